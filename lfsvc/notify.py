"""`notify:` of config.yaml → targets; the end of a job → a message; a message → what each preset sends. Pure."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from lfsvc import wording
from lfsvc.job import Job, State

QUEUE_EMPTY = "queue_empty"
TEST = "test"

# What `on` may name.
EVENTS = (State.SUCCEEDED.value, State.FAILED.value, State.KILLED.value, State.INTERRUPTED.value, QUEUE_EMPTY)
# What one wants to be told at night: what went wrong by itself, and that the machine is idle.
DEFAULT_EVENTS = (State.FAILED.value, State.INTERRUPTED.value, QUEUE_EMPTY)
# What is worth a louder tone.
URGENT = (State.FAILED.value, State.INTERRUPTED.value)

MARKS = {"succeeded": "✓", "failed": "✗", "killed": "■", "interrupted": "✗", QUEUE_EMPTY: "○"}

KINDS = ("desktop", "command", "webhook")
# How many failed jobs the message of an empty queue names.
NAMED_JOBS = 10


@dataclass(frozen=True, kw_only=True)
class Target:
    """One entry of `notify:`. Neither its repr nor its `label` says what is secret, and an address is."""

    number: int
    kind: str
    on: frozenset[str]
    command: tuple[str, ...] = field(default=(), repr=False)
    url: str = field(default="", repr=False)
    preset: str = ""
    secret: str = field(default="", repr=False)
    token: str = field(default="", repr=False)

    @property
    def label(self) -> str:
        """How messages call it: `slack webhook at hooks.slack.com`."""
        if self.kind == "webhook":
            return f"{self.preset} webhook at {urlsplit(self.url).hostname}"
        return f"command {self.command[0]}" if self.kind == "command" else self.kind


@dataclass(frozen=True, kw_only=True)
class Message:
    """What is to be told. `job` is the job's dictionary with times as ISO 8601, {} where it is of no one job."""

    event: str
    title: str
    body: str
    host: str
    job: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def urgent(self) -> bool:
        """Whether it is worth a louder tone."""
        return self.event in URGENT

    @property
    def text(self) -> str:
        """Title and body."""
        return f"{self.title}\n{self.body}" if self.body else self.title

    @property
    def document(self) -> dict[str, Any]:
        """What the preset json sends."""
        rows = {"event": self.event, "title": self.title, "body": self.body, "host": self.host}
        return rows | ({"job": self.job} if self.job else {}) | ({"counts": self.counts} if self.counts else {})


@dataclass(frozen=True, kw_only=True, repr=False)
class Request:
    """An HTTP POST; its repr says nothing."""

    url: str
    headers: Mapping[str, str]
    body: bytes


