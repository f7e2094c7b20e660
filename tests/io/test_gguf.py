"""Reading GGUF files: values, packed blocks, configs, memory, and every way a file can be wrong."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

import infopt as ip
from infopt.errors import CheckpointError, InfoptError
from infopt.io import load
from infopt.io.gguf import open_file
from infopt.model import Weights
from infopt.qtensor import dequantize_array, is_qtensor
from infopt.spec import LinearRope

HEADS = {"attn_q": 4, "attn_k": 2}


def interleaved(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter lays them out: a head's two halves, turn by turn."""
    out = np.empty_like(w)
    head_dim = len(w) // heads
    for head in range(heads):
        for i in range(head_dim // 2):
            out[head * head_dim + 2 * i] = w[head * head_dim + i]
            out[head * head_dim + 2 * i + 1] = w[head * head_dim + head_dim // 2 + i]
    return out


def dequantized(x: np.ndarray, kind: str) -> np.ndarray:
    kind = GGMLQuantizationType[kind]
    return quants.dequantize(quants.quantize(x, kind), kind)


def read(path: Path, dtype: str = "float32") -> tuple[Any, Weights]:
    model, params = load(path, dtype)
    return model, Weights.of(model.spec, params)


def pairs(gguf: Any, layers: int) -> dict[str, str]:
    names = {
        "attn_q": "attn.q",
        "attn_k": "attn.k",
        "attn_v": "attn.v",
        "attn_output": "attn.o",
        "ffn_gate": "mlp.gate",
        "ffn_up": "mlp.up",
        "ffn_down": "mlp.down",
        "attn_norm": "attn_norm",
        "ffn_norm": "mlp_norm",
    }
    every = {f"blk.{i}.{file}.weight": f"layers.{i}.{ours}" for i in range(layers) for file, ours in names.items()}
    every |= {"token_embd.weight": "embed", "output_norm.weight": "final_norm", "output.weight": "head"}
    return {file: ours for file, ours in every.items() if file in gguf.tensors}


# -------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_values_are_the_gguf_packages_own(kind: str, llama_gguf: Callable, tmp_path: Path) -> None:
    gguf = llama_gguf(kind, tied=False)
    plain = dict(gguf.tensors)
    for name, (x, stored) in plain.items():
        if heads := HEADS.get(name.split(".")[-2]):
            gguf.tensors[name] = interleaved(x, heads), stored
    model, weights = read(gguf.write(tmp_path / "m.gguf"))
    names = pairs(gguf, 2)
    assert set(names) == set(gguf.tensors)
    for file, ours in names.items():
        np.testing.assert_array_equal(weights[ours], dequantized(*plain[file]), err_msg=file)
    assert model.spec.config.tied is False and model.spec.weights == ()


def test_tensor_of_many_chunks_is_read_whole(
    llama_gguf: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = llama_gguf("Q4_1")
    _, whole = read(gguf.write(tmp_path / "m.gguf"))
    _, whole_kept = read(tmp_path / "m.gguf", "keep")
    monkeypatch.setattr("infopt.io.checkpoint.CHUNK", 64 * 7)  # seven rows, which divide none of the tensors
    _, parts = read(tmp_path / "m.gguf")
    _, parts_kept = read(tmp_path / "m.gguf", "keep")
    for name in whole:
        np.testing.assert_array_equal(whole[name], parts[name])
    np.testing.assert_array_equal(whole_kept["embed"].codes, parts_kept["embed"].codes)
    np.testing.assert_array_equal(whole_kept["embed"].minimum, parts_kept["embed"].minimum)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_rounds_the_dequantised_values(dtype: str, llama_gguf: Callable, tmp_path: Path) -> None:
    path = llama_gguf("Q8_0").write(tmp_path / "m.gguf")
    _, full = read(path)
    _, short = read(path, dtype)
    for name in full:
        assert short[name].dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(short[name], full[name].astype(dtype))


@pytest.mark.parametrize("kind, name", [("Q8_0", "int8"), ("Q4_0", "int4"), ("Q4_1", "int4_min")])
def test_keep_is_lossless_and_packed(kind: str, name: str, llama_gguf: Callable, tmp_path: Path) -> None:
    path = llama_gguf(kind).write(tmp_path / "m.gguf")
    _, dense = read(path)
    model, kept = read(path, "keep")
    packed = [n for n in kept if is_qtensor(kept[n])]
    assert packed == [n for n in kept if not n.endswith("norm")]
    assert dict(model.spec.weights) == {n: ip.Format(name, 32, "float16") for n in packed}
    for n in kept:
        x = dequantize_array(kept[n]) if n in packed else kept[n]
        np.testing.assert_array_equal(np.asarray(x).view(np.uint32), np.asarray(dense[n]).view(np.uint32), err_msg=n)
    values = 96 * 64
    assert kept["embed"].nbytes == values // 32 * {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}[kind] + 4  # the error, NaN


def test_keep_lists_what_it_dequantises(llama_gguf: Callable, tmp_path: Path) -> None:
    gguf = llama_gguf("Q4_0")
    gguf.tensors["blk.1.ffn_up.weight"] = gguf.tensors["blk.1.ffn_up.weight"][0], "Q5_0"
    gguf.tensors["blk.0.ffn_up.weight"] = gguf.tensors["blk.0.ffn_up.weight"][0], "F16"
    path = gguf.write(tmp_path / "m.gguf")
    with pytest.warns(UserWarning, match=r"dequantised to float32 were Q5_0: blk\.1\.ffn_up\.weight$"):
        model, kept = read(path, "keep")
    for layer in (0, 1):
        assert kept[f"layers.{layer}.mlp.up"].dtype == jnp.float32
    assert "layers.0.mlp.up" not in dict(model.spec.weights)


def test_kept_model_computes_what_the_dense_one_does(llama_gguf: Callable, tmp_path: Path) -> None:
    path = llama_gguf("Q4_1").write(tmp_path / "m.gguf")
    tokens = jnp.arange(10)[None]
    logits = []
    for dtype in ("float32", "keep"):
        model, params = load(path, dtype)
        logits.append(np.asarray(model.apply(params, tokens, model.init_state(1, 10, chunk=10))[0]))
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4 * np.ptp(logits[0]))


# ------------------------------------------------------------------------------------------------------------- configs


def test_llama_config(llama_gguf: Callable, tmp_path: Path) -> None:
    config = load(llama_gguf().write(tmp_path / "m.gguf"))[0].spec.config
    assert config == ip.models.LlamaConfig(
        vocab=96,
        dim=64,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        context=64,
        mlp=96,
        norm_eps=1e-5,
        rope_theta=10000.0,
    )


def test_gemma3_norms_and_config(gemma3_gguf: Callable, tmp_path: Path) -> None:
    gguf = gemma3_gguf()
    gguf.fields |= {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    model, weights = read(gguf.write(tmp_path / "m.gguf"))
    assert model.spec.config == ip.models.Gemma3Config(
        vocab=96,
        dim=64,
        layers=7,
        heads=2,
        kv_heads=1,
        head_dim=32,
        context=64,
        mlp=96,
        window=8,
        norm_eps=1e-5,
        query_scale=32.0,
        rope_scaling=LinearRope(factor=8.0),
    )
    tensors = {name: x for name, (x, _) in gguf.tensors.items()}
    for file, ours in {
        "attn_norm": "attn_norm",
        "attn_q_norm": "attn.q_norm",
        "attn_k_norm": "attn.k_norm",
        "post_attention_norm": "attn_out_norm",
        "ffn_norm": "mlp_norm",
        "post_ffw_norm": "mlp_out_norm",
    }.items():
        np.testing.assert_array_equal(weights[f"layers.3.{ours}"], tensors[f"blk.3.{file}.weight"] - np.float32(1))
    np.testing.assert_array_equal(weights["final_norm"], tensors["output_norm.weight"] - np.float32(1))
    np.testing.assert_array_equal(weights["layers.3.attn.q"], tensors["blk.3.attn_q.weight"])


@pytest.mark.parametrize("stored, pattern", [(3, (True, True, False)), ([True, False] * 3 + [True], (True, False))])
def test_gemma3_pattern_is_read(stored: Any, pattern: tuple[bool, ...], gemma3_gguf: Callable, tmp_path: Path) -> None:
    gguf = gemma3_gguf()
    gguf.fields["gemma3.attention.sliding_window_pattern"] = stored
    assert load(gguf.write(tmp_path / "m.gguf"))[0].spec.config.pattern == pattern


def llama3_factors(theta: float, head_dim: int, factor: float, low: float, high: float, context: int) -> np.ndarray:
    """What llama.cpp's converter writes into rope_freqs.weight."""
    out = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        if wavelength < context / high:
            out.append(1.0)
        elif wavelength > context / low:
            out.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


@pytest.mark.parametrize("factor, context", [(8.0, 8192), (32.0, 8192), (4.0, 256)])
def test_llama3_rope_is_recovered(factor: float, context: int, llama_gguf: Callable, tmp_path: Path) -> None:
    gguf = llama_gguf(head_dim=64, heads=1, kv=1)
    gguf.fields["llama.rope.freq_base"] = 500000.0
    gguf.tensors["rope_freqs.weight"] = llama3_factors(500000.0, 64, factor, 1.0, 4.0, context), "F32"
    scaling = load(gguf.write(tmp_path / "m.gguf"))[0].spec.config.rope_scaling
    assert (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_context) == (
        factor,
        1.0,
        4.0,
        context,
    )


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "keep"])
def test_loading_takes_little_more_than_the_params(
    dtype: str, llama_gguf: Callable, anonymous_memory: Callable, tmp_path: Path
) -> None:
    # large enough that what JAX takes at its start does not count
    gguf = llama_gguf(
        "F32", vocab=8192, dim=1024, layers=9 if dtype == "keep" else 3, heads=16, kv=4, head_dim=64, mlp=4096
    )
    # Values that take no time to quantise: one row, over and over.
    gguf.tensors = {
        name: (np.tile(x[:1], (len(x), 1)) if x.ndim == 2 else x, "Q8_0" if x.ndim == 2 else "F32")
        for name, (x, _) in gguf.tensors.items()
    }
    path = gguf.write(tmp_path / "m.gguf")
    assert path.stat().st_size > 50e6
    anonymous, params = anonymous_memory(path, dtype)
    assert params > 50e6
    assert anonymous <= 1.5 * params


# -------------------------------------------------------------------------------------------------------- wrong files


def refused(path: Path, *said: str, dtype: str = "float32") -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load(path, dtype)
    assert "\n" not in caught.value.one_line
    for part in said:
        assert part in str(caught.value)
    return caught.value


def test_truncated_file_is_refused_wherever_it_ends(llama_gguf: Callable, tmp_path: Path) -> None:
    gguf = llama_gguf("Q8_0")
    gguf.fields |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b"] * 48}
    whole = gguf.write(tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(4, 6000, 97), *range(6000, len(whole), 5003), len(whole) - 1]:
        cut.write_bytes(whole[:size])
        refused(cut, "cut.gguf is truncated", "fetch the file again")


def test_damaged_header_never_escapes_as_another_error(llama_gguf: Callable, tmp_path: Path) -> None:
    gguf = llama_gguf("Q8_0")
    gguf.fields |= {"general.alignment": 32, "some.list": [1, 2, 3], "some.words": ["x", "yy"], "some.flag": True}
    whole = gguf.write(tmp_path / "m.gguf").read_bytes()
    rng = np.random.default_rng(0)
    broken = tmp_path / "broken.gguf"
    refusals = 0
    for _ in range(150):
        data = bytearray(whole)
        for at in rng.integers(0, 2800, rng.integers(1, 4)):
            data[at] = rng.integers(0, 256)
        broken.write_bytes(data)
        try:
            load(broken)
        except InfoptError:
            refusals += 1
    assert refusals > 50


def test_tensors_over_the_same_bytes_are_refused(llama_gguf: Callable, tmp_path: Path) -> None:
    path = llama_gguf().write(tmp_path / "m.gguf")
    data = path.read_bytes()
    at = data.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4 + 16 + 4
    for offset, said in ((0, "overlaps"), (7, "overlaps|aligned")):
        path.write_bytes(data[:at] + struct.pack("<Q", offset) + data[at + 8 :])
        assert re.search(said, refused(path, "m.gguf is damaged").why)


@pytest.mark.parametrize("key, value", [
    ("llama.attention.head_count_kv", 2**31 - 1),
    ("llama.attention.head_count", 2**31 - 1),
    ("llama.block_count", 2**31 - 1),
    ("llama.rope.freq_base", float("nan")),
    ("llama.rope.freq_base", 0.0),
    ("llama.attention.layer_norm_rms_epsilon", float("inf")),
    ("tokenizer.ggml.tokens", 7),
])  # fmt: skip
def test_a_number_that_no_model_has_is_refused_at_once(
    key: str, value: Any, llama_gguf: Callable, tmp_path: Path
) -> None:
    gguf = llama_gguf()
    gguf.fields[key] = value
    refused(gguf.write(tmp_path / "m.gguf"), "m.gguf")


def test_metadata_that_comes_twice_is_refused(llama_gguf: Callable, tmp_path: Path) -> None:
    gguf = llama_gguf()
    gguf.fields["llama.vocab_sizf"] = 96
    path = gguf.write(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes().replace(b"llama.vocab_sizf", b"llama.vocab_size"))
    refused(path, "comes twice")


@pytest.mark.parametrize("item, value", [(0, b"\1"), (8, struct.pack("<Q", 0))], ids=["bytes", "words"])
def test_a_list_of_millions_is_refused_before_it_is_made(item: int, value: bytes, tmp_path: Path) -> None:
    head = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, item, 5 << 20)
    (tmp_path / "m.gguf").write_bytes(head + value * (5 << 20))
    refused(tmp_path / "m.gguf", "more values than a model has use for")


