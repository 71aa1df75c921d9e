"""The output of a failed step → why it failed, and what to do.

What counts is exceptions, the last words of native code and torchrun's summary; never free text, since a
data set may hold any words. Of these the rank that failed first speaks, and of that rank the last exception:
what it printed before, it survived.

Source: outputs of LLaMA-Factory 0.9.3 and public reports, kept in tests/data/failures.
"""

from __future__ import annotations

import os
import re
from collections import deque

from lfsvc.llamafactory.known_failures import CONSEQUENCES, KNOWN, PACKAGES, SIGNALS, WRAPPERS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# Of a log at most this much is read, from its end, and of a line no more than this.
READ_BYTES = 8 << 20
PIECE_BYTES = 64 << 10
LINE_BYTES = 4 << 10

# What is kept of it, whatever it holds. The patterns of the table are run over no more than that.
MOST_EXCEPTIONS = 64
MOST_CHAINED = 6
MOST_LINES = 24
MOST_CHARACTERS = 600
MOST_SHOWN = 300

SIGKILL = 9
FROM_OUTSIDE = (2, SIGKILL, 15)
CRASHES = (7, 11)
LAST_SIGNAL = 64

# The exit status of a step that could not be started.
NOTHING_RAN = -1

TRACEBACK = "Traceback (most recent call last)"
# What rich draws round one.
BOX = "│╭╰"
CHAINED = {
    "The above exception was the direct cause of the following exception": "direct",
    "During handling of the above exception, another exception occurred": "context",
}
ANSI = r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07]{0,200}\x07)"
# torch's and ray's marks of who prints.
RANK = r"\[(?:rank|default)(\d{1,6})\]: ?|\((?:\w{1,60} )?(?:rank=\d+ )?pid=\d+\) ?"
EXCEPTION = (
    r"(?P<type>[A-Za-z_][\w.]*\.[A-Z]\w*|\w*(?:Error|Exception|Interrupt|Exit|Iteration|Invalid))"
    r"(?:\(\w+\))?(?:: (?P<text>.*)|:?)$"
)
# What native code says: torch's error log, an uncaught C++ exception, CANN's codes, bash, argparse.
NATIVE = (
    r"\[E\d{3,4} |  what\(\):|Fatal Python error"
    r"|(?:\[PID: \d+\] ?)?(?:\d{4}-[\d:.-]{1,40} )?(?:\w+\()?E[A-Z0-9]\d{4}\)?: |\S+: line \d+: |[\w./-]+: error: "
)
# Lines that end the text of an exception: somebody else speaks.
NEXT_SPEAKER = (
    r"\[(?:INFO|WARNING|ERROR|DEBUG)\||[EWI]\d{4} \d\d:|\[?\d{4}-\d\d-\d\d[ T]|={10}|-{10}|\{'|\s*\d+%\||\[[EW]\d{3,4} "
)
EXIT = r"\s*exitcode\s*: (-?\d{1,9})|.*\bfailed \(exitcode: (-?\d{1,9})\) local_rank: (\d{1,6})"


class Raised:
    """One exception as it was printed: the last part of its type's name, its text, and where it was raised."""

    __slots__ = ("link", "place", "text", "type")

    def __init__(self, kind: str, text: str, link: str, place: str) -> None:
        self.type = kind.rpartition(".")[2]
        self.text = [text[:MOST_CHARACTERS]]
        self.link = link
        self.place = place

    def whole(self) -> str:
        """Type and text, all lines, and the place: what the table is asked about."""
        return f"{self.type}: " + "\n".join((*self.text, self.place))

    def short(self) -> str:
        """Type and what its text begins with, in one line."""
        said = [line.strip() for line in self.text if line.strip()]
        text = " ".join(said[:2]) if said and said[0].endswith(":") else said[0] if said else ""
        text = f"{self.type}: {text}" if text else self.type
        return text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN].rstrip() + " ..."


class Stream:
    """The lines of one rank, or those without a rank: where in a traceback they are."""

    __slots__ = ("chain", "current", "ignored", "link", "place", "tracing")

    def __init__(self) -> None:
        self.tracing = 0  # lines of others that may still pass before its exception
        self.current: Raised | None = None  # its text may go on
        self.chain: list[Raised] | None = None
        self.link = ""
        self.place = ""
        self.ignored = False