def _same_url(target: Target, now: float) -> str:
    del now
    return target.url


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What a kind of server wants.

    Args:
        body: (target, message, text cut to `limit_bytes`, now in s) → the JSON that is sent.
        limit_bytes: of the text, in UTF-8.
        per_minute: how many messages it takes in a minute.
        error: the key of its JSON answer that is 0 where all is well; "" where the HTTP status says it all.
        busy: values of that key with which another try is worth it.
        keys: what an entry may hold besides.
        url: (target, now in s) → the address that is posted to.
    """

    body: Callable[[Target, Message, str, float], dict[str, Any]]
    limit_bytes: int
    per_minute: int
    error: str = ""
    busy: frozenset[int] = frozenset()
    keys: frozenset[str] = frozenset()
    url: Callable[[Target, float], str] = _same_url


# -- presets -----------------------------------------------------------------------------------------


def _json(target: Target, message: Message, text: str, now: float) -> dict[str, Any]:
    del target, text, now
    return message.document


def _slack(target: Target, message: Message, text: str, now: float) -> dict[str, Any]:
    del target, message, now
    return {"text": html.escape(text, quote=False)}


def _ntfy(target: Target, message: Message, text: str, now: float) -> dict[str, Any]:
    del text, now
    return {
        "topic": target.url.rstrip("/").rpartition("/")[2],
        "title": message.title,
        "message": cut(message.body or message.title, PRESETS["ntfy"].limit_bytes),
        "priority": 4 if message.urgent else 3,
    }


def _feishu(target: Target, message: Message, text: str, now: float) -> dict[str, Any]:
    del message
    body: dict[str, Any] = {"msg_type": "text", "content": {"text": text}}
    if target.secret:
        timestamp = str(int(now))
        # The string that others sign is the key here, and what is signed is empty.
        body |= {"timestamp": timestamp, "sign": signature(f"{timestamp}\n{target.secret}", "")}
    return body


def _robot(target: Target, message: Message, text: str, now: float) -> dict[str, Any]:
    del target, message, now
    return {"msgtype": "text", "text": {"content": text}}


def _dingtalk_url(target: Target, now: float) -> str:
    if not target.secret:
        return target.url
    from urllib.parse import urlencode

    timestamp = str(int(now * 1000))
    query = {"timestamp": timestamp, "sign": signature(target.secret, f"{timestamp}\n{target.secret}")}
    return f"{target.url}{'&' if '?' in target.url else '?'}{urlencode(query)}"


def _ntfy_url(target: Target, now: float) -> str:
    del now
    return target.url.rstrip("/").rpartition("/")[0] + "/"


def signature(key: str, text: str) -> str:
    """HMAC-SHA256 in Base64, as the robots of DingTalk and Feishu want it."""
    import base64
    import hashlib
    import hmac

    return base64.b64encode(hmac.new(key.encode(), text.encode(), hashlib.sha256).digest()).decode()


PRESETS: dict[str, Preset] = {
    "json": Preset(body=_json, limit_bytes=1 << 20, per_minute=600, keys=frozenset({"token"})),
    # Also Mattermost, Rocket.Chat and Discord's /slack. At best 4,000 characters, one message a second.
    # Source: docs.slack.dev, chat.postMessage (truncating), Rate limits (posting messages).
    "slack": Preset(body=_slack, limit_bytes=4000, per_minute=60),
    # 4,096 bytes, else the message becomes an attachment; one request in 5 s after a burst of 60.
    # Source: docs.ntfy.sh/publish (publish as JSON, limitations).
    "ntfy": Preset(body=_ntfy, url=_ntfy_url, limit_bytes=4096, per_minute=12, keys=frozenset({"token"})),
    # A request of 20 KB, in which JSON may double the text; 100 a minute. 11232: its servers are busy.
    # Source: open.feishu.cn/document/ukTMukTMukTM/ucTM5YjL3ETO24yNxkjN (custom bot usage guide).
    "feishu": Preset(
        body=_feishu, limit_bytes=9000, per_minute=100, error="code", busy=frozenset({11232}),
        keys=frozenset({"secret"}),
    ),
    # 20 a minute, else it takes none for ten minutes. -1: its servers are busy.
    # Source: open.dingtalk.com/document/robots/custom-robot-access, customize-robot-security-settings.
    "dingtalk": Preset(
        body=_robot, url=_dingtalk_url, limit_bytes=9000, per_minute=20, error="errcode", busy=frozenset({-1}),
        keys=frozenset({"secret"}),
    ),
    # 2,048 bytes, 20 a minute. -1: its servers are busy; 45009: too many.
    # Source: developer.work.weixin.qq.com/document/path/91770 (group robot), path/90313 (error codes).
    "wecom": Preset(body=_robot, limit_bytes=2048, per_minute=20, error="errcode", busy=frozenset({-1, 45009})),
}  # fmt: skip


def request_of(target: Target, message: Message, now: float) -> Request:
    """What is posted to a webhook. `now`: seconds since the epoch, which signatures carry."""
    preset = PRESETS[target.preset]
    body = preset.body(target, message, cut(message.text, preset.limit_bytes), now)
    headers = {"Content-Type": "application/json; charset=utf-8", "User-Agent": "lfsvc"}
    if target.token:
        headers["Authorization"] = f"Bearer {target.token}"
    return Request(url=preset.url(target, now), headers=headers, body=encode(body))


def encode(value: object) -> bytes:
    """JSON in UTF-8; a lone surrogate of a file's name goes as its escape."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")


def cut(text: str, limit_bytes: int) -> str:
    """The text, no longer than that in UTF-8, with … where something is left out."""
    data = text.encode("utf-8", "backslashreplace")
    if len(data) <= limit_bytes:
        return text
    return data[: limit_bytes - len("…".encode())].decode("utf-8", "ignore") + "…"


# -- settings ----------------------------------------------------------------------------------------


def parse_notify(value: object) -> tuple[Target, ...]:
    """Read the value of `notify:`.

    Raises:
        ValueError: a clause such as `notify: entry 2: preset must be one of …`, without anything secret.
    """
    if not isinstance(value, list):
        raise ValueError("notify must be a list of entries, each with desktop, command or webhook")
    targets = []
    for number, entry in enumerate(value, start=1):
        try:
            targets.append(_target(number, entry))
        except ValueError as error:
            raise ValueError(f"notify: entry {number}: {error}") from None
    return tuple(targets)


def _target(number: int, entry: object) -> Target:
    if not isinstance(entry, dict):
        raise ValueError("it must hold `key: value` lines")
    # YAML 1.1 reads the bare word `on` as true.
    given: dict[Any, Any] = {"on" if key is True else key: value for key, value in entry.items()}
    kinds = [kind for kind in KINDS if kind in given]
    if len(kinds) != 1:
        raise ValueError(f"it must have one of desktop, command, webhook, and has {' and '.join(kinds) or 'none'}")
    kind = kinds[0]
    if kind == "desktop" and given[kind] is not True:
        # Not the value: an address in the wrong place is a secret all the same.
        raise ValueError("desktop must be true; to turn it off, take the entry away")
    preset = given.get("preset", "json") if kind == "webhook" else ""
    if preset and (not isinstance(preset, str) or preset not in PRESETS):
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}")
    secrets = PRESETS[preset].keys if preset else frozenset()
    known = [kind, "on", *(["preset", *sorted(secrets)] if preset else [])]
    for key in given:
        if key not in known:
            of = f"a {preset} webhook" if preset else f"a {kind} entry"
            named = f"the key {key!r}" if isinstance(key, str) and key.isidentifier() else "a key"
            raise ValueError(f"{named} is unknown; {of} has {', '.join(known)}")
    for key in secrets & given.keys():
        if not _is_word(given[key]):
            raise ValueError(f"{key} must be text without blanks")
    return Target(
        number=number,
        kind=kind,
        on=_events(given.get("on", list(DEFAULT_EVENTS))),
        preset=preset,
        command=_command(given[kind]) if kind == "command" else (),
        url=_address(given[kind], preset) if kind == "webhook" else "",
        **{key: given[key] for key in secrets & given.keys()},
    )


