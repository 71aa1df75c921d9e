"""Which steps a job has. What they need is imported before the first one starts: an upgrade may come while it runs."""

from __future__ import annotations

from lfsvc.runner.steps import LlamaFactory, Shell, Work

TYPE_CHECKING = False
if TYPE_CHECKING:
    from lfsvc.documents import Spec


def works(spec: Spec, job_folder: str) -> list[Work]:
    """The steps of a job, in their order. A script has one, whose start nothing else is to delay."""
    if spec["command"] == "shell":
        return [Shell(spec, job_folder)]
    found: list[Work] = [LlamaFactory(spec, job_folder)]
    # .get: a service that was started before an upgrade writes the spec of its own version.
    if spec.get("merge") is not None:
        from lfsvc.runner.merge import Merge

        found.append(Merge(spec, job_folder))
    if spec.get("results") is not None:
        from lfsvc.runner.collect import Collect

        found.append(Collect(spec, job_folder))
    return found
