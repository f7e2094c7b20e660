"""What a family says of its stream is true: folding by it changes nothing, and it leaves no reader out."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infopt as ip
from infopt.errors import InfoptError
from infopt.model import Weights, assemble, family_of, is_matrix, shapes, stream_of
from infopt.testing import FAMILIES, base_of

KNOWN = [name for name in FAMILIES if name != "nnx"]
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (1, 20)))


def loud(name: str, w: Any) -> Any:
    """Biases that matter."""
    return w + 0.3 * jnp.cos(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape) if name.endswith("bias") else w


@functools.cache
def compiled(model: ip.Model) -> Any:
    return jax.jit(lambda params: model.apply(params, TOKENS)[0])


def logits(model: ip.Model, weights: dict[str, Any]) -> Any:
    return compiled(model)(assemble(model.spec, weights))


def weights_of(family: str) -> tuple[ip.Model, dict[str, Any]]:
    model, params = base_of(family)
    weights = Weights.of(model.spec, params)
    return model, {name: loud(name, weights[name]) for name in weights}


def spread(want: Any, got: Any) -> float:
    return float(jnp.abs(got - want).max() / jnp.std(want))


def scales(name: str, n: int) -> Any:
    return jnp.asarray(np.random.default_rng(len(name)).uniform(0.5, 2.0, n), jnp.float32)


@pytest.mark.parametrize("family", KNOWN)
def test_a_norms_scale_moves_into_its_readers(family: str) -> None:
    model, weights = weights_of(family)
    stream, want = stream_of(model.spec), logits(model, weights)
    assert len(stream.reads) == 2 * model.spec.config.layers + 1
    for norm, readers in stream.reads.items():
        s = scales(norm, len(weights[norm]))
        weights[norm] = (weights[norm] + stream.offset) * s - stream.offset
        if norm + "_bias" in weights:
            weights[norm + "_bias"] = weights[norm + "_bias"] * s
        for name in readers:
            w = weights[name]
            weights[name] = w / jnp.broadcast_to(s, w.shape)
    assert spread(want, logits(model, weights)) < 1e-4


@pytest.mark.parametrize("family", KNOWN)
def test_a_row_that_feeds_a_column_is_scaled_for_it(family: str) -> None:
    model, weights = weights_of(family)
    c, stream, want = model.spec.config, stream_of(model.spec), logits(model, weights)
    assert {name.split(".", 2)[2] for name in stream.feeds} >= {"attn.v"}
    for first, second in stream.feeds.items():
        w, v = weights[first], weights[second]
        s = scales(first, w.shape[-2])
        weights[first] = w * jnp.broadcast_to(s[:, None], w.shape)
        if first + "_bias" in weights:
            b = weights[first + "_bias"]
            weights[first + "_bias"] = b * jnp.broadcast_to(s, b.shape)
        if v.shape[-1] != len(s):
            s = jnp.repeat(s.reshape(-1, c.head_dim), c.heads // c.kv_heads, 0).reshape(-1)
        weights[second] = v / jnp.broadcast_to(s, v.shape)
    assert spread(want, logits(model, weights)) < 1e-4


@pytest.mark.parametrize("family", KNOWN)
def test_every_matrix_reads_or_writes(family: str) -> None:
    model, _ = base_of(family)
    stream = stream_of(model.spec)
    named = {*stream.writes, *stream.tables}.union(*stream.reads.values())
    matrices = {n for n, shape in shapes(model.spec).items() if is_matrix(n, shape)}
    last = (
        {n for n in matrices if n.endswith(("attn.o", "mlp.down"))} if stream.unrotatable and stream.offset else set()
    )
    assert named | last == matrices


def test_a_stream_is_asked_for_by_name() -> None:
    model, _ = base_of("nnx")
    with pytest.raises(InfoptError, match="not known what reads and writes the residual stream of a nnx") as e:
        stream_of(model.spec)
    assert "ip.Stream(" in e.value.fix


@pytest.mark.parametrize(
    ("changes", "said", "fix"),
    [
        (dict(writes=("attn.o", "mlp.dwon")), r"names 'mlp\.dwon', which no layer has", "mlp.down"),
        (dict(tables=("attn.q",)), r"names 'attn\.q', which no layer has", ""),
        (dict(writes=("attn.o", "mlp.up")), r"names layers\.0\.mlp\.up, of shape", "[out, in]"),
        (dict(writes=("attn_norm",)), r"names layers\.0\.attn_norm, of shape", "[out, in]"),
    ],
)
def test_what_no_layer_has_or_is_of_another_width_is_refused(changes: Any, said: str, fix: str) -> None:
    model, _ = base_of("llama")
    own = family_of(model.spec)
    assert own.stream and own.embed and own.block and own.final
    given: Any = dict(init=own.init, embed=own.embed, block=own.block, final=own.final)
    ip.define("mistyped", own.config, **given, stream=dataclasses.replace(own.stream, **changes))
    with pytest.raises(InfoptError, match=said) as e:
        stream_of(model.spec.replace(family="mistyped"))
    assert fix in e.value.fix
