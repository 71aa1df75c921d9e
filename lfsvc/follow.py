"""Following a file that grows, told by the kernel: inotify, no polling.

A writer on another machine is not seen; jobs write on this one. Source: inotify(7).
"""

from __future__ import annotations

import os

IN_MODIFY = 0x2
PIECE_BYTES = 64 * 1024


class Follower:
    """Reads what is appended to a file. `fileno()` is readable when there may be more."""

    def __init__(self, path: str, offset: int = 0) -> None:
        """Open a file, to be read from `offset` (bytes) on.

        Raises:
            OSError: it cannot be read, or inotify gives no watch.
        """
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        os.lseek(self._file, offset, os.SEEK_SET)
        self._watch: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._watch < 0 or libc.inotify_add_watch(self._watch, os.fsencode(path), IN_MODIFY) < 0:
            number = ctypes.get_errno()
            self.close()
            raise OSError(number, os.strerror(number), path)

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._watch

    def read(self) -> bytes:
        """Read one piece; b"" at the present end of the file."""
        data = os.read(self._file, PIECE_BYTES)
        if data:
            return data
        # Clear first, read again after: what comes in between is announced anew.
        try:
            os.read(self._watch, 4096)
        except BlockingIOError:
            pass
        return os.read(self._file, PIECE_BYTES)

    def close(self) -> None:
        """Stop following."""
        os.close(self._file)
        if self._watch >= 0:
            os.close(self._watch)
