"""A stack as text: parsed, never evaluated."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from typing import Any

from infopt.errors import StackSyntaxError, nearest
from infopt.methods import METHODS
from infopt.model import Model
from infopt.transforms.base import Transform, compose
from infopt.transforms.cache_kv import cache_kv
from infopt.transforms.dequantize import dequantize
from infopt.transforms.flash_attention import flash_attention
from infopt.transforms.gqa import gqa
from infopt.transforms.paged import paged
from infopt.transforms.quantize import quantize
from infopt.transforms.rotate import rotate
from infopt.transforms.sliding_window import sliding_window
from infopt.transforms.speculative import self_draft, speculative

FACTORIES: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        quantize,
        dequantize,
        rotate,
        cache_kv,
        flash_attention,
        gqa,
        sliding_window,
        paged,
        speculative,
        self_draft,
    )
} | METHODS
"""What a stack's text may name. A transform joins by one line here."""

DEFAULT = "cache_kv()"
"""What a command applies where it is told no stack, and the model has no cache yet (a saved stack may)."""

_EXAMPLE = "quantize(bits=8) | cache_kv()"


def parse_stack(text: str, most: int = 2000) -> Transform:
    """The transform that a text describes: calls joined by `|`, with literal arguments or calls inside.

    Args:
      text: as `"quantize(bits=8) | sliding_window(256, sinks=4) | cache_kv(bits=8)"`; "" is no transform.
      most: characters of a text that are read.

    Raises:
      StackSyntaxError: it does not parse, names what is no transform, or holds anything but literals.

    >>> parse_stack("gqa(1) | cache_kv()")
    gqa(kv_heads=1) | cache_kv()
    """
    if not isinstance(text, str):
        raise StackSyntaxError(
            f"a stack's text is a {type(text).__name__}.",
            why="a stack is read from characters.",
            fix=f"a text, as {_EXAMPLE!r}",
        )
    if not text.strip():
        return compose()
    if len(text) > most:
        raise StackSyntaxError(
            f"a stack's text of {len(text)} characters.",
            why="no stack is that long, and parsing takes memory.",
            fix=f"at most {most}",
        )
    try:
        tree = ast.parse(" ".join(text.split()), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise StackSyntaxError(
            f"cannot read the stack {text!r}: {e.args[0] if e.args else 'too deep'}.",
            why="its brackets, commas and quotes must be those of Python calls.",
            fix=f"transforms joined by |, as in {_EXAMPLE!r}",
        ) from None
    try:
        result = _read(tree)
    except RecursionError:
        raise StackSyntaxError(
            f"the stack {text[:40]!r}... is nested too deep.",
            why="parsing takes memory at each level.",
            fix=f"transforms joined by |, as in {_EXAMPLE!r}",
        ) from None
    if not isinstance(result, Transform):
        raise StackSyntaxError(
            f"{text!r} is not a transform.",
            why="a stack is one transform, or several in a row.",
            fix=f"transforms joined by |, as in {_EXAMPLE!r}",
        )
    return result


def stack_option(text: str | None) -> Callable[[Model], Model]:
    """What the option `--stack` makes of a model; parsed at once, so that a mistake is told before a model is read.

    Args:
      text: as for `parse_stack`; "none" or "" leaves the model as it is, and None is `DEFAULT` where it has no cache.

    Raises:
      StackSyntaxError: as `parse_stack`.

    >>> import infopt as ip
    >>> cached = stack_option(None)(ip.models.llama())
    >>> cached.spec.cache, stack_option(None)(cached) is cached
    (True, True)
    """
    if text is not None and text.strip() in ("", "none"):
        return lambda model: model
    stack = parse_stack(DEFAULT if text is None else text)
    return lambda model: model if text is None and model.spec.cache else stack(model)


def _read(node: ast.expr) -> Any:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        sides = [_read(node.left), _read(node.right)]
        for side in sides:
            if not isinstance(side, Transform):
                raise StackSyntaxError(
                    f"{side!r} is not a transform.",
                    why="| joins transforms.",
                    fix=f"transforms joined by |, as in {_EXAMPLE!r}",
                )
        return compose(*sides)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _call(node.func.id, node)
    if isinstance(node, ast.Name):
        raise StackSyntaxError(
            f"{node.id!r} in a stack's text is not a call.",
            why="only a factory's call makes a transform.",
            fix=f"{node.id}(), or a literal value",
        )
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise StackSyntaxError(
            f"{ast.unparse(node)[:60]!r} is code, and a stack's text is not evaluated.",
            why="a stack may come from a file or a stranger, so it is data.",
            fix=f"literal arguments only, as in {_EXAMPLE!r}",
        ) from None


def _call(name: str, node: ast.Call) -> Any:
    if name not in FACTORIES:
        raise StackSyntaxError(
            f"{name!r} is not a transform.",
            why="a stack's text calls only the factories that are known by name.",
            fix=nearest(name, list(FACTORIES)),
        )
    factory = FACTORIES[name]
    if any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords):
        raise StackSyntaxError(
            f"{name}(...) unpacks with *.", why="a text names no variables to unpack.", fix="write the arguments out"
        )
    if len({k.arg for k in node.keywords}) < len(node.keywords):
        raise StackSyntaxError(
            f"{name}(...) gives an argument twice.",
            why="one of the two values would be lost.",
            fix="leave one of the two out",
        )
    args = [_read(a) for a in node.args]
    kwargs = {str(k.arg): _read(k.value) for k in node.keywords}
    try:
        inspect.signature(factory).bind(*args, **kwargs)
    except TypeError as e:
        signature = ", ".join(str(p).split(":")[0] for p in inspect.signature(factory).parameters.values())
        raise StackSyntaxError(
            f"{name}: {e}.", why="the call does not fit the factory's arguments.", fix=f"{name}({signature})"
        ) from None
    try:
        return factory(*args, **kwargs)
    except TypeError as e:
        raise StackSyntaxError(
            f"{name}: {e}.", why="a value of another type was expected.", fix=f"see help(infopt.{name})"
        ) from None
