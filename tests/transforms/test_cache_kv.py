"""cache_kv: what it keeps, in how many bits, and that it changes no logit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infopt as ip
from infopt.errors import InfoptError, TransformOrderError
from infopt.model import Weights, build
from infopt.qtensor import Format
from infopt.reference import reference

BARE = ip.models.llama(layers=2, dim=16, heads=2, kv_heads=1, head_dim=8, mlp=16, vocab=29, context=48, tied=False)
PARAMS = BARE.init(jax.random.key(0))
ROWS = 8
TOKENS = np.random.default_rng(0).integers(0, 29, (ROWS, 9))


def test_it_edits_the_cache_and_its_codec_only() -> None:
    spec = BARE.spec
    assert ip.cache_kv().edit(spec) == spec.replace(cache=True)
    assert ip.cache_kv(bits=8).edit(spec) == spec.replace(cache=True, kv=Format("int8", 8, "float16"))
    assert ip.cache_kv(bits=4).edit(spec).kv == Format("int4_min", 8, "float16")
    assert ip.cache_kv(bits=4, group=4).edit(spec).kv == Format("int4_min", 4, "float16")
    assert ip.cache_kv(bits=8, group=2).edit(spec).kv == Format("int8", 2, "float16")


@pytest.mark.parametrize("width, group", [(8, 8), (32, 32), (64, 32), (80, 20), (50, 10), (74, 2), (128, 32)])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_group_is_by_default_the_largest_even_divisor_of_a_head(width: int, group: int, bits: int) -> None:
    spec = ip.models.llama(layers=1, dim=16, heads=1, kv_heads=1, head_dim=width).spec
    kv = ip.cache_kv(bits=bits).edit(spec).kv
    assert kv is not None
    assert kv.group == group


def test_it_is_exact_without_a_codec() -> None:
    assert ip.cache_kv().exact
    assert not ip.cache_kv(bits=8).exact
    assert not ip.cache_kv(bits=4).exact


@pytest.mark.parametrize("bits, group", [(None, None), (8, None), (8, 4), (4, None), (4, 4)])
def test_logits_in_chunks_are_the_numpy_models(bits: int | None, group: int | None) -> None:
    """With few bits too: keys go through the codec before they are read, as in the numpy model."""
    model = ip.cache_kv(bits=bits, group=group)(BARE)
    step, state = jax.jit(model.apply), model.init_state(ROWS, 12)
    parts = []
    for start in range(0, 9, 3):
        logits, state = step(PARAMS, jnp.asarray(TOKENS[:, start : start + 3], jnp.int32), state)
        parts.append(np.asarray(logits))
    got = np.concatenate(parts, 1)
    weights, plain = Weights.of(model.spec, PARAMS), Weights.of(BARE.spec, PARAMS)
    off = [np.abs(got[b] - reference(ip.oracle(model.spec), weights, TOKENS[b])).max() for b in range(ROWS)]
    away = [np.abs(got[b] - reference(BARE.spec, plain, TOKENS[b])).max() for b in range(ROWS)]
    if bits is None:
        assert max(off + away) < 1e-4
    else:  # a value on the edge may round the other way: in few rows, and by little
        assert np.median(off) < 1e-4
        assert max(off) < (2e-2 if bits == 8 else 0.3)
        assert min(away) > 1e-3


@pytest.mark.parametrize("bits", [8, 4])
def test_recomputation_goes_through_the_codec_too(bits: int) -> None:
    """The uncached stack of a rounding cache is its oracle: keys are rounded before they are read."""
    spec = ip.oracle(ip.cache_kv(bits=bits)(BARE).spec)
    got = np.asarray(jax.jit(build(spec).apply)(PARAMS, jnp.asarray(TOKENS, jnp.int32))[0])
    off = [np.abs(got[b] - reference(spec, Weights.of(spec, PARAMS), TOKENS[b])).max() for b in range(ROWS)]
    assert np.median(off) < 1e-4
    assert max(off) < (2e-2 if bits == 8 else 0.3)


@pytest.mark.parametrize(
    "transform, head",
    [
        (ip.cache_kv(), 8 * 4),
        (ip.cache_kv(bits=8), 8 + 2),
        (ip.cache_kv(bits=8, group=2), 8 + 4 * 2),
        (ip.cache_kv(bits=4), 8 // 2 + 2 + 2),
        (ip.cache_kv(bits=4, group=2), 8 // 2 + 4 * (2 + 2)),
    ],
    ids=repr,
)
def test_a_token_takes_the_bytes_that_are_said(transform: ip.CacheKV, head: int) -> None:
    """Two layers, keys and values, one head."""
    model = transform(BARE)
    assert model.token_bytes() == 2 * 2 * 1 * head
    state = model.init_state(1, 16)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state.kv)) == 16 * model.token_bytes()
    assert BARE.token_bytes() == 0


def test_a_group_that_does_not_divide_the_head_is_refused() -> None:
    with pytest.raises(InfoptError, match="groups of 6 do not divide a head, which has 8 channels") as e:
        ip.cache_kv(bits=4, group=6)(BARE)
    assert e.value.fix == "group=2 or 4 or 8"
    with pytest.raises(InfoptError, match="rounds nothing"):
        ip.cache_kv(group=8)
    with pytest.raises(InfoptError, match="group=1 is not"):
        ip.cache_kv(bits=8, group=1)


def test_a_second_cache_is_refused() -> None:
    with pytest.raises(TransformOrderError, match="has a cache already") as e:
        (ip.cache_kv() | ip.cache_kv(bits=8))(BARE)
    assert e.value.why
    assert e.value.fix


@pytest.mark.parametrize("bits", [0, 2, 16, "8", True, 7.5])
def test_a_codec_that_is_none_is_refused(bits: object) -> None:
    with pytest.raises(InfoptError, match="is not a codec") as e:
        ip.cache_kv(bits=bits)  # type: ignore[arg-type]
    assert e.value.fix == "bits=None, bits=8 or bits=4"