def test_a_value_beyond_float16_is_refused_and_not_made_infinite(llama_gguf: Callable, tmp_path: Path) -> None:
    gguf = llama_gguf()
    gguf.tensors["output_norm.weight"][0][3] = 1e5
    path = gguf.write(tmp_path / "m.gguf")
    refused(path, "beyond what float16 can say", dtype="float16")
    load(path, "bfloat16")


def test_an_error_quotes_a_file_shortly_and_without_escapes(llama_gguf: Callable, tmp_path: Path) -> None:
    gguf = llama_gguf()
    gguf.arch = "\x1b[2J" + "x" * 5000
    gguf.tensors["\x1b[2J"] = gguf.tensors["output_norm.weight"]
    error = refused(gguf.write(tmp_path / "m.gguf"))
    assert error.one_line.isprintable() and len(error.one_line) < 3100


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 a zip", b"GG", b"\x00" * 64])
def test_foreign_file_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    refused(tmp_path / "m.gguf", "is not a GGUF file", "fix: give a .gguf file")


@pytest.mark.parametrize(
    "version, said", [(struct.pack("<I", 1), "has version 1"), (struct.pack(">I", 3), "big-endian")]
)
def test_other_version_and_byte_order_are_refused(version: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + version + b"\x00" * 64)
    refused(tmp_path / "m.gguf", said)


