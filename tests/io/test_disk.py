"""Private folders: whose are removed, and whose are not; and what is said when the disk refuses."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

import infopt as ip
from infopt.io import disk
from infopt.testing import base_of

WRITER = """
import sys, time
from pathlib import Path
from infopt.io import disk
with disk.written_beside(Path(sys.argv[1])) as temporary:
    (temporary / "data-0").mkdir()
    (temporary / "data-0" / "big").write_text("x" * 1000)
    print(temporary, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that is in the middle of writing `tmp_path / "theirs"`, and its private folder."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "theirs")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process, Path(process.stdout.readline().strip())
    process.kill()
    process.communicate()


@pytest.mark.parametrize("name", ["mine", "theirs"])
@pytest.mark.parametrize("call", [ip.save, ip.export], ids=["save", "export"])
def test_what_a_killed_process_left_is_removed_by_the_next_write_and_a_live_one_stays(
    call: object, name: str, writer: tuple[subprocess.Popen[str], Path], tmp_path: Path
) -> None:
    process, theirs = writer
    model, params = base_of("llama")
    call(tmp_path / "first", model, params)  # type: ignore[operator]
    assert (theirs / "data-0" / "big").exists(), "its process lives"
    os.utime(theirs, (time.time() - 10 * disk.STALE,) * 2)
    call(tmp_path / "second", model, params)  # type: ignore[operator]
    assert (theirs / "data-0" / "big").exists(), "its process lives, however old it is"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert theirs.exists()
    call(tmp_path / name, model, params)  # type: ignore[operator]
    assert {p.name for p in tmp_path.iterdir()} == {"first", "second", name}


def test_a_process_that_ends_well_is_not_disturbed(writer: tuple[subprocess.Popen[str], Path], tmp_path: Path) -> None:
    with disk.private_folder(tmp_path, "mine.saving"):
        process, theirs = writer
        process.communicate("")
        assert process.returncode == 0
        assert not theirs.exists()


def test_another_hosts_folder_is_left_alone_for_a_day(tmp_path: Path) -> None:
    theirs = tmp_path / ".stack.saving-00000000-01234567"
    assert not theirs.name.startswith(f".stack.saving-{disk._host()}")
    theirs.mkdir()
    with disk.private_folder(tmp_path, "mine.saving"):
        assert theirs.exists()
    os.utime(theirs, (time.time() - disk.STALE - 60,) * 2)
    with disk.private_folder(tmp_path, "mine.saving"):
        assert not theirs.exists()


@pytest.mark.parametrize(
    "name", [".stack.saving-{}", ".stack-{}-01234567", "a.saving-{}-01234567", ".saving-{}-0123456"]
)
def test_folders_of_other_names_are_left_alone(name: str, tmp_path: Path) -> None:
    other = tmp_path / name.format(disk._host())
    other.mkdir()
    os.utime(other, (0, 0))
    with disk.private_folder(tmp_path, "mine.saving"):
        pass
    assert other.exists()


def test_links_and_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "a").write_text("mine")
    link, file = (tmp_path / f".stack.saving-{disk._host()}-0000000{i}" for i in (1, 2))
    link.symlink_to(tmp_path / "precious")
    file.write_text("mine")
    with disk.private_folder(tmp_path, "mine.saving"):
        pass
    assert (tmp_path / "precious" / "a").exists() and link.is_symlink() and file.exists()


def test_a_disk_without_locks_is_written_and_nothing_there_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    left = tmp_path / f".stack.saving-{disk._host()}-01234567"
    left.mkdir()
    monkeypatch.setattr(fcntl, "flock", refuse)
    with disk.written_beside(tmp_path / "out") as temporary:
        os.rename(temporary, tmp_path / "out")
    assert (tmp_path / "out").exists() and left.exists()


def test_a_folder_taken_for_a_leftover_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    mkdir = Path.mkdir

    def swept(self: Path, *args: object, **kwargs: object) -> None:
        mkdir(self, *args, **kwargs)  # type: ignore[arg-type]
        if self.parent == tmp_path:
            made.append(self)
            if len(made) == 1:
                disk._remove_leftovers(tmp_path)

    monkeypatch.setattr(Path, "mkdir", swept)
    with disk.private_folder(tmp_path, "mine.saving") as folder:
        assert folder.exists() and len(made) == 2
        assert not made[0].exists()


def test_data_that_no_stack_names_goes_when_nobody_else_writes(tmp_path: Path) -> None:
    model, params = base_of("llama")
    ip.save(tmp_path / "stack", model, params)
    left = tmp_path / "stack" / "data-0123456789abcdef"
    left.mkdir()
    (tmp_path / "stack" / "notes").mkdir()
    with disk.private_folder(tmp_path, "stack.saving"):  # another save, about to name its data
        ip.save(tmp_path / "stack", model, params)
        assert left.exists()
    ip.save(tmp_path / "stack", model, model.init(jax.random.key(1)))
    assert not left.exists()
    assert sorted(p.name[:5] for p in (tmp_path / "stack").iterdir()) == ["data-", "notes", "stack"]
    ip.load(tmp_path / "stack")
