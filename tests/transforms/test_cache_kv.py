"""cache_kv: what it keeps, in how many bits, and that it changes no logit."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infopt as ip
from infopt import cache as kv
from infopt import ops
from infopt.errors import InfoptError, PromptError, TransformOrderError
from infopt.model import Weights, build, spec_from_json
from infopt.qtensor import Format
from infopt.reference import reference
from infopt.spec import Codec
from infopt.testing import verify

BARE = ip.models.llama(layers=2, dim=16, heads=2, kv_heads=1, head_dim=8, mlp=16, vocab=29, context=48, tied=False)
PARAMS = BARE.init(jax.random.key(0))
WIDE = ip.models.llama(layers=2, dim=16, heads=4, kv_heads=2, head_dim=8, mlp=16, vocab=29, context=48, tied=False)
WIDE_PARAMS = WIDE.init(jax.random.key(1))
ROWS = 8
TOKENS = np.random.default_rng(0).integers(0, 29, (ROWS, 9))


def test_it_edits_the_cache_and_its_codec_only() -> None:
    spec = BARE.spec
    assert ip.cache_kv().edit(spec) == spec.replace(cache=True)
    assert ip.cache_kv(bits=8).edit(spec) == spec.replace(cache=True, kv=Codec(Format("int8", 8, "float16")))
    assert ip.cache_kv(bits=4).edit(spec).kv == Codec(Format("int4_min", 8, "float16"))
    assert ip.cache_kv(bits=4, group=4).edit(spec).kv == Codec(Format("int4_min", 4, "float16"))
    assert ip.cache_kv(bits=8, group=2).edit(spec).kv == Codec(Format("int8", 2, "float16"))


@pytest.mark.parametrize("width, group", [(8, 8), (32, 32), (64, 32), (80, 20), (50, 10), (74, 2), (128, 32)])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_group_is_by_default_the_largest_even_divisor_of_a_head(width: int, group: int, bits: int) -> None:
    spec = ip.models.llama(layers=1, dim=16, heads=1, kv_heads=1, head_dim=width).spec
    kv = ip.cache_kv(bits=bits).edit(spec).kv
    assert kv is not None
    assert kv.format.group == group


def test_it_is_exact_without_a_codec() -> None:
    assert ip.cache_kv().exact
    assert not ip.cache_kv(bits=8).exact
    assert not ip.cache_kv(bits=4).exact


@pytest.mark.parametrize("bits, group", [(None, None), (8, None), (8, 4), (4, None), (4, 4), (2, None)])
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
        assert max(off) < {8: 2e-2, 4: 0.3, 2: 1.0}[bits]
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
        (ip.cache_kv(bits=2), 8 // 4 + 2 + 2),
        (ip.cache_kv(bits=2, group=4, rotate=True), 8 // 4 + 2 * (2 + 2)),
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


@pytest.mark.parametrize("bits", [0, 3, 16, "8", True, 7.5])
def test_a_codec_that_is_none_is_refused(bits: object) -> None:
    with pytest.raises(InfoptError, match="is not a codec") as e:
        ip.cache_kv(bits=bits)  # type: ignore[arg-type]
    assert e.value.fix == "bits=None, bits=8, bits=4 or bits=2"


# ------------------------------------------------------------------------------------------- by channel, and rotated

SPLIT = "cache_kv(bits=4, split=4, tail=3)"


@pytest.mark.parametrize(
    "stack, generation",
    [
        (SPLIT, False),
        ("cache_kv(bits=2, rotate=True)", False),
        ("cache_kv(bits=2, split=8, tail=0, rotate=True)", False),
        (f"sliding_window(5, sinks=2) | {SPLIT}", False),
        ("sliding_window(9, sinks=1) | cache_kv(bits=4, split=2, tail=1) | paged(4)", False),
        (f"gqa(1) | sliding_window(6) | {SPLIT} | flash_attention('blockwise')", False),
        (f"{SPLIT} | speculative(self_draft(quantize(bits=8)), k=2)", True),
    ],
)
def test_late_rounding_equals_the_numpy_model_ragged_in_chunks_and_rolled_back(stack: str, generation: bool) -> None:
    model = ip.parse_stack(stack)(WIDE)
    params = model.convert(WIDE_PARAMS)
    verify(model, params, generation=generation)


def test_recomputation_sees_late_rounding_too() -> None:
    spec = ip.oracle(ip.parse_stack(f"sliding_window(5, sinks=2) | {SPLIT}")(WIDE).spec)
    tokens = np.random.default_rng(0).integers(0, 29, (4, 22))
    got = np.asarray(jax.jit(build(spec).apply)(WIDE_PARAMS, jnp.asarray(tokens, jnp.int32))[0])
    off = [np.abs(g - reference(spec, Weights.of(spec, WIDE_PARAMS), t)).max() for g, t in zip(got, tokens)]
    assert np.median(off) < 1e-4
    assert max(off) < 0.3


def test_until_the_tail_has_passed_logits_are_those_without_rounding() -> None:
    """Groups of 4 that are seen rounded 3 tokens later: the query at 6 is the first that sees one."""
    model, plain = ip.parse_stack(SPLIT)(WIDE), ip.cache_kv()(WIDE)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 29, (1, 12)), jnp.int32)
    got, want = (np.asarray(jax.jit(m.apply)(WIDE_PARAMS, tokens)[0])[0] for m in (model, plain))
    off = np.abs(got - want).max(-1)
    assert off[:6].max() < 1e-5
    assert off[6:].min() > 1e-3


def test_rotation_changes_no_logit_before_rounding() -> None:
    """Scores of rotated queries and keys are those of the others; and an outlier is spread over all channels."""
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    x[..., 5] += 100
    q, k = (np.asarray(ops.rotated(jnp.asarray(u))) for u in (x[::-1], x))
    np.testing.assert_allclose(np.sum(q * k, -1), np.sum(x[::-1] * x, -1), rtol=1e-5)
    assert np.abs(k).max() < 0.45 * np.abs(x).max()


def test_a_channel_of_outliers_costs_a_scale_by_channel_nothing() -> None:
    """One channel a hundred times the others: by token it takes the others' levels, by channel it has its own."""
    keys = np.random.default_rng(0).normal(size=(1, 8, 1, 8)).astype(np.float32)
    keys[..., 3] *= 100
    codec = Codec(Format("int4_min", 8, "float16"), split=8)
    x = jnp.asarray(keys)
    by_channel, values = (np.asarray(u) for u in kv.round_groups(x, x, codec))
    others = [0, 1, 2, 4, 5, 6, 7]
    error, plain = (np.abs(u - keys)[..., others].max() for u in (by_channel, values))
    assert error < 0.15
    assert plain > 1.0


