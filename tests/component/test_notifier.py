"""Delivery to real HTTP servers, real commands and a real bus."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from dbus_next.message import Message as BusMessage

from lfsvc import processes
from lfsvc.delivery import NO_DAEMON, NOTIFICATIONS, Children, Command, Outcome, post
from lfsvc.job import Job, State
from lfsvc.notify import PRESETS, Message, Target, parse_notify
from lfsvc.service.bus import Bus
from lfsvc.service.notifier import MOST_WAITING, Notifier, Outbox
from lfsvc.task import parse

SECRET = "0123456789abcdef"
QUICK = (0.01, 0.01)
# Seconds that nobody else sleeps.
MARK = 10_000_000 + os.getpid()
FAILED = Message(event="failed", title="✗ job 42 train 千问 failed", body="Out of memory.\non h", host="h")


@dataclass
class Answer:
    """What the server says. `wait`: not before this is set."""

    status: int = 200
    body: str = "ok"
    headers: Mapping[str, str] = field(default_factory=dict)
    wait: threading.Event | None = None


class Server(ThreadingHTTPServer):
    """Answers in the given order, the last one for ever; `requests` has what came."""

    daemon_threads = True

    def __init__(self, *answers: Answer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = list(answers) or [Answer()]
        self.requests: queue.Queue[tuple[str, Mapping[str, str], bytes]] = queue.Queue()
        self.port = int(self.server_address[1])
        self.scheme = "http"
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})

    def url(self, path: str = f"/hook/{SECRET}") -> str:
        return f"{self.scheme}://localhost:{self.port}{path}"

    async def request(self) -> tuple[str, Mapping[str, str], bytes]:
        return await asyncio.to_thread(self.requests.get, timeout=20)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what some tests are about."""

    def __enter__(self) -> Server:  # noqa: PYI034 - Self is not in Python 3.10
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        for answer in self.answers:
            if answer.wait is not None:
                answer.wait.set()
        self.shutdown()
        self.thread.join()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.put((self.path, dict(self.headers), body))
        answers = self.server.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if answer.wait is not None:
            answer.wait.wait(60)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body.encode())

    def log_message(self, *args: Any) -> None:
        pass


