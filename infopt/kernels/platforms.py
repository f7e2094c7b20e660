"""A kernel on the platform that it is written for, and a clear error on any other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

from infopt.errors import InfoptError

_refused = Primitive("infopt_refused")
_refused.multiple_results = True


@_refused.def_abstract_eval
def _(*_: Any, out: Any, **__: Any) -> Any:
    return out


def _raise(ctx: Any, *_: Any, what: str, platforms: tuple[str, ...], fix: str, **__: Any) -> Any:
    here = " or ".join(ctx.module_context.platforms)
    raise InfoptError(
        f"{what} on {here}.",
        why=f"it is written for {' and '.join(platforms)}, and compiles for nothing else.",
        fix=fix,
    )


mlir.register_lowering(_refused, _raise)


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