def test_what_a_split_cache_takes_is_its_groups_and_a_ring_of_the_latest_tokens() -> None:
    model = ip.cache_kv(bits=4, split=4, tail=3)(BARE)
    assert model.token_bytes() == 2 * (8 // 2 + 8 * 4 // 4 + 8 // 2 + 4)  # two layers, one head; a scale, a minimum
    states = [model.init_state(1, n, chunk=5) for n in (24, 40)]
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(state.kv)) for state in states]
    recent = 4 + 3 + 5 - 2
    assert sizes == [n * model.token_bytes() + recent * 2 * 2 * 8 * 4 for n in (24, 40)]
    assert [state.lookahead for state in states] == [5, 5]


def test_a_chunk_longer_than_the_ring_of_latest_tokens_is_refused() -> None:
    """A tail may be shorter than a chunk, which the ring is sized by; what is longer than that does not fit it."""
    model = ip.cache_kv(bits=4, split=4, tail=0)(WIDE)
    state = model.init_state(1, 40, chunk=6)
    with pytest.raises(PromptError, match="looks ahead 6") as e:
        model.apply(WIDE_PARAMS, jnp.zeros((1, 7), jnp.int32), state)
    assert "chunk=7" in e.value.fix
    with pytest.raises(InfoptError, match="built to look ahead 6"):
        ip.rollback(state.replace(lengths=state.lengths + 12, peak=state.peak + 12), 7)


