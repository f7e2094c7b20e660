"""From what a user calls a model to its files: infopt's own names, `hf:owner/name`, and the user's aliases.

Aliases stand in a TOML file, and are followed until they end at a name that is none, or at a path:

    [models]
    small = "smollm2-135m"
    chat = "hf:owner/name@v1.0"
    mine = "~/models/mine.gguf"
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from pathlib import Path

from infopt.errors import CheckpointError, FetchError, nearest
from infopt.io import hf, hub

WORD = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?")
PATH_ENDINGS = (".gguf", ".safetensors", ".bin", ".json")


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a name ends.

    Args:
      asked: the name.
      at: one of `hub.known()`, a model of the hub, or a path of the user's own.
      alias: whether aliases were followed.
    """

    asked: str
    at: str | hf.Ref | Path
    alias: bool = False

    def cached(self) -> Path | None:
        """Its file or folder if it is on this machine; asks nobody.

        Raises:
          FetchError: a cache cannot be read.
        """
        if isinstance(self.at, hf.Ref):
            return hf.cached(self.at)
        if isinstance(self.at, Path):
            return self.at if self.at.exists() else None
        return hub.cached(self.at)

    def pull(self) -> Path:
        """Fetches it, or what has changed since.

        Raises:
          FetchError: it cannot be fetched, or is a path, which nobody fetches.
        """
        if isinstance(self.at, hf.Ref):
            return hf.pull(self.at)
        if isinstance(self.at, Path):
            raise self.own("fetched" if self.at.exists() else "found")
        return hub.resolve(self.at)

    def remove(self) -> int:
        """Deletes it from the cache that it is in; the bytes freed.

        Raises:
          FetchError: it is not there, cannot be deleted, or is the user's own.
        """
        if isinstance(self.at, hf.Ref):
            return hf.remove(self.at)
        if isinstance(self.at, Path):
            raise self.own("deleted")
        return hub.remove(self.at)

    def own(self, what: str) -> FetchError:
        """Why nothing is done about a path."""
        return FetchError(
            f"{self.asked!r} cannot be {what}: it stands for {self.at}",
            why=f"that is what {config_file()} says, and your own files are not infopt's to fetch or delete",
            fix="deal with the file itself, or change the alias",
        )


def config_file() -> Path | None:
    """The file of aliases: `INFOPT_CONFIG`, else `XDG_CONFIG_HOME/infopt/models.toml`, else under `~/.config`.

    None where there is no home folder either.
    """
    try:
        if own := os.environ.get("INFOPT_CONFIG"):
            return Path(own).expanduser().absolute()
        if xdg := os.environ.get("XDG_CONFIG_HOME"):
            return Path(xdg).expanduser().absolute() / "infopt" / "models.toml"
        return Path.home() / ".config" / "infopt" / "models.toml"
    except RuntimeError:
        return None


def aliases() -> dict[str, str]:
    """What the user calls models: each alias and what it stands for, as written.

    Raises:
      FetchError: the file cannot be read, or is not of the form above.
    """
    path = config_file()
    if path is None or not (path.exists() or os.environ.get("INFOPT_CONFIG")):
        return {}
    form = '[models] and below it lines such as small = "hf:owner/name"'
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FetchError(
            f"the aliases in {path} cannot be read",
            why=error.strerror or str(error),
            fix="make the file readable, or let INFOPT_CONFIG name another",
        ) from error
    except (ValueError, RecursionError) as error:
        raise FetchError(f"{path} is not TOML", why=str(error) or type(error).__name__, fix=form) from error
    models = values.pop("models", {})
    if values:
        raise FetchError(f"{path} has an unknown entry {next(iter(values))!r}", why="only [models] is read", fix=form)
    if not isinstance(models, dict):
        raise FetchError(f"{path}: models is not a table", why=f"it is {models!r:.40}", fix=form)
    for name, target in models.items():
        if not _is_name(name):
            raise FetchError(
                f"{path}: {name!r} cannot be the name of a model",
                why="letters, digits and . - _ make a name; not two dots in a row, nor a file's ending",
                fix="choose another name",
            )
        if not isinstance(target, str) or not target:
            raise FetchError(
                f"{path}: {name} stands for {target!r:.40}", why="an alias is a text", fix=f'{name} = "hf:owner/name"'
            )
    return models


