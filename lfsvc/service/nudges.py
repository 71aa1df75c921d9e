"""The socket by which runners say that their documents have changed. A lost datagram costs nothing but time."""

from __future__ import annotations

import asyncio
import os
import socket
import zlib
from collections.abc import Callable

from lfsvc import paths
from lfsvc.files import make_private


def socket_path(state_folder: str) -> str:
    """The socket of a state folder's service: the same after a restart, since runners know it by its path."""
    return os.path.join(paths.runtime_dir(), f"nudge-{zlib.crc32(state_folder.encode()):08x}")


class Nudges:
    """Listens on the socket; `on_nudge` gets the id of the job."""

    def __init__(self, path: str, on_nudge: Callable[[int], None]) -> None:
        make_private(os.path.dirname(path))
        # Left by a service that was killed. Ours alone: the caller holds the lock on the state folder.
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        self._path = path
        self._on_nudge = on_nudge
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._socket.bind(path)
        asyncio.get_running_loop().add_reader(self._socket, self._read)

    def _read(self) -> None:
        while True:
            try:
                data = self._socket.recv(64)
            except OSError:
                return
            if data.isdigit() and len(data) < 20:
                self._on_nudge(int(data))

    def close(self) -> None:
        """Stop listening."""
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()
        try:
            os.unlink(self._path)
        except OSError:
            pass
