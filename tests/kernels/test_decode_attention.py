"""One contract for every implementation of decode attention, against a float64 model that knows no cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infopt as ip
from infopt import cache as kv
from infopt.cache import Layout
from infopt.kernels.decode_attention import IMPLEMENTATIONS, decode_attention, pallas_tpu
from infopt.kernels.decode_attention.shapes import CODECS, CONTRACT, TOLERANCE, Shape
from infopt.kernels.decode_attention.xla import FEWEST, read_lengths
from infopt.qtensor import round_trip
from infopt.spec import Window

RUNS = {name: {"interpret": True} if name.startswith("pallas") else {} for name in IMPLEMENTATIONS}


def expected(shape):
    """In float64, from the text itself, each token rounded as the codec does."""
    keys, values, q, sink_q = shape.text()
    dtype = jnp.dtype(shape.dtype)
    keys, values = (round_trip(jnp.asarray(x).astype(dtype), shape.format) for x in (keys, values))
    keys, values, q, sink_q = (np.asarray(jnp.asarray(x).astype(dtype), np.float64) for x in (keys, values, q, sink_q))
    out, share = np.zeros(q.shape), shape.heads // shape.kv_heads
    lse = np.full(q.shape[:3], -np.inf)
    logits = np.linspace(-1.0, 2.0, shape.heads)
    for b, length in enumerate(shape.lengths):
        for t in range(shape.queries):
            p = max(length - shape.queries, 0) + t
            seen = [s for s in range(min(p + 1, length))
                    if shape.window is None or s > p - shape.window or s < shape.sinks]  # fmt: skip
            for h in range(shape.heads) if seen else ():
                scores = [(sink_q if s < shape.sinks else q)[b, t, h] @ keys[b, s, h // share] for s in seen]
                scores = np.array(scores) * shape.width**-0.5
                if shape.softcap:
                    scores = shape.softcap * np.tanh(scores / shape.softcap)
                lse[b, t, h] = total = np.logaddexp.reduce(scores)
                if shape.sink_logits:
                    total = np.logaddexp(total, logits[h])
                out[b, t, h] = np.exp(scores - total) @ values[b, seen, h // share]
    return out, lse


@pytest.mark.parametrize("shape", CONTRACT, ids=lambda s: s.name)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_an_implementation_equals_the_float64_model(name, shape):
    args, how = shape.arguments()
    call = jax.jit(lambda *args: decode_attention(*args, **how, return_lse=True, implementation=name, **RUNS[name]))
    (out, lse), (want, want_lse) = call(*args), expected(shape)
    assert out.dtype == shape.dtype and lse.dtype == jnp.float32
    real = (
        np.arange(shape.queries)[None] < np.asarray(shape.lengths)[:, None]
    )  # a short row's other queries are padding
    tolerance = TOLERANCE[shape.dtype]
    for got, w in ((out, want), (lse, want_lse)):
        np.testing.assert_allclose(np.asarray(got, np.float64)[real], w[real], atol=tolerance, rtol=tolerance)
    assert not np.asarray(out[np.asarray(shape.lengths) == 0]).any()


def test_slots_read_double_up_to_all_of_them():
    assert read_lengths(8192) == [256, 512, 1024, 2048, 4096, 8192]
    assert read_lengths(300) == [256, 300]
    assert read_lengths(FEWEST) == [FEWEST]


@pytest.mark.parametrize("codec", CODECS)
def test_what_lies_beyond_the_slots_in_use_is_not_read(codec):
    """NaN in the slots that a short row does not reach changes nothing: 0 * NaN would, if they were read."""
    args, how = Shape("", lengths=(200, 90), slots=2048, codec=codec).arguments()

    def poison(leaf):
        return leaf.at[:, :, FEWEST:].set(jnp.nan) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    q, keys, values, layer = args
    keys, values = jax.tree.map(poison, (keys, values))
    found = decode_attention(q, keys, values, layer, **how, implementation="xla")
    np.testing.assert_array_equal(found, decode_attention(*args, **how, implementation="xla"))
    assert np.isfinite(found).all()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_page_that_is_not_there_reads_as_zeros_and_as_no_other_rows(name, codec):
    (q, keys, values, layer), how = Shape("", page=16, lengths=(64, 40), codec=codec, width=32).arguments()
    how["table"] = how["table"].at[1, 1].set(-1)
    found = decode_attention(q, keys, values, layer, **how, implementation=name, **RUNS[name])
    cache = [kv.decode(kv.read(x, layer, how["layout"], how["table"]), 2, jnp.float32) for x in (keys, values)]
    k, v = (np.repeat(x.at[1, 16:32].set(0)[1, :40], 2, 1) for x in cache)  # [S, H, D]
    scores = np.einsum("hd,shd->hs", q[1, 0], k) * 32**-0.5
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    want = np.einsum("hs,shd->hd", weight / weight.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(found[1, 0], want, atol=2e-5)


def test_gradients_go_through_a_cache_with_every_implementation():
    """A kernel has no derivative of its own: it is XLA's, of the same call."""
    (q, keys, values, layer), how = Shape("", lengths=(40, 7), queries=3, window=9, sinks=2, width=32).arguments()

    def gradients(name):
        def loss(q, keys, values):
            out = decode_attention(q, keys, values, layer, **how, implementation=name, **RUNS.get(name, {}))
            return jnp.sum(out * jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

        return jax.grad(loss, argnums=(0, 1, 2))(q, keys, values)

    want = gradients("xla")
    assert all(jnp.any(x != 0) for x in want)
    for name in (None, *IMPLEMENTATIONS):
        for one, other in zip(gradients(name), want, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


LINEAR = Shape("").arguments()
WRONG = {
    "heads": (dict(heads=3), "do not divide"),
    "table": (dict(table=jnp.zeros((1, 4), jnp.int32)), "table"),
    "no_table": (dict(layout=Layout(64, page=16)), "no table"),
    "name": (dict(implementation="xl"), "'xla'"),
    "no_heads": (dict(heads=0), "do not divide"),
    "lengths": (dict(lengths=jnp.ones(3, jnp.int32)), "lengths have shape"),
    "positions": (dict(positions=jnp.ones((1, 2), jnp.int32)), "positions have shape"),
    "sink_logits": (dict(sink_logits=jnp.ones(3)), "sink_logits have shape"),
    "softcap": (dict(softcap=0.0), "softcap=0.0"),
    "interpret": (dict(interpret=True), "names no kernel"),
}


@pytest.mark.parametrize(("change", "said"), WRONG.values(), ids=WRONG)
def test_bad_input_is_refused_with_a_reason(change, said):
    args, how = LINEAR
    with pytest.raises(ip.InfoptError, match=said) as e:
        decode_attention(*args, **how | change)
    assert e.value.why and e.value.fix


NOT_ON_TPU = {
    "dtype": (Shape("", dtype="float16"), "keys or values in float16"),
    "few slots a page": (Shape("", page=4), "at least 8"),
    "pages across registers": (Shape("", page=12), "registers of 8"),
    "another grid": (Shape("", codec="nf4", width=32), "it undoes int8 and int4_min"),
    "a long table": (Shape("", page=8), "block table of 8 pages; it holds 4"),
}


@pytest.mark.parametrize(("shape", "said"), NOT_ON_TPU.values(), ids=NOT_ON_TPU)
def test_what_the_tpu_kernel_cannot_serve_is_refused(shape, said, monkeypatch):
    monkeypatch.setitem(CODECS, "nf4", "nf4")
    if "table" in said:
        monkeypatch.setattr(pallas_tpu, "MOST_LISTED", 4)
    args, how = shape.arguments()
    with pytest.raises(ip.InfoptError, match=said) as e:
        decode_attention(*args, **how, implementation="pallas_tpu")
    assert "blockwise" in e.value.fix


@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_gpu"])
def test_a_kernel_for_other_hardware_is_refused_and_never_replaced(name):
    args, how = Shape("", width=128, slots=256).arguments()
    with pytest.raises(ip.InfoptError, match="cpu") as e:
        jax.jit(lambda *args: decode_attention(*args, **how, implementation=name))(*args)
    assert "blockwise" in e.value.fix
    with pytest.raises(ip.InfoptError, match="cpu"):
        decode_attention(*args, **how, implementation=name)  # nor outside of jit
    q, *rest = args
    with pytest.raises(ip.InfoptError, match="cpu"):
        jax.jit(jax.vmap(lambda q: decode_attention(q, *rest, **how, implementation=name)))(jnp.stack([q, q]))


def test_a_ring_and_a_linear_cache_of_the_same_text_agree():
    ring = Shape("", window=20, sinks=3, ring=True, lengths=(64, 30), queries=2)
    linear = Shape("", window=20, sinks=3, slots=64, lengths=(64, 30), queries=2)
    assert ring.layout == Layout(24, Window(20, 3), 2) and linear.layout.lookahead is None
    one, two = (decode_attention(*args, **how) for args, how in (ring.arguments(), linear.arguments()))
    np.testing.assert_allclose(one, two, atol=2e-6)


def test_heads_lie_side_by_side_and_are_rounded_by_themselves():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 3, 32)), jnp.float32).at[:, :, 1].multiply(50)
    for codec in (Shape("", codec=name).format for name in CODECS):
        stored = kv.encode(x, codec)
        np.testing.assert_array_equal(kv.decode(stored, 3, jnp.float32), round_trip(x, codec))
        assert all(leaf.ndim == 3 for leaf in jax.tree.leaves(stored))