class Output:
    """What counts of an output, gathered line by line in bounded memory."""

    def __init__(self) -> None:
        self.chains: deque[tuple[int | None, list[Raised]]] = deque(maxlen=MOST_EXCEPTIONS)
        self.natives: deque[str] = deque(maxlen=MOST_EXCEPTIONS)
        self.exits: dict[int, int] = {}
        self.root: int | None = None
        self._streams: dict[int | None, Stream] = {}
        self._in_root = False
        self._rank = 0

    def add(self, line: str) -> None:
        """Take in one line."""
        if "\x1b" in line:
            line = re.sub(ANSI, "", line)
        bar = max(line.rfind("it/s"), line.rfind("s/it"))
        if bar >= 0 and "%|" in line[:bar]:
            # A progress bar has no line end; what another process prints then joins it.
            line = line[bar:].partition("]")[2]
        rank = None
        if line[:1] in ("[", "(") and (found := re.match(RANK, line)):
            rank = int(found[1]) if found[1] else None
            line = line[found.end() :]
        self._summary(line)
        if rank not in self._streams and len(self._streams) >= MOST_EXCEPTIONS:
            return
        self._trace(rank, self._streams.setdefault(rank, Stream()), line)

    def last_chains(self) -> dict[int | None, list[Raised]]:
        """The last chain of each rank, in the order of their ends: what came before was survived."""
        last: dict[int | None, list[Raised]] = {}
        for rank, chain in self.chains:
            last.pop(rank, None)
            last[rank] = chain
        return last

    def _summary(self, line: str) -> None:
        """torchrun's account of the ranks that it found dead."""
        if line.startswith("Root Cause (first observed failure)"):
            self._in_root = True
        elif "rank" in line and (found := re.match(r"\s+rank\s+: (\d{1,6})", line)):
            self._rank = int(found[1])
            if self._in_root:
                self.root = self._rank
                self._in_root = False
        elif "exitcode" in line and (found := re.match(EXIT, line)):
            if found[1] is not None:
                self.exits[self._rank] = int(found[1])
            elif self.root is None:
                self.root = int(found[3])
                self.exits[self.root] = int(found[2])
            if len(self.exits) > MOST_EXCEPTIONS:
                self.exits.popitem()

    def _trace(self, rank: int | None, stream: Stream, line: str) -> None:
        if TRACEBACK in line or (not stream.tracing and line.startswith('  File "') and ", line " in line):
            stream.tracing = MOST_LINES
            stream.current = None
            stream.place = ""
            return
        if "xception" in line:
            if line.startswith("Exception ignored in"):
                stream.ignored = True
                return
            for text, link in CHAINED.items():
                if text in line:
                    stream.link = link
                    stream.current = None
                    return
        if stream.tracing:
            if line.startswith('  File "'):
                stream.place = line[:MOST_CHARACTERS]
            elif line and not line[0].isspace() and line[0] not in BOX:
                stream.tracing -= 1
                found = re.match(EXCEPTION, line)
                if found:
                    stream.tracing = 0
                    self._raise(rank, stream, Raised(found["type"], found["text"] or "", stream.link, stream.place))
                    return
        if re.match(NATIVE, line):
            self.natives.append(line[:MOST_CHARACTERS])
        if stream.current is not None:
            if re.match(NEXT_SPEAKER, line) or len(stream.current.text) >= MOST_LINES:
                stream.current = None
            elif not line.startswith(("frame #", "Exception raised from")):
                stream.current.text.append(line[:MOST_CHARACTERS])

    def _raise(self, rank: int | None, stream: Stream, raised: Raised) -> None:
        """Take in an exception; it joins the chain of the one before where Python says so."""
        stream.link = ""
        if stream.ignored:
            stream.ignored = False
            return
        if raised.type in WRAPPERS:
            return
        if self.root is not None:
            # A script went on after a torchrun that had failed: that is not what it died of.
            self.root = None
            self.exits.clear()
            self.chains.clear()
            self.natives.clear()
        stream.current = raised
        if raised.link and stream.chain is not None:
            stream.chain.append(raised)
            if len(stream.chain) > MOST_CHAINED:
                del stream.chain[1]
            # It counts from its last exception on.
            self.chains = deque((c for c in self.chains if c[1] is not stream.chain), maxlen=MOST_EXCEPTIONS)
        else:
            stream.chain = [raised]
        self.chains.append((rank, stream.chain))


