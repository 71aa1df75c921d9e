"""spec.json → steps → result.json.

One loop waits for everything at once: output, the end of a child, a request to stop, room in the
journal. SIGTERM means stop: it is passed on to every process of the job, and after the grace time
SIGKILL follows. Whatever is left when the steps are through is ended the same way, counted and named.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

from lfsvc import documents, journal, processes
from lfsvc.runner import steps
from lfsvc.runner.output import PIECE_BYTES, JournalCopy, Output, note
from lfsvc.runner.report import Report
from lfsvc.runner.spawn import prepare_process, spawn
from lfsvc.runner.works import works

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

    from lfsvc.documents import Result, Spec, StepDocument
    from lfsvc.llamafactory.progress import TrainerLog
    from lfsvc.runner.steps import Work

# After its last step a runner gives the journal this long, and as long again at most to count what is
# left of a very large log: the devices do not wait for it.
JOURNAL_SECONDS = 0.15
COUNT_SECONDS = 0.05

PREPARE_SECONDS = 1.0

NOTHING_RAN = -1


class Runner:
    """The run of one job."""

    def __init__(self, spec: Spec, folder: str) -> None:
        self._spec = spec
        self._folder = folder
        self._outputs: list[Output] = []
        self._poll = select.poll()
        self._stop_requested = False
        self._kill_at = 0.0
        self._ended: dict[int, int] = {}
        self._journal = journal.Journal()
        share = spec["journal"]
        self._budget = journal.Budget(share["lines"], share["seconds"], share["spent"])
        self._works = works(spec, folder)
        self._report = Report(spec, folder, self._budget, [work.name for work in self._works])
        self._model = ""
        # What is needed when a step fails is imported while it runs, since an upgrade may come; but not for
        # a step that is over before that would be done.
        self._prepare_at: float | None = time.monotonic() + PREPARE_SECONDS
        self._wakeup, wakeup_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._poll.register(self._wakeup, select.POLLIN)
        signal.set_wakeup_fd(wakeup_end, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, self._on_signal)
        for number in (signal.SIGINT, signal.SIGHUP):
            # A terminal's Ctrl-C or hang-up is meant for whoever watches, not for the job.
            signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            self._stop_requested = True

    def _is_stopped(self) -> bool:
        return self._stop_requested

    def run(self) -> Result:
        """Run the steps; give the result."""
        failed = ""
        failure = ""
        exit_status = NOTHING_RAN
        stopped = False
        done = {step["name"]: step for step in self._spec.get("done", ())}
        for work, step in zip(self._works, self._report.steps, strict=True):
            if step["name"] in done:
                step.update(done[step["name"]])
                exit_status = 0
                continue
            stopped = stopped or (self._stop_requested and not failed)
            if stopped or failed:
                self._skip(step, "the job was killed" if stopped else f"the {failed} step failed")
                continue
            reason = self._reason_to_skip(work)
            if reason:
                self._skip(step, reason, tell=True)
                continue
            status, failure = self._run_step(work, step)
            # A step of which nothing ran, after others that did, is a failure like any other.
            exit_status = 1 if status == NOTHING_RAN and exit_status != NOTHING_RAN else status
            if step["state"] != "succeeded":
                stopped = step["state"] == "killed"
                failed = "" if stopped else step["name"]
        self._end_leftovers()
        self._close_outputs()
        return {
            "format": documents.FORMAT,
            "job_id": self._spec["job_id"],
            "attempt": self._spec["attempt"],
            "state": "killed" if stopped else "failed" if failed else "succeeded",
            "stopped": stopped,
            "exit_status": exit_status,
            "failed_step": failed,
            "failure": failure if failed else "",
            "model": self._model,
            "finished_at": _now(),
            "steps": self._report.steps,
            "progress": self._report.last_progress,
            "warnings": self._report.warnings,
            "journal_spent": self._budget.spent(journal.boot_seconds()),
        }

    def _reason_to_skip(self, work: Work) -> str:
        try:
            return work.skip()
        except Exception as error:
            return f"a {_fault(error)}"

    def _skip(self, step: StepDocument, reason: str, *, tell: bool = False) -> None:
        step["state"] = "skipped"
        step["note"] = reason
        if tell and self._outputs:
            # Into the log of the step before, and from there into the journal.
            self._outputs[-1].write(f"[lfsvc] {step['name']} skipped: {reason}\n".encode("utf-8", "backslashreplace"))

    def _run_step(self, work: Work, step: StepDocument) -> tuple[int, str]:
        """Run one step to its end; give its exit status and, where it failed, the sentence."""
        step["started_at"] = _now()
        step["state"] = "running"
        try:
            prepare_process(self._spec)
            prepared = work.prepare()
        except (steps.CannotRun, OSError) as error:
            return self._cannot_run(step, str(error))
        if prepared is None:
            return self._end_step(work, step, 0)
        step["log"] = prepared.log_path
        self._report.warnings += prepared.warnings
        for warning in prepared.warnings:
            note(prepared.log, warning)
        self._report.begin(step["name"], _trainer_log(work.output_dir))
        self._report.write()
        pipe, pipe_end = os.pipe2(os.O_CLOEXEC)
        try:
            pid = spawn(prepared, self._spec["environment"], pipe_end)
        except (OSError, ValueError) as error:
            os.close(pipe)
            os.close(prepared.log)
            reason = getattr(error, "strerror", None) or str(error)
            return self._cannot_run(step, f"{prepared.program} cannot be started: {reason}.")
        finally:
            os.close(pipe_end)
        self._after_start()
        output = Output(pipe, prepared.log, self._copy_of(step))
        self._outputs.append(output)
        self._poll.register(pipe, select.POLLIN)
        status = self._wait_for(pid, output)
        self._report.end()
        return self._end_step(work, step, status, output.lost_because)

    def _end_step(self, work: Work, step: StepDocument, status: int, lost_because: str = "") -> tuple[int, str]:
        """See to what a step has left, now that its program has ended with `status`."""
        step["exit_status"] = status
        # What a killed step made is not complete, whatever it says.
        try:
            failure = work.finish((status or NOTHING_RAN) if self._stop_requested else status, self._is_stopped)
        except Exception as error:
            # The rest of the job, and the word about its end, must not be lost over it.
            failure = f"A {_fault(error)}."
        self._report.warnings += work.warnings
        step["finished_at"] = _now()
        self._model = work.model or self._model
        if self._stop_requested and not (status == 0 and work.model):
            step["state"] = "killed"
            return status, ""
        step["state"] = "failed" if status or failure else "succeeded"
        if status:
            failure = steps.describe_end(step["name"], status, step["log"], lost_because)
        return (status or 1 if failure else 0), failure

    def _cannot_run(self, step: StepDocument, sentence: str) -> tuple[int, str]:
        step["finished_at"] = _now()
        step["state"] = "failed"
        step["exit_status"] = NOTHING_RAN
        return NOTHING_RAN, sentence

    def _after_start(self) -> None:
        """What need not be done before the job's first instruction."""
        try:
            documents.reserve_result(self._folder)
        except OSError:
            pass
        self._report.nudge()

    def _copy_of(self, step: StepDocument) -> JournalCopy | None:
        if not self._journal.available or not step["log"]:
            return None
        fields = journal.job_fields(
            job_id=self._spec["job_id"],
            name=self._spec["name"],
            command=self._spec["command"],
            task=self._spec["task"],
            step=step["name"],
            log=step["log"],
        )
        try:
            return JournalCopy(step["log"], self._journal, self._budget, fields)
        except OSError:
            return None

    def _wait_for(self, pid: int, output: Output) -> int:
        """Move output until the step's process has ended; give its exit status, 128+N for signal N."""
        while pid not in self._ended:
            self._turn()
        output.drain()
        return self._ended.pop(pid)

    def _turn(self, deadline: float | None = None) -> None:
        """Wait for one thing to happen, until `deadline` (monotonic seconds), and see to it."""
        if self._stop_requested and not self._kill_at:
            self._kill_at = time.monotonic() + self._spec["grace_seconds"]
            self._signal_all(signal.SIGTERM)
        if self._kill_at and time.monotonic() >= self._kill_at:
            self._signal_all(signal.SIGKILL)
            # Whoever forked meanwhile is met by the next round.
            self._kill_at = time.monotonic() + 0.05
        # The pipe first: the journal may lag, the job may not.
        copies = [output.copy for output in self._outputs if output.copy is not None]
        more = [copy for copy in copies if copy.feed()]
        blocked = any(copy.blocked for copy in copies)
        if blocked:
            self._poll.register(self._journal.fileno(), select.POLLOUT)
        self._prepare_for_failure()
        waits = (deadline, self._kill_at or None, self._report.due, self._prepare_at)
        ends = [end for end in waits if end is not None]
        wait = 0.0 if more else max(0.0, min(ends) - time.monotonic()) if ends else None
        ready = {fd for fd, _ in self._poll.poll(None if wait is None else wait * 1000)}
        if blocked:
            self._poll.unregister(self._journal.fileno())
        for output in self._outputs:
            if output.open and output.pipe in ready:
                self._pump(output)
                self._report.printed()
        self._report.turn()
        if self._wakeup in ready:
            try:
                os.read(self._wakeup, PIECE_BYTES)
            except BlockingIOError:
                pass
        self._reap()

    def _prepare_for_failure(self) -> None:
        if self._prepare_at is not None and time.monotonic() >= self._prepare_at:
            self._prepare_at = None
            steps.prepare_for_failure()

    def _pump(self, output: Output) -> None:
        for _ in range(16):
            if not output.pump():
                break
        if not output.open:
            self._poll.unregister(output.pipe)

    def _reap(self) -> bool:
        """Take in the children that have ended; False where there is no child left at all."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            code = os.waitstatus_to_exitcode(status)
            self._ended[pid] = code if code >= 0 else 128 - code

    def _signal_all(self, number: int) -> None:
        for process in processes.descendants(os.getpid()):
            process.signal(number)

    def _end_leftovers(self) -> None:
        """End what the steps left behind. As a subreaper this process has every orphan of theirs as its child."""
        if not self._reap():
            return
        left = processes.descendants(os.getpid())
        if left and not self._stop_requested:
            named = ", ".join(process.describe() for process in left[:5])
            more = f" and {len(left) - 5} more" if len(left) > 5 else ""
            count = "1 process" if len(left) == 1 else f"{len(left)} processes"
            text = f"ended {count} that the job left behind: {named}{more}"
            self._report.warnings.append(text)
            if self._outputs:
                self._outputs[-1].write(f"[lfsvc] {text}\n".encode("utf-8", "backslashreplace"))
        # From here on it is a kill like any other.
        self._stop_requested = True
        while self._reap():
            self._turn()

    def _close_outputs(self) -> None:
        deadline = time.monotonic() + JOURNAL_SECONDS
        for output in self._outputs:
            output.drain()
            copy = output.copy
            if copy is not None:
                self._finish_copy(copy, deadline)
                copy.close(deadline + COUNT_SECONDS)
                if copy.missed_lines and copy.blocked:
                    self._report.warnings.append(
                        f"{copy.missed_lines:,} lines are not in the journal, which took nothing more; the log has them"
                    )
            if output.lost_bytes:
                self._report.warnings.append(
                    f"{output.lost_bytes:,} bytes of output could not be written to the log: {output.lost_because}"
                )
            output.close()

    def _finish_copy(self, copy: JournalCopy, deadline: float) -> None:
        room = select.poll()
        finished = False
        while time.monotonic() < deadline:
            if copy.feed():
                continue
            if not copy.blocked:
                if finished:
                    return
                copy.finish()
                finished = True
                continue
            room.register(self._journal.fileno(), select.POLLOUT)
            room.poll(max(0.0, deadline - time.monotonic()) * 1000)


def _trainer_log(output_dir: str) -> TrainerLog | None:
    """The log that tells of a step's progress; nothing is imported for a step that has none."""
    if not output_dir:
        return None
    from lfsvc.llamafactory.progress import TrainerLog

    return TrainerLog(output_dir)


def _fault(error: Exception) -> str:
    return f"fault in lfsvc, please report it: {type(error).__name__}: {error}"


def _now() -> int:
    return time.time_ns() // 1000


def main(folder: str) -> int:
    """Run the job of a folder; give the runner's own exit status: 0 where result.json tells the rest."""
    document = documents.read(folder, documents.SPEC)
    if document is None:
        print(f"lfsvc runner: {folder} has no {documents.SPEC}", file=sys.stderr)
        return 2
    spec: Spec = document  # type: ignore[assignment]  # its format was checked by read()
    processes.become_subreaper()
    result = Runner(spec, folder).run()
    documents.write_result(folder, result)
    return 0
