"""`decode_attention`: one signature for all implementations, and what each can serve."""

from __future__ import annotations

from typing import Any

import jax

from infopt.cache import Layout
from infopt.errors import InfoptError
from infopt.kernels.decode_attention import pallas_gpu, pallas_tpu, xla
from infopt.kernels.decode_attention.call import Call
from infopt.kernels.flash_attention.options import Options
from infopt.kernels.flash_attention.sums import with_sink_logits
from infopt.kernels.platforms import Implementation, check_served, run, runs_on
from infopt.masks import Late
from infopt.typing import Array

IMPLEMENTATIONS: dict[str, Implementation] = {
    "xla": Implementation(xla.forward),
    "blockwise": Implementation(xla.blockwise),
    "pallas_tpu": Implementation(pallas_tpu.forward, ("tpu",), pallas_tpu.refuses),
    "pallas_gpu": Implementation(pallas_gpu.forward, ("gpu",), pallas_gpu.refuses),
}
"""By name: `forward(call) -> (out, lse)`, `refuses(call)`. An implementation joins by its file and a line here."""


def available(platform: str | None = None) -> list[str]:
    """The names of the implementations that run compiled on a platform, the default backend's by default."""
    return runs_on(IMPLEMENTATIONS, platform)


def decode_attention(
    q: Array,
    keys: Any,
    values: Any,
    layer: Any,
    *,
    layout: Layout,
    heads: int,
    positions: Array,
    lengths: Array,
    table: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_queries: Array | None = None,
    sink_logits: Array | None = None,
    late: Late | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    interpret: bool = False,
) -> Any:
    """Causal attention of new tokens over the cache that holds them already (Dao et al. 2023, "Flash-Decoding").

    The layout says who sees whom: its window and sinks, and which position each slot holds. With a block table it is
    PagedAttention (Kwon et al. 2023).

    Args:
      q: queries `[B, T, H, D]`: one token, k + 1 under speculation, or a chunk of a prompt.
      keys, values: whole stacks `[R, B, S, K * D]`, in pages `[R, pool of slots, K * D]`; arrays, or QTensors whose
        leaves have that form: they are dequantised where they are used.
      layer: which of the R layers.
      layout: of the cache (`infopt.cache.Layout`).
      heads: K, which divides H.
      positions: `[B, T]` of the queries.
      lengths: `[B]` tokens that each row holds, the new ones included; a row of 0 gives zeros.
      table: `[B, pages]`, where the layout has pages.
      scale: multiplies scores; 1 / sqrt(D) by default.
      softcap: scores become softcap * tanh(score / softcap).
      sink_queries: `[B, T, H, D]`, the queries as they look at the window's sinks; q by default.
      sink_logits: `[H]`: one more score a head that has no value.
      late: of keys that are rounded late, which ones these are (`infopt.masks.Late`).
      return_lse: whether to return the log-sum-exp `[B, T, H]` too (without the sink logits).
      implementation: a name in `IMPLEMENTATIONS`; None takes what suits the platform and the shape.
      interpret: run a Pallas kernel in Pallas' interpreter, on any platform.

    Returns:
      `[B, T, H, D]` in the dtype of q; with `return_lse` a pair.

    Raises:
      InfoptError: shapes that do not fit, a table without pages or pages without a table, heads that do not divide, an
        implementation that is not there, or that cannot serve this platform or call (it names one that can).
    """
    if heads < 1 or q.shape[2] % heads:
        raise InfoptError(
            f"decode_attention: {heads} key/value heads do not divide {q.shape[2]} query heads.",
            why="each serves an equal share of them.",
            fix="a number of key/value heads that divides",
        )
    batch, new, all_heads, _ = q.shape
    for what, x, want in (
        ("positions", positions, (batch, new)),
        ("lengths", lengths, (batch,)),
        ("sink_queries", sink_queries, q.shape),
        ("sink_logits", sink_logits, (all_heads,)),
    ):
        if x is not None and x.shape != want:
            raise InfoptError(
                f"decode_attention: {what} have shape {tuple(x.shape)}.", why="one for each.", fix=f"{tuple(want)}"
            )
    if interpret and implementation is None:
        raise InfoptError(
            "decode_attention(interpret=True) names no kernel.",
            why="what suits this platform is no kernel of Pallas.",
            fix="implementation='pallas_tpu' or 'pallas_gpu'",
        )
    if softcap is not None and not softcap > 0:
        raise InfoptError(
            f"decode_attention(softcap={softcap}).", why="scores are divided by it.", fix="softcap > 0, or None"
        )
    if (table is None) != (layout.page is None):
        raise InfoptError(
            f"decode_attention: pages of {layout.page}, and {'no ' if table is None else 'a '}table.",
            why="a block table says where pages lie.",
            fix="both, or none",
        )
    window, width = layout.window, q.shape[-1]
    o = Options(
        scale=float(width**-0.5 if scale is None else scale),
        window=window.size if window else None,
        sinks=window.sinks if window else 0,
        softcap=None if softcap is None else float(softcap),
        late=late,
    )
    sink_q = None if not o.sinks else q if sink_queries is None else sink_queries
    call = Call(q, sink_q, keys, values, layer, positions, lengths, table, layout, o, heads)
    if implementation is not None:
        what = f"queries {tuple(call.q.shape)} of {call.layout}"
        check_served(IMPLEMENTATIONS, implementation, "decode attention", (call,), what, "blockwise")
    if implementation in ("xla", "blockwise"):  # which JAX differentiates by itself
        out, lse = IMPLEMENTATIONS[implementation].forward(call)
    else:
        out, lse = _core(call, implementation, interpret)
    if sink_logits is not None:
        out = with_sink_logits(out, lse, sink_logits)
    return (out, lse) if return_lse else out


def _forward(call: Call, name: str | None, interpret: bool) -> tuple[Array, Array]:
    if name is not None:
        return run(IMPLEMENTATIONS, name, (call,), interpret, "blockwise")
    if pallas_tpu.refuses(call):
        return xla.forward(call)
    return jax.lax.platform_dependent(call, tpu=pallas_tpu.forward, default=xla.forward)


def _kept(call: Call, name: str | None, interpret: bool) -> tuple[tuple[Array, Array], Call]:
    return _core(call, name, interpret), call


def _of_kept(name: str | None, interpret: bool, call: Call, d: tuple[Array, Array]) -> tuple[Call]:
    return jax.vjp(xla.forward, call)[1](d)


_core: Any = jax.custom_vjp(_forward, nondiff_argnums=(1, 2))
_core.defvjp(_kept, _of_kept)
