"""A terminal that takes nothing, as after Ctrl-S."""

from __future__ import annotations

import os
import pty
import tty

from lfsvc.service.writer import MOST_BYTES, Writer


def test_a_terminal_that_takes_nothing_keeps_nobody_waiting_and_says_what_is_missing() -> None:
    master, slave = pty.openpty()
    tty.setraw(slave)
    writer = Writer(slave)
    line = b"x" * 1023 + b"\n"
    # Nobody reads: a write to this terminal itself would block after some KiB.
    for _ in range(2 * MOST_BYTES // len(line)):
        writer.write(line)
    seen = b""
    while len(seen) < MOST_BYTES // 2:
        seen += os.read(master, 65536)
    writer.write(b"the last\n")
    while not seen.endswith(b"the last\n"):
        seen += os.read(master, 65536)
    assert b" bytes are not shown here; the log files have them\nthe last\n" in seen
    writer.finish(20)
    os.close(master)
    os.close(slave)


def test_a_terminal_that_is_gone_is_no_fault() -> None:
    reader, pipe = os.pipe()
    os.close(reader)
    writer = Writer(pipe)
    writer.write(b"to nobody")
    writer.finish(20)
    assert writer.gone
    writer.write(b"any more")
    os.close(pipe)
