"""The GPU's kernels without a GPU: their numbers in Pallas' interpreter, and the Triton modules that they become."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jaxlib.mlir import ir

import infopt as ip
from infopt import cache as kv
from infopt.cache import Layout
from infopt.errors import InfoptError
from infopt.kernels.decode_attention import decode_attention
from infopt.kernels.flash_attention import flash_attention
from infopt.kernels.flash_attention.options import Options, Places
from infopt.kernels.flash_attention.pallas_gpu import LEAST, Blocks, bounds, of_rows
from infopt.kernels.flash_attention.sums import joined
from infopt.qtensor import Format
from infopt.spec import Window

B, T, S, H, K, D, E = 2, 45, 150, 6, 2, 20, 24  # no whole block of anything: 135 rows a head, blocks of 64


def normal(*shapes, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape).astype(dtype)) for shape in shapes]


def ids(length, texts):
    return np.tile(np.arange(length, dtype=np.int32) * texts // length, (B, 1))


MASKS = {
    "causal": dict(offsets=(105, 50)),
    "bidirectional": dict(causal=False),
    "ragged": dict(offsets=(105, 3), lengths=(150, 48)),
    "a_row_that_sees_nothing": dict(offsets=(105, 0), lengths=(150, 0)),
    "window": dict(offsets=(105, 0), window=20),
    "window_and_sinks": dict(offsets=(105, 60), window=20, sinks=5, sunk=True),
    "more_sinks_than_a_block": dict(offsets=(105, 105), window=80, sinks=70, sunk=True),
    "sinks_of_the_same_queries": dict(offsets=(105, 60), window=20, sinks=5),
    "softcap": dict(offsets=(105, 50), softcap=1.5, scale=0.7),
    "segments": dict(causal=False, segments=(ids(T, 3), ids(S, 3))),
    "positions": dict(window=30, shuffled=True),
    "sink_logits": dict(offsets=(105, 0), sink_logits=np.linspace(-1, 2, H, dtype=np.float32)),
    "bfloat16": dict(offsets=(105, 50), dtype="bfloat16"),
}
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def flash_arguments(offsets=None, lengths=None, sunk=False, shuffled=False, dtype="float32", **how):
    q, k, v, sink_q = normal((B, T, H, D), (B, S, K, D), (B, S, K, E), (B, T, H, D), dtype=dtype)
    if sunk:
        how["sink_queries"] = sink_q
    if shuffled:  # a ring's keys, some of its places empty
        order = np.random.default_rng(0).permutation(S)
        key = np.tile(np.where(order % 7 == 0, -1, order), (B, 1))
        how["positions"] = jnp.asarray(np.arange(T)[None] + [[100], [20]]), jnp.asarray(key)
    else:
        how |= {n: None if x is None else jnp.asarray(x) for n, x in (("offsets", offsets), ("lengths", lengths))}
    return (q, k, v), how


@pytest.mark.parametrize("mask", MASKS)
def test_flash_attention_equals_the_reference(mask):
    args, how = flash_arguments(**MASKS[mask])

    @functools.partial(jax.jit, static_argnums=0)
    def run(name, *args):
        return flash_attention(*args, **how, return_lse=True, implementation=name, interpret=True)

    found, wanted = run("pallas_gpu", *args), run("reference", *args)
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == want.dtype
        close = TOLERANCE[MASKS[mask].get("dtype", "float32")]
        np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=close, atol=close)


def test_gradients_go_through_the_kernel():
    args, how = flash_arguments(offsets=(105, 60), window=20, sinks=5, sunk=True, softcap=2.0)

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.grad, argnums=(1, 2, 3))
    def gradient(name, *args):
        out, lse = flash_attention(*args, **how, return_lse=True, implementation=name, interpret=True)
        return jnp.sum(out**2) + jnp.sum(lse)

    for got, want in zip(gradient("pallas_gpu", *args), gradient("reference", *args), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_only_blocks_that_a_window_reaches_are_walked():
    """With sinks too: they are a walk of their own, so that what lies between is left out."""
    o, b = Options(1.0, window=32, sinks=4), Blocks(16, 16, 4)
    at = jnp.arange(256, dtype=jnp.int32)[None]
    first, last = bounds(o, of_rows(Places(at, at), 1, b.rows, 256, b.keys), b)
    np.testing.assert_array_equal(last[0], 1 + np.arange(16))
    np.testing.assert_array_equal(first[0], np.maximum(np.arange(16) - 2, 0))


CODECS = {"dense": None, "int8": Format("int8", 10, "float16"), "int4": Format("int4_min", 10, "float16")}
LAYOUTS = {
    "linear": Layout(250),
    "linear_window_and_sinks": Layout(250, Window(70, 6)),
    "ring_and_sinks": Layout(70 + 6 + 3 - 1, Window(70, 6), 3),
    "pages": Layout(250, None, None, 24),
    "pages_of_a_ring": Layout(70 + 3 - 1, Window(70, 0), 3, 16),
}
STEPS = 3


CALLS = [(layout, "dense") for layout in LAYOUTS] + [
    ("linear", "int8"), ("ring_and_sinks", "int4"), ("pages", "int4"), ("pages_of_a_ring", "int8"),
]  # fmt: skip
LENGTHS = (200, 65, 0, 2)


def decode_arguments(layout, codec):
    """Rows of several lengths in the second of a cache's two layers, and the queries of their last three tokens."""
    rows, lengths, table = len(LENGTHS), jnp.asarray(LENGTHS), None
    *texts, q, sink_q = normal(*[(rows, max(LENGTHS), K, D)] * 2, *[(rows, STEPS, H, D)] * 2)
    if layout.page is not None:
        table = jnp.asarray(np.random.default_rng(1).permutation(rows * layout.pages).reshape(rows, -1))

    @jax.jit
    def filled(text):
        at = jnp.broadcast_to(jnp.arange(max(LENGTHS))[None], (rows, max(LENGTHS)))
        sinks = layout.window.sinks if layout.window else 0
        last = (at >= lengths[:, None] - (layout.slots - sinks)) | (at < sinks)  # what no later token is written over
        keep = last & (at < lengths[:, None])
        empty = kv.empty(layout, 2, rows, K, D, codec, text.dtype)
        return kv.write(empty, kv.encode(text, codec), 1, layout, table, at, keep)

    positions = jnp.asarray(np.maximum(np.array(LENGTHS) - STEPS, 0)[:, None] + np.arange(STEPS)[None])
    how = dict(layout=layout, heads=K, positions=positions, lengths=lengths, table=table)
    if layout.window and layout.window.sinks:
        how["sink_queries"] = sink_q
    return (q, *(filled(x) for x in texts), jnp.int32(1)), how


