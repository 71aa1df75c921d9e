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

from lfsvc.files import create_fresh, fingerprint, replace_file, sync_file, sync_folder, write_all
from lfsvc.llamafactory import models
from lfsvc.llamafactory.cli import PROGRAM
from lfsvc.llamafactory.merge import MARKER
from lfsvc.runner.steps import CannotRun, Prepared, Work, open_log, require_llamafactory, timestamp

TYPE_CHECKING = False
if TYPE_CHECKING:
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
        self._model = ""

    def _make_durable(self) -> None:
        """Put the adapter on the disk: after an interruption the training counts as done."""
        for name in (*ADAPTER_FILES, "adapter_config.json"):
            try:
                sync_file(os.path.join(self._plan["adapter"], name))
            except FileNotFoundError:
                continue

    def _adapter(self) -> list[tuple[int, int, int] | None]:
        return [fingerprint(os.path.join(self._plan["adapter"], name)) for name in ADAPTER_FILES]

    def model(self) -> str:
        """The merged model, once it is complete."""
        return self._model

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
        return models.local_folder(self._plan["base"], self._spec["working_directory"], self._spec["environment"])

    def prepare(self) -> Prepared:
        """Clear away what an interrupted merge left, see to the room, write the config."""
        program = require_llamafactory(self._spec)
        self._make_durable()
        output_dir = self._spec["output_dir"]
        recover(output_dir)
        merged = os.path.join(output_dir, MERGED)
        if os.path.lexists(merged) and not is_ours(merged):
            raise CannotRun(
                f"The adapter was not merged: {merged} is there and was not made by lfsvc, so it is left alone. "
                "Move it away and submit the training again, or merge by hand with llamafactory-cli export."
            )
        self._check_room(output_dir)
        warnings: list[str] = []
        try:
            self._partial = self._make_partial(output_dir)
            stem = f"merge_lora_{timestamp()}"
            config, fd = create_fresh(output_dir, stem, ".yaml", 0o666)
            try:
                export_dir = json.dumps(self._partial, ensure_ascii=False)
                write_all(fd, f"{self._plan['config']}export_dir: {export_dir}\n".encode("utf-8", "surrogateescape"))
            finally:
                os.close(fd)
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
        path = os.path.join(output_dir, PARTIAL)
        number = 1
        while True:
            try:
                os.mkdir(path)
                break
            except FileExistsError:
                # Somebody else's: `recover` has cleared away what is ours.
                number += 1
                path = os.path.join(output_dir, f"{PARTIAL}_{number}")
        marker = {
            "made_by": "lfsvc",
            "job_id": self._spec["job_id"],
            "base": self._plan["base"],
            "adapter": self._plan["adapter"],
        }
        replace_file(os.path.join(path, MARKER), json.dumps(marker, indent=1).encode(), mode=0o666, durable=False)
        return path

    def finish(self, exit_status: int) -> str:
        """Swap the complete model in, or take the incomplete one away."""
        if exit_status != 0:
            _remove(self._partial)
            return ""
        if not os.path.isfile(os.path.join(self._partial, "config.json")) or not models.weight_bytes(self._partial):
            _remove(self._partial)
            return "llamafactory-cli export ended well, but wrote no model."
        merged = os.path.join(self._spec["output_dir"], MERGED)
        try:
            sync_tree(self._partial)
            swap(self._partial, merged)
        except OSError as error:
            _remove(self._partial)
            return f"The merged model could not be put in its place, {merged}: {error.strerror}."
        self._model = merged
        if self._plan["delete_checkpoints"]:
            self.warnings += delete_checkpoints(self._spec["output_dir"])
        return ""


def is_ours(folder: str) -> bool:
    """Whether a folder is a merged model that lfsvc made."""
    return os.path.isfile(os.path.join(folder, MARKER))


def recover(output_dir: str) -> None:
    """Bring back or clear away what a merge left that was cut off: what is ours, nothing else."""
    merged, old = os.path.join(output_dir, MERGED), os.path.join(output_dir, OLD)
    if not os.path.lexists(merged) and is_ours(old):
        # Cut off between the two renames of `swap`.
        os.rename(old, merged)
    for name in os.listdir(output_dir):
        if name in (OLD, PARTIAL) or name.startswith(PARTIAL + "_"):
            path = os.path.join(output_dir, name)
            if is_ours(path):
                _remove(path)


def sync_tree(folder: str) -> None:
    """Make the files of a folder durable: a rename must not reach the disk before them."""
    for root, _, names in os.walk(folder):
        for name in names:
            sync_file(os.path.join(root, name))
        sync_folder(root)


def swap(new: str, place: str) -> None:
    """Put `new` in its place; what was there is removed once `new` is.

    Raises:
        OSError: what was there is there again or still.
    """
    parent = os.path.dirname(place)
    old = new
    if not os.path.lexists(place):
        os.rename(new, place)
        sync_folder(parent)
        return
    if not exchange(new, place):
        # This file system cannot exchange: `recover` mends what a crash between the two leaves.
        old = os.path.join(parent, OLD)
        os.rename(place, old)
        try:
            os.rename(new, place)
        except OSError:
            os.rename(old, place)
            raise
    sync_folder(parent)
    _remove(old)


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


def _remove(path: str) -> None:
    """Remove a folder of ours, best effort: what stays is hidden, marked, and met by the next merge."""
    if os.path.islink(path):
        os.unlink(path)
    elif path:
        shutil.rmtree(path, ignore_errors=True)


def _size(count: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1000:.0f} kB"
