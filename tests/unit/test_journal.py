"""The journal's copy of an output: its encoding, its budget, its lines."""

import socket
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from lfsvc.journal import Budget, Journal, encode
from lfsvc.runner.output import JournalCopy


@given(st.lists(st.integers(0, 4), min_size=1, max_size=300))
def test_no_window_of_thirty_seconds_has_more_than_the_budget(gaps: list[int]) -> None:
    budget = Budget(8, 30, [])
    now, sent = 1000, []
    for gap in gaps:
        now += gap
        if not budget.exhausted(now):
            budget.take(now)
            sent.append(now)
    for second in sent:
        assert len([other for other in sent if second <= other < second + 30]) <= 8


def test_a_budget_goes_on_in_the_next_job() -> None:
    budget = Budget(2, 30, Budget(2, 30, [[100, 2]]).spent(110))
    assert budget.exhausted(110)
    assert not budget.exhausted(131)
    # After a boot the clock starts anew.
    assert not Budget(2, 30, [[100, 2]]).exhausted(5)


def test_a_value_with_a_line_break_goes_in_with_its_length() -> None:
    assert encode({"A": "1", "MESSAGE": "x\ny"}) == b"A=1\nMESSAGE\n\x03\0\0\0\0\0\0\0x\ny\n"


def listen(folder: Path) -> tuple[socket.socket, Journal]:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    server.bind(str(folder / "socket"))
    server.settimeout(5)
    return server, Journal(str(folder / "socket"))


def messages(output: bytes, folder: Path, lines: int = 100) -> list[str]:
    (folder / "log").write_bytes(output)
    server, journal = listen(folder)
    copy = JournalCopy(str(folder / "log"), journal, Budget(lines, 30, []), {"JOB_ID": "1"})
    server.setblocking(False)
    found = []

    def drain() -> None:
        while True:
            try:
                data = server.recv(100_000)
            except BlockingIOError:
                return
            head, _, rest = data.partition(b"\nMESSAGE")
            assert head.startswith(b"JOB_ID=1\nPRIORITY=6")
            found.append(rest[1:-1].decode() if rest[:1] == b"=" else rest[9:-1].decode())

    while copy.feed():
        drain()
    copy.finish()
    while copy.feed():
        drain()
    copy.close(0.0)
    drain()
    server.close()
    journal.close()
    return found


def test_lines_arrive_as_they_are(tmp_path: Path) -> None:
    assert messages(b"one\n\ntwo\r\nlast", tmp_path) == ["one", "", "two", "last"]


def test_what_is_not_text_arrives_escaped(tmp_path: Path) -> None:
    assert messages(b"a\0b \xff\xe4 \xc3\xa4\n", tmp_path) == ["a\\x00b \\xff\\xe4 ä"]


def test_a_repainted_line_arrives_in_its_last_state(tmp_path: Path) -> None:
    assert messages(b"\r 10%\r 50%\r100%\nnext\n", tmp_path) == ["100%", "next"]


def test_a_very_long_line_is_split(tmp_path: Path) -> None:
    found = messages(b"x" * 100_000 + b"\n", tmp_path)
    assert len(found) == 4 and "".join(found) == "x" * 100_000


def test_beyond_the_budget_lines_are_counted(tmp_path: Path) -> None:
    assert messages(b"line\n" * 500, tmp_path, lines=3) == ["line"] * 3 + ["… 497 lines only in the log file"]


def test_no_journal_is_no_error(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "nothing"))
    assert not journal.available
    assert journal.send({}, "x") is False


def test_a_full_socket_is_not_waited_for(tmp_path: Path) -> None:
    server, journal = listen(tmp_path)
    for _ in range(100_000):
        if journal.send({}, "x" * 1000) is None:
            break
    else:
        raise AssertionError("the socket never filled up")
    server.close()
    journal.close()