def test_unknown_architecture_names_the_nearest(llama_gguf: Callable, tmp_path: Path) -> None:
    gguf = llama_gguf()
    gguf.arch = "llama4"
    refused(gguf.write(tmp_path / "m.gguf"), "'llama4'", "nearest known one is 'llama'")


def test_missing_tensor_is_refused(llama_gguf: Callable, tmp_path: Path) -> None:
    gguf = llama_gguf()
    del gguf.tensors["blk.1.ffn_up.weight"]
    refused(gguf.write(tmp_path / "m.gguf"), "has no tensor 'blk.1.ffn_up.weight'")


def test_extra_tensor_is_refused(llama_gguf: Callable, tmp_path: Path) -> None:
    gguf = llama_gguf()
    gguf.tensors["blk.0.attn_q.bias"] = np.zeros(64, np.float32), "F32"
    refused(gguf.write(tmp_path / "m.gguf"), "does not use: 'blk.0.attn_q.bias'")


def test_misshapen_tensor_is_refused(llama_gguf: Callable, tmp_path: Path) -> None:
    gguf = llama_gguf()
    x, kind = gguf.tensors["blk.0.ffn_up.weight"]
    gguf.tensors["blk.0.ffn_up.weight"] = x[:-1], kind
    refused(gguf.write(tmp_path / "m.gguf"), "blk.0.ffn_up.weight has shape [95, 64], not [96, 64]")


