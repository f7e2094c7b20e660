"""Models of the Hugging Face hub, in its own cache, with its own token and endpoint: `hf:owner/name`.

`huggingface_hub` does the asking, the progress bar, the small files and the layout of the cache, which other programs
share. It starts an interrupted file over in the next process, so the large ones are fetched here: into a part that the
next pull goes on with, checked by SHA-256, and renamed to where `huggingface_hub` looks for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from infopt.errors import FetchError, human, nearest
from infopt.io.hub import disk_error, disk_errors, sync

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo, DeleteCacheStrategy, HFCacheInfo

PREFIX = "hf:"
WORD = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
NAME = re.compile(
    rf"hf:({WORD}/{WORD})(?:@({WORD}))?(?::((?:[A-Za-z0-9_][\w.+-]*/)*[A-Za-z0-9_][\w.+-]*\.gguf))?", re.A
)
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
PART = re.compile(r"(.+)-00001-of-(\d{5})\.gguf")
LATER_PART = re.compile(r".+-(?!00001)\d{5}-of-\d{5}\.gguf")

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SMALL = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates/default.jinja", "additional_chat_templates/tool_use.jinja", INDEX,
)  # fmt: skip
"""What a folder of safetensors is read with; no code, and no weights of other libraries."""
CARDS = ("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt")
"""What says under which licence the weights are."""
LARGEST_CARD = 1 << 20  # bytes; a larger one is left where it is

CACHE_VARIABLE = "HF_HUB_CACHE"


@dataclasses.dataclass(frozen=True)
class Ref:
    """A model of the hub: `hf:owner/name`, `hf:owner/name@revision`, `hf:owner/name:file.gguf`.

    Args:
      repo: `owner/name`.
      revision: a branch, a tag or a commit.
      file: a GGUF file of the repository, or "" for its safetensors, or for the one GGUF file that it has.
    """

    repo: str
    revision: str = "main"
    file: str = ""

    @staticmethod
    def parse(name: str) -> Ref:
        """Read a name; what could leave a folder, or is no name, is refused.

        Raises:
          FetchError: it is not of the form above.

        >>> Ref.parse("hf:owner/name@v1:model-Q8_0.gguf")
        Ref(repo='owner/name', revision='v1', file='model-Q8_0.gguf')
        """
        match = NAME.fullmatch(name)
        if not match or ".." in name or "--" in match[1] or len(match[1]) > 96:
            raise FetchError(
                f"{name!r} is not the name of a model of the hub",
                why="letters, digits and single . - _ make a name",
                fix="hf:owner/name, hf:owner/name@revision or hf:owner/name:file.gguf",
            )
        return Ref(match[1], match[2] or "main", match[3] or "")

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return f"{PREFIX}{self.repo}{revision}" + (f":{self.file}" if self.file else "")

    @property
    def folder(self) -> Path:
        """The repository's folder in the hub's cache."""
        return cache_folder() / ("models--" + self.repo.replace("/", "--"))


@dataclasses.dataclass(frozen=True)
class _File:
    """A file of a repository: its size, and its SHA-256 if it is stored as a large one."""

    name: str
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model in the hub's cache.

    Args:
      name: as `Ref` reads it.
      path: a folder, or a .gguf file.
      size: bytes on the disk.
      modified: seconds since 1970.
      whole: False for what an interrupted pull left.
    """

    name: str
    path: Path
    size: int
    modified: float
    whole: bool = True


