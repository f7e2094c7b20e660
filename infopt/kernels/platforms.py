"""An operation's table of implementations; a kernel on the platform that it is written for, and an error elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from infopt.errors import InfoptError, nearest

EVERYWHERE = ("cpu", "gpu", "tpu")


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One row of an operation's table.

    Args:
      forward: the operation; one that does not run everywhere takes `interpret=`, for Pallas' interpreter.
      platforms: where it runs compiled.
      refuses: of a call, why it cannot be served, or "".
    """

    forward: Callable[..., Any]
    platforms: tuple[str, ...] = EVERYWHERE
    refuses: Callable[..., str] = lambda *_: ""


Table = Mapping[str, Implementation]

_refused = Primitive("infopt_refused")
_refused.multiple_results = True


@_refused.def_abstract_eval
def _(*_: Any, out: Any, **__: Any) -> Any:
    return out


def _error(here: str, what: str, platforms: tuple[str, ...], fix: str) -> InfoptError:
    why = f"it is written for {' and '.join(platforms)}, and compiles for nothing else."
    return InfoptError(f"{what} on {here}.", why=why, fix=fix)


@_refused.def_impl
def _(*_: Any, what: str, platforms: tuple[str, ...], fix: str, **__: Any) -> Any:
    raise _error(jax.default_backend(), what, platforms, fix)


def _raise(ctx: Any, *_: Any, what: str, platforms: tuple[str, ...], fix: str, **__: Any) -> Any:
    raise _error(" or ".join(ctx.module_context.platforms), what, platforms, fix)


mlir.register_lowering(_refused, _raise)


def _batched(args: Any, axes: Any, *, out: Any, **static: Any) -> Any:
    """Under `jax.vmap` it stands for as many results, wherever the axis is."""
    (size,) = {x.shape[axis] for x, axis in zip(args, axes, strict=True) if axis is not None}
    wide = tuple(ShapedArray((size, *each.shape), each.dtype) for each in out)
    return _refused.bind(*args, out=wide, **static), [0] * len(out)


batching.primitive_batchers[_refused] = _batched


def only_on(platforms: Sequence[str], run: Callable[..., Any], args: tuple[Any, ...], what: str, fix: str) -> Any:
    """`run(*args)` in a program for one of `platforms`; whoever compiles it for another gets an InfoptError.

    The platform is known when a program is lowered, not when it is traced: one may be compiled on a CPU for a TPU.

    Args:
      platforms: `"cpu"`, `"gpu"`, `"tpu"`.
      run: a function of arrays.
      args: its arguments.
      what: how the error begins: "... was asked for".
      fix: what to ask for instead.

    Raises:
      InfoptError: when the program is lowered.
    """
    shapes, tree = jax.tree.flatten(jax.eval_shape(run, *args))
    avals = tuple(ShapedArray(s.shape, s.dtype) for s in shapes)

    def refuse(*args: Any) -> Any:
        found = _refused.bind(*jax.tree.leaves(args), out=avals, what=what, platforms=tuple(platforms), fix=fix)
        return jax.tree.unflatten(tree, found)

    names = {"gpu": "cuda"}
    return jax.lax.platform_dependent(*args, default=refuse, **{names.get(p, p): run for p in platforms})


def runs_on(table: Table, platform: str | None) -> list[str]:
    """The names of the implementations that run compiled on a platform, the default backend's by default."""
    platform = jax.default_backend() if platform is None else platform
    return [name for name, row in table.items() if platform in row.platforms]


def check_served(table: Table, name: str, operation: str, call: tuple[Any, ...], what: str, portable: str) -> None:
    """Raise InfoptError unless a table has an implementation of that name, and it serves a call.

    Args:
      table, name: where, and which.
      operation: what the table is of, in words.
      call: what its `refuses` takes.
      what: the call, in words.
      portable: an implementation that serves every call.
    """
    if name not in table:
        raise InfoptError(
            f"no implementation of {operation} is called {name!r}.",
            why=nearest(name, list(table)),
            fix="one of " + ", ".join(table),
        )
    if refused := table[name].refuses(*call):
        raise InfoptError(
            f"{name} cannot serve {what}: {refused}",
            why="it is written for some calls, and nothing is put in its place.",
            fix=f"implementation={portable!r}, which serves every call",
        )


def run(table: Table, name: str, args: tuple[Any, ...], interpret: bool, portable: str, **static: Any) -> Any:
    """What an implementation gives for arrays `args`: anywhere, interpreted, or only in a program for its platforms."""
    row = table[name]
    if row.platforms == EVERYWHERE:
        return row.forward(*args, **static)
    if interpret:
        return row.forward(*args, **static, interpret=True)
    return only_on(
        row.platforms,
        lambda *args: row.forward(*args, **static),
        args,
        f"{name} was asked for",
        f"implementation={portable!r}, or None for what suits the platform",
    )
