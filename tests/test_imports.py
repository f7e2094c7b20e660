"""The rooms: a module imports only from rooms above its own, so that the core never learns of what is built on it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import infopt

PACKAGE = Path(infopt.__file__).parent

ROOMS: list[tuple[str, ...]] = [
    ("errors", "typing", "interrupts", "progress"),
    ("texts", "folders"),
    ("devices",),
    ("formats",),
    ("qtensor",),
    ("interop",),
    ("spec",),
    ("masks",),
    ("hadamard",),
    ("cache",),
    ("sampling",),
    ("kernels",),
    ("ops",),
    ("model",),
    ("models",),
    ("methods",),
    ("nnx",),
    ("transforms",),
    ("reference",),
    ("io",),
    ("generation",),
    ("planner", "chat", "train", "timing", "evaluate", "audit"),
    ("ablation",),
    ("budget",),
    ("testing",),
    ("infopt",),  # the package's own face, which gathers what is above it
    ("bench", "tpu"),
    ("library",),
    ("cli",),
    ("__main__",),
]
"""From the top: what stands in one room does not import its neighbours."""
RANK = {room: i for i, rooms in enumerate(ROOMS) for room in rooms}
NEVER = {
    "models": ("transforms",),
    "transforms": ("models",),
    "io": ("transforms",),
    "generation": ("transforms", "models", "io"),
}
"""Beyond the order: rooms that must not know each other."""
ONLY = {"reference": ("spec",)}
LATE = {("model", "audit")}
"""A method of a Model that hands over to a module below, which it imports when it is called."""
GATHER = ("__init__", "parse")
"""Files of models and transforms that may import their siblings."""
SERVE = ("base",)
"""Files of models and transforms that their siblings may import."""


def sources() -> dict[str, str]:
    """Each module of the package and its text, by dotted name below the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts)] = path.read_text(encoding="utf-8")
    return found


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes that run, also inside functions; not what stands under `if TYPE_CHECKING`."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and is_type_checking(child.test):
            for other in child.orelse:
                yield from walk(other)
        else:
            yield from walk(child)


def imports(name: str, text: str, known: set[str]) -> set[str]:
    """The package's modules that a module imports, by dotted name below the package ("infopt": the package itself)."""
    found = set()

    def add(parts: list[str]) -> None:
        while parts and ".".join(parts) not in known and ".".join([*parts, "__init__"]) not in known:
            parts = parts[:-1]  # a name in a module, not a module
        found.add(".".join(parts) or "infopt")

    for node in walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, *rest = alias.name.split(".")
                if first == "infopt":
                    add(rest)
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                base = name.split(".")[: -node.level] + base
            elif base[0] != "infopt":
                continue
            else:
                base = base[1:]
            for alias in node.names:
                add([*base, alias.name])
    return found


def room(name: str) -> str:
    return "infopt" if name == "__init__" else name.split(".")[0]


def faults(name: str, text: str, known: set[str]) -> list[str]:
    """What a module imports that it must not."""
    mine, out = room(name), []
    if mine not in RANK:
        return [f"{name} stands in no room: add it to ROOMS"]
    for other in imports(name, text, known):
        theirs = room(other)
        if mine == theirs:
            me, sibling = name.split(".")[-1], other.split(".")[-1]
            if mine in ("models", "transforms") and me not in GATHER and sibling not in SERVE:
                out.append(f"{name} imports its sibling {other}")
        elif (name, other) in LATE:
            continue
        elif theirs in NEVER.get(mine, ()):
            out.append(f"{name} imports {other}: {mine} must not know {theirs}")
        elif mine in ONLY and theirs not in ONLY[mine]:
            out.append(f"{name} imports {other}: {mine} imports only {', '.join(ONLY[mine])}")
        elif RANK[theirs] >= RANK[mine]:
            out.append(f"{name} imports {other}, which stands below it")
    return out


SOURCES = sources()


@pytest.mark.parametrize("name", SOURCES)
def test_module_imports_only_from_rooms_above(name: str) -> None:
    assert faults(name, SOURCES[name], set(SOURCES)) == []


def test_every_room_exists() -> None:
    assert {room(name) for name in SOURCES} == set(RANK)


@pytest.mark.parametrize(
    ("name", "text", "caught"),
    [
        ("ops", "from infopt.model import Model", "stands below"),
        ("ops", "import infopt.model", "stands below"),
        ("ops", "def late():\n    from infopt import transforms", "stands below"),
        ("spec", "from infopt import generation", "stands below"),
        ("qtensor", "from .spec import Spec", "stands below"),
        ("cache", "import infopt as ip", "stands below"),
        ("errors", "from infopt.typing import Array", "stands below"),
        ("models.llama", "from infopt.transforms.base import Transform", "must not know"),
        ("models.llama", "from infopt.models import gemma3", "sibling"),
        ("models.llama", "from .gemma3 import Gemma3Config", "sibling"),
        ("transforms.gqa", "from infopt.models.llama import LlamaConfig", "must not know"),
        ("transforms.gqa", "from infopt.transforms.quantize import quantize", "sibling"),
        ("transforms.gqa", "from infopt.transforms import quantize", "sibling"),
        ("transforms.base", "from infopt.transforms.parse import parse_stack", "sibling"),
        ("io.gguf", "from infopt.transforms import quantize", "must not know"),
        ("generation", "from infopt.transforms.speculative import Speculative", "must not know"),
        ("reference", "from infopt.ops import rope", "imports only spec"),
        ("reference", "from infopt.qtensor import dequantize_array", "imports only spec"),
        ("newcomer", "import jax", "no room"),
    ],
)
def test_a_wrong_import_is_caught(name: str, text: str, caught: str) -> None:
    found = faults(name, text, set(SOURCES) | {name})
    assert len(found) == 1
    assert caught in found[0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model", "if TYPE_CHECKING:\n    from infopt.transforms.base import Transform"),
        ("model", "from infopt import cache as kv, ops\nfrom infopt.spec import Spec"),
        ("transforms.gqa", "from infopt.transforms.base import Transform"),
        ("transforms.parse", "from infopt.transforms.gqa import gqa"),
        ("transforms.__init__", "from infopt.transforms.gqa import gqa"),
        ("cli", "import infopt as ip"),
        ("ops", "import jax\nfrom infoptimal import x"),
    ],
)
def test_a_right_import_passes(name: str, text: str) -> None:
    assert faults(name, text, set(SOURCES)) == []
