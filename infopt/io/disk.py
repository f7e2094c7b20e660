"""Writing a folder so that it is there whole, or not at all; and what is said when the disk refuses."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from infopt.errors import CheckpointError, InfoptError

FULL = (errno.ENOSPC, errno.EDQUOT)
PRIVATE = re.compile(r"\.(?:.+\.saving|fetch)-([0-9a-f]{8})-[0-9a-f]{8}")
"""Names of private folders: what they are for, a hash of the host's name, and chance."""
STALE = 24 * 3600
"""Seconds; another host's private folder that is older was left by a process that was killed."""


def refused(error: OSError, elsewhere: str) -> dict[str, str]:
    """The reason and the fix of an error that says that the disk is full or not ours to use.

    Args:
      error: of the call that failed.
      elsewhere: how to take another place.

    >>> refused(OSError(errno.ENOSPC, "No space left on device"), "set INFOPT_CACHE to another folder")
    {'why': 'No space left on device', 'fix': 'free some space, or set INFOPT_CACHE to another folder'}
    """
    first = "free some space" if error.errno in FULL else "make the folder readable and writable"
    return {"why": error.strerror or str(error), "fix": f"{first}, or {elsewhere}"}


@contextlib.contextmanager
def written_beside(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder`, on the same disk, so that the last step is a rename; removed whatever happens.

    Raises:
      CheckpointError: in place of whatever went wrong inside.
    """
    try:
        with private_folder(folder.parent, f"{folder.name}.saving") as temporary:
            yield temporary
    except InfoptError:
        raise
    except OSError as error:
        raise CheckpointError(f"{folder} could not be written.", **refused(error, "write to another one")) from error
    except Exception as error:  # orbax and what it stands on raise of many kinds
        raise CheckpointError(
            f"{folder} could not be written.",
            why=str(error) or type(error).__name__,
            fix="see the reason: free some space, say, or write to another disk",
        ) from error


@contextlib.contextmanager
def private_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new hidden folder in `parent`, locked as long as it is in use, and removed whatever happens.

    What a killed process left is removed by the next one that wants such a folder here.
    """
    parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(parent)
    folder, lock = _new_locked(parent, name)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Whether this is the only process that holds the folder. A lock ends with its process, however that ends.

    On a disk without locks each is told so.
    """
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        alone = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            alone = False
        except OSError:
            pass
        yield alone
    finally:
        os.close(lock)


def is_being_written(folder: Path) -> bool:
    """Whether somebody is at work on `folder`, or was killed at it since the last private folder was made beside it."""
    start = f".{folder.name}.saving-"
    return any(PRIVATE.fullmatch(name) and name.startswith(start) for name in os.listdir(folder.parent))


def _new_locked(parent: Path, name: str) -> tuple[Path, int]:
    while True:
        folder = parent / f".{name}-{_host()}-{secrets.token_hex(4)}"
        folder.mkdir()
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # it was taken for a leftover before it was locked
            continue
        except OSError:
            folder.rmdir()
            raise
        with contextlib.suppress(OSError):  # a disk without locks: then nobody gets one, and nothing is removed
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder, lock
        os.close(lock)


def _remove_leftovers(parent: Path) -> None:
    """Remove private folders that no process holds. A lock ends with its process, however that ends."""
    with contextlib.suppress(OSError):
        for name in os.listdir(parent):
            # Not each disk that hosts share tells one of them of the other's locks.
            if (of := PRIVATE.fullmatch(name)) and (of[1] == _host() or _age(parent / name) > STALE):
                _remove_unless_held(parent / name)


def _remove_unless_held(folder: Path) -> None:
    with contextlib.suppress(OSError):
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def _host() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def is_free(folder: Path) -> bool:
    """Whether nothing is there but, at most, an empty folder."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def sync(path: Path) -> None:
    """A file, or a folder and all that is in it, onto the disk: the rename that follows must not outlive the bytes."""
    for root, _, files in os.walk(path):
        for file in files:
            _sync_one(Path(root) / file)
        _sync_one(Path(root))


def sync_entries(folder: Path) -> None:
    """The names in a folder onto the disk, after a rename."""
    _sync_one(folder)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
