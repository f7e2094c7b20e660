"""English that every CPython carries: its documentation's topics, and the docstrings of its standard library.

A topic belongs to one of three splits by a hash of its name, the same in every CPython, so that no version's training
text is another's held-out text. Topics repeat each other by whole paragraphs ("specialnames" holds "customization"), so
a paragraph belongs to the first split that has it, held-out before calibration before training, and is there once.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import sysconfig
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from infopt.errors import InfoptError, nearest

SPLITS = {"heldout": 0.2, "calibration": 0.3, "training": 1.0}
"""Each split's upper bound on a topic's hash, a number in [0, 1)."""
OTHERS = frozenset(
    ("__pycache__", "_bundled", "idlelib", "lib-dynload", "lib2to3", "site-packages", "test", "tests", "turtledemo")
)
"""Folders of the standard library's that are no library, or not there everywhere."""
SHORTEST = 40
"""Characters that a docstring has at least, to be a text."""


def topics(split: str = "heldout") -> str:
    """The documentation topics of a split (`pydoc_data.topics`), one after the other.

    Args:
      split: "heldout" (the text of every evaluation here: some 140 kB), "calibration" or "training".

    Raises:
      InfoptError: there is no such split, or this Python carries no topics.

    >>> len(topics()) > 80_000, "Emulating container types" in topics(), "Lambdas" in topics("training")
    (True, True, True)
    """
    return "\n\n".join(documents(split))


def documents(split: str = "heldout") -> tuple[str, ...]:
    """The topics of a split one by one, as `topics`."""
    if split not in SPLITS:
        raise InfoptError(
            f"there is no split {split!r}.",
            why="topics are held out, for calibration, or for training.",
            fix=nearest(split, list(SPLITS)),
        )
    return _documents()[split]


def docstrings() -> tuple[str, ...]:
    """Training text: the standard library's docstrings, without paragraphs that any topic has (1.5 MB)."""
    seen = {_bare(paragraph) for text in _topics().values() for paragraph in text.split("\n\n")}
    return tuple(_new(_docstrings(), seen))


@functools.cache
def _documents() -> dict[str, tuple[str, ...]]:
    seen: set[str] = set()
    of = {name: [text for topic, text in sorted(_topics().items()) if split_of(topic) == name] for name in SPLITS}
    return {name: tuple(_new(of[name], seen)) for name in SPLITS}


def split_of(topic: str) -> str:
    """The split that a topic belongs to.

    >>> split_of("specialnames"), split_of("lambda")
    ('heldout', 'training')
    """
    at = int(hashlib.sha256(topic.encode()).hexdigest()[:8], 16) / 2**32
    return next(name for name, bound in SPLITS.items() if at < bound)


def digest(text: str) -> str:
    """What tables call a text: the first 12 digits of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _topics() -> Mapping[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InfoptError(
            "this Python carries no documentation topics.",
            why=f"pydoc_data.topics cannot be imported: {error}.",
            fix="use a CPython with its whole standard library, or give a text of your own",
        ) from error
    return topics


def _new(texts: Iterable[str], seen: set[str]) -> list[str]:
    """The texts without the paragraphs that were seen before; notes those that are there."""
    found = []
    for text in texts:
        kept = []
        for paragraph in text.strip().split("\n\n"):
            bare = _bare(paragraph)
            if bare and bare not in seen:
                kept.append(paragraph.rstrip())
            seen.add(bare)
        if kept:
            found.append("\n\n".join(kept))
    return found


def _bare(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _docstrings() -> list[str]:
    """Each docstring of the standard library's modules, classes and functions, in the order of their files."""
    root, found = Path(sysconfig.get_path("stdlib")), []
    for path in sorted(root.rglob("*.py")):
        if OTHERS & {*path.relative_to(root).parts}:
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):  # samples of damaged source, which other folders have too
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= SHORTEST:
                    found.append(text)
    return found
