"""GGUF's K-quants: kept bit for bit, in the file's bytes; their values are the gguf package's own."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import kquants
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, quants

import infopt as ip
from infopt import reference, testing
from infopt.errors import CheckpointError, InfoptError, TransformOrderError
from infopt.formats import FORMATS, Format
from infopt.io.blocks import FIELDS, KEPT, put_together, take_apart
from infopt.io.gguf import open_file
from infopt.model import Weights, build, shapes
from infopt.planner import abstract_params, abstract_state
from infopt.qtensor import (
    QTensor,
    dequantize_array,
    is_qtensor,
    pack,
    planes,
    quantize_array,
    split_planes,
    take,
    unpack,
)
from infopt.spec import oracle

KINDS = ("Q4_K", "Q5_K", "Q6_K")
BITS = {"Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625}
MIXED = {"attn_v": "Q5_K", "ffn_down": "Q6_K", "token_embd": "Q6_K", "output": "Q6_K"}
"""As files called Q4_K_M have them: the rest is Q4_K."""
SIZES = dict(dim=256, mlp=512, heads=4, kv=2, head_dim=64)
TEXT = [5, 17, 3, 90, 44, 8, 8, 61, 2, 30, 12, 71]
dequantize = jax.jit(dequantize_array)


def tensor(kind: str, shape: tuple[int, ...] = (5, 3, 512), x: np.ndarray | None = None) -> tuple[np.ndarray, QTensor]:
    """Blocks of `x`, or of random bits, uint8 `[rows, bytes]`, and the QTensor that they become."""
    rows = kquants.random(shape, kind, seed=0) if x is None else kquants.quantize(x, kind)
    rows = rows.reshape(-1, rows.shape[-1])
    parts = take_apart(GGMLQuantizationType[kind], rows.reshape(len(rows), shape[-1] // 256, -1))
    leaves = {name: jnp.asarray(leaf.reshape(*shape[:-1], -1)) for name, leaf in parts.items()}
    return rows, QTensor(format=KEPT[GGMLQuantizationType[kind]], shape=shape[-2:], **{"minimum": None} | leaves)


def of_package(rows: np.ndarray, kind: str) -> np.ndarray:
    return quants.dequantize(rows, GGMLQuantizationType[kind])


# --------------------------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("kind", KINDS)
def test_the_makers_blocks_mean_what_went_into_them(kind: str) -> None:
    x = np.random.default_rng(0).normal(size=(6, 512)).astype(np.float32)
    x[1], x[2, :256], x[3] = 0, 0, np.abs(x[3]) + 1
    got = of_package(kquants.quantize(x, kind), kind)
    step = {"Q4_K": 0.25, "Q5_K": 0.12, "Q6_K": 0.08}[kind]  # of about the greatest value
    assert np.abs(got - x).max() < step * np.abs(x).max() / 2
    assert not got[1].any() and got[3].min() > 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_the_gguf_packages_bit_for_bit(kind: str) -> None:
    """Whatever the bits: products of d, a number of 6 or 8 bits and a code are exact in float32, so that only the
    difference to the minimum is rounded, and a fused multiply and add rounds it alike."""
    rows, q = tensor(kind, (40, 512))
    want = of_package(rows, kind)
    np.testing.assert_array_equal(np.asarray(dequantize(q)).view(np.uint32), want.view(np.uint32))
    np.testing.assert_array_equal(np.asarray(dequantize_array(q)).view(np.uint32), want.view(np.uint32))
    np.testing.assert_array_equal(reference.dequantize(q).astype(np.float32), want)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", *KINDS])
def test_blocks_taken_apart_and_put_together_are_the_same(kind: str) -> None:
    kind = GGMLQuantizationType[kind]
    size = sum(FIELDS[kind.name].values())
    blocks = np.random.default_rng(1).integers(0, 256, (7, 3, size), np.uint8)  # NaN and infinite scales too
    parts = take_apart(kind, blocks)
    assert sum(x.nbytes for x in parts.values()) == blocks.nbytes
    np.testing.assert_array_equal(put_together(kind, parts), blocks)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_words_are_taken_apart_as_they_were_packed(bits: int) -> None:
    """By numpy, by JAX, and by the reference's reading of a stream of bits."""
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 2, 64)).astype(np.uint8)
    packed = pack(codes, bits, np)
    assert packed.shape == (3, 2 * 64 * bits // 8)
    np.testing.assert_array_equal(np.asarray(pack(jnp.asarray(codes), bits)), packed)
    np.testing.assert_array_equal(reference.unpack(packed, bits, 64), codes)
    found = unpack(packed, bits, 64)
    in_order = np.concatenate([plane.reshape(3, 2, -1) for plane in found], -1)
    np.testing.assert_array_equal(in_order, codes)
    for ours, of_numpy in zip(jax.jit(unpack, static_argnums=(1, 2))(packed, bits, 64), found, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), of_numpy)


