"""Files that must survive: atomic replacement, private folders, names that are not taken yet.

Imports nothing that costs: the runner uses it before its job starts.
"""

from __future__ import annotations

import errno
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

# A marker or a model's config is far smaller; what is larger is not what it seems.
MOST_JSON_BYTES = 16 * 1024 * 1024


def replace_file(path: str, data: bytes, *, mode: int = 0o600, durable: bool) -> None:
    """Replace the file at `path` by `data`, whole or not at all.

    A reader sees the old or the new content, never a part. With `durable` both the content and the
    name survive a power cut once this returns; without, either of the two may be there after it.

    Raises:
        OSError: the old file is untouched, and nothing is left beside it.
    """
    temporary = f"{path}.new"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        try:
            write_all(fd, data)
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except OSError:
        try:
            os.unlink(temporary)
        except OSError:
            pass
        raise
    if durable:
        sync_folder(os.path.dirname(path))


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`, however many calls that takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def fingerprint(path: str) -> tuple[int, int, int] | None:
    """Inode, size and mtime (ns) of a file, None where there is none: what is another one was written since.

    Not the clock: a file that is copied or unpacked brings an old mtime with it.
    """
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def sync_file(path: str) -> None:
    """Make the content of a file durable, where its file system can."""
    _sync(path, os.O_RDONLY)


def sync_folder(path: str) -> None:
    """Make the names in a folder durable, where its file system can."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: str, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some network file systems know no fsync, of folders above all.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def make_private(path: str) -> None:
    """Make a folder that only its user enters, with its parents.

    Raises:
        OSError: it cannot be made, or it belongs to somebody else (in /tmp anybody may have made it).
    """
    os.makedirs(path, mode=0o700, exist_ok=True)
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode) and not os.path.isdir(path):
        raise NotADirectoryError(f"{path} is not a folder")
    if os.stat(path).st_uid != os.getuid() or (stat.S_ISLNK(status.st_mode) and path.startswith("/tmp/")):  # noqa: S108 - the check is about /tmp
        raise PermissionError(f"{path} belongs to another user")
    if stat.S_IMODE(status.st_mode) & 0o077 and stat.S_ISDIR(status.st_mode):
        os.chmod(path, 0o700)


def create_fresh(folder: str, stem: str, extension: str, mode: int) -> tuple[str, int]:
    """Create `stem.extension` in `folder`, or `stem_2`, `stem_3` … where taken; give path and descriptor.

    The descriptor appends. The mode is subject to the umask.
    """
    for path in numbered(os.path.join(folder, stem), extension):
        try:
            return path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, mode)
        except FileExistsError:
            continue
    raise AssertionError("numbers do not end")


def write_fresh(folder: str, stem: str, extension: str, data: bytes, mode: int) -> str:
    """Write a file under a name that `create_fresh` finds; give its path. Of one that finds no room nothing stays."""
    path, fd = create_fresh(folder, stem, extension, mode)
    try:
        write_all(fd, data)
    except OSError:
        os.unlink(path)
        raise
    finally:
        os.close(fd)
    return path


def numbered(stem: str, extension: str = "") -> Iterator[str]:
    """The names that something may have, in their order: stem, stem_2, stem_3 …, without end."""
    yield stem + extension
    number = 2
    while True:
        yield f"{stem}_{number}{extension}"
        number += 1


def read_json(path: str) -> Any:
    """The JSON of a file; None where it is missing, cannot be read or is none."""
    import json

    try:
        with open(path, "rb") as file:
            return json.loads(file.read(MOST_JSON_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
