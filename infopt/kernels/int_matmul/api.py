"""`int_matmul`: one signature for all implementations, and what each can serve."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from infopt.errors import InfoptError
from infopt.kernels.int_matmul import pallas_tpu, xla
from infopt.kernels.int_matmul.call import Call, rounded
from infopt.kernels.platforms import Implementation, check_served, run, runs_on
from infopt.qtensor import QTensor, of_layer
from infopt.typing import Array

IMPLEMENTATIONS: dict[str, Implementation] = {
    "xla": Implementation(xla.forward),
    "pallas_tpu": Implementation(pallas_tpu.forward, ("tpu",), pallas_tpu.refuses),
}
"""By name: `forward(call) -> [M, O]`, `refuses(call)`. An implementation joins by its file and a line here."""

MOST = 2**31 // (127 * 255)
"""Terms of 127 x 255 whose sum int32 holds."""


def available(platform: str | None = None) -> list[str]:
    """The names of the implementations that run compiled on a platform, the default backend's by default."""
    return runs_on(IMPLEMENTATIONS, platform)


def int_matmul(
    x: Array, weight: QTensor, layer: Any = None, *, implementation: str | None = None, interpret: bool = False
) -> Array:
    """x @ w.T with the rows of x rounded to 8 bits, each by a scale of its own; products are whole numbers.

    Of a row x and of a group g of a row of weights, which are level * scale_g + minimum_g:

        most = max|x|;  c = clip(round_half_even(x * (127 / most)), -127, 127)
        y = most * (1 / 127) * sum_g (scale_g * sum_g (c * level) + minimum_g * sum_g c)

    or with `most` the weight's own (`QTensor.input`) where its format is `static`; what is greater is cut off then.
    The inner sums are exact, in int32; all else is float32. A row's result depends on no other row. Rows of nothing
    greater than 2**-119 count as zeros; one that holds NaN or infinity gives NaN. There is no gradient.

    Source: per-token scales as Yao et al. 2022, "ZeroQuant", section 4.1; int8 products as Dettmers et al. 2022,
    "LLM.int8()", without its outliers kept apart.

    Args:
      x: `[..., I]`, float.
      weight: `[..., O, I]`, whole levels (`Row.whole`).
      layer: which of the leading axes, as for `ops.linear`.
      implementation: a name in `IMPLEMENTATIONS`; None takes what suits the platform and the weight. All compute the
        same whole numbers.
      interpret: run a Pallas kernel in Pallas' interpreter, on any platform.

    Returns:
      `[..., O]` in the dtype of x.

    Raises:
      InfoptError: shapes or a format that do not fit, more terms than int32 can sum, an implementation that is not
        there, or that cannot serve this platform or call.

    >>> import jax.numpy as jnp
    >>> from infopt.formats import Format
    >>> from infopt.qtensor import quantize_array
    >>> w = quantize_array(jnp.asarray([[1.0, 2.0, -4.0]]), Format("int8"), trailing=2)
    >>> w.codes, int_matmul(jnp.asarray([[127.0, 1.0, 1.0]]), w)  # (127 * 32 + 64 - 127) * 4 / 127
    (Array([[  32,   64, -127]], dtype=int8), Array([[126.01575]], dtype=float32))
    """
    index = tuple(jnp.asarray(i, jnp.int32) for i in (layer if isinstance(layer, tuple) else (layer,)) if i is not None)
    form, (outputs, terms) = weight.format, weight.shape
    if not form.row.whole:
        raise InfoptError(
            f"int_matmul: weights in {form.name}.", why="their levels are no whole numbers.", fix="int8 or int4, say"
        )
    if x.shape[-1:] != (terms,) or len(index) != weight.codes.ndim - 2:
        raise InfoptError(
            f"int_matmul: x {tuple(x.shape)}, weights {tuple(weight.codes.shape[:-2]) + weight.shape}, layer of "
            f"{len(index)} numbers.",
            why="each row is multiplied by all of one matrix.",
            fix=f"x [..., {terms}], and an index for each of the {weight.codes.ndim - 2} leading axes",
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise InfoptError(f"int_matmul: x is {x.dtype}.", why="it is rounded here.", fix="a float type")
    if terms > MOST:
        raise InfoptError(
            f"int_matmul: sums of {terms} terms.", why=f"int32 holds at most {MOST} of them.", fix="no activations"
        )
    if interpret and implementation is None:
        raise InfoptError(
            "int_matmul(interpret=True) names no kernel.",
            why="what suits this platform is no kernel of Pallas.",
            fix="implementation='pallas_tpu'",
        )
    if form.static and weight.input is None:
        raise InfoptError(
            f"int_matmul: weights in {form}, and no scale of inputs.",
            why="a method reads it off a text, and it is stored beside the codes (QTensor.input).",
            fix="model.convert(params) of a stack with quantize(static=True, method=...)",
        )
    static = of_layer(weight.input, index) if form.static else None
    call = Call(*rounded(x.reshape(-1, terms), static), weight, index, x.dtype)
    if implementation is not None:
        what = f"{call.codes.shape[0]} rows by {form}"
        check_served(IMPLEMENTATIONS, implementation, "the integer product", (call,), what, "xla")
        y = run(IMPLEMENTATIONS, implementation, (call,), interpret, "xla")
    elif pallas_tpu.refuses(call):
        y = xla.forward(call)
    else:
        y = jax.lax.platform_dependent(call, tpu=pallas_tpu.forward, default=xla.forward)
    return y.reshape(*x.shape[:-1], outputs)
