"""One try to deliver one message: an HTTP POST, or a command. Blocks, so it is for a thread or the client.

What is costly to import is imported when something is delivered.
"""

from __future__ import annotations

import html
import json
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lfsvc import processes
from lfsvc.job import State
from lfsvc.notify import PRESETS, Message, Target, encode, request_of

if TYPE_CHECKING:
    from http.client import HTTPResponse
    from urllib.error import HTTPError

HTTP_SECONDS = 10.0
COMMAND_SECONDS = 60.0
DESKTOP_SECONDS = 10.0
# Of an answer or of a command's output: enough for a reason.
KEPT_BYTES = 4096
# A server that asks to be left alone for longer gets no further try.
LONGEST_WAIT_SECONDS = 600.0

NOTIFICATIONS = "org.freedesktop.Notifications"
NOTIFICATIONS_PATH = "/org/freedesktop/Notifications"
NO_DAEMON = "no notification daemon is on the session bus"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a try: `problem` is "" where it was delivered; `again`: another try may help.

    `wait_seconds`: how long the server asked to be left alone.
    """

    problem: str = ""
    again: bool = False
    wait_seconds: float = 0.0


# -- HTTP --------------------------------------------------------------------------------------------


def post(target: Target, message: Message, environment: Mapping[str, str], *, timeout: float = HTTP_SECONDS) -> Outcome:
    """Post a message to a webhook. Proxies are those of `environment`, as urllib reads them.

    Redirects are not followed: urllib would turn the POST into a GET, whose 200 means nothing.
    """
    import http.client
    import ssl
    import urllib.error
    import urllib.request

    class NoRedirect(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *args: Any, **kwargs: Any) -> None:
            del args, kwargs

    request = request_of(target, message, time.time())
    proxies = _proxies(environment, urlsplit(request.url).netloc)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies), NoRedirect)
    posted = urllib.request.Request(request.url, data=request.body, headers=dict(request.headers), method="POST")  # noqa: S310 - parse_notify lets only http and https in
    try:
        with opener.open(posted, timeout=timeout) as response:
            problem, again = problem_of(target, _read(response, timeout))
            outcome = Outcome(problem=problem, again=again)
    except urllib.error.HTTPError as error:
        with error:
            try:
                answer = _read(error, timeout)
            except (OSError, http.client.HTTPException):
                # The status has come; what it says of itself has not.
                answer = b""
            outcome = _http_problem(error.code, error.headers.get("Retry-After") or "", answer)
    except (OSError, http.client.HTTPException) as error:
        # URLError wraps what happened.
        cause = getattr(error, "reason", None) or error
        outcome = Outcome(problem=_network_problem(cause, timeout), again=not isinstance(cause, ssl.CertificateError))
    except Exception as error:
        # Whatever a strange server provokes is a reason, not the end of a thread. Its text may hold an address.
        outcome = Outcome(problem=type(error).__name__)
    return Outcome(
        problem=without_secrets(target, outcome.problem), again=outcome.again, wait_seconds=outcome.wait_seconds
    )


def _proxies(environment: Mapping[str, str], host: str) -> dict[str, str]:
    """The proxies for a host: `https_proxy` and the like, in small letters rather than in capitals."""
    import urllib.request

    # Its type stubs do not know all of it.
    module: Any = urllib.request
    found: dict[str, str] = {}
    for name, value in sorted(environment.items()):
        # In ASCII capitals come first, so the small ones win.
        if name.lower().endswith("_proxy"):
            found[name.lower().removesuffix("_proxy")] = value
    found = {scheme: value for scheme, value in found.items() if value}
    if module.proxy_bypass_environment(host, found):
        return {}
    found.pop("no", None)
    return found


def _read(response: HTTPResponse | HTTPError, timeout: float) -> bytes:
    """The beginning of an answer; one that trickles is cut off."""
    deadline = time.monotonic() + timeout
    data = b""
    while len(data) < KEPT_BYTES and time.monotonic() < deadline:
        piece = response.read1(KEPT_BYTES)
        if not piece:
            break
        data += piece
    return data


def _http_problem(code: int, wanted_pause: str, answer: bytes) -> Outcome:
    if 300 <= code < 400:
        return Outcome(problem=f"HTTP {code}: it has moved; put the new address into config.yaml")
    text = shown(answer)
    problem = f"HTTP {code}" + (f": {text}" if text else "")
    if code not in (408, 425, 429) and code < 500:
        return Outcome(problem=problem)
    wait = retry_after(wanted_pause, time.time())
    return Outcome(problem=problem, again=wait <= LONGEST_WAIT_SECONDS, wait_seconds=wait)


def retry_after(value: str, now: float) -> float:
    """How many seconds a Retry-After header asks for; 0 where it says nothing. Source: RFC 9110, 10.2.3."""
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    from email.utils import parsedate_to_datetime

    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, TypeError):
        return 0.0


def _network_problem(cause: object, timeout: float) -> str:
    if isinstance(cause, TimeoutError):
        return f"no answer within {timeout:g} s"
    if verify_message := getattr(cause, "verify_message", ""):
        return f"its certificate is not trusted: {verify_message}"
    return shown((getattr(cause, "strerror", "") or str(cause) or repr(cause)).encode("utf-8", "replace"))


def problem_of(target: Target, answer: bytes) -> tuple[str, bool]:
    """What a 200 complains of all the same, and whether another try is worth it; "" where all is well."""
    preset = PRESETS[target.preset]
    if not preset.error:
        return "", False
    try:
        document = json.loads(answer)
        # Feishu's first robots answer with StatusCode alone.
        code = document[preset.error] if preset.error in document else document["StatusCode"]
    except (ValueError, TypeError, KeyError):
        return f"answered what no {target.preset} robot does: {shown(answer)}", False
    if code == 0:
        return "", False
    text = document.get("errmsg") or document.get("msg") or ""
    return f"{preset.error} {code}: {shown(str(text).encode())}", code in preset.busy


def shown(data: bytes) -> str:
    """What a server or a command said, as a part of one line."""
    return " ".join("".join(c if c.isprintable() else " " for c in data.decode("utf-8", "replace")).split())[:200]


def without_secrets(target: Target, text: str) -> str:
    """A text that may quote the address or a secret, without them."""
    parts = urlsplit(target.url)
    words = [target.secret, target.token, *parts.path.split("/"), *parts.query.replace("=", "&").split("&")]
    for word in sorted(words, key=len, reverse=True):
        # Shorter ones are words of the interface: /send, ?key=.
        if len(word) >= 8 or (word and word in (target.secret, target.token)):
            text = text.replace(word, "***")
    return text


# -- commands ----------------------------------------------------------------------------------------


class Children:
    """Children of this process that are no jobs, for whoever takes in or ends all others.

    The process launcher reaps every child and ends what it takes for a job's orphan. Both go through
    here, under one lock with the start: a command neither loses its exit status nor is ended.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pids: set[int] = set()
        self._statuses: dict[int, int] = {}

    def start(self, start: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        """Start a child by `start`; whatever that raises."""
        with self.lock:
            child = start()
            self.pids.add(child.pid)
        return child

    def reap(self, pid: int) -> None:
        """Take in a child that has ended; the status of one of these is kept."""
        with self.lock:
            try:
                ended, status = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                return
            if ended and pid in self.pids:
                self._statuses[pid] = os.waitstatus_to_exitcode(status)

    def finish(self, child: subprocess.Popen[bytes]) -> int:
        """The exit status of a child that has ended, or is being killed; negative for a signal."""
        try:
            _, status = os.waitpid(child.pid, 0)
            code = os.waitstatus_to_exitcode(status)
        except ChildProcessError:
            code = 0
        with self.lock:
            self.pids.discard(child.pid)
            child.returncode = self._statuses.pop(child.pid, code)
        return child.returncode


class Command:
    """A command that is told of a message. `run` blocks; `kill` is for another thread."""

    def __init__(self, children: Children) -> None:
        self._children = children
        self._pidfd = -1
        self._pid = 0
        self._killed = False
        self._lock = threading.Lock()

    def run(
        self, target: Target, message: Message, environment: Mapping[str, str], *, timeout: float = COMMAND_SECONDS
    ) -> Outcome:
        """Run it, with the job as environment and as JSON on stdin. It is never tried twice."""
        document = os.memfd_create("lfsvc-notification")
        os.write(document, encode(message.document if not message.job else message.job) + b"\n")
        os.lseek(document, 0, os.SEEK_SET)
        try:
            child = self._children.start(
                lambda: subprocess.Popen(
                    target.command,
                    stdin=document,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env={**environment, **environment_of(message)},
                    start_new_session=True,
                )
            )
        except (OSError, ValueError) as error:
            return Outcome(problem=f"it cannot be run: {getattr(error, 'strerror', None) or error}")
        finally:
            os.close(document)
        output, in_time = self._watch(child, timeout)
        code = self._children.finish(child)
        if not in_time:
            return Outcome(problem=f"it was killed, with its children, after {timeout:g} s")
        if code == 0:
            return Outcome()
        lines = output.decode("utf-8", "replace").strip().splitlines()
        end = f"was killed by {processes.signal_name(-code)}" if code < 0 else f"ended with exit status {code}"
        return Outcome(problem=f"it {end}" + (f": {shown(lines[-1].encode())}" if lines else ""))

    def _watch(self, child: subprocess.Popen[bytes], timeout: float) -> tuple[bytes, bool]:
        """Read what it prints until it ends, not until its pipe does: what it left behind may hold that.

        Gives the last of the output, and whether it ended in time. It is not reaped here, so that its
        PID stays its own.
        """
        assert child.stdout is not None
        with child.stdout as pipe:
            os.set_blocking(pipe.fileno(), False)
            try:
                pidfd = os.pidfd_open(child.pid)
            except ProcessLookupError:
                # Somebody has reaped it already; what it printed is in the pipe.
                return (pipe.read(1 << 20) or b"")[-KEPT_BYTES:], True
            with self._lock:
                self._pidfd, self._pid = pidfd, child.pid
                if self._killed:
                    self._kill()
            try:
                return self._read(pipe.fileno(), pidfd, time.monotonic() + timeout)
            finally:
                with self._lock:
                    self._pidfd, self._pid = -1, 0
                os.close(pidfd)

    def _read(self, pipe: int, pidfd: int, deadline: float) -> tuple[bytes, bool]:
        output = b""
        waiting = [pipe, pidfd]
        while True:
            ready = select.select(waiting, [], [], max(0.0, deadline - time.monotonic()))[0]
            if not ready:
                with self._lock:
                    self._kill()
                select.select([pidfd], [], [])
                return output, False
            if pipe in ready:
                try:
                    piece = os.read(pipe, 65536)
                except BlockingIOError:
                    piece = b""
                if not piece:
                    waiting = [pidfd]
                output = (output + piece)[-KEPT_BYTES:]
            elif pidfd in ready:
                return output, True

    def kill(self) -> None:
        """End the command that runs, and any that is begun from now on, with all their children."""
        with self._lock:
            self._killed = True
            self._kill()

    def _kill(self) -> None:
        if self._pidfd < 0:
            return
        # Found before the parent is gone: what has a session of its own is no longer below it then.
        below = processes.descendants(self._pid)
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            os.killpg(self._pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        for process in below:
            process.signal(signal.SIGKILL)


def environment_of(message: Message) -> dict[str, str]:
    """What a command finds in its environment, besides the service's own."""
    rows: dict[str, Any] = {"EVENT": message.event, "TITLE": message.title, "BODY": message.body, "HOST": message.host}
    keys = ("id", "state", "name", "command", "task", "path", "exit_status", "failed_step", "failure", "output_dir",
            "log", "model")  # fmt: skip
    rows |= {f"JOB_{key.upper()}": message.job.get(key, "") for key in keys if message.job}
    # What it leaves behind is no orphan of a job.
    rows["NOTIFICATION"] = 1
    rows |= {f"COUNT_{state.upper()}": count for state, count in message.counts.items()}
    return {f"LFSVC_{name}": str(value).replace("\0", "\\x00") for name, value in rows.items()}


# -- desktop -----------------------------------------------------------------------------------------


def desktop_arguments(message: Message, *, markup: bool) -> tuple[str, int, str, str, str, int]:
    """Application, replaced id, icon, summary, body and urgency for a notification daemon.

    `markup`: the daemon reads the body as markup. Source: Desktop Notifications Specification 1.2.
    """
    body = message.body
    if markup:
        body = html.escape(body, quote=False)
    return "lfsvc", 0, "", message.title, body, 2 if message.event == State.FAILED.value else 1