class Said:
    """The service's log: what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.fields: list[Mapping[str, str]] = []
        self._more = asyncio.Event()

    def write(self, message: str, priority: int = 6, fields: Mapping[str, str] | None = None) -> None:
        self.lines.append(message)
        self.fields.append(fields or {})
        self._more.set()

    async def line(self) -> str:
        """Wait for the next line."""
        await asyncio.wait_for(self._more.wait(), 20)
        self._more.clear()
        return self.lines[-1]


def job(state: State = State.FAILED, job_id: int = 42) -> Job:
    return Job(
        id=job_id, task=parse("/a/x.yaml"), text="/a/x.yaml", working_directory="/a", name="千问", state=state,
        started_at=1_000_000, finished_at=61_000_000, exit_status=1, failure="Out of memory.",
        progress={"loss": float("nan")},
    )  # fmt: skip


@contextlib.asynccontextmanager
async def notifying(
    said: Said, *entries: dict[str, Any], bus: Any = None, idle: Callable[[], bool] = lambda: False, **more: Any
) -> AsyncIterator[Notifier]:
    notifier = Notifier(
        targets=parse_notify(list(entries)), bus=bus, log=said, idle=idle, children=Children(),  # type: ignore[arg-type]  # it writes, which is all that is asked
        **{"environment": dict, "delays": QUICK, **more},
    )  # fmt: skip
    yield notifier
    await notifier.close()


def one(**entry: Any) -> Target:
    (target,) = parse_notify([entry])
    return target


# -- webhooks ----------------------------------------------------------------------------------------


def test_a_server_that_fails_twice_gets_the_message_at_the_third_try() -> None:
    async def main() -> None:
        said = Said()
        with Server(Answer(500), Answer(503), Answer()) as server:
            async with notifying(said, {"webhook": server.url()}) as notifier:
                notifier.finished(job())
                bodies = [json.loads((await server.request())[2]) for _ in range(3)]
        assert bodies[0] == bodies[1] == bodies[2]
        assert bodies[0]["title"] == "✗ job 42 train 千问 failed"
        assert bodies[0]["job"]["finished_at"] == "1970-01-01T00:01:01.000000Z"
        assert bodies[0]["job"]["failure"] == "Out of memory."
        # JSON has no NaN.
        assert bodies[0]["job"]["progress"] == {"loss": None}
        assert said.lines == []

    asyncio.run(main())


def test_what_cannot_be_delivered_is_one_line_with_the_host_alone() -> None:
    async def main() -> None:
        said = Said()
        with Server(Answer(404, f"no hook {SECRET}")) as server:
            async with notifying(said, {"desktop": True, "on": "killed"}, {"webhook": server.url()}) as notifier:
                notifier.finished(job())
                assert await said.line() == (
                    "Entry 2 of notify (json webhook at localhost) was not told '✗ job 42 train 千问 failed': "
                    "HTTP 404: no hook ***"
                )
            assert server.requests.qsize() == 1
        assert said.fields[0]["JOB_ID"] == "42" and len(said.lines) == 1

    asyncio.run(main())


def test_a_server_that_stays_away_is_given_up() -> None:
    async def main() -> None:
        said = Said()
        with Server() as server:
            url = server.url()
        async with notifying(said, {"webhook": url, "preset": "slack"}) as notifier:
            notifier.finished(job())
            assert (await said.line()).endswith(": Connection refused (after 3 tries)")

    asyncio.run(main())


def test_a_server_that_is_down_does_not_delay_another() -> None:
    async def main() -> None:
        said = Said()
        with Server(Answer(502)) as down, Server() as up:
            async with notifying(said, {"webhook": down.url()}, {"webhook": up.url()}, delays=(3600,)) as notifier:
                notifier.finished(job())
                await up.request()
                assert said.lines == []
        assert said.lines == [
            "Entry 1 of notify (json webhook at localhost) was not told '✗ job 42 train 千问 failed': "
            "the scheduler stops"
        ]

    asyncio.run(main())


def test_the_end_does_not_wait_for_a_server_that_does_not_answer() -> None:
    async def main() -> None:
        said = Said()
        with Server(Answer(wait=threading.Event())) as server:
            async with notifying(said, {"webhook": server.url()}) as notifier:
                notifier.finished(job())
                notifier.finished(job(job_id=43))
                await server.request()
            assert [line.rpartition(": ")[2] for line in said.lines] == ["the scheduler stops"] * 2
            assert server.requests.qsize() == 0

    asyncio.run(main())


def test_what_is_due_at_the_end_is_still_delivered() -> None:
    async def main() -> None:
        with Server() as server:
            async with notifying(Said(), {"webhook": server.url()}) as notifier:
                notifier.finished(job())
            assert server.requests.qsize() == 1

    asyncio.run(main())


def test_a_server_that_wants_to_be_left_alone_is() -> None:
    with Server(Answer(429, headers={"Retry-After": "7"}), Answer(503, headers={"Retry-After": "3600"})) as server:
        target = one(webhook=server.url(), preset="slack")
        assert post(target, FAILED, {}) == Outcome(problem="HTTP 429: ok", again=True, wait_seconds=7)
        assert post(target, FAILED, {}) == Outcome(problem="HTTP 503: ok", again=False, wait_seconds=3600)
    tries: list[float] = []
    done = threading.Event()

    def attempt(target: Target, message: Message) -> Outcome:
        tries.append(time.monotonic())
        if len(tries) == 2:
            done.set()
            return Outcome()
        return Outcome(problem="busy", again=True, wait_seconds=0.4)

    outbox = Outbox(attempt, lambda *told: pytest.fail(str(told)), (0.001,))
    outbox.put(target, FAILED)
    assert done.wait(20)
    outbox.close(20)
    assert tries[1] - tries[0] >= 0.4


def test_a_200_that_complains_is_not_taken_for_success() -> None:
    async def main() -> None:
        said = Said()
        answer = Answer(body='{"code":19021,"data":{},"msg":"sign match fail or timestamp is not within one hour"}')
        with Server(answer) as server:
            entry = {"webhook": server.url(), "preset": "feishu", "secret": "wrong"}
            async with notifying(said, entry) as notifier:
                notifier.finished(job())
                assert (await said.line()).endswith(": code 19021: sign match fail or timestamp is not within one hour")
            assert server.requests.qsize() == 1

    asyncio.run(main())


def test_a_server_that_says_it_is_busy_in_a_200_is_tried_again() -> None:
    with Server(Answer(body='{"errcode":45009,"errmsg":"api freq out of limit"}')) as server:
        outcome = post(one(webhook=server.url(), preset="wecom"), FAILED, {})
    assert outcome == Outcome(problem="errcode 45009: api freq out of limit", again=True)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_arrives_as_json(preset: str) -> None:
    answer = Answer(body=json.dumps({"code": 0, "errcode": 0}))
    with Server(answer) as server:
        keys = dict.fromkeys(PRESETS[preset].keys, "tk_x")
        assert post(one(webhook=server.url("/topic"), preset=preset, **keys), FAILED, {}) == Outcome()
        path, headers, body = server.requests.get(timeout=20)
    assert path.partition("?")[0] == ("/" if preset == "ntfy" else "/topic")
    assert headers["Content-Type"] == "application/json; charset=utf-8"
    assert headers.get("Authorization") == ("Bearer tk_x" if "token" in keys else None)
    assert "千问" in json.dumps(json.loads(body), ensure_ascii=False)


def test_a_redirect_is_not_followed_into_a_get_that_means_nothing() -> None:
    with Server(Answer(302, headers={"Location": "/elsewhere"})) as server:
        outcome = post(one(webhook=server.url()), FAILED, {})
        assert server.requests.qsize() == 1
    assert outcome == Outcome(problem="HTTP 302: it has moved; put the new address into config.yaml")


def test_a_server_that_does_not_answer_in_time_is_tried_again() -> None:
    with Server(Answer(wait=threading.Event())) as server:
        outcome = post(one(webhook=server.url()), FAILED, {}, timeout=0.2)
    assert outcome == Outcome(problem="no answer within 0.2 s", again=True)


def test_a_server_that_no_one_vouches_for_gets_nothing(tmp_path: Path) -> None:
    key, certificate = str(tmp_path / "key"), str(tmp_path / "certificate")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days",
         "2", "-subj", "/CN=localhost", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    with Server() as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.scheme = "https"
        outcome = post(one(webhook=server.url()), FAILED, {})
        assert server.requests.qsize() == 0
    assert outcome.problem.startswith("its certificate is not trusted: self") and not outcome.again


def test_proxies_are_those_of_the_jobs_environment() -> None:
    async def main() -> None:
        with Server() as proxy:
            environment = {"HTTP_PROXY": "http://127.0.0.1:1", "http_proxy": proxy.url(""), "no_proxy": ".invalid"}
            entry = {"webhook": f"http://nowhere.example/{SECRET}"}
            async with notifying(Said(), entry, environment=lambda: environment) as notifier:
                notifier.finished(job())
                assert (await proxy.request())[0] == f"http://nowhere.example/{SECRET}"
            direct = one(webhook=f"http://nowhere.invalid/{SECRET}")
            assert post(direct, FAILED, environment).again
            assert proxy.requests.qsize() == 0

    asyncio.run(main())


def test_a_group_robot_is_not_asked_more_often_than_it_allows() -> None:
    target = one(webhook="https://h.example/x", preset="wecom")
    told: queue.Queue[Message] = queue.Queue()
    left: list[Message] = []

    def attempt(target: Target, message: Message) -> Outcome:
        told.put(message)
        return Outcome()

    outbox = Outbox(attempt, lambda target, message, problem: left.append(message), QUICK)
    for _ in range(PRESETS["wecom"].per_minute + 1):
        outbox.put(target, FAILED)
    for _ in range(PRESETS["wecom"].per_minute):
        told.get(timeout=20)
    outbox.close(20)
    assert told.empty() and left == [FAILED]


def test_where_too_many_wait_the_oldest_gives_way() -> None:
    target = one(webhook="https://h.example/x")
    begun, go_on = threading.Event(), threading.Event()
    left: list[tuple[str, str]] = []

    def attempt(target: Target, message: Message) -> Outcome:
        begun.set()
        go_on.wait(20)
        return Outcome()

    outbox = Outbox(attempt, lambda target, message, problem: left.append((message.title, problem)), QUICK)
    messages = [Message(event="failed", title=str(n), body="", host="h") for n in range(MOST_WAITING + 2)]
    outbox.put(target, messages[0])
    assert begun.wait(20)
    for message in messages[1:]:
        outbox.put(target, message)
    assert left == [("1", f"more than {MOST_WAITING} messages wait")]
    go_on.set()
    outbox.close(20)


# -- which events ------------------------------------------------------------------------------------


def test_each_target_is_told_of_its_events_and_of_the_empty_queue_once() -> None:
    async def main() -> None:
        idle = False
        with Server() as server:
            entry = {"webhook": server.url(), "on": ["succeeded", "queue_empty"]}
            async with notifying(Said(), entry, idle=lambda: idle) as notifier:
                idle = True
                # At the start nothing has ended, and a job that was cancelled is no news.
                notifier.changed()
                notifier.finished(job(State.CANCELLED))
                notifier.changed()
                idle = False
                notifier.finished(job(State.FAILED))
                notifier.changed()
                notifier.finished(job(State.SUCCEEDED))
                idle = True
                notifier.changed()
                notifier.changed()
                titles = [json.loads((await server.request())[2])["title"] for _ in range(2)]
                assert titles == [
                    "✓ job 42 train 千问 succeeded",
                    "○ the queue is empty: 1 succeeded, 1 failed",
                ]
                # As a reload does.
                notifier.targets = ()
                notifier.finished(job(State.SUCCEEDED))
            assert server.requests.qsize() == 0

    asyncio.run(main())


# -- commands ----------------------------------------------------------------------------------------


def wait_for_sleeping(seconds: str, count: int) -> list[processes.Process]:
    """Wait until there are so many processes `sleep seconds`: of their start and end nobody is told."""
    deadline = time.monotonic() + 20
    while True:
        words = [b"sleep", seconds.encode()]
        found = [process for process in processes.everyone() if processes.arguments(process.pid) == words]
        if len(found) == count:
            return found
        assert time.monotonic() < deadline, found


def python(code: str) -> dict[str, Any]:
    return {"command": [sys.executable, "-I", "-c", code]}


def test_a_command_has_the_job_in_its_environment_and_as_json(tmp_path: Path) -> None:
    async def main() -> None:
        entry = python(
            "import json, os, sys; job = json.load(sys.stdin); e = os.environ;"
            f"open({str(tmp_path / 'new')!r}, 'w').write(json.dumps([job, e['LFSVC_JOB_ID'], e['LFSVC_JOB_NAME'],"
            " e['LFSVC_JOB_STATE'], sys.argv[1:], os.getsid(0) == os.getpid(), 'NOTIFY_SOCKET' in e]));"
            f"os.rename({str(tmp_path / 'new')!r}, {str(tmp_path / 'told')!r})"
        )
        entry["command"] += ["$HOME", "a b"]
        os.environ["NOTIFY_SOCKET"] = "/nowhere"
        try:
            async with notifying(Said(), entry) as notifier:
                notifier.finished(job())
        finally:
            del os.environ["NOTIFY_SOCKET"]

    asyncio.run(main())
    told, *rest = json.loads((tmp_path / "told").read_text())
    assert rest == ["42", "千问", "failed", ["$HOME", "a b"], True, False]
    assert told["id"] == 42 and told["started_at"] == "1970-01-01T00:00:01.000000Z"
    assert told["failure"] == "Out of memory." and "environment" not in told


def test_a_command_that_fails_is_said_with_its_last_line_and_not_tried_again() -> None:
    async def main() -> None:
        said = Said()
        entry = python("import sys; print('much', flush=True); print('no such\\tuser', file=sys.stderr); sys.exit(3)")
        async with notifying(said, entry) as notifier:
            notifier.finished(job())
            assert (await said.line()).endswith(" failed': it ended with exit status 3: no such user")

    asyncio.run(main())


def test_a_command_that_cannot_be_run_is_said() -> None:
    outcome = Command(Children()).run(one(command=["/nowhere/mail"]), FAILED, {})
    assert outcome == Outcome(problem="it cannot be run: No such file or directory")


def test_a_command_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    target = one(command=["/bin/sh", "-c", f"setsid sleep {MARK}6 & sleep {MARK}6 & echo $! >{pids}; wait"])
    outcome = Command(Children()).run(target, FAILED, dict(os.environ), timeout=1.0)
    assert outcome == Outcome(problem="it was killed, with its children, after 1 s")
    assert pids.exists()
    wait_for_sleeping(f"{MARK}6", 0)


def test_what_a_command_leaves_behind_is_not_waited_for() -> None:
    outcome = Command(Children()).run(one(command=["/bin/sh", "-c", f"sleep {MARK}5 & echo bad; exit 1"]), FAILED, {})
    assert outcome == Outcome(problem="it ended with exit status 1: bad")
    (left,) = wait_for_sleeping(f"{MARK}5", 1)
    left.signal(signal.SIGKILL)


def test_the_end_kills_a_command_that_hangs(tmp_path: Path) -> None:
    async def main() -> None:
        said = Said()
        os.mkfifo(tmp_path / "begun")
        entry = {"command": ["/bin/sh", "-c", f": >{tmp_path}/begun; exec sleep {MARK}4"]}
        async with notifying(said, entry) as notifier:
            notifier.finished(job())
            await asyncio.to_thread(lambda: (tmp_path / "begun").read_text())
        assert said.lines[0].endswith(": the scheduler stops")

    asyncio.run(main())
    wait_for_sleeping(f"{MARK}4", 0)


def test_a_command_keeps_its_exit_status_whoever_reaps_it() -> None:
    """The process launcher takes in every child of the service, at any moment."""
    children = Children()
    stop = threading.Event()

    def reap() -> None:
        while not stop.is_set():
            with contextlib.suppress(ChildProcessError):
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if ended is not None:
                    children.reap(ended.si_pid)

    thread = threading.Thread(target=reap)
    thread.start()
    try:
        for _ in range(30):
            outcome = Command(children).run(one(command=["/bin/sh", "-c", "echo no; exit 7"]), FAILED, {})
            assert outcome == Outcome(problem="it ended with exit status 7: no")
    finally:
        stop.set()
        thread.join()
    assert children.pids == set()


# -- desktop -----------------------------------------------------------------------------------------


@pytest.fixture
def bus_address() -> Iterator[str]:
    daemon = subprocess.Popen(
        ["dbus-daemon", "--session", "--nofork", "--print-address"], stdout=subprocess.PIPE, text=True
    )
    with daemon:
        assert daemon.stdout is not None
        yield daemon.stdout.readline().strip()
        daemon.terminate()


@contextlib.asynccontextmanager
async def connected(address: str) -> AsyncIterator[Bus]:
    bus = await Bus.connect(address)
    yield bus
    bus.disconnect()
    with contextlib.suppress(EOFError):
        await bus.wait_for_disconnect()
    connection: Any = bus
    # dbus-next only shuts it down.
    connection._connection._sock.close()


def test_where_no_daemon_is_that_is_said_once(bus_address: str) -> None:
    async def main() -> None:
        said = Said()
        async with connected(bus_address) as bus, notifying(said, {"desktop": True}, bus=bus) as notifier:
            for number in range(3):
                notifier.finished(job(job_id=number))
        assert said.lines == [f"Entry 1 of notify (desktop): {NO_DAEMON}"]

    asyncio.run(main())


def test_a_daemon_that_hangs_delays_nobody(bus_address: str) -> None:
    async def main() -> None:
        asked = asyncio.Event()

        def handler(message: BusMessage) -> bool:
            if message.interface != NOTIFICATIONS:
                return False
            asked.set()
            # Taken, and never answered.
            return True

        async with connected(bus_address) as bus, connected(bus_address) as daemon:
            daemon.add_handler(handler)
            assert await daemon.own_name(NOTIFICATIONS)
            with Server() as server:
                said = Said()
                async with notifying(said, {"desktop": True}, {"webhook": server.url()}, bus=bus) as notifier:
                    notifier.finished(job())
                    await asyncio.wait_for(asked.wait(), 20)
                    await server.request()
                assert said.lines == [
                    "Entry 1 of notify (desktop) was not told '✗ job 42 train 千问 failed': the scheduler stops"
                ]

    asyncio.run(main())


def test_a_target_that_provokes_a_fault_does_not_silence_the_others() -> None:
    told: list[str] = []
    said: list[str] = []
    done = threading.Event()

    def attempt(target: Target, message: Message) -> Outcome:
        del message
        if target.number == 1:
            raise ValueError("40 is not a valid Signals")
        told.append(target.label)
        done.set()
        return Outcome()

    outbox = Outbox(attempt, lambda target, message, problem: said.append(problem), ())
    message = Message(event="failed", title="t", body="", host="h")
    for number in (1, 2):
        outbox.put(Target(number=number, kind="desktop", on=frozenset()), message)
    assert done.wait(20)
    outbox.close(5)
    assert (told, said) == (["desktop"], ["ValueError: 40 is not a valid Signals"])
