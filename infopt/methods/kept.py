"""What a method has computed, kept on disk step by step: never computed twice, and a run that was killed goes on."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from infopt.errors import InfoptError
from infopt.folders import cache_folder
from infopt.model import Family, Weights, family_of, shapes
from infopt.qtensor import Format
from infopt.spec import Spec

MOST = 8 << 30
"""Bytes that all results may take; when a new one is begun, those used longest ago make room for it."""


class Kept:
    """The steps of one computation, each a pytree of arrays in a file; or nothing is kept, where `folder` is None."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, step: str, like: Any) -> Any:
        """The step's pytree, of the structure, shapes and types of `like`; None if it is not there, or not whole."""
        if self.folder is None:
            return None
        leaves, structure = jax.tree.flatten(like)
        try:
            data = (self.folder / step).read_bytes()
            os.utime(self.folder)  # those that were used longest ago make room
        except OSError:
            return None
        body, told = data[:-32], data[-32:]
        sizes = [int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in leaves]
        if len(body) != sum(sizes) or hashlib.sha256(body).digest() != told:
            return None
        parts, at = [], 0
        for leaf, size in zip(leaves, sizes, strict=True):
            parts.append(np.frombuffer(body, np.dtype(leaf.dtype), size // leaf.dtype.itemsize, at).reshape(leaf.shape))
            at += size
        return jax.tree.unflatten(structure, [jax.numpy.asarray(part) for part in parts])

    def put(self, step: str, tree: Any) -> None:
        """Keep a step, whole or not at all.

        Raises:
          InfoptError: the folder cannot be written.
        """
        if self.folder is None:
            return
        body = b"".join(np.ascontiguousarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))
        fresh = self.folder / f".{step}-{secrets.token_hex(4)}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            fresh.write_bytes(body + hashlib.sha256(body).digest())
            os.replace(fresh, self.folder / step)
        except OSError as error:
            with contextlib.suppress(OSError):
                fresh.unlink()
            raise InfoptError(
                f"{self.folder} cannot hold what was computed.",
                why=str(error),
                fix="INFOPT_CACHE=..., another folder; or INFOPT_METHOD_CACHE=0, and nothing is kept",
            ) from error


def kept_for(
    method: str, spec: Spec, weights: Weights, formats: Mapping[str, Format], clip: str | None, platform: str
) -> Kept:
    """Where the steps of a method on these weights are kept: a hash of all that they depend on names the folder.

    `INFOPT_METHOD_CACHE=0` keeps nothing; nor is anything kept of a family that is not the library's own.
    """
    if os.environ.get("INFOPT_METHOD_CACHE") == "0" or not _of_the_library(family_of(spec)):
        return Kept(None)  # a family of the user's own may be another tomorrow, under the same name
    told = {
        "method": method,
        "spec": spec.to_json(),
        "formats": {name: repr(f) + repr(f.row) for name, f in sorted(formats.items())},
        "clip": clip,
        "platform": platform,
        "source": source(),
    }
    found = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name in sorted(shapes(spec)):
        for leaf in jax.tree.leaves(weights[name]):
            found.update(f"{name} {leaf.shape} {leaf.dtype}".encode())
            found.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    root = cache_folder() / "methods"
    folder = root / found.hexdigest()[:24]
    if not folder.exists():
        _make_room(root)
    return Kept(folder)


def _of_the_library(family: Family) -> bool:
    own = [f for f in (family.embed, family.block, family.final, family.logits) if f is not None]
    return bool(own) and all(getattr(f, "__module__", "").startswith("infopt.") for f in own)


@functools.cache
def source(*more: str) -> str:
    """A hash of the code that a method's result depends on, and of `more` rooms."""
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy", "optax")]
    package, found = Path(__file__).parents[1], hashlib.sha256(json.dumps(versions).encode())
    names = ("cache", "formats", "hadamard", "masks", "model", "ops", "qtensor", "spec")
    rooms = (
        file for room in ("methods", "models", "kernels", *more) for file in sorted(package.glob(f"{room}/**/*.py"))
    )
    for file in (*rooms, *(package / f"{name}.py" for name in names)):
        found.update(file.read_bytes())
    return found.hexdigest()


def _make_room(root: Path) -> None:
    try:
        folders = [
            (f.stat().st_mtime, sum(x.stat().st_size for x in f.iterdir()), f) for f in root.iterdir() if f.is_dir()
        ]
    except OSError:  # not there yet, or another process is about it
        return
    total = sum(size for _, size, _ in folders)
    for _, size, folder in sorted(folders):
        if total <= MOST:
            return
        shutil.rmtree(folder, ignore_errors=True)
        total -= size