@pytest.mark.parametrize(("layout", "codec"), CALLS)
def test_decode_attention_equals_what_xla_reads(layout, codec):
    args, how = decode_arguments(LAYOUTS[layout], CODECS[codec])

    @functools.partial(jax.jit, static_argnums=0)
    def run(name, *args):
        return decode_attention(*args, **how, softcap=3.0, return_lse=True, implementation=name, interpret=True)

    real = np.arange(STEPS)[None] < np.asarray(how["lengths"])[:, None]  # of a short row the other queries are padding
    for got, want in zip(run("pallas_gpu", *args), run("xla", *args), strict=True):
        np.testing.assert_allclose(got[real], want[real], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(got[2], want[2])  # the empty row


def test_what_several_programs_find_is_one_softmax():
    rng = np.random.default_rng(0)
    scores, values = rng.normal(size=(1, 1, 6, 5, 8)), rng.normal(size=(1, 1, 6, 8, 4))
    scores[:, :, 2], scores[:, :, :, 4] = -np.inf, -np.inf  # a program, and a row, that see nothing
    weights = np.exp(scores)
    total = weights.sum(-1)
    with np.errstate(divide="ignore"):
        lse, whole = np.log(total), np.log(total.sum(2))
    out = (weights @ values) / np.where(total == 0, 1, total)[..., None]
    found, sums = jax.jit(joined, static_argnums=2)(np.float32(out), np.float32(lse), 2)
    np.testing.assert_allclose(sums, whole, rtol=1e-5)
    want = (weights @ values).sum(2) / np.where(total.sum(2) == 0, 1, total.sum(2))[..., None]
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-6)