def test_five_bits_are_eight_codes_in_five_bytes() -> None:
    word = sum(code << 5 * place for place, code in enumerate(range(24, 32)))
    packed = pack(np.arange(24, 32, dtype=np.uint8)[None], 5, np)
    assert packed.tolist() == list(word.to_bytes(5, "little"))


@pytest.mark.parametrize("kind", KINDS)
def test_planes_slices_and_rows_are_those_of_any_format(kind: str) -> None:
    w, x = (np.random.default_rng(2).normal(size=(*n, 512)).astype(np.float32) for n in ((3, 6), (4,)))
    rows, q = tensor(kind, (3, 6, 512), w)
    one = q[1]
    assert jax.tree.structure(one) == jax.tree.structure(q)
    product = sum(a @ b.T for a, b in zip(split_planes(jnp.asarray(x), one), planes(one), strict=True))
    want = x.astype(np.float64) @ of_package(rows, kind).reshape(w.shape)[1].T
    np.testing.assert_allclose(np.asarray(product), want, rtol=1e-5, atol=1e-4)
    some = jnp.array([[2, 0], [3, 3]])
    np.testing.assert_array_equal(np.asarray(dequantize(take(one, some))), np.asarray(dequantize(one))[some])


@pytest.mark.parametrize("kind", KINDS)
def test_live_buffers_take_the_files_bytes(kind: str) -> None:
    rows, q = tensor(kind)
    fmt = q.format
    assert q.nbytes == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(q)) == rows.nbytes
    assert q.nbytes == fmt.bytes_per_value(512) * 5 * 3 * 512
    assert fmt.bytes((5, 3, 512)) == q.nbytes + 4 * 5  # and of a weight the error of its rounding
    assert fmt.bytes_per_value(4096) * 8 == BITS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_rounds_to_them_and_the_error_says_what_can_be(kind: str) -> None:
    fmt = KEPT[GGMLQuantizationType[kind]]
    for call in (
        lambda: ip.quantize(format=fmt.name),
        lambda: quantize_array(jnp.ones((2, 256)), fmt),
        lambda: ip.parse_stack(f"quantize(format='{fmt.name}')"),
    ):
        with pytest.raises(InfoptError, match=f"nothing here rounds to {fmt.name}") as e:
            call()
        assert 'dtype="keep"' in e.value.fix and "int4" in e.value.fix
        assert not any(name in e.value.fix for name, row in FORMATS.items() if row.kept)


