"""`lfsvc serve`: wiring, readiness, signals, watchdog."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import sdnotify

from lfsvc import config as settings
from lfsvc import environment_file, journal, paths
from lfsvc.config import Config
from lfsvc.delivery import Children
from lfsvc.errors import Internal, LfsvcError, NoService
from lfsvc.job import Job, StepState
from lfsvc.llamafactory import cli
from lfsvc.llamafactory.environment import job_environment
from lfsvc.service import dbus, notifier
from lfsvc.service.bus import Bus, BusError
from lfsvc.service.events import Held, JournalListener, Listener, Log
from lfsvc.service.launchers.base import Launcher
from lfsvc.service.launchers.process import ProcessLauncher
from lfsvc.service.launchers.systemd import SystemdLauncher
from lfsvc.service.lock import StateLock, make_private_state
from lfsvc.service.nudges import Nudges, socket_path
from lfsvc.service.private_bus import PrivateBus
from lfsvc.service.scheduler import Scheduler
from lfsvc.service.specs import Surroundings
from lfsvc.service.store import Store
from lfsvc.service.terminal import TerminalListener
from lfsvc.wording import progress_text


class SystemdNotifier:
    """Word to systemd about the service itself. Silent where NOTIFY_SOCKET is not set: there is nobody to tell."""

    def __init__(self) -> None:
        self._notifier = sdnotify.SystemdNotifier()

    def notify(self, state: str) -> None:
        """Send a message of sd_notify(3)."""
        # sdnotify encodes as Latin-1 and drops what does not fit, such as a Chinese file name; systemd reads UTF-8.
        self._notifier.notify(state.encode("utf-8", "backslashreplace").decode("latin-1"))


@dataclass(frozen=True, kw_only=True)
class Invocation:
    """How the service was started. `umask` is what it was given, for jobs whose submitter names none."""

    as_unit: bool
    environment: Mapping[str, str]
    umask: int

    @classmethod
    def present(cls) -> Invocation:
        """Find out how this process was started, and take the service's own umask."""
        return cls(
            # systemd sets it to the PID of what it executed; a shell within a unit only inherits it.
            as_unit=os.environ.get("SYSTEMD_EXEC_PID") == str(os.getpid()),
            environment=dict(os.environ),
            umask=os.umask(0o077),
        )


def serve(*, launcher: str = "") -> int:
    """Run the service until SIGTERM or SIGINT; give the exit status. `launcher` overrides the config's.

    Raises:
        LfsvcError: it cannot start; the message says why. systemd has been told, so that a client that
            wanted it started can say it, too.
    """
    try:
        return _serve(launcher)
    except LfsvcError as error:
        SystemdNotifier().notify("STATUS=Failed: " + error.text.replace("\n", " "))
        raise


def _serve(launcher: str) -> int:
    invocation = Invocation.present()
    config = settings.load()
    if launcher:
        config = replace(config, launcher=launcher)
    make_private_state(config)
    lock = StateLock(config.state_folder)
    try:
        return asyncio.run(Service(invocation, config, launcher).run())
    finally:
        lock.close()