def _is_word(value: object) -> bool:
    return isinstance(value, str) and value.isascii() and value.isprintable() and " " not in value and value != ""


def _events(value: object) -> frozenset[str]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(word, str) and word in EVENTS for word in values):
        raise ValueError(f"on must be one or more of {', '.join(EVENTS)}, not {value!r}")
    return frozenset(values)


def _command(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(word, str) for word in value):
        raise ValueError("command must be a list of words, the program first, with numbers in quotes")
    if not value[0] or any("\0" in word for word in value):
        raise ValueError("command must name a program")
    return tuple(value)


def _address(value: object, preset: str) -> str:
    """A webhook's address. What is wrong with it is said without it: whoever knows it can post there."""
    wanted = "webhook must be an address such as https://host/path"
    if not isinstance(value, str) or not _is_word(value):
        raise ValueError(f"{wanted}, without blanks, in ASCII")
    try:
        parts = urlsplit(value)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fine = False
    if not fine:
        raise ValueError(wanted)
    if "@" in parts.netloc:
        raise ValueError("webhook must not hold a user and a password; ntfy and json take a token")
    topic = parts.path.rstrip("/").rpartition("/")[2]
    if preset == "ntfy" and not (0 < len(topic) <= 64 and topic.replace("-", "_").replace("_", "a").isalnum()):
        raise ValueError("webhook must end in the topic, such as https://ntfy.sh/my_topic")
    return value


# -- messages ----------------------------------------------------------------------------------------


def job_message(job: Job, dictionary: Mapping[str, Any], host: str) -> Message:
    """The message of a job's end. `dictionary`: the job as the bus gives it, with times as ISO 8601."""
    state = job.state.value
    return Message(
        event=state,
        title=_clean(f"{MARKS.get(state, '·')} job {job.id} {job.title} {state}", lines=False),
        body=_clean("\n".join([*_facts(job), f"on {host}"])),
        host=host,
        job=dictionary,
    )


def _facts(job: Job) -> list[str]:
    """What is known of a job that has ended, the most wanted first."""
    facts = []
    if job.failure:
        facts.append(job.failure)
    elif job.failed_step:
        facts.append(f"The step {job.failed_step} ended with exit status {job.exit_status}.")
    if job.started_at:
        # Where it came to matters only where it did not come to its end; then nothing is left either.
        unknown = {"remaining_time"} | ({"percentage", "total_steps"} if job.state is State.SUCCEEDED else set())
        progress = wording.progress_text({key: value for key, value in job.progress.items() if key not in unknown})
        ran = f"ran {wording.duration((job.finished_at - job.started_at) / 1_000_000)}"
        facts.append(", ".join(filter(None, (ran, progress))))
    if job.state is State.SUCCEEDED:
        facts += [f"model: {job.model}"] if job.model else [f"output: {job.output_dir}"] if job.output_dir else []
    elif job.log:
        facts.append(f"log: {job.log}")
    return facts


class Tally:
    """How the jobs ended since the queue was last empty."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._named: list[str] = []

    def add(self, job: Job) -> None:
        """Count a job that has ended. One that was cancelled never ran: whoever cancelled it knows."""
        state = job.state.value
        if state in EVENTS:
            self.counts[state] = self.counts.get(state, 0) + 1
        if state in URGENT and len(self._named) < NAMED_JOBS:
            self._named.append(f"job {job.id} {job.title} {state}")

    def message(self, host: str) -> Message:
        """The message of an empty queue."""
        counts = {state: self.counts[state] for state in EVENTS if state in self.counts}
        told = ", ".join(f"{count} {state}" for state, count in counts.items())
        more = sum(counts.get(state, 0) for state in URGENT) - len(self._named)
        lines = [*self._named, *([f"and {more} more"] if more else []), f"on {host}"]
        title = f"{MARKS[QUEUE_EMPTY]} the queue is empty: {told}"
        return Message(event=QUEUE_EMPTY, title=title, body=_clean("\n".join(lines)), host=host, counts=counts)


def test_message(target: Target, host: str) -> Message:
    """The message of `lfsvc notify test`."""
    return Message(
        event=TEST,
        title="lfsvc: a test message",
        body=_clean(f"Entry {target.number} of notify works. 通知 ✓\non {host}"),
        host=host,
    )


def _clean(text: str, *, lines: bool = True) -> str:
    """Without control characters and halves of surrogates, which not every reader takes."""
    kept = "\n\t" if lines else ""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(c if (c >= " " and not "\x7f" <= c < "\xa0") or c in kept else " " for c in text)