def cache_folder() -> Path:
    """The hub's cache: `HF_HUB_CACHE`, else `HF_HOME/hub`, else `~/.cache/huggingface/hub`."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).absolute()


# ---------------------------------------------------------------------------------------------------- what is here


def cached(ref: Ref) -> Path | None:
    """The folder or file of a model that is here whole; asks nobody.

    Raises:
      FetchError: the cache cannot be read, or holds several GGUF files and the name says none.
    """
    with disk_errors(cache_folder(), CACHE_VARIABLE):
        commit = ref.revision
        if not COMMIT.fullmatch(commit):
            try:
                commit = (ref.folder / "refs" / ref.revision).read_text(encoding="utf-8").strip()
            except (FileNotFoundError, NotADirectoryError):
                return None
        snapshot = ref.folder / "snapshots" / commit
        if not COMMIT.fullmatch(commit) or not snapshot.is_dir():
            return None
        if ref.file:
            return snapshot / ref.file if all((snapshot / part).is_file() for part in parts(ref.file)) else None
        if _whole(snapshot):
            return snapshot
        ggufs = _ggufs(snapshot)
    if len(ggufs) > 1:
        raise _several(ref, ggufs, "are here")
    return snapshot / ggufs[0] if ggufs else None


def _whole(snapshot: Path) -> bool:
    """Whether a folder has its config and all its safetensors."""
    try:
        weights = shards(snapshot / INDEX) if (snapshot / INDEX).exists() else [WEIGHTS]
    except FetchError:
        return False
    return all((snapshot / name).is_file() for name in ("config.json", *weights))


def shards(index: Path) -> list[str]:
    """The files that an index of safetensors names."""
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not files or not all(re.fullmatch(r"\w[\w.-]*\.safetensors", file, re.A) for file in files):
            raise ValueError("it does not name files beside itself")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FetchError(
            f"{index} is damaged", why=str(error) or type(error).__name__, fix="tell the model's owner, or use another"
        ) from error
    return sorted(files)


def parts(file: str) -> list[str]:
    """The files of a GGUF model, which may be split."""
    match = PART.fullmatch(file)
    if not match or int(match[2]) > 999:  # a damaged name must not list a hundred thousand
        return [file]
    return [f"{match[1]}-{i:05}-of-{match[2]}.gguf" for i in range(1, int(match[2]) + 1)]


def _ggufs(snapshot: Path) -> list[str]:
    """The whole GGUF models in a folder, a split one by its first part."""
    found = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.gguf") if path.is_file()]
    return [file for file in _firsts(found) if all((snapshot / part).is_file() for part in parts(file))]


def _firsts(files: Iterable[str]) -> list[str]:
    return sorted(f for f in files if f.endswith(".gguf") and not LATER_PART.fullmatch(f))


def _several(ref: Ref, ggufs: list[str], state: str) -> FetchError:
    shown = ", ".join(ggufs[:12]) + (f" and {len(ggufs) - 12} more" if len(ggufs) > 12 else "")
    return FetchError(
        f"{ref} is several models",
        why=f"{len(ggufs)} GGUF files {state}: {shown}",
        fix=f"name one, as in {ref}:{ggufs[0]}",
    )


def entries() -> list[Entry]:
    """The models in the hub's cache that are of a kind that can be read, and what interrupted pulls left."""
    with disk_errors(cache_folder(), CACHE_VARIABLE):
        out = []
        scan = _scan()
        for repo in scan.repos if scan else ():
            if repo.repo_type == "model":
                out += _entries_of(repo)
        for folder in cache_folder().glob("models--*"):
            if left := _unfinished(folder):
                name = PREFIX + folder.name.removeprefix("models--").replace("--", "/")
                modified = max(stat.st_mtime for stat in left.values())
                out.append(Entry(name, folder, sum(stat.st_size for stat in left.values()), modified, whole=False))
        return sorted((entry for entry in out if NAME.fullmatch(entry.name)), key=lambda entry: entry.name)


def _entries_of(repo: CachedRepoInfo) -> list[Entry]:
    out = []
    for revision in repo.revisions:
        known = sorted(ref for ref in revision.refs if "/" not in ref)
        which = "main" if "main" in known else (known or [revision.commit_hash])[0]
        place, modified = revision.snapshot_path, revision.last_modified
        if _whole(place):
            out.append(Entry(str(Ref(repo.repo_id, which)), place, revision.size_on_disk, modified))
            continue
        for file in _ggufs(place):
            size = sum((place / part).stat().st_size for part in parts(file))
            out.append(Entry(str(Ref(repo.repo_id, which, file)), place / file, size, modified))
    return out


def _unfinished(folder: Path) -> dict[Path, os.stat_result]:
    """What interrupted pulls left in a repository's folder, or what running ones have so far."""
    out = {}
    for path in folder.glob("blobs/*.incomplete"):
        with contextlib.suppress(FileNotFoundError):  # a running one was done
            out[path] = path.stat()
    return out


