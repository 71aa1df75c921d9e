"""The merge of a training's adapter into its base model: exported into a fresh folder, then swapped in.

At no moment is there half a model under output_dir/merged: an older one stays until the new one is
complete on the disk. What an interrupted merge left is cleared away by the next one.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil

from lfsvc.files import fingerprint, numbered, read_json, replace_file, sync_file, sync_folder, write_fresh
from lfsvc.llamafactory import models
from lfsvc.llamafactory.cli import PROGRAM
from lfsvc.llamafactory.merge import MARKER
from lfsvc.runner.steps import CannotRun, Prepared, Work, open_log, require_llamafactory, timestamp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from lfsvc.documents import Spec

MERGED = "merged"
# Made by lfsvc, as their marker says; nothing without it is ever touched.
PARTIAL = ".merged.partial"
OLD = ".merged.old"

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

# renameat2(2)
AT_FDCWD = -100
RENAME_EXCHANGE = 2


class Merge(Work):
    """`llamafactory-cli export`, where the training has written an adapter that can be merged."""

    name = "merge"

    def __init__(self, spec: Spec, job_folder: str) -> None:
        super().__init__(spec, job_folder)
        plan = spec["merge"]
        assert plan is not None
        self._plan = plan
        # Trained before an interruption, it is there already.
        self._before = [None] * len(ADAPTER_FILES) if spec.get("done") else self._adapter()
        self._partial = ""

    def _make_durable(self) -> None:
        """Put the adapter on the disk: after an interruption the training counts as done."""
        for name in (*ADAPTER_FILES, "adapter_config.json"):
            try:
                sync_file(os.path.join(self._plan["adapter"], name))
            except FileNotFoundError:
                continue

    def _adapter(self) -> list[tuple[int, int, int] | None]:
        return [fingerprint(os.path.join(self._plan["adapter"], name)) for name in ADAPTER_FILES]

    def skip(self) -> str:
        """By the plan, and by what the training has left."""
        if self._plan["skip"]:
            return self._plan["skip"]
        written = [new for new, old in zip(self._adapter(), self._before, strict=True) if new not in (None, old)]
        if not written:
            return f"the training has written no adapter into {self._plan['adapter']}"
        method = models.quantised_as(self._base())
        if method:
            return f"the base model {self._plan['base']} is quantised ({method}), and such a one takes no merge"
        return ""

    def _base(self) -> str:
        return models.local_folder(
            self._plan["base"], self._spec["working_directory"], self._spec["environment"], self._plan["cache_dir"]
        )

    def prepare(self) -> Prepared:
        """Clear away what an interrupted merge left, see to the room, write the config."""
        program = require_llamafactory(self._spec)
        output_dir = self._spec["output_dir"]
        merged = os.path.join(output_dir, MERGED)
        warnings: list[str] = []
        try:
            self._make_durable()
            recover(output_dir)
            if is_foreign(merged):
                raise CannotRun(_foreign(merged))
            self._check_room(output_dir)
            self._partial = self._make_partial(output_dir)
            stem = f"merge_lora_{timestamp()}"
            export_dir = json.dumps(self._partial, ensure_ascii=False)
            text = f"{self._plan['config']}# Renamed to {MERGED} when it is complete.\nexport_dir: {export_dir}\n"
            config = write_fresh(output_dir, stem, ".yaml", text.encode("utf-8", "surrogateescape"), 0o666)
        except OSError as error:
            raise CannotRun(f"The merge cannot write into {output_dir}: {error.strerror}.") from error
        log_path, log = open_log(output_dir, stem, self._job_folder, warnings)
        return Prepared(program, [PROGRAM, "export", config], log_path, log, warnings)

    def _check_room(self, output_dir: str) -> None:
        base = self._base()
        needed = models.weight_bytes(base) if base else 0
        place = os.statvfs(output_dir)
        free = place.f_bavail * place.f_frsize
        if needed > free:
            raise CannotRun(
                f"The adapter was not merged: a merged model takes about {_size(needed)}, as much as its base, and the "
                f"disk of {output_dir} has {_size(free)} left. Make room there and submit the training again, or turn "
                "merging off (merge.enabled: false in config.yaml)."
            )

    def _make_partial(self, output_dir: str) -> str:
        # What is there is somebody else's: `recover` has cleared away what is ours.
        path = next(name for name in numbered(os.path.join(output_dir, PARTIAL)) if not os.path.lexists(name))
        os.mkdir(path)
        self._mark(path, [])
        return path

    def _mark(self, folder: str, files: list[str]) -> None:
        """Write the marker; `files` are those that the export made, so that others are known as somebody's own."""
        marker = {
            "made_by": "lfsvc",
            "job_id": self._spec["job_id"],
            "base": self._plan["base"],
            "adapter": self._plan["adapter"],
            "files": files,
        }
        replace_file(os.path.join(folder, MARKER), json.dumps(marker, indent=1).encode(), mode=0o666, durable=False)

    def finish(self, exit_status: int, stopped: Callable[[], bool]) -> str:
        """Swap the complete model in, or take the incomplete one away."""
        failure = self._swap_in(stopped) if exit_status == 0 else ""
        if self.model:
            if self._plan["delete_checkpoints"] and not stopped():
                self.warnings += delete_checkpoints(self._spec["output_dir"])
        else:
            remove(self._partial)
        return failure

    def _swap_in(self, stopped: Callable[[], bool]) -> str:
        merged = os.path.join(self._spec["output_dir"], MERGED)
        if not os.path.isfile(os.path.join(self._partial, "config.json")) or not models.weight_bytes(self._partial):
            return "llamafactory-cli export ended well, but wrote no model."
        try:
            self._mark(self._partial, files_in(self._partial))
            if not sync_tree(self._partial, stopped):
                return ""
            if is_foreign(merged):
                # It came while the export ran.
                return _foreign(merged)
            kept = swap(self._partial, merged)
        except OSError as error:
            return f"The merged model could not be put in its place, {merged}: {error.strerror}."
        self.model = merged
        if kept:
            self.warnings.append(f"the merged model before this one had files of yours in it: it is kept as {kept}")
        try:
            sync_folder(self._spec["output_dir"])
        except OSError as error:
            self.warnings.append(f"{merged} may not survive a power cut: {error.strerror}")
        return ""


