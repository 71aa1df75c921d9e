"""A dbus-daemon of our own, for machines where no session bus is: containers, chroots, a Slurm shell."""

from __future__ import annotations

import asyncio
import os
import subprocess

from lfsvc import paths
from lfsvc.errors import NoService
from lfsvc.files import make_private


class PrivateBus:
    """The daemon, as a child of the service. Made by `start`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """The PID of the daemon."""
        return self._process.pid

    @classmethod
    async def start(cls, address: str) -> PrivateBus:
        """Start a daemon that listens at `address`; returns when it does.

        Raises:
            NoService: there is no dbus-daemon, or it does not come up.
        """
        make_private(os.path.dirname(address.removeprefix("unix:path=")))
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        try:
            process = subprocess.Popen(
                [
                    "dbus-daemon", "--session", "--nofork", "--nopidfile", "--nosyslog",
                    f"--address={address}", f"--print-address={write_end}",
                ],  # fmt: skip
                pass_fds=[write_end],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # A Ctrl-C in the terminal ends the service, which then ends its bus.
                start_new_session=True,
            )
        except OSError as error:
            os.close(read_end)
            raise NoService(
                "There is no session bus, and dbus-daemon is not installed to start one.",
                "install the package dbus (apt-get install dbus)",
            ) from error
        finally:
            os.close(write_end)
        with open(read_end, "rb") as pipe:
            line = await asyncio.to_thread(pipe.readline)
        if not line:
            raise NoService(f"dbus-daemon did not come up at {address} (exit status {process.wait()}).")
        return cls(process)

    def stop(self) -> None:
        """End the daemon."""
        self._process.terminate()
        # ProcessLauncher takes in every child that ends, so its status may be gone already.
        self._process.wait()


def address() -> str:
    """Where the private bus listens."""
    return paths.private_bus_address()