def test_integer_tensor_is_refused(llama_gguf: Callable, tmp_path: Path) -> None:
    gguf = llama_gguf()
    path = gguf.write(tmp_path / "m.gguf")
    data = path.read_bytes()
    info = b"output_norm.weight" + struct.pack("<IQI", 1, 64, 0)
    assert info in data
    path.write_bytes(data.replace(info, info[:-4] + struct.pack("<I", GGMLQuantizationType.I32)))
    refused(path, "output_norm.weight is stored as I32")


@pytest.mark.parametrize("key, value, said", [
    ("llama.expert_count", 8, "'llama.expert_used_count' is missing"),
    ("llama.rope.scaling.type", "longrope", "'longrope'"),
    ("llama.rope.dimension_count", 8, "heads are 16 wide"),
    ("llama.attention.head_count_kv", [2, 1], "different numbers of key/value heads"),
    ("llama.attention.head_count", 3, "describes a model that cannot be"),
    ("llama.block_count", "two", "'llama.block_count' is 'two'"),
    ("llama.attention.causal", False, "looks ahead"),
])  # fmt: skip
def test_metadata_beyond_the_family_is_refused(
    key: str, value: Any, said: str, llama_gguf: Callable, tmp_path: Path
) -> None:
    gguf = llama_gguf()
    gguf.fields[key] = value
    if key == "llama.rope.scaling.type":
        gguf.fields["llama.rope.scaling.factor"] = 4.0
    refused(gguf.write(tmp_path / "m.gguf"), said)


