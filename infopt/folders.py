"""Where infopt keeps files of its own."""

from __future__ import annotations

import os
from pathlib import Path

from infopt.errors import FetchError


def cache_folder() -> Path:
    """The folder for what infopt keeps: `INFOPT_CACHE`, else `XDG_CACHE_HOME/infopt`, else `~/.cache/infopt`.

    Raises:
      FetchError: no variable is set and there is no home folder.
    """
    try:
        if own := os.environ.get("INFOPT_CACHE"):
            return Path(own).expanduser().absolute()
        if xdg := os.environ.get("XDG_CACHE_HOME"):
            return Path(xdg).expanduser().absolute() / "infopt"
        return Path.home() / ".cache" / "infopt"
    except RuntimeError as error:
        raise FetchError(
            "there is no place for the cache folder", why=str(error), fix="set INFOPT_CACHE to a folder"
        ) from error