def cause(lines: Iterable[str], exit_status: int = 1) -> str:
    """The cause in one sentence and what to do in another; "" where the lines tell nothing.

    Args:
        lines: the output, a progress bar's every state a line of its own.
        exit_status: of the step; 128+N or -N for signal N.
    """
    output = Output()
    for line in lines:
        output.add(line)
    root = output.root
    died = _signal(output, exit_status)
    if died in FROM_OUTSIDE:
        return _of_signal(died, root)
    chains = output.last_chains()
    first = _first_to_fail(chains, root)
    killed = next((rank for rank, code in output.exits.items() if code == -SIGKILL), None)
    if first is None and killed is not None:
        return _of_signal(SIGKILL, killed)
    if root is not None and root not in chains and died in CRASHES:
        # It had no time for an exception: those of others are not what happened.
        first = None
    natives = [text for text in output.natives if not re.search(CONSEQUENCES, text)]
    # An accelerator's exception says little where its own software has said more.
    helped = first is not None and re.search(r"NPU|HCCL|NCCL|CUDA|ACL", first[-1].whole()) is not None
    return (
        _known_of(first)
        or (_known(natives) if helped else "")
        or _unknown(first)
        or _known(natives)
        or (_of_signal(died, root) if died in CRASHES else "")
        or next((_known_of(chain) or _unknown(chain) for chain in chains.values()), "")
        or _known(output.natives)
        or _of_signal(died, root)
    )


def _signal(output: Output, exit_status: int) -> int:
    """The signal that the first rank to fail, or without torchrun the step, died of; 0 for none."""
    if output.root is not None:
        died = -output.exits.get(output.root, 0)
    elif exit_status == NOTHING_RAN:
        return 0
    else:
        died = exit_status - 128 if exit_status > 128 else -exit_status
    return died if 0 < died <= LAST_SIGNAL else 0


def _first_to_fail(chains: dict[int | None, list[Raised]], root: int | None) -> list[Raised] | None:
    """The chain that says why: of the rank that torchrun names, else the first that no other rank brought about."""
    own = {rank: chain for rank, chain in chains.items() if not _is_consequence(chain)}
    if root is not None and root in own:
        return own[root]
    return next(iter(own.values()), None)


def explain(log_path: str, exit_status: int, start: int = 0) -> str:
    """The cause of a failed step in one sentence and what to do in another, or "" where the output tells nothing.

    At most the last 8 MiB of the log are read, from byte `start` on, in pieces: memory stays bounded
    whatever the log holds. A log that cannot be read tells nothing.
    """
    try:
        return cause(_lines(log_path, start), exit_status)
    except (OSError, ValueError):
        return ""


def _lines(path: str, start: int) -> Iterator[str]:
    """The lines of the end of a file without the empty ones; of a long one its first 4 KiB."""
    with open(path, "rb", buffering=0) as file:
        begin = max(start, os.fstat(file.fileno()).st_size - READ_BYTES, 0)
        file.seek(begin)
        left = READ_BYTES
        rest = b""
        while left > 0 and (piece := file.read(min(PIECE_BYTES, left))):
            left -= len(piece)
            *whole, tail = piece.replace(b"\r", b"\n").split(b"\n")
            for line in whole:
                if rest or line:
                    yield (rest + line)[:LINE_BYTES].decode("utf-8", "replace")
                    rest = b""
            rest = (rest + tail)[:LINE_BYTES]
        if rest:
            yield rest.decode("utf-8", "replace")


def _is_consequence(chain: list[Raised]) -> bool:
    return any(re.search(CONSEQUENCES, raised.whole()) for raised in chain)


def _known_of(chain: list[Raised] | None) -> str:
    """What the table says of a chain: of what it ended with first, then of what led to it."""
    return _known(raised.whole() for raised in reversed(chain or ()))


def _known(texts: Iterable[str]) -> str:
    for text in texts:
        for pattern, why, what_to_do in KNOWN:
            found = re.search(pattern, text, re.MULTILINE)
            if found:
                return _sentences(why, what_to_do, found.groupdict(""))
    return ""


def _sentences(why: str, what_to_do: str, found: dict[str, str]) -> str:
    names = {name: " ".join(value.split())[:MOST_SHOWN] for name, value in found.items()}
    package = names.get("package") or names.get("name") or ""
    names["install"] = PACKAGES.get(package, package)
    return f"{why.format(**names).rstrip('.')}. {what_to_do.format(**names)}"


def _unknown(chain: list[Raised] | None) -> str:
    if not chain:
        return ""
    text = chain[-1].short().rstrip(".")
    if chain[-1].link == "direct" and len(chain) > 1:
        text += f" (caused by {chain[-2].short().rstrip('.')})"
    return f"{text}."


def _of_signal(number: int, rank: int | None) -> str:
    if not number:
        return ""
    who = "it" if rank is None else f"rank {rank}"
    why, what_to_do = SIGNALS.get(number, (f"{{who}} died of signal {number}", "The end of its log may say more."))
    return _sentences(why, what_to_do, {"who": who})