class Service(Listener):
    """The service while it runs."""

    def __init__(self, invocation: Invocation, config: Config, launcher: str) -> None:
        self._invocation = invocation
        self._config = config
        self._launcher_override = launcher
        self._log = Log(print_too=not invocation.as_unit)
        self._systemd = SystemdNotifier()
        self._stop = asyncio.Event()
        self._private_bus: PrivateBus | None = None
        # Those that are no jobs.
        self._children = Children()
        self._told_status = ""

    async def run(self) -> int:
        """Start, serve, stop; give the exit status."""
        started_at = time.time_ns() // 1000
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        # A terminal that is closed takes the shell, not the queue; as a unit, SIGHUP is the reload.
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        bus = await self._connect()
        store = Store()
        try:
            return await self._serve(bus, store, started_at)
        finally:
            await store.close()
            bus.disconnect()
            if self._private_bus is not None:
                self._private_bus.stop()
            self._log.finish()

    async def _serve(self, bus: Bus, store: Store, started_at: int) -> int:
        await store.open(self._config.state_folder)
        launchers = await self._open_launchers(bus)
        chosen = launchers[0]
        nudge_socket = socket_path(self._config.state_folder)
        surroundings = Surroundings(
            environment=self._invocation.environment,
            umask=self._invocation.umask,
            nudge_socket=nudge_socket,
            environment_file=self._environment_file,
        )
        self._scheduler = scheduler = Scheduler(
            store=store,
            launcher=chosen,
            others={launcher.name: launcher for launcher in launchers[1:]},
            config=self._config,
            surroundings=surroundings,
            log=self._log,
        )
        scheduler.listen(JournalListener(self._log))
        # Before `load`, so that ends that were missed are told, too.
        self._notifier = notifier.Notifier(
            targets=self._config.notify,
            bus=bus,
            log=self._log,
            idle=lambda: not scheduler.running() and not scheduler.queue_length,
            environment=lambda: {**self._invocation.environment, **self._environment_file()},
            children=self._children,
        )
        scheduler.listen(self._notifier)
        nudges = Nudges(nudge_socket, scheduler.on_nudge)
        try:
            exported = dbus.SchedulerObject(
                bus, scheduler, self._log, started_at=started_at, llamafactory_cli=self._llamafactory_cli()
            )
            # Ends that were missed are taken in before anybody can ask; a client that waited looks again
            # when the name has an owner.
            missed = Held()
            scheduler.listen(missed)
            await scheduler.load()
            exported.export()
            await dbus.claim_name(bus)
            scheduler.listen(exported)
            missed.release(exported)
            self._listen_on_terminal()
            self._ready(chosen)
            work = asyncio.ensure_future(scheduler.run())
            status = await self._until_stop(bus, work)
            self._systemd.notify("STOPPING=1\nSTATUS=Stopping; jobs go on")
            await scheduler.stop()
            await asyncio.gather(work, return_exceptions=True)
            await self._notifier.close()
            await exported.close()
            return status
        finally:
            nudges.close()

    async def _connect(self) -> Bus:
        """Connect to the session bus; where there is none, start one."""
        for address in paths.session_bus_addresses():
            try:
                return await Bus.connect(address)
            except OSError:
                continue
        address = paths.private_bus_address()
        self._private_bus = await PrivateBus.start(address)
        self._log.write(f"No session bus here: started one at {address}")
        return await Bus.connect(address)

    async def _open_launchers(self, bus: Bus) -> list[Launcher]:
        """Open what the machine offers; the first is the one that jobs are started with."""
        wanted = self._config.launcher
        found: list[Launcher] = []
        if wanted != "process":
            systemd = SystemdLauncher(bus)
            try:
                await systemd.open()
                found.append(systemd)
            except BusError as error:
                if wanted == "systemd" or self._invocation.as_unit:
                    raise NoService(
                        f"systemd does not answer on the session bus: {error}.",
                        "set `launcher: process`, or auto",
                    ) from error
        if self._private_bus is not None:
            self._children.pids.add(self._private_bus.pid)
        found.append(ProcessLauncher(spare=self._children))
        return found

    def _environment_file(self) -> Mapping[str, str]:
        """What ~/.config/lfsvc/environment says now. It is for the unit: a shell's exports are that shell's."""
        if not self._invocation.as_unit:
            return {}
        path = paths.environment_file()
        try:
            with open(path, "rb") as file:
                return environment_file.parse(file.read())
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise Internal(f"{path} cannot be read: {error.strerror}.", "mend its permissions") from error

    def _llamafactory_cli(self) -> str:
        environment = job_environment(
            service=self._invocation.environment,
            file=self._environment_file(),
            devices=(),
            own={},
            work_folder="",
        )
        return cli.find_program(cli.PROGRAM, environment["PATH"])

    def _listen_on_terminal(self) -> None:
        if self._invocation.as_unit or not sys.stdout.isatty():
            return
        terminal = TerminalListener()
        self._scheduler.listen(terminal)
        for job in self._scheduler.running():
            # From here on: what it printed before was printed before.
            terminal.follow(job.log, os.path.getsize(job.log) if os.path.exists(job.log) else 0)

    def _ready(self, launcher: Launcher) -> None:
        self._scheduler.listen(self)
        self._systemd.notify("READY=1")
        self.changed()
        if not self._log.has_journal:
            self._log.write("There is no journal on this machine: the jobs' output is in their log files only")
        how = "a systemd unit each" if launcher.name == "systemd" else "processes of this service"
        self._log.write(f"The scheduler is ready; jobs run as {how}, {self._scheduler.queue_length} waiting")
        interval = _watchdog_seconds(self._invocation.environment)
        if interval:
            self._ping(interval)

    def _ping(self, interval: float) -> None:
        # From inside the loop: a loop that stands still is a service that does.
        self._systemd.notify("WATCHDOG=1")
        asyncio.get_running_loop().call_later(interval, self._ping, interval)

    async def _until_stop(self, bus: Bus, work: asyncio.Future[None]) -> int:
        """Wait for a reason to stop; give the exit status."""
        stop: asyncio.Future[Any] = asyncio.ensure_future(self._stop.wait())
        gone: asyncio.Future[Any] = asyncio.ensure_future(bus.wait_for_disconnect())
        await asyncio.wait({stop, gone, work}, return_when=asyncio.FIRST_COMPLETED)
        if work.done() and work.exception() is not None:
            self._log.write(f"A fault in lfsvc, please report it: {work.exception()!r}", journal.ERROR)
            return 1
        if stop.done():
            gone.cancel()
            return 0
        if gone.done():
            gone.exception()
            self._log.write("The session bus is gone; jobs go on, and a new scheduler takes them up", journal.ERROR)
            return 1
        # The manager is stopping: nothing is to be decided any more, but status can still be asked for.
        await stop
        return 0

    def _reload(self) -> None:
        """SIGHUP: read config.yaml again; one that does not hold leaves the old one in force."""
        if not hasattr(self, "_scheduler"):
            # It starts, and has just read it.
            return
        self._systemd.notify("RELOADING=1")
        try:
            config = settings.load()
            if self._launcher_override:
                config = replace(config, launcher=self._launcher_override)
            for key in ("state_dir", "launcher"):
                if getattr(config, key) != getattr(self._config, key):
                    self._log.write(f"{key} has changed; that takes effect with a restart", journal.WARNING)
            self._scheduler.config = self._config = config
            self._notifier.targets = config.notify
            self._log.write("The config was read again", journal.NOTICE)
        except LfsvcError as error:
            self._log.write(f"The old config stays in force: {error.text}", journal.ERROR)
        self._systemd.notify("READY=1")

    def changed(self) -> None:
        """Tell systemd, whose `systemctl status` shows it, what runs."""
        running = self._scheduler.running()
        what = ", ".join(map(_in_words, running)) or "Idle"
        status = f"{what}; {self._scheduler.queue_length} waiting"
        if status != self._told_status:
            self._told_status = status
            self._systemd.notify(f"STATUS={status}")


def _in_words(job: Job) -> str:
    """A running job in one line: `job 42 train qwen_sft: 38 %, loss 0.412, 1 h 12 min left`."""
    step = next((step.name for step in job.steps if step.state is StepState.RUNNING), job.task.command.value)
    progress = progress_text(job.progress)
    return f"job {job.id} {step} {job.short_name}" + (f": {progress}" if progress else "")


def _watchdog_seconds(environment: Mapping[str, str]) -> float:
    """Half the time after which systemd takes the service for hung; 0 where it does not watch.

    Source: sd_watchdog_enabled(3).
    """
    usec = environment.get("WATCHDOG_USEC", "")
    pid = environment.get("WATCHDOG_PID", "")
    if not usec.isdigit() or (pid and pid != str(os.getpid())):
        return 0.0
    return int(usec) / 2_000_000
