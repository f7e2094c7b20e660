"""flash_attention: the same logits and gradients, memory that grows with the length."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infopt as ip
from infopt import ops, testing
from infopt.errors import InfoptError, PromptError, TransformOrderError

BARE, PARAMS = testing.base_of("llama")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 40)), jnp.int32)


@pytest.fixture(autouse=True)
def several_blocks(small_blocks):
    pass


def test_it_edits_attention_only_and_is_exact() -> None:
    for name in (None, "blockwise", "pallas_tpu", "pallas_gpu"):
        made = ip.flash_attention(name)
        assert made.exact
        assert made.edit(BARE.spec) == BARE.spec.replace(attention=name or ops.FLASH)
        assert BARE.spec.replace(attention=name or ops.FLASH).attention in ops.CACHED


@pytest.mark.parametrize(
    "stack",
    ["", "sliding_window(7, sinks=2)", "gqa(1)", "cache_kv()", "sliding_window(7, sinks=2) | cache_kv() | paged(4)"],
)
@pytest.mark.parametrize("name", [None, "blockwise"])
def test_logits_and_gradients_are_those_of_the_plain_form(stack: str, name: str | None) -> None:
    plain = ip.parse_stack(stack)(BARE)
    flash = ip.flash_attention(name)(plain)
    params = plain.convert(PARAMS)

    def loss(params, model):
        logits, _ = model.apply(params, TOKENS)
        return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 0])

    want, got = (jax.jit(jax.value_and_grad(lambda p, m=m: loss(p, m)))(params) for m in (plain, flash))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_window_as_long_as_the_text_is_no_window() -> None:
    for flash in (ip.compose(), ip.flash_attention("blockwise")):
        want, _ = flash(BARE).apply(PARAMS, TOKENS)
        got, _ = (ip.sliding_window(40) | flash)(BARE).apply(PARAMS, TOKENS)
        np.testing.assert_array_equal(got, want)


def test_a_window_as_long_as_a_linear_cache_is_no_window() -> None:
    """To the bit; a ring, which is shorter, and blocks that set sinks apart sum in another order."""
    for codec in (ip.cache_kv(), ip.cache_kv(bits=8)):
        want, _ = codec(BARE).apply(PARAMS, TOKENS)
        window = (ip.sliding_window(BARE.spec.config.context) | codec)(BARE)
        assert not window.init_state(1, TOKENS.shape[1]).layouts[0].lookahead
        np.testing.assert_array_equal(window.apply(PARAMS, TOKENS)[0], want)


def temporaries(model: ip.Model, length: int) -> int:
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    run = jax.jit(lambda p, t: model.hidden(p, t, model.init_state(1, length))[0])
    return run.lower(params, tokens).compile().memory_analysis().temp_size_in_bytes


def test_the_memory_of_a_model_grows_with_the_length_and_no_longer_with_its_square() -> None:
    ip.testing.blockwise.QUERIES = ip.testing.blockwise.KEYS = 128  # small blocks have many bounds
    base = ip.models.llama(layers=2, dim=64, heads=8, kv_heads=2, head_dim=8, vocab=64, context=8192)
    plain, flash = ([temporaries(m, n) for n in (2048, 8192)] for m in (base, ip.flash_attention()(base)))
    assert plain[1] > 12 * plain[0]
    assert flash[1] < 5 * flash[0]


@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_gpu"])
def test_a_kernel_for_other_hardware_is_an_error_and_never_another_kernel(name: str) -> None:
    wide = ip.models.llama(layers=1, dim=128, heads=2, kv_heads=1, head_dim=128, vocab=32, context=256)
    model = ip.flash_attention(name)(wide)
    with pytest.raises(InfoptError, match="cpu") as e:
        jax.jit(model.apply)(model.init(jax.random.key(0)), jnp.ones((1, 256), jnp.int32))
    assert "blockwise" in e.value.fix
    cached = ip.cache_kv()(model)
    with pytest.raises(InfoptError, match="cpu") as e:
        cached.apply(model.init(jax.random.key(0)), jnp.ones((1, 256), jnp.int32))
    ip.flash_attention("blockwise")  # what the fix names is a name
    assert "'blockwise'" in e.value.fix


def test_twice_is_refused() -> None:
    with pytest.raises(TransformOrderError, match="blockwise already") as e:
        (ip.flash_attention("blockwise") | ip.flash_attention())(BARE)
    assert e.value.why and e.value.fix


@pytest.mark.parametrize("name", ["flash", "blockwize", "reference", 3])
def test_a_name_that_is_none_is_refused(name: object) -> None:
    with pytest.raises(InfoptError, match="called") as e:
        ip.flash_attention(name)  # pyright: ignore[reportArgumentType]
    assert "blockwise" in e.value.fix


def test_a_text_beyond_the_context_is_refused_without_a_window_only() -> None:
    flash = ip.flash_attention() | ip.cache_kv()
    with pytest.raises(PromptError, match="context of 64") as e:
        flash(BARE).init_state(1, 65)
    assert "sliding_window" in e.value.fix
    (ip.sliding_window(6) | flash)(BARE).init_state(1, 1000)