def modules(f, *args):
    """The names of the Triton kernels of a program that is lowered for an H100 which is not here.

    Each is parsed again, as the compiler will: lowering itself verifies nothing.
    """
    from jax._src.pallas.triton.lowering import _new_ir_context

    here = contextlib.nullcontext()
    if jax.__version_info__ >= (0, 11):  # which takes no card for granted
        h100 = jax.sharding.AbstractDevice("NVIDIA H100", None, "gpu")
        here = jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=h100))
    with here:
        lowered = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",))
    found = []

    def visit(op):
        if op.name == "stablehlo.custom_call" and "xla.gpu.triton" in str(op.attributes["call_target_name"]):
            found.append(ir.DictAttr(op.attributes["mhlo.backend_config"]))
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(visit)
    with _new_ir_context():
        for config in found:
            assert ir.Module.parse(config["ir"].value_bytes).operation.verify()
    return [config["name"].value for config in found]


lowers = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")


@lowers
@pytest.mark.parametrize("mask", ["causal", "bidirectional", "window_and_sinks", "softcap", "segments", "bfloat16"])
def test_flash_attention_lowers_for_cuda(mask):
    args, how = flash_arguments(**MASKS[mask])
    assert modules(lambda *x: flash_attention(*x, **how, implementation="pallas_gpu"), *args) == ["flash_attention"]


@lowers
@pytest.mark.parametrize(("layout", "codec"), CALLS)
def test_decode_attention_lowers_for_cuda(layout, codec):
    args, how = decode_arguments(LAYOUTS[layout], CODECS[codec])
    assert modules(lambda *x: decode_attention(*x, **how, implementation="pallas_gpu"), *args) == ["decode_attention"]


@lowers
def test_a_stack_lowers_for_cuda_with_both_kernels():
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    flash = ip.flash_attention("pallas_gpu")(ip.models.llama(layers=2, kv_heads=2, head_dim=32))
    cached = (ip.cache_kv(bits=4) | ip.paged(16))(flash)
    for model, kernel in ((flash, "flash_attention"), (cached, "decode_attention")):
        params = jax.eval_shape(model.init, jax.random.key(0))
        state = jax.eval_shape(functools.partial(model.init_state, 1, 64, chunk=8))
        assert modules(model.apply, params, tokens, state) == [kernel]


@pytest.mark.parametrize(
    ("why", "shapes", "dtypes"),
    [
        ("more than 256 channels", [(1, 4, 2, 300)] * 3, ["float32"] * 3),
        ("none of float32", [(1, 4, 2, 16)] * 3, ["int8"] * 3),
        ("differ in dtype", [(1, 4, 2, 16)] * 3, ["float32", "bfloat16", "bfloat16"]),
        ("an axis is empty", [(1, 4, 2, 16), (1, 0, 2, 16), (1, 0, 2, 16)], ["float32"] * 3),
    ],
)
def test_what_the_kernel_cannot_serve_it_refuses(why, shapes, dtypes):
    args = [jnp.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    with pytest.raises(InfoptError, match=why):
        flash_attention(*args, implementation="pallas_gpu")


def test_a_codec_without_a_rule_here_is_refused():
    args, how = decode_arguments(Layout(16), Format("nf4", 10, "float16"))
    with pytest.raises(InfoptError, match="does not dequantise nf4"):
        decode_attention(*args, **how, implementation="pallas_gpu")


def test_a_block_fits_the_smallest_card():
    """Of 99 KiB: the rows, and twice the keys and values, which are in flight while others are used."""
    for width in (16, 80, 128, 256):
        for itemsize in (2, 4):
            b = Blocks.plan(10**6, 10**6, (width, width), itemsize, 4, (64, 64))
            wide = 1 << (width - 1).bit_length()
            assert min(b.rows, b.keys) >= LEAST
            assert (b.rows * wide + 2 * b.keys * 2 * wide) * itemsize <= 99 * 2**10
