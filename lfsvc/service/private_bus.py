"""A dbus-daemon of our own, for machines where no session bus is: containers, chroots, a Slurm shell."""

from __future__ import annotations

import asyncio
import os
import subprocess

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
        return await asyncio.to_thread(cls._start, address)

    @classmethod
    def _start(cls, address: str) -> PrivateBus:
        folder = os.path.dirname(address.removeprefix("unix:path="))
        make_private(folder)
        log = os.path.join(folder, "dbus-daemon.log")
        try:
            with open(log, "wb") as errors:
                process = subprocess.Popen(
                    # It prints the address when it listens.
                    [
                        "dbus-daemon",
                        "--session",
                        "--nofork",
                        "--nopidfile",
                        f"--address={address}",
                        "--print-address=1",
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    # A Ctrl-C in the terminal ends the service, which then ends its bus.
                    start_new_session=True,
                )
        except FileNotFoundError as error:
            raise NoService(
                "There is no session bus, and dbus-daemon is not installed to start one.",
                "install the package dbus (apt-get install dbus)",
            ) from error
        assert process.stdout is not None
        with process.stdout as pipe:
            line = pipe.readline()
        if not line:
            raise NoService(f"dbus-daemon did not come up at {address} (exit status {process.wait()}).", f"see {log}")
        return cls(process)

    def stop(self) -> None:
        """End the daemon."""
        self._process.terminate()
        # ProcessLauncher takes in every child that ends, so its status may be gone already.
        self._process.wait()