def _scan() -> HFCacheInfo | None:
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        return scan_cache_dir(cache_folder())
    except CacheNotFound:
        return None
    except ValueError as error:  # a file in place of the folder
        raise NotADirectoryError(errno.ENOTDIR, "it is not a folder") from error


# ---------------------------------------------------------------------------------------------------------- fetching


def pull(ref: Ref) -> Path:
    """Fetches what of a model is not here yet, or not as the hub has it now.

    Only what is read is fetched: config, tokenizer, licence and safetensors; or one GGUF file, with the parts it is
    split into. The revision is noted last, when all files are whole: a half-fetched model is not found by `cached`.

    Returns:
      The model's folder in the hub's cache, or the GGUF file in it.

    Raises:
      FetchError: there is no such model, it is not readable here or not for this user, the hub cannot be reached, or
        the cache cannot be written.
    """
    with _hub_errors(ref):
        commit, listed = _ask(ref)
        files, target = _needed(ref, commit, listed)
        snapshot = ref.folder / "snapshots" / commit
        missing = [listed[file] for file in files if not (snapshot / file).exists()]
        _check_space(ref, missing)
        for file in missing:
            _fetch(ref, commit, file)
        if not COMMIT.fullmatch(ref.revision):
            _note(ref.folder / "refs" / ref.revision, commit)
    return snapshot / target if target else snapshot


