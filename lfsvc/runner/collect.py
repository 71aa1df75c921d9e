"""The step after an evaluation: its numbers join summary.csv."""

from __future__ import annotations

import os
import time

from lfsvc.files import read_json
from lfsvc.llamafactory import results
from lfsvc.llamafactory.merge import MARKER
from lfsvc.runner.steps import Work

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from lfsvc.documents import Spec


class Collect(Work):
    """Refreshes the table of all evaluations. Starts no program: it takes milliseconds."""

    name = "collect"

    def __init__(self, spec: Spec, job_folder: str) -> None:
        super().__init__(spec, job_folder)
        row = spec["results"]
        assert row is not None
        self._row = row
        # Evaluated before an interruption, they are there already.
        self._before = {} if spec.get("done") else results.snapshot(row["path"])
        trained_by = maker_of(row["model"])
        if row["trained_by"] and trained_by not in (0, row["trained_by"]):
            self.warnings.append(
                f"{row['model']} is no longer the model of job {row['trained_by']}: job {trained_by} made it anew"
            )

    def prepare(self) -> None:
        """Nothing to prepare."""

    def finish(self, exit_status: int, stopped: Callable[[], bool]) -> str:
        """Write the row; a table that cannot be written fails the step, the results stay where they are."""
        if exit_status != 0 or stopped():
            return ""
        row = self._row
        run: results.Run = {
            "run": row["run"],
            "mode": row["mode"],
            "type": row["type"],
            "model": row["model"],
            "path": row["path"],
            "finished_at": time.time_ns() // 1000,
        }
        try:
            self.warnings += results.collect(row["root"], run, self._before)
        except OSError as error:
            table = os.path.join(row["root"], "summary.csv")
            return (
                f"{table} cannot be written: {error.strerror or error}. The results themselves are in {row['path']}; "
                "mend the folder and submit the evaluation again."
            )
        return ""


def maker_of(model: str) -> int:
    """The job that made a merged model; 0 where it is none of ours."""
    marker = read_json(os.path.join(model, MARKER))
    try:
        return int(marker["job_id"])
    except (ValueError, KeyError, TypeError):
        return 0