def looks_like_path(name: str) -> bool:
    """A name with a slash or a file's ending is taken for a path."""
    return any(mark in name for mark in "/\\~") or name.endswith(PATH_ENDINGS)


def _is_name(text: str) -> bool:
    return bool(WORD.fullmatch(text)) and ".." not in text and not looks_like_path(text)


def follow(name: str) -> Target:
    """Where a name ends.

    Args:
      name: one of infopt's own, an alias, or `hf:owner/name`. An alias goes before a name of infopt's own.

    Raises:
      FetchError: it is no name, or unknown; or its aliases are damaged, or lead nowhere or in a circle.

    >>> follow("hf:owner/name").at
    Ref(repo='owner/name', revision='main', file='')
    >>> follow("../models")
    Traceback (most recent call last):
    infopt.errors.FetchError: '../models' is not a name
      why: paths are your own, and neither fetched nor deleted here
      fix: infopt list shows the names that there are
    """
    if name.startswith(hf.PREFIX):
        return Target(name, hf.Ref.parse(name))
    if not _is_name(name):
        raise FetchError(
            f"{name!r:.100} is not a name",
            why="paths are your own, and neither fetched nor deleted here"
            if looks_like_path(name)
            else "letters, digits and . - _ make a name; or it starts with hf:",
            fix="infopt list shows the names that there are",
        )
    known, trail = aliases(), [name]
    while (at := trail[-1]) in known:
        end = known[at]
        if end in trail:
            raise FetchError(
                f"the alias {name!r} never ends",
                why=f"{config_file()} says {' -> '.join([*trail, end])}",
                fix="let one of them stand for hf:owner/name, or a path",
            )
        trail.append(end)
        if end.startswith(hf.PREFIX):
            return Target(name, hf.Ref.parse(end), alias=True)
        if looks_like_path(end):
            # A relative path is meant from where it is written.
            folder = config_file()
            return Target(name, (folder.parent if folder else Path()) / os.path.expanduser(end), alias=True)
    if at in hub.known():
        return Target(name, at, alias=len(trail) > 1)
    names = sorted({*hub.known(), *known} - set(trail))
    if len(trail) > 1:
        raise FetchError(
            f"the alias {name!r} stands for {at!r:.100}, and no model is called that",
            why=nearest(at, names),
            fix=f"correct it in {config_file()}: hf:owner/name, a path with a slash in it, or a known name",
        )
    raise FetchError(
        f"no model is called {name!r}",
        why=nearest(name, names),
        fix="give a known name, hf:owner/name, or the path of a .gguf file or of a Hugging Face folder",
    )


def locate(name_or_path: str | Path, fetch: bool = True) -> Path:
    """The file or folder of a model.

    Args:
      name_or_path: a path that exists, or what `follow` takes.
      fetch: whether a model that is not on this machine is fetched; one that is, is not looked for elsewhere.

    Raises:
      CheckpointError: there is nothing at the path.
      FetchError: as `follow`; or it is not here, and cannot be, or is not to be fetched.
    """
    name = str(name_or_path)
    if not name.startswith(hf.PREFIX):
        path = Path(os.path.expanduser(name))
        try:
            if path.exists():
                return path
        except OSError as error:  # a folder on the way is closed to us, or the name is longer than names can be
            raise CheckpointError(
                f"it cannot be told whether there is a file or folder {name!r:.100}.",
                why=error.strerror or str(error),
                fix="check the path, and the permissions of the folders that it leads through",
            ) from error
        if looks_like_path(name):
            raise CheckpointError(
                f"there is no file or folder {name!r}.",
                why="a name with a slash or a file's ending is taken for a path.",
                fix='check the path; for a model by name write infopt.load("smollm2-135m")',
            )
    target = follow(name)
    if found := target.cached():
        return found
    if not fetch:
        raise FetchError(f"{name} is not on this machine", why="only what is here is shown", fix=f"infopt pull {name}")
    return target.pull()
