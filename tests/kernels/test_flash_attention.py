"""One contract for every implementation of flash attention, against a float64 model of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infopt as ip
from infopt.kernels.flash_attention import IMPLEMENTATIONS, available, blockwise, flash_attention, pallas_tpu
from infopt.kernels.flash_attention.options import Options, Places, mask, needed, visits
from infopt.kernels.flash_attention.shapes import CONTRACT, TOLERANCE, Shape

RUNS = {name: {"interpret": True} if name.startswith("pallas") else {} for name in IMPLEMENTATIONS}
"""Pallas kernels run in Pallas' interpreter here; tests/test_tpu.py compiles them."""
BY_NAME = {shape.name: shape for shape in CONTRACT}


def expected(shape, q, k, v, o):
    """The output and the log-sum-exp, in float64, one query at a time."""
    q, k, v, sunk = (None if x is None else np.asarray(x, np.float64) for x in (q, k, v, o.get("sink_queries")))
    scale = shape.width**-0.5 if shape.scale is None else shape.scale
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    lse = np.full(q.shape[:3], -np.inf)
    share = shape.heads // shape.kv_heads
    for b in range(shape.batch):
        length = shape.length if shape.lengths is None else shape.lengths[b]
        for t in range(shape.queries):
            p = t + (0 if shape.offsets is None else shape.offsets[b])
            seen = [s for s in range(length) if not shape.causal or s <= p]
            if shape.window is not None:
                seen = [s for s in seen if p - s < shape.window or s < shape.sinks]
            if shape.segments:
                ids = [np.asarray(x)[b] for x in o["segments"]]
                seen = [s for s in seen if ids[1][s] == ids[0][t]]
            if not seen:
                continue
            for h in range(shape.heads):
                queries = [sunk if sunk is not None and s < shape.sinks else q for s in seen]
                scores = np.array([x[b, t, h] @ k[b, s, h // share] for x, s in zip(queries, seen)]) * scale
                if shape.softcap is not None:
                    scores = shape.softcap * np.tanh(scores / shape.softcap)
                lse[b, t, h] = np.logaddexp.reduce(scores)
                total = lse[b, t, h]
                if shape.sink_logits:
                    total = np.logaddexp(total, float(o["sink_logits"][h]))
                out[b, t, h] = np.exp(scores - total) @ v[b, seen, h // share]
    return out, lse


def run(shape, name, seed=0):
    q, k, v = shape.arrays(seed)
    o = shape.options()
    call = jax.jit(lambda q, k, v: flash_attention(q, k, v, **o, return_lse=True, implementation=name, **RUNS[name]))
    return call(q, k, v), expected(shape, q, k, v, o)


@pytest.mark.parametrize("shape", CONTRACT, ids=lambda s: s.name)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_an_implementation_equals_the_float64_model(name, shape):
    (out, lse), (want, want_lse) = run(shape, name)
    assert out.dtype == shape.dtype and lse.dtype == jnp.float32
    tolerance = TOLERANCE[shape.dtype]
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(np.asarray(lse, np.float64), want_lse, atol=tolerance, rtol=tolerance)


SEVERAL = ("many_blocks", "ragged", "bidirectional_ragged", "window_and_sinks", "softcap", "segments")


@pytest.mark.parametrize("shape", [BY_NAME[name] for name in SEVERAL], ids=lambda s: s.name)
@pytest.mark.parametrize("name", ["blockwise", "pallas_tpu"])
def test_it_equals_the_float64_model_over_several_blocks_of_keys(name, shape, monkeypatch):
    monkeypatch.setattr(blockwise, "QUERIES", 16)
    monkeypatch.setattr(blockwise, "KEYS", 24)
    monkeypatch.setattr(pallas_tpu, "ROWS", 128)
    monkeypatch.setattr(pallas_tpu, "KEYS", 128)
    (out, lse), (want, want_lse) = run(shape, name)
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=2e-5, rtol=2e-5)
    np.testing.assert_allclose(np.asarray(lse, np.float64), want_lse, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["softcap", "segments", "window_and_sinks", "bidirectional_ragged"])
def test_its_gradient_over_several_blocks_is_that_of_the_reference(name, monkeypatch):
    monkeypatch.setattr(blockwise, "QUERIES", 16)
    monkeypatch.setattr(blockwise, "KEYS", 24)
    shape = BY_NAME[name]
    o = shape.options()

    def loss(qkv, name):
        return jnp.sum(jnp.sin(3 * flash_attention(*qkv, **o, implementation=name)))

    want, got = (jax.jit(jax.grad(lambda x, n=n: loss(x, n)))(shape.arrays()) for n in ("reference", "blockwise"))
    for a, b in zip(want, got):
        np.testing.assert_allclose(b, a, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [None, "reference", "blockwise"])
def test_nothing_to_ask_or_to_see_gives_nothing_or_zeros(name):
    q, k, v = Shape("", queries=3).arrays()
    assert flash_attention(q[:, :0], k, v, implementation=name).shape == (1, 0, 4, 16)
    out, lse = flash_attention(q, k[:, :0], v[:, :0], return_lse=True, implementation=name)
    assert not out.any() and np.isneginf(lse).all()


def test_the_tpus_kernel_serves_many_queries_that_share_a_head_and_says_what_it_does_not():
    def said(queries, heads, width, keys=None):
        size = (1, queries, heads, width), (1, keys or queries, 1, width)
        q, k = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in size)
        return pallas_tpu.refuses(q, k, k, Options(1.0))

    assert said(4096, 32, 128) == said(2048, 64, 64) == ""  # multi-query Llama 8B
    assert "channels" in said(128, 1, 4096)
    assert "list" in said(2**28, 1, 128, keys=8)


GRADIENTS = ("causal", "ragged", "window_and_sinks", "softcap", "segments", "sink_logits", "a_row_that_sees_nothing")


@pytest.mark.parametrize("shape", [BY_NAME[name] for name in GRADIENTS], ids=lambda s: s.name)
@pytest.mark.parametrize("name", ["blockwise", "pallas_tpu", None])
def test_its_gradient_is_that_of_the_reference(name, shape):
    q, k, v = shape.arrays()
    o = shape.options()
    given = {"q": q, "k": k, "v": v} | {n: o[n] for n in ("sink_queries", "sink_logits") if o.get(n) is not None}
    weight = jax.random.normal(jax.random.key(9), (*q.shape[:3], v.shape[-1]))

    def loss(given, name):
        how = o | {n: given[n] for n in given if n not in "qkv"}
        more = RUNS.get(name, {})
        out, lse = flash_attention(
            given["q"], given["k"], given["v"], **how, return_lse=True, implementation=name, **more
        )
        return jnp.sum(out * weight) + jnp.sum(jnp.where(jnp.isneginf(lse), 0.0, lse) * weight[..., 0])

    want, got = (jax.jit(jax.grad(lambda g, n=n: loss(g, n)))(given) for n in ("reference", name))
    for each in given:
        assert float(jnp.abs(want[each]).max()) > 1e-3
        np.testing.assert_allclose(got[each], want[each], atol=5e-5, rtol=5e-5, err_msg=each)


def test_the_gradient_of_sinks_that_are_seen_by_the_queries_themselves():
    q, k, v = Shape("", queries=60).arrays()

    def loss(q, name):
        return jnp.sum(jnp.sin(3 * flash_attention(q, k, v, window=9, sinks=3, implementation=name)))

    want, got = (jax.grad(loss)(q, name) for name in ("reference", "blockwise"))
    np.testing.assert_allclose(got, want, atol=5e-5)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_window_as_long_as_the_text_is_no_window(name):
    shape = BY_NAME["window_as_long_as_the_text"]
    q, k, v = shape.arrays()
    with_window, without = (
        flash_attention(q, k, v, window=w, implementation=name, **RUNS[name]) for w in (shape.queries, None)
    )
    np.testing.assert_array_equal(with_window, without)


@pytest.mark.parametrize("name", ["reference", "blockwise", "pallas_tpu"])
def test_keys_may_lie_in_any_order_with_empty_places_between(name):
    q, k, v = Shape("", queries=40, keys=90).arrays()
    order = np.random.default_rng(0).permutation(90)
    position = np.where(order % 3 == 0, -1, order)
    at = jnp.arange(50, 90, dtype=jnp.int32)[None]
    shuffled = flash_attention(
        q, k[:, order], v[:, order], window=30, positions=(at, jnp.asarray(position, jnp.int32)[None]),
        implementation=name, **RUNS[name],
    )  # fmt: skip
    straight = np.where(np.arange(90) % 3 == 0, -1, np.arange(90))
    want = flash_attention(
        q, k, v, window=30, positions=(at, jnp.asarray(straight, jnp.int32)[None]), implementation="reference"
    )
    np.testing.assert_allclose(shuffled, want, atol=2e-6)


def test_blocks_are_needed_where_a_mask_lets_anything_through():
    rng = np.random.default_rng(0)
    for trial in range(20):
        o = Options(
            1.0,
            causal=bool(rng.integers(2)),
            window=(None, 5, 17)[trial % 3],
            sinks=int(rng.integers(4)) * (trial % 3 > 0),
        )
        query = np.sort(rng.integers(0, 64, (2, 16)))
        key = np.where(rng.random((2, 32)) < 0.3, -1, np.arange(32)[None])
        p = Places(jnp.asarray(query, jnp.int32), jnp.asarray(key, jnp.int32))
        seen = np.asarray(mask(o, p)).reshape(2, 4, 4, 8, 4).any((2, 4))
        use = np.asarray(needed(o, p, 4, 4))
        assert not (seen & ~use).any()
        order, count = map(np.asarray, visits(jnp.asarray(use)))
        for b in range(2):
            for n in range(4):
                assert order[b, n, : count[b, n]].tolist() == np.flatnonzero(use[b, n]).tolist()


def test_half_of_a_causal_square_and_most_of_a_windowed_one_are_left_out():
    at = jnp.arange(4096, dtype=jnp.int32)[None]
    causal = needed(Options(1.0), Places(at, at), 128, 128)
    assert int(causal.sum()) == 32 * 33 // 2
    windowed = needed(Options(1.0, window=512, sinks=4), Places(at, at), 128, 128)
    assert int(windowed.sum()) < 32 * 6 + 32


def temporaries(queries, name, window=None):
    shape = Shape("", queries=queries, heads=9, kv_heads=3, width=64)
    q, k, v = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.eval_shape(shape.arrays))
    run = jax.jit(lambda q, k, v: flash_attention(q, k, v, window=window, implementation=name))
    return run.lower(q, k, v).compile().memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_length_by_block_and_with_its_square_in_the_reference():
    plain, blocks = ([temporaries(n, name) for n in (1024, 4096)] for name in ("reference", "blockwise"))
    assert plain[1] > 12 * plain[0]
    assert blocks[1] < 5 * blocks[0]
    assert 50 * temporaries(16384, "blockwise") < temporaries(16384, "reference")


@pytest.mark.parametrize("name", ["reference", "blockwise"])
def test_float32_is_multiplied_in_full_forwards_and_backwards(name):
    """A TPU's own choice is bfloat16, a GPU's TF32: neither keeps the contract's tolerance."""
    q, k, v = Shape("", queries=40).arrays()
    loss = jax.grad(lambda *x: flash_attention(*x, implementation=name).sum(), argnums=(0, 1, 2))
    for f in (lambda *x: flash_attention(*x, implementation=name), loss):
        text = jax.jit(f).lower(q, k, v).as_text()
        assert text.count("stablehlo.dot_general") == text.count("precision = [HIGHEST, HIGHEST]") > 1
    low = (x.astype(jnp.bfloat16) for x in (q, k, v))
    assert "HIGHEST" not in jax.jit(lambda *x: flash_attention(*x, implementation=name)).lower(*low).as_text()


def test_what_runs_where_is_told():
    assert available("cpu") == ["reference", "blockwise"]
    assert "pallas_tpu" in available("tpu") and "pallas_gpu" in available("gpu")


Q, K, AT = jnp.zeros((2, 3, 4, 8)), jnp.zeros((2, 5, 2, 8)), jnp.zeros((2, 3), jnp.int32)
WRONG = {
    "heads": (dict(k=jnp.zeros((2, 5, 3, 8)), v=jnp.zeros((2, 5, 3, 8))), "do not divide"),
    "axes": (dict(q=jnp.zeros((3, 4, 8))), "q has shape"),
    "rows": (dict(k=jnp.zeros((1, 5, 2, 8)), v=jnp.zeros((1, 5, 2, 8))), "do not fit"),
    "widths": (dict(k=jnp.zeros((2, 5, 2, 4))), "do not fit"),
    "window": (dict(window=0), "window"),
    "sinks": (dict(window=2, sinks=3), "sinks"),
    "lengths": (dict(lengths=jnp.zeros(3, jnp.int32)), "lengths"),
    "offsets": (dict(offsets=jnp.zeros((2, 1), jnp.int32)), "offsets"),
    "segments": (dict(segments=(jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 3), jnp.int32))), "segments"),
    "logits": (dict(sink_logits=jnp.zeros(3)), "sink_logits"),
    "sink_queries": (dict(window=3, sinks=1, sink_queries=K), "sink_queries"),
    "sinks_without_a_window": (dict(sinks=1), "sinks=1"),
    "sink_queries_without_sinks": (dict(window=3, sink_queries=Q), "sink_queries"),
    "nothing_to_interpret": (dict(interpret=True), "names no kernel"),
    "name": (dict(implementation="blockwis"), "did you mean 'blockwise'"),
    "softcap": (dict(softcap=0.0), "softcap=0.0"),
    "half a window": (dict(window=2.5), "window=2.5"),
    "both": (dict(positions=(AT, jnp.zeros((2, 5), jnp.int32)), lengths=AT[:, 0]), "one of the two"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), WRONG.values(), ids=WRONG)
def test_bad_input_is_refused_with_a_reason(change, said):
    with pytest.raises(ip.InfoptError, match=said) as e:
        flash_attention(**{"q": Q, "k": K, "v": K} | change)
    assert e.value.why and e.value.fix


@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_gpu"])
def test_a_kernel_for_other_hardware_is_refused_and_never_replaced(name):
    q, k, v = Shape("", queries=256, width=128).arrays()
    with pytest.raises(ip.InfoptError, match="cpu") as e:
        jax.jit(lambda q, k, v: flash_attention(q, k, v, implementation=name))(q, k, v)
    assert "blockwise" in e.value.fix
