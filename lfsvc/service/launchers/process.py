"""Runners as plain processes, for machines without a booted systemd.

A runner is a child subreaper and clears out its own descendants. This service is one as well: where a
runner was killed, what it leaves behind ends up here and is ended, however often it forked.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess

from lfsvc import processes
from lfsvc.delivery import Children
from lfsvc.service.launchers.base import CannotStart, Start, boot_id

# How much longer than the grace time a runner may take to end before it is ended itself.
STOP_MARGIN_SECONDS = 5.0

# Every process of a job has it in its environment, unless it threw it away.
MARK = "LFSVC_JOB_FOLDER"


class _Running:
    """A runner that is being watched."""

    def __init__(self, start: Start, process: processes.Process, child: subprocess.Popen[bytes] | None) -> None:
        self.start = start
        self.process = process
        self.child = child
        self.gone = asyncio.Event()
        self.force: asyncio.TimerHandle | None = None


class ProcessLauncher:
    """See `base.Launcher`."""

    name = "process"

    def __init__(self, *, spare: Children) -> None:
        """Take over the children of this process. `spare`: those that are no jobs, such as a bus."""
        self._running: dict[int, _Running] = {}
        self._spare = spare
        processes.become_subreaper()
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self._reap)

    async def instance(self) -> str:
        # A container that is started anew keeps the boot id; its first process has another start time.
        init = processes.find(1)
        return f"{boot_id()}/{os.readlink('/proc/self/ns/pid')}/{init.start if init else 0}"

    async def going_down(self) -> bool:
        return False

    async def start(self, start: Start) -> str:
        try:
            child = await asyncio.to_thread(self._spawn, start)
        except OSError as error:
            raise CannotStart(f"The runner cannot be started: {error.strerror}.") from error
        process = processes.find(child.pid)
        if process is None:
            # It has ended already; its start time no longer matters.
            process = processes.Process(child.pid, os.getpid(), 0, "Z", "")
        self._watch(_Running(start, process, child))
        return json.dumps({"pid": process.pid, "start": process.start})

    def _spawn(self, start: Start) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            start.runner_arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd="/",
            # The job's environment is in its spec. The mark finds a runner whose handle was not stored.
            env={"PATH": os.environ.get("PATH", os.defpath), MARK: start.folder},
            # The terminal's Ctrl-C and hang-up are not for the jobs.
            start_new_session=True,
        )

    async def attach(self, start: Start, handle: str) -> bool:
        process = await asyncio.to_thread(self._find_runner, start, handle)
        if process is None:
            return False
        self._watch(_Running(start, process, None))
        return True

    def _find_runner(self, start: Start, handle: str) -> processes.Process | None:
        if handle:
            known = json.loads(handle)
            process = processes.find(known["pid"])
            return process if process is not None and process.start == known["start"] else None
        # The last service died between the start and writing down where it is.
        wanted = [os.fsencode(argument) for argument in start.runner_arguments[-2:]]
        for process in processes.carrying(MARK, start.folder):
            if processes.arguments(process.pid)[-2:] == wanted:
                return process
        return None

    def _watch(self, running: _Running) -> None:
        self._running[running.start.job_id] = running
        try:
            fd = os.pidfd_open(running.process.pid)
        except OSError:
            running.gone.set()
            return
        loop = asyncio.get_running_loop()

        def ended() -> None:
            loop.remove_reader(fd)
            os.close(fd)
            running.gone.set()

        loop.add_reader(fd, ended)

    def _reap(self) -> None:
        """Take in every child that has ended: runners, and orphans of runners that were killed."""
        children = {running.child.pid: running.child for running in self._running.values() if running.child}
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            child = children.get(ended.si_pid)
            if child is not None:
                child.poll()
            else:
                self._spare.reap(ended.si_pid)

    async def wait(self, job_id: int) -> str:
        running = self._running[job_id]
        await running.gone.wait()
        if running.force is not None:
            running.force.cancel()
        await self.clear(running.start)
        del self._running[job_id]
        code = running.child.poll() if running.child is not None else None
        if code is None or code == 0:
            return ""
        if code < 0:
            return f"was killed by {processes.signal_name(-code)}"
        return f"ended with exit status {code}"

    async def stop(self, job_id: int) -> None:
        running = self._running.get(job_id)
        if running is None:
            return
        running.process.signal(signal.SIGTERM)
        if running.force is None:
            delay = running.start.grace_seconds + STOP_MARGIN_SECONDS
            running.force = asyncio.get_running_loop().call_later(delay, running.process.signal, signal.SIGKILL)

    async def clear(self, start: Start) -> None:
        while True:
            left = await asyncio.to_thread(self._leftovers, start)
            if not left:
                return
            for process in left:
                process.signal(signal.SIGKILL)
            await asyncio.wait([asyncio.ensure_future(_gone(process)) for process in left], timeout=1.0)

    def _leftovers(self, start: Start) -> list[processes.Process]:
        """What carries the job's mark, and orphans that have come to this process and belong to no other job."""
        marked = {process.pid: process for process in processes.carrying(MARK, start.folder)}
        others = {running.process.pid for job_id, running in self._running.items() if job_id != start.job_id}
        # Under its lock no child is between its start and being known.
        with self._spare.lock:
            for process in processes.descendants(os.getpid()):
                ours = process.parent == os.getpid() and process.pid not in self._spare.pids | others
                if ours and not processes.is_marked(process, "LFSVC_NOTIFICATION"):
                    marked.setdefault(process.pid, process)
        marked.pop(os.getpid(), None)
        return list(marked.values())


async def _gone(process: processes.Process) -> None:
    """Wait until a process has ended."""
    try:
        fd = os.pidfd_open(process.pid)
    except OSError:
        return
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    loop.add_reader(fd, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(fd)
        os.close(fd)