@pytest.mark.parametrize("group", [None, 128, 512])
def test_a_block_has_256_values(group: int | None) -> None:
    with pytest.raises(InfoptError, match="q4_k has no groups of") as e:
        Format("q4_k", group, "float16")
    assert e.value.fix == "group=256"


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def k_gguf(llama_gguf: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`k_gguf(kind)`: a small Llama, all of its matrices so; of kind "mixed", as files called Q4_K_M are."""

    @functools.cache
    def make(kind: str) -> Path:
        gguf = llama_gguf("F32", tied=False, **SIZES)
        for name, (x, _) in gguf.tensors.items():
            if x.ndim == 2:
                stored = MIXED.get(name.split(".")[-2], "Q4_K") if kind == "mixed" else kind
                gguf.tensors[name] = x * x.shape[-1] ** -0.5, stored
        return gguf.write(tmp_path_factory.mktemp("kquants") / f"{kind}.gguf")

    return make


@pytest.fixture(scope="module")
def kept(k_gguf: Callable[[str], Path]) -> Callable[[str], tuple[ip.Model, Any]]:
    return functools.cache(lambda kind: ip.load(k_gguf(kind), dtype="keep"))


def expected(model: ip.Model, params: Any, tokens: list[int]) -> np.ndarray:
    return reference.reference(oracle(model.spec), Weights.of(model.spec, params), tokens)


def check_logits(model: ip.Model, params: Any, want: np.ndarray) -> None:
    got = model.apply(params, jnp.asarray([TEXT]), model.init_state(1, len(TEXT), chunk=len(TEXT)))[0][0]
    np.testing.assert_allclose(np.asarray(got), want, atol=1e-4 * float(want.std()))


@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
def test_a_file_is_kept_saved_and_written_bit_for_bit(
    kind: str, k_gguf: Callable[[str], Path], kept: Callable[..., Any], tmp_path: Path
) -> None:
    path, (model, params) = k_gguf(kind), kept(kind)
    dense, dense_params = ip.load(path)
    weights, plain = Weights.of(model.spec, params), Weights.of(dense.spec, dense_params)
    packed = [n for n in weights if is_qtensor(weights[n])]
    assert packed == [n for n in weights if not n.endswith("norm")]
    names = {"embed": "token_embd", "head": "output", "layers.1.attn.v": "attn_v", "layers.0.mlp.down": "ffn_down"}
    for name, file in names.items():
        assert model.spec.format_of(name).name == (MIXED[file] if kind == "mixed" else kind).lower()
    for n in weights:
        got = dequantize(weights[n]) if n in packed else weights[n]
        np.testing.assert_array_equal(np.asarray(got).view(np.uint32), np.asarray(plain[n]).view(np.uint32), err_msg=n)

    stored = sum(t.rows.nbytes for t in open_file(path).tensors.values())
    live = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(params))
    assert live == model.weight_bytes() == stored + 4 * len(packed)
    said = re.search(r"([\d.]+) bytes a weight", repr(model))
    assert said and float(said[1]) == pytest.approx(stored / (dense.weight_bytes() / 4), abs=0.006)
    same = jax.tree.map(lambda a: (a.shape, np.dtype(a.dtype)), params)
    assert jax.tree.map(lambda a: (a.shape, np.dtype(a.dtype)), abstract_params(model.spec)) == same

    ip.save(tmp_path / "stack", model, params)
    ip.save(tmp_path / "again.gguf", model, params)
    for loaded, again in (ip.load(tmp_path / "stack"), ip.load(tmp_path / "again.gguf", dtype="keep")):
        assert loaded.spec == model.spec and jax.tree.structure(again) == jax.tree.structure(params)
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
            assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    ours = {t.name: t for t in GGUFReader(tmp_path / "again.gguf").tensors}
    for t in GGUFReader(path).tensors:
        assert ours[t.name].tensor_type == t.tensor_type
        np.testing.assert_array_equal(ours[t.name].data, t.data)


def test_a_tensor_of_many_chunks_is_read_and_written_whole(
    k_gguf: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = k_gguf("mixed")
    monkeypatch.setattr("infopt.io.checkpoint.CHUNK", 256 * 37)  # rows, which divide none of the tensors
    monkeypatch.setattr("infopt.io.gguf_out.CHUNK", 256 * 29)
    ip.save(tmp_path / "again.gguf", *ip.load(path, dtype="keep"))
    a, b = (open_file(p).tensors for p in (path, tmp_path / "again.gguf"))
    for name in a:
        np.testing.assert_array_equal(a[name].rows, b[name].rows)


def test_logits_are_those_of_the_file_in_float32(k_gguf: Callable[[str], Path], kept: Callable[..., Any]) -> None:
    want = expected(*ip.load(k_gguf("mixed")), TEXT)
    check_logits(*kept("mixed"), want)


def test_it_writes_text_by_a_cache(kept: Callable[..., Any]) -> None:
    """Each token is the likeliest by the numpy model."""
    base, params = kept("mixed")
    model = ip.cache_kv()(base)
    tokens = list(ip.generate(model, model.convert(params), TEXT, max_new=8).tokens)
    assert len(tokens) == 8
    want = expected(base, params, TEXT + tokens)[len(TEXT) - 1 : -1]
    assert want.argmax(-1).tolist() == tokens


DEEP = "sliding_window(5, sinks=2) | cache_kv(bits=8) | paged(4)"


@pytest.mark.parametrize(
    ("kind", "stack"),
    [*((kind, DEEP) for kind in KINDS), ("mixed", "cache_kv(bits=8) | speculative(self_draft(), k=2)")],
)
def test_a_deep_stack_over_each_equals_its_oracle(kind: str, stack: str, kept: Callable[..., Any]) -> None:
    base, params = kept(kind)
    model = ip.parse_stack(stack)(base)
    assert {f.name for _, f in model.spec.weights} == ({kind.lower()} if kind != "mixed" else {"q4_k", "q5_k", "q6_k"})
    testing.verify(model, model.convert(params), generation=False)  # speculation draws tokens all the same


def test_heads_are_pooled_after_they_are_dense(kept: Callable[..., Any]) -> None:
    base, params = kept("mixed")
    model = (ip.dequantize() | ip.gqa(1) | ip.quantize(bits=8) | ip.cache_kv())(base)
    dense = model.convert(params)
    check_logits(model, dense, expected(model, dense, TEXT))


def test_what_needs_dense_weights_says_so(kept: Callable[..., Any]) -> None:
    model, _ = kept("mixed")
    with pytest.raises(TransformOrderError, match="packed as q4_k in groups of 256"):
        ip.quantize(bits=8)(model)
    with pytest.raises(TransformOrderError, match="q4_k"):
        ip.gqa(1)(model)
    with pytest.raises(InfoptError, match="nothing here rounds to"):
        model.init(jax.random.key(0))


def test_what_is_not_kept_is_listed(llama_gguf: Callable[..., Any], tmp_path: Path) -> None:
    gguf = llama_gguf("Q4_K", **SIZES)
    gguf.tensors["blk.1.ffn_up.weight"] = gguf.tensors["blk.1.ffn_up.weight"][0], "Q5_1"
    said = r"keeps Q4_0, Q4_1, Q8_0, Q4_K, Q5_K, Q6_K; dequantised to float32 were Q5_1: blk\.1\.ffn_up\.weight$"
    with pytest.warns(UserWarning, match=said):
        model, _ = ip.load(gguf.write(tmp_path / "m.gguf"), dtype="keep")
    assert model.spec.format_of("layers.1.mlp.up") is None and model.spec.format_of("layers.1.mlp.gate") is not None


@pytest.mark.parametrize("kind", ["Q5_K"])  # of eight planes
def test_no_float_copy_of_a_stack_is_ever_there(kind: str) -> None:
    base = ip.cache_kv()(ip.models.llama(layers=24, vocab=32, dim=256, mlp=512, heads=4, kv_heads=2, head_dim=64))
    fmt = KEPT[GGMLQuantizationType[kind]]
    packed = sorted((name, fmt) for name, shape in shapes(base.spec).items() if len(shape) > 1)
    spec = base.spec.replace(weights=tuple(packed))
    state = abstract_state(spec, batch=1, context=8, chunk=1)
    run = jax.jit(lambda p, t, s: build(spec).hidden(p, t, s)[1], donate_argnums=2)
    program = run.lower(abstract_params(spec), jax.ShapeDtypeStruct((1, 1), np.int32), state).compile()
    layer = 4 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256)
    assert program.memory_analysis().temp_size_in_bytes < 3 * layer  # of 24


def test_a_saved_stack_whose_numbers_are_cut_is_refused(kept: Callable[..., Any], tmp_path: Path) -> None:
    ip.save(tmp_path / "stack", *kept("Q4_K"))
    (table,) = (tmp_path / "stack").glob("data-*/arrays/layers.0.mlp.up.inner/.zarray")
    table.write_text(json.dumps(json.loads(table.read_text()) | {"shape": [512, 6]}))
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up\.inner has shape \[512, 6\]"):
        ip.load(tmp_path / "stack")
