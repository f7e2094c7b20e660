"""The contract's own test: break the library in one place, and a stack must no longer equal its oracle."""

import inspect
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infopt as ip
from infopt import cache, model, ops, qtensor, sampling, testing
from infopt.kernels.decode_attention import api as decode_api
from infopt.kernels.decode_attention import xla
from infopt.kernels.flash_attention import api as flash_api
from infopt.kernels.flash_attention import blockwise, options

RING = "sliding_window(6) | cache_kv()"
SINKS = "sliding_window(5, sinks=2) | cache_kv()"
BLOCKS = "flash_attention('blockwise')"
SPECULATIVE = "cache_kv() | speculative(self_draft(quantize(bits=4, group=16)), k=2)"

# (what is broken, the object that holds the function, its name, a line of it, the line broken, stacks that must notice)
BREAKS = [
    ("ring_one_slot_too_small", cache.Layout, "plan", "lookahead - 1", "lookahead - 2", [RING, SINKS]),
    ("ring_that_forgets_its_sinks", cache.Layout, "slot", "position < sinks", "position < 0", [SINKS]),
    ("window_one_too_long", options, "seen", "key > query - size", "key >= query - size", [RING, "sliding_window(6)"]),
    ("window_one_too_short", options, "seen", "key > query - size", "key > query - size + 1", ["sliding_window(6)"]),
    ("sinks_hidden", options, "seen", "key < sinks", "key < 0", [SINKS]),
    ("causality_off_by_one", options, "seen", "key <= query", "key <= query + 1", ["", RING]),
    ("causality_off_by_one_by_block", options, "seen", "key <= query", "key <= query + 1", [BLOCKS]),
    ("a_block_left_out", blockwise, "needed", "low <= last", "low + 8 <= last", [BLOCKS]),
    ("sinks_counted_twice", blockwise._Blocks, "of", "jnp.where(at < n, -1, p.key)", "jnp.where(at < 0, -1, p.key)",
     [BLOCKS + " | sliding_window(5, sinks=2)"]),
    ("too_few_slots_read", xla, "_enough", "most >", "most - 4 >", ["cache_kv()"]),
    ("sink_seen_at_its_full_distance", ops, "sink_query_position", "jnp.minimum(query, window.size - 1)", "query",
     [SINKS, "sliding_window(5, sinks=2)"]),
    ("swapped_nibbles", qtensor, "unpack", "plane(k) for k in range(n)", "plane(n - 1 - k) for k in range(n)",
     ["quantize(bits=4, group=16) | cache_kv()"]),
    ("wrong_rope_base", ops, "rope_frequencies", "theta **", "(2 * theta) **", ["", "cache_kv()"]),
    ("keys_rotated_by_slot", ops, "attend", "k = rope(k, c.positions)", "k = rope(k, c.positions * 0)", ["cache_kv()"]),
    ("padding_is_written", cache, "write", "jnp.where(keep, layout.slot(positions), _NOWHERE)",
     "layout.slot(positions)", [RING]),
    ("dropped_writes_wrap", cache, "write", "_NOWHERE", "-1", [RING]),
    ("page_of_another_row", cache.Layout, "place", "page * self.page", "0 * page * self.page",
     ["cache_kv() | paged(4)"]),
    ("noise_keyed_by_nothing_but_the_seed", sampling, "noise", "position)", "0 * position)", ["cache_kv()"]),
    ("noise_keyed_by_the_slot", model, "sample", "over(s.seed,",
     "over(jnp.arange(s.seed.shape[0], dtype=jnp.uint32),", ["cache_kv()"]),
    ("noise_keyed_by_the_step", model, "sample", "over(s.seed, lengths,", "over(s.seed, lengths - lengths,",
     [SPECULATIVE]),
    ("noise_keyed_by_the_step_before", sampling, "noise", "position)", "position - 1)", ["cache_kv()"]),
    ("drafts_emitted_unverified", model, "_build_speculative", "accepted + 1", "k + 1", [SPECULATIVE]),
    ("one_guess_too_many", model, "_build_speculative", "accepted + 1", "jnp.minimum(accepted + 2, k + 1)",
     [SPECULATIVE]),
    ("draft_forgets_its_last_token", model, "_build_speculative", "start + count", "start + count - 1", [SPECULATIVE]),
    ("inactive_rows_advance", model, "_build_plain", "active.astype(jnp.int32)", "jnp.ones(last.shape, jnp.int32)",
     ["cache_kv()"]),
]  # fmt: skip


def broken(function, old, new):
    """The function with one line changed, in its own module's namespace."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    assert old in source, f"{old!r} is no longer in {function.__name__}: mend this test"
    # its annotations were executed when it was imported; a second time they are of no interest
    namespace = dict(inspect.unwrap(function).__globals__)
    exec(compile("from __future__ import annotations\n" + source.replace(old, new), "<broken>", "exec"), namespace)
    return namespace[function.__name__]


def verify(stack, family="llama"):
    bare, params = testing.base_of(family)
    made = ip.parse_stack(stack)(bare)
    return testing.verify(made, made.convert(params))


@pytest.fixture
def fresh_build():
    with testing.small_blocks():
        yield


@pytest.mark.parametrize(("owner", "name", "old", "new", "stacks"), [b[1:] for b in BREAKS], ids=[b[0] for b in BREAKS])
def test_a_break_is_noticed(owner, name, old, new, stacks, monkeypatch, fresh_build):
    static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    function = broken(getattr(owner, name), old, new)
    monkeypatch.setattr(owner, name, staticmethod(function) if static else function)
    for stack in stacks:
        with pytest.raises(testing.Mismatch):
            verify(stack)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("jax.nn.sigmoid(", "jnp.ones_like("),
        ("logits.astype", "logits[::-1].astype"),
    ],
)
def test_learned_sinks_left_out_or_of_other_heads_are_noticed(old, new, monkeypatch, fresh_build):
    function = broken(flash_api.with_sink_logits, old, new)
    for module in (flash_api, decode_api):
        monkeypatch.setattr(module, "with_sink_logits", function)
    with pytest.raises(testing.Mismatch):
        verify("sliding_window(5, sinks=2) | cache_kv()", "gpt_oss")


def test_keys_that_skip_the_codec_are_noticed(monkeypatch, fresh_build):
    monkeypatch.setattr(cache, "quantize_array", lambda x, codec: x)
    with pytest.raises(testing.Mismatch):
        verify("cache_kv(bits=8)")


def test_rollback_beyond_the_lookahead_would_be_wrong(fresh_build):
    bare, params = testing.base_of("llama")
    made = ip.parse_stack(RING)(bare)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (1, 30)))
    step, state = jax.jit(made.apply), made.init_state(1, 40, chunk=5)
    for i in range(0, 30, 5):
        _, state = step(params, tokens[:, i : i + 5], state)
    oracle, _ = ip.sliding_window(6)(bare).apply(params, tokens)
    for n, right in ((5, True), (6, False)):  # what rollback does, without its refusal
        got, _ = step(params, tokens[:, 30 - n : 35 - n], state.replace(lengths=state.lengths - n))
        assert bool(jnp.abs(got[:, 0] - oracle[:, 30 - n]).max() < 1e-3) is right
    with pytest.raises(ip.InfoptError, match="look ahead 5"):
        ip.rollback(state, 6)