def _ask(ref: Ref) -> tuple[str, dict[str, _File]]:
    """The commit that a revision is now, and the files in it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi(library_name="infopt").model_info(ref.repo, revision=ref.revision, files_metadata=True)
        files = {}
        for file in info.siblings or ():
            sha256 = file.lfs.sha256 if file.lfs and SHA256.fullmatch(file.lfs.sha256) else ""
            files[file.rfilename] = _File(file.rfilename, int(file.size or 0), sha256)
        if not COMMIT.fullmatch(info.sha or ""):
            raise ValueError(f"the commit is {info.sha!r:.60}")
    except HfHubHTTPError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FetchError(
            f"what answers for {ref} is not a hub",
            why=" ".join(f"{type(error).__name__}: {error}".split())[:200],
            fix="check HF_ENDPOINT, and what stands between it and this machine",
        ) from error
    return str(info.sha), files


def _needed(ref: Ref, commit: str, listed: Mapping[str, _File]) -> tuple[list[str], str]:
    """The files to fetch, the small ones first; and which of them is the model, if one is."""
    ggufs = _firsts(listed)
    if not ref.file and "config.json" in listed and (INDEX in listed or WEIGHTS in listed):
        weights = [WEIGHTS]
        if INDEX in listed:
            _fetch(ref, commit, listed[INDEX])
            weights = shards(ref.folder / "snapshots" / commit / INDEX)
        cards = [file for file in CARDS if file in listed and listed[file].size <= LARGEST_CARD]
        files, target = [file for file in SMALL if file in listed] + cards + weights, ""
    elif not ref.file and len(ggufs) > 1:
        raise _several(ref, ggufs, "are in it")
    elif not ref.file and not ggufs:
        other = sorted(
            f for f in listed if f.endswith((".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".safetensors"))
        )
        raise FetchError(
            f"{ref} has no weights that are read here",
            why=f"neither {WEIGHTS} with a config.json nor a GGUF file is in it, but "
            + (", ".join(other[:3]) if other else "no weights at all"),
            fix="save_pretrained(..., safe_serialization=True) of transformers writes safetensors from the others",
        )
    else:
        target = ref.file or ggufs[0]
        files = parts(target)
    if lost := [file for file in files if file not in listed]:
        raise FetchError(
            f"{ref.repo} has no file {lost[0]!r}",
            why=nearest(lost[0], ggufs) if target and ggufs else "its other files ask for it, or the name does",
            fix="name a file that the hub shows under Files, of this revision",
        )
    return files, target


def _check_space(ref: Ref, files: list[_File]) -> None:
    """Raises at once where the disk would be full at the end."""
    needed = sum(file.size for file in files)
    needed -= sum(stat.st_size for stat in _unfinished(ref.folder).values())
    folder = next(path for path in (ref.folder, *ref.folder.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FetchError(
            f"{ref} does not fit onto the disk",
            why=f"it takes {human(needed)} more, and {human(free)} are free under {cache_folder()}",
            fix=f"free some space (infopt list, infopt rm), or set {CACHE_VARIABLE} to another folder",
        )


def _fetch(ref: Ref, commit: str, file: _File) -> None:
    """One file, whole or not at all."""
    from huggingface_hub import constants, hf_hub_download

    # Beyond that size the hub takes no plain requests.
    if file.sha256 and file.size <= constants.MAX_HTTP_DOWNLOAD_SIZE:
        _fetch_large(ref, commit, file)
    # A blob that is there is only linked to.
    hf_hub_download(ref.repo, file.name, revision=commit, library_name="infopt")


def _fetch_large(ref: Ref, commit: str, file: _File) -> None:
    """A file's bytes into the cache, under their hash, going on where an earlier pull was interrupted."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    blob = ref.folder / "blobs" / file.sha256
    part = blob.with_name(f"{file.sha256}.infopt.incomplete")
    lock = ref.folder.parent / ".locks" / ref.folder.name / f"{file.sha256}.lock"  # huggingface_hub takes it too
    for place in (blob, lock):
        place.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return
        if part.exists() and part.stat().st_size > file.size:
            part.unlink()
        with open(part, "ab") as out:
            http_get(
                hf_hub_url(ref.repo, file.name, revision=commit),
                out,
                resume_size=out.tell(),
                headers=build_hf_headers(library_name="infopt"),
                expected_size=file.size,
                displayed_filename=file.name,
            )
            sync(out)
        with open(part, "rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != file.sha256:
            part.unlink()
            raise FetchError(
                f"{file.name} of {ref} did not arrive as the hub has it",
                why=f"its SHA-256 is {found[:16]}..., not {file.sha256[:16]}...",
                fix=f"infopt pull {ref}; if it stays so, a proxy or HF_ENDPOINT serves something else",
            )
        os.replace(part, blob)


def _note(path: Path, commit: str) -> None:
    """Writes which commit a revision is, at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number, fresh = tempfile.mkstemp(prefix=".infopt-", dir=path.parent.parent)  # outside refs, where each file is one
    try:
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(commit)
        os.chmod(fresh, 0o644)  # others may share this cache
        os.replace(fresh, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
        raise


@contextlib.contextmanager
def _hub_errors(ref: Ref) -> Iterator[None]:
    """Turns what `huggingface_hub` raises into a FetchError that says how to go on."""
    import httpx2

    try:
        yield
    except (OSError, httpx2.HTTPError) as error:
        raise _explain(ref, error) from error


def _explain(ref: Ref, error: BaseException) -> FetchError:
    import httpx2
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{ref.repo}"
    said = " ".join(str(error).split())[:200]
    if isinstance(error, errors.GatedRepoError):
        return FetchError(
            f"{ref} is gated",
            why="its owner gives access to those who ask, and who say who they are",
            fix=f"accept its terms at {page}, then `hf auth login`, or set HF_TOKEN",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return FetchError(
            f"the hub shows no model {ref.repo}",
            why="there is none of that name, or it is private and no token was given that may see it",
            fix=f"check the name at {page}; for a private model `hf auth login`, or set HF_TOKEN",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return FetchError(
            f"{ref.repo} has no revision {ref.revision!r}",
            why="it names neither a branch, a tag nor a commit",
            fix=f"see {page}/commits, or leave @{ref.revision} out",
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return FetchError(
                f"the hub refuses {ref}",
                why=f"it answers {status}: the token is missing or expired, may not read this model, or there is none",
                fix=f"open {page}, then `hf auth login` with a token that may read it, or set HF_TOKEN",
            )
        fix = "wait a while, and pull again" if status == 429 or status >= 500 else "check the name and HF_ENDPOINT"
        return FetchError(f"the hub did not give {ref}", why=f"it answers {status}: {said}", fix=fix)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return FetchError(
            f"{ref} is not on this machine, and the hub is not asked",
            why="HF_HUB_OFFLINE is set",
            fix="unset it, and pull",
        )
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return _explain(ref, error.__cause__)
    if isinstance(error, httpx2.HTTPError):
        return FetchError(
            f"the hub at {constants.ENDPOINT} could not be reached for {ref}",
            why=said or type(error).__name__,
            fix="check the network, HF_ENDPOINT and HTTPS_PROXY, then pull again: what has arrived is kept",
        )
    if isinstance(error, OSError) and error.errno is not None:
        return disk_error(cache_folder(), error, CACHE_VARIABLE)
    return FetchError(
        f"what {constants.ENDPOINT} sent for {ref} is not what it had announced",
        why=said or type(error).__name__,
        fix="pull again; if it stays so, check HF_ENDPOINT, and what stands between it and this machine",
    )


# ---------------------------------------------------------------------------------------------------------- deleting


def remove(ref: Ref) -> int:
    """Deletes a model from the hub's cache: its files that no other revision shares.

    Without a revision or a file this takes what interrupted pulls left, too. A commit that has several names is gone
    under all of them.

    Returns:
      The bytes freed.

    Raises:
      FetchError: it is not there, or cannot be deleted.
    """
    with disk_errors(cache_folder(), CACHE_VARIABLE):
        if not ref.folder.is_dir():
            raise _not_here(ref)
        bare = ref == Ref(ref.repo)
        scan = _scan()
        repo = next((repo for repo in scan.repos if repo.repo_path.name == ref.folder.name), None) if scan else None
        if scan is None or repo is None:  # it has no snapshots, or is damaged
            if not bare:
                raise _not_here(ref)
            freed = sum(
                path.stat().st_size for path in ref.folder.rglob("*") if path.is_file() and not path.is_symlink()
            )
            shutil.rmtree(ref.folder)
            return freed
        left = _unfinished(ref.folder) if bare else {}
        freed = sum(stat.st_size for stat in left.values())
        # Of this repository alone: a plan is made by commits, and a copy of a repository has the same.
        plan = _plan(ref, dataclasses.replace(scan, repos=frozenset({repo})), repo)
        if plan is None and not left:
            raise _not_here(ref)
        for path in left:
            path.unlink(missing_ok=True)
        return freed + (_execute(plan) if plan else 0)


def _plan(ref: Ref, scan: HFCacheInfo, repo: CachedRepoInfo) -> DeleteCacheStrategy | None:
    """What to delete, or None where there is nothing of that name."""
    doomed = {r for r in repo.revisions if ref.revision in (*r.refs, r.commit_hash)}
    if ref.file:
        for revision in doomed:
            folder = revision.snapshot_path
            gone = {folder / part for part in parts(ref.file)}
            if files := [file for file in revision.files if file.file_path in gone]:
                useful = _whole(folder) or any(folder / other not in gone for other in _ggufs(folder))
                return scan.delete_files(*files) if useful else scan.delete_revisions(revision.commit_hash)
        return None
    if ref == Ref(ref.repo):  # and what was begun, under no name
        doomed |= {r for r in repo.revisions if not (r.refs or _whole(r.snapshot_path) or _ggufs(r.snapshot_path))}
    return scan.delete_revisions(*(r.commit_hash for r in doomed)) if doomed else None


def _execute(plan: DeleteCacheStrategy) -> int:
    logger = logging.getLogger("huggingface_hub.utils._cache_manager")  # it logs a refusal, and goes on
    was, logger.disabled = logger.disabled, True
    try:
        plan.execute()
    finally:
        logger.disabled = was
    for path in (*plan.files, *plan.repos, *plan.snapshots, *plan.refs, *plan.blobs):
        if path.exists():
            raise PermissionError(errno.EACCES, f"{path} cannot be deleted")
    return plan.expected_freed_size


def _not_here(ref: Ref) -> FetchError:
    return FetchError(
        f"{ref} is not on this machine", why=f"it is not in {cache_folder()}", fix="infopt list says what is here"
    )