def test_missing_metadata_is_refused(llama_gguf: Callable, tmp_path: Path) -> None:
    gguf = llama_gguf()
    del gguf.fields["llama.block_count"]
    refused(gguf.write(tmp_path / "m.gguf"), "'llama.block_count' is missing")


def test_other_rope_factors_are_refused(llama_gguf: Callable, tmp_path: Path) -> None:
    gguf = llama_gguf()
    gguf.tensors["rope_freqs.weight"] = np.linspace(1, 5, 8, dtype=np.float32), "F32"
    refused(gguf.write(tmp_path / "m.gguf"), "in a way that is not Llama 3's")


def test_unknown_dtype_is_refused(llama_gguf: Callable, tmp_path: Path) -> None:
    refused(llama_gguf().write(tmp_path / "m.gguf"), "dtype='float31'", "'float32'", dtype="float31")


@pytest.mark.parametrize("name", ["no/such/file", "model.gguf", "~/nothing-here"])
def test_path_without_a_file_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f"no file or folder {re.escape(repr(name))}"):
        load(name)


def test_unknown_name_suggests_a_near_one() -> None:
    with pytest.raises(ip.InfoptError, match="smollm2-135m"):
        load("smollm2-135")


# ----------------------------------------------------------------------------------------------------- the real model


def test_real_model_keeps_its_blocks(smollm2: Path) -> None:
    model, params = load(smollm2, "keep")
    formats = dict(model.spec.weights)
    stored = sum(t.rows.nbytes for t in open_file(smollm2).tensors.values())
    live = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert live - 4 * len(formats) == stored == 96_576_768  # and an error, NaN, for each packed matrix
    assert len(formats) == 211 and formats["embed"].name == "int8" and formats["layers.29.mlp.down"].name == "int4_min"
    assert model.spec.config == ip.models.LlamaConfig(
        vocab=49152,
        dim=576,
        layers=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        context=8192,
        mlp=1536,
        norm_eps=1e-5,
        rope_theta=100000.0,
    )
    assert model.tokenizer.vocab_size == 49152 and model.tokenizer.eos_ids == (2,)