@pytest.mark.parametrize("stack", ["cache_kv(bits=4)", "cache_kv(bits=2, rotate=True)", SPLIT])
def test_a_spec_with_a_codec_is_the_same_after_json(stack: str) -> None:
    model = ip.parse_stack(stack)(WIDE)
    assert spec_from_json(model.spec.to_json()) == model.spec
    assert repr(ip.parse_stack(repr(model.transform))) == repr(model.transform)


def test_a_plain_codec_is_written_as_it_always_was() -> None:
    """Stacks that were saved before there were others hold the format alone."""
    spec = ip.cache_kv(bits=4)(WIDE).spec
    assert json.loads(spec.to_json())["kv"] == {"name": "int4_min", "group": 8, "scale": "float16"}


def test_a_stack_with_a_split_codec_is_saved_and_loaded(tmp_path) -> None:
    model = ip.parse_stack(SPLIT)(WIDE)
    ip.save(tmp_path / "stack", model, model.convert(WIDE_PARAMS))
    loaded, _ = ip.load(tmp_path / "stack")
    assert loaded.spec == model.spec


@pytest.mark.parametrize(
    "options, message, fix",
    [
        (dict(rotate=True), r"rotate=True\) rounds nothing", "bits=4, rotate=True"),
        (dict(split=32), r"split=32\) rounds nothing", "bits=4, split=32"),
        (dict(bits=4, tail=3), "no groups of tokens", "split=32, tail=3"),
        (dict(bits=4, split=3), "does not fill whole bytes", "split=4"),
        (dict(bits=2, split=6), "does not fill whole bytes", "split=8"),
        (dict(bits=4, split=1), "split=1 is not", "split=2"),
        (dict(bits=4, split=True), "split=True is not", "split=2"),
        (dict(bits=4, split=8, tail=-1), "tail=-1 is not", "tail=1"),
        (dict(bits=4, rotate=1), "rotate=1", "rotate=True"),
    ],
    ids=repr,
)
def test_options_that_mean_nothing_are_refused(options: dict, message: str, fix: str) -> None:
    with pytest.raises(InfoptError, match=message) as e:
        ip.cache_kv(**options)
    assert e.value.why
    assert fix in e.value.fix


def test_a_head_that_is_no_power_of_two_cannot_be_rotated() -> None:
    odd = ip.models.llama(layers=1, dim=16, heads=1, kv_heads=1, head_dim=24)
    with pytest.raises(InfoptError, match="24 channels, which is no power of two") as e:
        ip.cache_kv(bits=4, rotate=True)(odd)
    assert "leave rotate out" in e.value.fix
    assert ip.cache_kv(bits=4, split=32)(odd).token_bytes() > 0


def test_pages_that_hold_no_whole_groups_are_refused() -> None:
    with pytest.raises(TransformOrderError, match="rounded over 8 tokens") as e:
        (ip.cache_kv(bits=4, split=8) | ip.paged(12))(WIDE)
    assert e.value.fix == "a page that 8 divides: paged(16)"


@pytest.mark.parametrize("where", ["decode", "flash"])
def test_a_kernel_that_knows_no_late_rounding_refuses_it(where: str) -> None:
    spec = (ip.parse_stack(SPLIT) | ip.flash_attention("pallas_tpu"))(WIDE).spec
    spec = spec if where == "decode" else spec.replace(cache=False)
    with pytest.raises(InfoptError, match=r"pallas_tpu cannot serve .* no keys that are rounded late"):
        build(spec).apply(WIDE_PARAMS, jnp.zeros((1, 3), jnp.int32))
