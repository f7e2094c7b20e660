"""Writing a folder so that it is there whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from infopt.errors import CheckpointError, InfoptError


@contextlib.contextmanager
def written_beside(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder`, on the same disk, so that the last step is a rename; removed whatever happens.

    Raises:
      CheckpointError: in place of whatever went wrong inside.
    """
    temporary = folder.parent / f".{folder.name}.saving-{secrets.token_hex(4)}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
    except InfoptError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise CheckpointError(
            f"{folder} could not be written.",
            why=error.strerror or str(error),
            fix="free some space, or write to another disk" if full else "write to a folder that is yours to change",
        ) from error
    except Exception as error:  # orbax and what it stands on raise of many kinds
        raise CheckpointError(
            f"{folder} could not be written.",
            why=str(error) or type(error).__name__,
            fix="see the reason: free some space, say, or write to another disk",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