def is_foreign(merged: str) -> bool:
    """Whether something is there that lfsvc did not make."""
    return os.path.lexists(merged) and not is_ours(merged)


def _foreign(merged: str) -> str:
    return (
        f"The adapter was not merged: {merged} is there and was not made by lfsvc, so it is left alone. "
        "Move it away and submit the training again, or merge by hand with llamafactory-cli export."
    )


def is_ours(folder: str) -> bool:
    """Whether a folder is a merged model that lfsvc made."""
    return os.path.isfile(os.path.join(folder, MARKER))


def files_in(folder: str) -> list[str]:
    """The files of a folder and of those in it, relative to it."""
    return sorted(
        os.path.relpath(os.path.join(root, name), folder) for root, _, names in os.walk(folder) for name in names
    )


def has_files_of_others(folder: str) -> bool:
    """Whether a merged model holds what its export did not make: a conversion that took hours, say."""
    marker = read_json(os.path.join(folder, MARKER))
    try:
        return not set(files_in(folder)) <= {*marker["files"], MARKER}
    except (KeyError, TypeError):
        return True


def recover(output_dir: str) -> None:
    """Bring back or clear away what a merge left that was cut off: what is ours, nothing else."""
    merged, old = os.path.join(output_dir, MERGED), os.path.join(output_dir, OLD)
    if not os.path.lexists(merged) and is_ours(old):
        # Cut off between the two renames of `swap`.
        os.rename(old, merged)
    for name in os.listdir(output_dir):
        path = os.path.join(output_dir, name)
        if name == OLD and is_ours(path):
            put_aside(path)
        elif name == PARTIAL or name.startswith(PARTIAL + "_"):
            if is_ours(path):
                remove(path)
            else:
                # Cut off before its marker was written, it is empty; of anything else nothing is touched.
                try:
                    os.rmdir(path)
                except OSError:
                    continue


def sync_tree(folder: str, stopped: Callable[[], bool]) -> bool:
    """Make the files of a folder durable: a rename must not reach the disk before them. False: `stopped` in between."""
    for root, _, names in os.walk(folder):
        for name in names:
            if stopped():
                return False
            sync_file(os.path.join(root, name))
        sync_folder(root)
    return not stopped()


def swap(new: str, place: str) -> str:
    """Put `new` in its place; what was there is removed, or kept under the name that is given back.

    Raises:
        OSError: what was there is there again or still.
    """
    if not os.path.lexists(place):
        os.rename(new, place)
        return ""
    old = new
    if not exchange(new, place):
        # This file system cannot exchange: `recover` mends what a crash between the two leaves.
        old = os.path.join(os.path.dirname(place), OLD)
        os.rename(place, old)
        try:
            os.rename(new, place)
        except OSError:
            os.rename(old, place)
            raise
    return put_aside(old)


def put_aside(old: str) -> str:
    """Remove a merged model that another one has replaced; one with files of somebody's own is kept and named."""
    if not has_files_of_others(old):
        remove(old)
        return ""
    stem = os.path.join(os.path.dirname(old), f"{MERGED}_before_{timestamp()}")
    kept = next(name for name in numbered(stem) if not os.path.lexists(name))
    os.rename(old, kept)
    return kept


def exchange(one: str, other: str) -> bool:
    """Exchange two names atomically; False where libc, kernel or file system cannot.

    Source: renameat2(2), RENAME_EXCHANGE.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), one, None, other)


def delete_checkpoints(output_dir: str) -> list[str]:
    """Delete the checkpoints of a training; give a warning for each that stays."""
    warnings = []
    for name in sorted(os.listdir(output_dir)):
        path = os.path.join(output_dir, name)
        number = name.removeprefix("checkpoint-")
        if number == name or not (number.isascii() and number.isdigit()) or os.path.islink(path):
            continue
        try:
            shutil.rmtree(path)
        except OSError as error:
            warnings.append(f"{path} was not deleted: {error.strerror}")
    return warnings


def remove(path: str) -> None:
    """Remove a folder of ours, best effort: what stays is hidden, marked, and met by the next merge."""
    if os.path.islink(path):
        os.unlink(path)
        return
    try:
        names = os.listdir(path)
    except OSError:
        return
    # The marker last: cut off in between, the rest is still known as ours.
    for name in sorted(names, key=lambda name: name == MARKER):
        entry = os.path.join(path, name)
        if os.path.isdir(entry) and not os.path.islink(entry):
            shutil.rmtree(entry, ignore_errors=True)
        else:
            try:
                os.unlink(entry)
            except OSError:
                continue
    try:
        os.rmdir(path)
    except OSError:
        pass


def _size(count: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1000:.0f} kB"
