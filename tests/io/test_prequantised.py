"""Checkpoints that are quantised already, made here by plain packers out of their formats' definitions."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import infopt as ip
from infopt.errors import CheckpointError
from infopt.formats import Format
from infopt.io import prequantised
from infopt.io.checkpoint import Source
from infopt.model import Weights
from infopt.qtensor import QTensor
from infopt.reference import dequantize, reference

FIXTURES = Path(__file__).parents[1] / "fixtures"
BF16, E4M3, E5M2, E8M0 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu
STORED = {"int32": "I32", "int64": "I64", "int8": "I8", "uint8": "U8", "float16": "F16", "float32": "F32",
          "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
          "float64": "F64"}  # fmt: skip

Parts = dict[str, np.ndarray]
Made = tuple[Parts, np.ndarray]
"""A module's tensors by the end of their names, and the values `[out, in]` that they stand for, float64."""

# The tests' own warnings are errors; that activations stay in float is said of most of these checkpoints.
quiet = pytest.mark.filterwarnings("ignore:.*activations were meant")


# ---------------------------------------------------------------------------------------------------------- the packers


def words(codes: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Codes in int32 words along an axis, the first lowest; the last word is filled up with 0."""
    codes, each = np.moveaxis(codes.astype(np.int64), axis, 0), 32 // bits
    out = np.zeros((-(-len(codes) // each), *codes.shape[1:]), np.int64)
    for i, code in enumerate(codes):
        out[i // each] += code * 2 ** (bits * (i % each))
    return np.moveaxis(out.astype(np.uint32).view(np.int32), 0, axis)


def grid(rng: np.random.Generator, shape: tuple[int, ...], kind: Any = np.float16) -> np.ndarray:
    return (rng.uniform(0.5, 1.5, shape) / 64).astype(kind)


def wide(x: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Scales or zero points `[rows, groups]`, one for each value, float64."""
    x = x.astype(np.float64)
    return np.repeat(np.repeat(x, -(-shape[0] // x.shape[0]), 0)[: shape[0]], -(-shape[1] // x.shape[1]), 1)[
        :, : shape[1]
    ]


def gptq(bits: int = 4, group: int = 64, sym: bool = False, one: int = 1, order: bool = False) -> Callable[..., Made]:
    """v1 subtracts 1 from each zero point, in whole words (GPTQModel: `qzeros -= 0x11111111`)."""

    def make(rng: np.random.Generator, out: int, width: int) -> Made:
        groups = width // (group if group > 0 else width)
        q = rng.integers(0, 2**bits, (width, out))
        z = np.full((groups, out), 2 ** (bits - 1)) if sym else rng.integers(0, 2**bits, (groups, out))
        s = grid(rng, (groups, out))
        g = np.arange(width) // (width // groups)
        g = rng.permutation(g) if order else g
        ones = np.uint32(sum(one << k for k in range(0, 32, bits)))
        zeros = (words(z, bits, 1).view(np.uint32) - ones).view(np.int32)
        parts = {"qweight": words(q, bits, 0), "qzeros": zeros, "scales": s, "g_idx": g.astype(np.int32)}
        return parts, (s[g].astype(np.float64) * (q - z[g])).T

    return make


def awq(group: int = 64) -> Callable[..., Made]:
    def make(rng: np.random.Generator, out: int, width: int) -> Made:
        q, z = rng.integers(0, 16, (width, out)), rng.integers(0, 16, (width // group, out))
        s = grid(rng, z.shape)

        def interleaved(x: np.ndarray) -> np.ndarray:
            return words(x.reshape(len(x), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(x.shape), 4, 1)

        each = [np.repeat(x, group, 0) for x in (s.astype(np.float64), z)]
        return {"qweight": interleaved(q), "qzeros": interleaved(z), "scales": s}, (each[0] * (q - each[1])).T

    return make


def float8(
    rows: int | None, group: int | None, scale: Any = np.float32, kind: Any = E4M3, inverse: bool = True, axes: int = 2
) -> Callable[..., Made]:
    """One scale for so many rows and columns; None for all of them."""

    def make(rng: np.random.Generator, out: int, width: int) -> Made:
        q = rng.normal(0, 20, (out, width)).astype(kind)
        high, long = rows or out, group or width
        s = grid(rng, (-(-out // high), -(-width // long)), scale)
        each = np.repeat(np.repeat(s.astype(np.float64), high, 0), long, 1)[:out, :width]
        stored = s if axes == 2 else s.reshape(-1)[0] if axes == 0 else s.reshape(-1)
        name = "weight_scale_inv" if inverse else "weight_scale"
        return {"weight": q, name: np.asarray(stored)}, q.astype(np.float64) * each

    return make


def whole(group: int | None, zeros: bool = False) -> Callable[..., Made]:
    def make(rng: np.random.Generator, out: int, width: int) -> Made:
        q = rng.integers(-128, 128, (out, width)).astype(np.int8)
        s = grid(rng, (out, 1 if group is None else width // group), BF16)
        z = rng.integers(-128, 128, s.shape).astype(np.int8)
        parts = {"weight": q, "weight_scale": s} | ({"weight_zero_point": z} if zeros else {})
        return parts, (q - wide(z, q.shape) * zeros) * wide(s, q.shape)

    return make


def in_words(bits: int, group: int | None, zeros: bool = False, order: bool = False) -> Callable[..., Made]:
    """compressed-tensors' pack-quantized: 2 ** (bits - 1) is added to codes and zero points."""

    def make(rng: np.random.Generator, out: int, width: int) -> Made:
        half = 2 ** (bits - 1)
        groups = 1 if group is None else width // group
        q = rng.integers(-half, half, (out, width))
        s, z = grid(rng, (out, groups), BF16), rng.integers(-half, half, (out, groups)) * zeros
        g = np.arange(width) // (width // groups)
        g = rng.permutation(g) if order else g
        parts = {
            "weight_packed": words(q + half, bits, 1),
            "weight_scale": s,
            "weight_shape": np.array([out, width], np.int64),
        }
        parts |= {"weight_zero_point": words(z + half, bits, 0)} if zeros else {}
        parts |= {"weight_g_idx": g.astype(np.int32)} if order else {}
        return parts, (q - z[:, g]) * s.astype(np.float64)[:, g]

    return make


def nvfp4(rng: np.random.Generator, out: int, width: int) -> Made:
    """The scale of the whole is a power of two, so that dividing by it rounds nothing."""
    q, s = rng.integers(0, 16, (out, width)), rng.uniform(50, 448, (out, width // 16)).astype(E4M3)
    level = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[q % 8] * np.where(q < 8, 1, -1)
    parts = {
        "weight_packed": (q[:, ::2] + 16 * q[:, 1::2]).astype(np.uint8),
        "weight_scale": s,
        "weight_global_scale": np.array([8192], np.float32),
    }
    return parts, level * wide(s, q.shape) / 8192


# ----------------------------------------------------------------------------------------------------- the checkpoints


def write(path: Path, tensors: Parts) -> None:
    """The safetensors package writes no 8-bit floats from numpy."""
    header, end = dict[str, Any](), 0
    for name, x in tensors.items():
        start, end = end, end + x.nbytes
        header[name] = {"dtype": STORED[x.dtype.name], "shape": list(x.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(x.tobytes() for x in tensors.values()))


LLAMA = {"model_type": "llama", "vocab_size": 48, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
         "tie_word_embeddings": False}  # fmt: skip
MATRICES = {"self_attn.q_proj": ("attn.q", 128, 128), "self_attn.k_proj": ("attn.k", 64, 128),
            "self_attn.v_proj": ("attn.v", 64, 128), "self_attn.o_proj": ("attn.o", 128, 128),
            "mlp.gate_proj": ("mlp.gate", 192, 128), "mlp.down_proj": ("mlp.down", 128, 192)}  # fmt: skip
"""Those that are packed: by name, the logical name, out and in; `mlp.up`, embed and head are stored dense."""

Checkpoint = tuple[Path, dict[str, np.ndarray]]


def checkpoint(
    folder: Path, quantization: dict[str, Any], make: Callable[..., Made], edit: Callable[[Parts], Any] | None = None
) -> Checkpoint:
    """A tiny Llama in a folder, and the values of its packed matrices by logical name."""
    rng = np.random.default_rng(0)
    tensors: Parts = {
        "model.embed_tokens.weight": rng.normal(size=(48, 128)).astype(BF16),
        "lm_head.weight": rng.normal(size=(48, 128)).astype(BF16),
        "model.norm.weight": np.ones(128, BF16),
        "model.layers.0.mlp.up_proj.weight": rng.normal(0, 0.1, (192, 128)).astype(BF16),
    }
    tensors |= {f"model.layers.0.{n}_layernorm.weight": np.ones(128, BF16) for n in ("input", "post_attention")}
    values = {}
    for name, (logical, out, width) in MATRICES.items():
        parts, values[f"layers.0.{logical}"] = make(rng, out, width)
        tensors |= {f"model.layers.0.{name}.{part}": x for part, x in parts.items()}
    if edit:
        edit(tensors)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | {"quantization_config": quantization}))
    write(folder / "model.safetensors", tensors)
    return folder, values


def gptq_config(**more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False, "desc_act": False} | more


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
            "ignore": ["lm_head"], "sparsity_config": {}, "transform_config": {}}  # fmt: skip


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
PACKED = "pack-quantized"
SCHEMES: dict[str, tuple[dict[str, Any], Callable[..., Made], Format]] = {
    "gptq": (gptq_config(), gptq(), Format("int4_zero", 64, "float16")),
    "gptq v2": (gptq_config(checkpoint_format="gptq_v2"), gptq(one=0), Format("int4_zero", 64, "float16")),
    "gptq symmetric": (gptq_config(sym=True), gptq(sym=True), Format("int4", 64, "float16")),
    "gptq 8 bits": (gptq_config(bits=8), gptq(8), Format("int8_zero", 64, "float16")),
    "gptq 8 bits by row": (gptq_config(bits=8, sym=True), gptq(8, -1, sym=True), Format("int8", None, "float16")),
    "gptq 2 bits": (gptq_config(bits=2), gptq(2, 32), Format("int2_zero", 32, "float16")),
    "gptq 2 bits symmetric": (gptq_config(bits=2, sym=True), gptq(2, 32, True), Format("int2", 32, "float16")),
    "awq": (AWQ, awq(), Format("int4_zero", 64, "float16")),
    "fp8 blocks": (FP8 | {"weight_block_size": [32, 64]}, float8(32, 64, BF16), Format("fp8_e4m3", 64, "bfloat16")),
    "fp8 blocks filled up": (FP8 | {"weight_block_size": [48, 80]}, float8(48, 80),
                             Format("fp8_e4m3", 80, "float32", pad=True)),
    "fp8 powers of two": (FP8 | {"weight_block_size": [32, 32]}, float8(32, 32, E8M0),
                          Format("fp8_e4m3", 32, "float8_e8m0fnu")),
    "fp8 one scale": (FP8, float8(None, None, kind=E5M2, axes=0), Format("fp8_e5m2", None, "float32")),
    "float by row": (compressed("float-quantized"), float8(1, None, BF16, inverse=False),
                     Format("fp8_e4m3", None, "bfloat16")),
    "naive, one scale": (compressed("naive-quantized"), float8(None, None, inverse=False, axes=1),
                         Format("fp8_e4m3", None, "float32")),
    "float by blocks": (compressed("float-quantized", strategy="block", block_structure=[32, 64]),
                        float8(32, 64, inverse=False), Format("fp8_e4m3", 64, "float32")),
    "packed 4 bits": (compressed(PACKED), in_words(4, 32), Format("int4", 32, "bfloat16")),
    "packed 4 bits with zeros": (compressed(PACKED), in_words(4, 64, True), Format("int4_zero", 64, "bfloat16")),
    "packed 8 bits by row": (compressed(PACKED), in_words(8, None), Format("int8", None, "bfloat16")),
    "packed 8 bits with zeros": (compressed(PACKED), in_words(8, 64, True), Format("int8_zero", 64, "bfloat16")),
    "whole by row": (compressed("int-quantized"), whole(None), Format("int8", None, "bfloat16")),
    "whole with zeros": (compressed("int-quantized"), whole(64, True), Format("int8_zero", 64, "bfloat16")),
    "nvfp4": (compressed("nvfp4-pack-quantized"), nvfp4, Format("nvfp4", 16, "float8_e4m3fn")),
}  # fmt: skip
LOGITS = ("gptq", "fp8 blocks filled up", "nvfp4", "whole with zeros")
"""Of one kind each, those of which logits are computed."""


def loaded(folder: Path, dtype: str) -> tuple[ip.Model, Any, Weights]:
    model, params = ip.load(folder, dtype)
    return model, params, Weights.of(model.spec, params)


@quiet
@pytest.mark.parametrize("scheme", SCHEMES)
def test_kept_weights_are_the_checkpoints_own_to_the_last_bit(scheme: str, tmp_path: Path) -> None:
    config, make, fmt = SCHEMES[scheme]
    folder, values = checkpoint(tmp_path / "model", config, make)
    model, params, weights = loaded(folder, "keep")
    formats = dict(model.spec.weights)
    assert formats.keys() == values.keys()
    assert formats["layers.0.mlp.down"].name == fmt.name
    assert fmt in formats.values()
    for name, want in values.items():
        assert isinstance(weights[name], QTensor)
        np.testing.assert_array_equal(dequantize(weights[name]).astype(np.float32), want.astype(np.float32))
    assert weights["layers.0.mlp.up"].dtype == np.float32
    assert model.weight_bytes() == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(params))
    if scheme in LOGITS:
        tokens = np.array([3, 14, 15, 9, 26])
        logits = np.asarray(jax.jit(model.apply)(params, tokens[None], model.init_state(1, 5))[0])[0]
        want = reference(model.spec, weights, tokens)
        np.testing.assert_allclose(logits, want, atol=1e-4 * np.ptp(want))


@quiet
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_dense_type_dequantises(scheme: str, tmp_path: Path) -> None:
    config, make, _ = SCHEMES[scheme]
    folder, values = checkpoint(tmp_path / "model", config, make)
    model, _, weights = loaded(folder, "float32")
    assert not model.spec.weights
    for name, want in values.items():
        np.testing.assert_array_equal(np.asarray(weights[name]), want.astype(np.float32))


@pytest.mark.parametrize("scheme", ["gptq 8 bits", "fp8 blocks filled up", "nvfp4"])
@quiet
def test_what_was_kept_is_saved_and_loaded_bit_for_bit(scheme: str, tmp_path: Path) -> None:
    model, params = ip.load(checkpoint(tmp_path / "model", *SCHEMES[scheme][:2])[0], "keep")
    ip.save(tmp_path / "stack", model, params)
    again, others = ip.load(tmp_path / "stack")
    assert again.spec == model.spec
    assert jax.tree.structure(others) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(others), jax.tree.leaves(params)):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@quiet
def test_nvfp4_under_any_scale_of_the_whole_is_right_to_rounding(tmp_path: Path) -> None:
    """1 / S is kept: its rounding, and that of its product with a scale, are all that differs."""

    def seventh(tensors: Parts) -> None:
        tensors |= {n: np.array([7168], np.float32) for n in tensors if n.endswith("weight_global_scale")}

    folder, values = checkpoint(tmp_path / "model", compressed("nvfp4-pack-quantized"), nvfp4, seventh)
    for dtype in ("keep", "float32"):
        _, _, weights = loaded(folder, dtype)
        for name, want in values.items():
            got = weights[name] if dtype == "float32" else dequantize(weights[name]).astype(np.float32)
            np.testing.assert_allclose(np.asarray(got), want * 8192 / 7168, rtol=2.0**-22)


def test_that_activations_stay_in_float_is_said_once(tmp_path: Path) -> None:
    def scales(tensors: Parts) -> None:
        tensors |= {f"model.layers.0.{name}.input_scale": np.ones(1, np.float32) for name in MATRICES}

    folder, _ = checkpoint(tmp_path / "model", FP8, float8(None, None, inverse=False, axes=0), scales)
    with pytest.warns(UserWarning, match="activations were meant to be rounded too") as said:
        ip.load(folder)
    assert len(said) == 1 and said[0].filename == __file__


GOLDEN = json.loads((FIXTURES / "prequantised_golden.json").read_text())["cases"]


@pytest.mark.parametrize("case", GOLDEN)
def test_values_are_those_that_compressed_tensors_and_transformers_unpack(case: str) -> None:
    """Packed by the packages themselves: tests/fixtures/make_prequantised_golden.py."""

    def array(told: dict[str, Any]) -> np.ndarray:
        return np.frombuffer(bytes.fromhex(told["bytes"]), told["dtype"]).reshape(told["shape"])

    parts = {name: array(told) for name, told in GOLDEN[case]["parts"].items()}
    tensors = {f"m.{name}": prequantised.Mapped(x, STORED[x.dtype.name]) for name, x in parts.items()}
    config = {"quant_method": "fp8", "weight_block_size": [4, 16]}
    config = config if GOLDEN[case]["format"] == "fp8" else compressed(GOLDEN[case]["format"])
    packed = prequantised.unpack("config.json", config, tensors)
    assert packed.keys() == {"m.weight"}
    want = array(GOLDEN[case]["values"]).astype(np.float32)
    np.testing.assert_array_equal(packed["m.weight"][0 : len(want)], want)
    np.testing.assert_array_equal(packed["m.weight"][3:7], want[3:7])
    kept = prequantised.read(packed, Source(("m.weight",)), want.shape)
    np.testing.assert_array_equal(dequantize(kept).astype(np.float32), want)


# ------------------------------------------------------------------------------------------------------- other families


def packed_fixture(
    folder: Path,
    name: str,
    quantization: dict[str, Any],
    choose: Callable[[str, np.ndarray], Callable[..., Made] | None],
) -> tuple[Path, Path]:
    """A family's fixture with random packed matrices; and the same model stored dense, in their values."""
    rng, tensors, dense = np.random.default_rng(1), dict[str, np.ndarray](), dict[str, np.ndarray]()
    for full, x in load_file(FIXTURES / name / "model.safetensors").items():
        dense[full], make = x, choose(full, x) if x.ndim == 2 else None
        if make is None:
            tensors[full] = x
            continue
        transposed = name == "gpt2"
        parts, values = make(rng, *(x.shape[::-1] if transposed else x.shape))
        dense[full] = np.ascontiguousarray(values.T if transposed else values).astype(np.float32)
        tensors |= {f"{full.removesuffix('.weight')}.{part}": y for part, y in parts.items()}
    config = json.loads((FIXTURES / name / "config.json").read_text())
    for kind, held, more in (("packed", tensors, {"quantization_config": quantization}), ("dense", dense, {})):
        shutil.copytree(FIXTURES / name, folder / kind)
        (folder / kind / "config.json").write_text(json.dumps(config | more))
        write(folder / kind / "model.safetensors", held)
    return folder / "packed", folder / "dense"


def phi3(name: str, x: np.ndarray) -> Any:
    return in_words(4, 16, zeros=True) if "qkv_proj" in name or "gate_up_proj" in name else None


def mixtral(name: str, x: np.ndarray) -> Any:
    return float8(16, 12, inverse=False) if ".experts." in name else None


def gpt2(name: str, x: np.ndarray) -> Any:
    return gptq(8, 12) if "attn.c_" in name else None


@pytest.mark.parametrize(
    ("family", "quantization", "choose", "packed"),
    [
        ("phi3", compressed(PACKED), phi3, {"attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up"}),
        ("mixtral", compressed("float-quantized", block_structure=[16, 12]), mixtral,
         {"mlp.experts.gate", "mlp.experts.up", "mlp.experts.down"}),
        ("gpt2", gptq_config(bits=8), gpt2, {"attn.q", "attn.k", "attn.v", "attn.o"}),
    ],
)  # fmt: skip
def test_rows_of_one_matrix_and_experts_and_stored_transposes(
    family: str, quantization: dict[str, Any], choose: Any, packed: set[str], tmp_path: Path
) -> None:
    folder, dense = packed_fixture(tmp_path, family, quantization, choose)
    model, params, weights = loaded(folder, "keep")
    assert {name.split(".", 2)[2] for name, _ in model.spec.weights} == packed
    _, _, want = loaded(dense, "float32")
    _, _, unpacked = loaded(folder, "float32")
    for name in want:
        got = dequantize(weights[name]).astype(np.float32) if isinstance(weights[name], QTensor) else weights[name]
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want[name]), err_msg=name)
        np.testing.assert_array_equal(np.asarray(unpacked[name]), np.asarray(want[name]), err_msg=name)
    assert model.weight_bytes() == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(params))


# -------------------------------------------------------------------------------------------------- gpt-oss's experts

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def mxfp4_values(tensors: Parts, stem: str) -> np.ndarray:
    """`[experts, out, in]`, a nibble at a time."""
    blocks, exponents = tensors[f"{stem}_blocks"], tensors[f"{stem}_scales"]
    values = np.empty((*blocks.shape[:3], 32))
    values[..., 0::2], values[..., 1::2] = E2M1[blocks % 16], E2M1[blocks // 16]
    return (values * 2.0 ** (exponents[..., None].astype(int) - 127)).reshape(*blocks.shape[:2], -1)


def test_experts_in_mxfp4_are_kept_to_the_last_bit_and_gates_and_ups_told_apart(tmp_path: Path) -> None:
    tensors = load_file(FIXTURES / "gpt_oss_mxfp4" / "model.safetensors")
    model, params, kept = loaded(FIXTURES / "gpt_oss_mxfp4", "keep")
    dense, _, unpacked = loaded(FIXTURES / "gpt_oss_mxfp4", "float32")
    assert len(model.spec.weights) == 6 and not dense.spec.weights
    assert {fmt for _, fmt in model.spec.weights} == {Format("mxfp4", 32, "float8_e8m0fnu")}
    for i in range(2):
        start = f"model.layers.{i}.mlp.experts."
        both, bias = mxfp4_values(tensors, f"{start}gate_up_proj"), tensors[f"{start}gate_up_proj_bias"]
        want = {"gate": both[:, 0::2], "up": both[:, 1::2], "down": mxfp4_values(tensors, f"{start}down_proj")}
        for name, values in want.items():
            full = f"layers.{i}.mlp.experts.{name}"
            assert isinstance(kept[full], QTensor)
            np.testing.assert_array_equal(dequantize(kept[full]), values)
            np.testing.assert_array_equal(np.asarray(unpacked[full]), values.astype(np.float32))
        np.testing.assert_array_equal(np.asarray(kept[f"layers.{i}.mlp.experts.gate_bias"]), bias[:, 0::2])
        np.testing.assert_array_equal(np.asarray(kept[f"layers.{i}.mlp.experts.up_bias"]), bias[:, 1::2])
    assert model.weight_bytes() == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(params))
    ip.save(tmp_path / "stack", model, params)
    again, others = ip.load(tmp_path / "stack")
    assert again.spec == model.spec
    for a, b in zip(jax.tree.leaves(others), jax.tree.leaves(params), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


UP = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop(f"{UP}_scales"), "mlp.experts has no gate_up_proj_scales"),
        (lambda t: t.pop(f"{UP}_blocks"), f"has no tensor '{UP}'"),
        (lambda t: t.pop(f"{UP}_bias"), f"has no tensor '{UP}_bias'"),
        (lambda t: t.pop("model.layers.1.self_attn.sinks"), "has no tensor 'model.layers.1.self_attn.sinks'"),
        (lambda t: t.update({f"{UP}_scales": np.zeros((3, 63, 2), np.uint8)}), "has shape [3, 63, 2], not [3, 64, 2]"),
        (lambda t: t.update({f"{UP}_blocks": t[f"{UP}_blocks"].view(np.int8)}), "is stored as I8"),
        (lambda t: t.update({f"{UP}_blocks": t[f"{UP}_blocks"].reshape(3, 64, -1)}), "[experts, out, groups, 16]"),
        (lambda t: t.update({UP: np.zeros((3, 64, 64), np.float32)}), "dense too"),
        (lambda t: t.update({f"{UP}_{x}": t[f"{UP}_{x}"][:2].copy() for x in ("blocks", "scales")}),
         f"{UP} has shape [2, 64, 64], not [3, 64, 64]"),
    ],
)  # fmt: skip
def test_experts_in_mxfp4_without_a_part_are_refused(edit: Callable[[Parts], Any], said: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(FIXTURES / "gpt_oss_mxfp4", folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    write(folder / "model.safetensors", tensors)
    refused(folder, said)


# ------------------------------------------------------------------------------------------------------------ bad input


def refused(folder: Path, *said: str, dtype: str = "keep") -> None:
    with pytest.raises(CheckpointError) as caught:
        ip.load(folder, dtype)
    assert "\n" not in caught.value.one_line
    for part in said:
        assert part in str(caught.value)


@pytest.mark.parametrize("method", ["bitsandbytes", "hqq", None, ["gptq"]])
def test_other_methods_are_refused_and_those_that_are_read_named(method: Any, tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path / "model", {"quant_method": method}, gptq())
    refused(folder, "quantised by", "gptq, awq, fp8, mxfp4, compressed-tensors", dtype="float32")


@pytest.mark.parametrize(
    "config",
    [
        gptq_config(checkpoint_format="marlin"),
        AWQ | {"version": "gemv"},
        compressed(PACKED) | {"transform_config": {"config_groups": {"a": {}}}},
        compressed(PACKED) | {"sparsity_config": {"format": "sparse-24-bitmask"}},
    ],
)
def test_other_packings_of_a_known_method_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    refused(checkpoint(tmp_path / "model", config, gptq())[0], "GPTQ and AWQ in 32-bit words")


@pytest.mark.parametrize(
    ("config", "make"),
    [
        (gptq_config(desc_act=True), gptq(order=True)),
        (compressed(PACKED, actorder="group"), in_words(4, 64, order=True)),
    ],
)
def test_groups_of_inputs_apart_are_read_dense_and_kept_by_nobody(
    config: dict[str, Any], make: Callable[..., Made], tmp_path: Path
) -> None:
    folder, values = checkpoint(tmp_path / "model", config, make)
    refused(folder, "not of neighbours", 'dtype="float32"')
    _, _, weights = loaded(folder, "float32")
    for name, want in values.items():
        np.testing.assert_array_equal(np.asarray(weights[name]), want.astype(np.float32))


Q = "model.layers.0.self_attn.q_proj."


def without(part: str) -> Callable[[Parts], Any]:
    return lambda tensors: tensors.pop(Q + part)


def replaced(part: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Parts], Any]:
    return lambda tensors: tensors.update({Q + part: np.ascontiguousarray(change(tensors[Q + part]))})


BAD: list[tuple[str, Callable[[Parts], Any], str]] = [
    ("gptq", without("scales"), "has no scales"),
    ("gptq", without("qzeros"), "has no qzeros"),
    ("gptq", without("qweight"), "has no tensor"),
    ("gptq", replaced("qweight", lambda x: x.astype(np.int64)), "is stored as I64"),
    ("gptq", replaced("scales", lambda x: x.astype(np.float64)), "is stored as F64"),
    ("gptq", replaced("qweight", lambda x: x[:, :64]), "has shape [16, 64], not [16, 128]"),
    ("gptq", replaced("qweight", lambda x: x[:8]), "g_idx has shape"),
    ("gptq", replaced("qzeros", lambda x: x[:, :12]), "codes are of 2, 4, 8 bits"),
    ("gptq", replaced("qzeros", lambda x: x[:1]), "has shape [1, 16], not [2, 16]"),
    ("gptq", replaced("scales", lambda x: x[0]), "it must be a matrix"),
    ("gptq", replaced("g_idx", lambda x: x + 5), "names a group that is not there"),
    ("gptq", lambda t: t.update({Q + "weight": np.zeros((128, 128), np.float32)}), "dense too"),
    ("gptq", lambda t: t.update({Q + "bias": np.ones(128, np.float16)}), "does not use"),
    ("awq", without("scales"), "has no scales"),
    ("awq", replaced("qweight", lambda x: x[:100]), "has shape [128, 100], not [128, 128]"),
    ("awq", replaced("qzeros", lambda x: x[:, :8]), "has shape [2, 8], not [2, 16]"),
    ("fp8 blocks", without("weight_scale_inv"), "has no weight_scale"),
    ("fp8 blocks", replaced("weight_scale_inv", lambda x: x[:3]), "or one a block of [32, 64]"),
    ("fp8 blocks", replaced("weight_scale_inv", lambda x: x.astype(np.float64)), "is stored as F64"),
    ("fp8 blocks", replaced("weight", lambda x: x[:32]), "for a weight of [32, 128]"),
    ("packed 4 bits with zeros", without("weight_shape"), "has no weight_shape"),
    ("packed 4 bits with zeros", without("weight_scale"), "has no weight_scale"),
    ("packed 4 bits with zeros", replaced("weight_zero_point", lambda x: x[:3]), "has shape [3, 2], not [16, 2]"),
    ("packed 4 bits with zeros", replaced("weight_packed", lambda x: x[:, :5]), "codes are of 2, 4, 8 bits"),
    ("packed 4 bits with zeros", replaced("weight_packed", lambda x: x.astype(np.int8)), "is stored as I8"),
    ("packed 4 bits with zeros", replaced("weight_shape", lambda x: -x), "weight_shape is [-128, -128]"),
    ("packed 4 bits with zeros", replaced("weight_shape", lambda x: x // [1, 3]), "16 words a row for 42 codes"),
    ("whole with zeros", replaced("weight_zero_point", lambda x: x[:, :1]), "not of the shape of the scales"),
    ("whole by row", without("weight_scale"), "has no weight_scale"),
    ("nvfp4", replaced("weight_global_scale", lambda x: 0 * x), "weight_global_scale is 0.0"),
    ("nvfp4", replaced("weight_scale", lambda x: x[:, :3]), "has shape [128, 3], not [128, 8]"),
]


@quiet
@pytest.mark.parametrize(("scheme", "edit", "said"), BAD)
def test_a_part_that_is_missing_or_of_another_kind_is_one_error(
    scheme: str, edit: Callable[[Parts], Any], said: str, tmp_path: Path
) -> None:
    folder, _ = checkpoint(tmp_path / "model", *SCHEMES[scheme][:2], edit)
    refused(folder, said)


@quiet
def test_packed_tensors_without_a_word_of_them_in_the_config_are_refused(tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path / "model", {}, gptq())
    refused(folder, "has no tensor")


@quiet
def test_bytes_that_may_be_pairs_of_4_bit_floats_are_not_taken_for_numbers(tmp_path: Path) -> None:
    """quant_method fp8 may store experts so, as int8."""
    folder, _ = checkpoint(tmp_path / "model", FP8, whole(None))
    refused(folder, "does not use")


def test_biases_of_0_that_writers_add_are_left_out(tmp_path: Path) -> None:
    edit = lambda tensors: tensors.update({Q + "bias": np.zeros(128, np.float16)})  # noqa: E731
    folder, values = checkpoint(tmp_path / "model", gptq_config(), gptq(), edit)
    _, _, weights = loaded(folder, "float32")
    np.testing.assert_array_equal(np.asarray(weights["layers.0.attn.q"]), values["layers.0.attn.q"].astype(np.float32))


def test_zero_points_that_differ_are_believed_more_than_the_config(tmp_path: Path) -> None:
    folder, values = checkpoint(tmp_path / "model", gptq_config(sym=True), gptq())
    model, _, weights = loaded(folder, "keep")
    assert {fmt.name for _, fmt in model.spec.weights} == {"int4_zero"}
    got = np.asarray(dequantize(weights["layers.0.mlp.gate"]).astype(np.float32))
    np.testing.assert_array_equal(got, values["layers.0.mlp.gate"].astype(np.float32))


def test_kept_weights_take_the_bytes_of_their_codes(tmp_path: Path) -> None:
    """Four bits, and 16 of a scale and 8 of a zero point for 64: 0.546875 bytes a weight; 4 of a matrix's error."""
    model, _ = ip.load(checkpoint(tmp_path / "model", gptq_config(), gptq())[0], "keep")
    values = sum(out * width for _, out, width in MATRICES.values())
    dense = 4 * (2 * 48 * 128 + 3 * 128 + 192 * 128)
    assert model.weight_bytes() == dense + math.ceil(values * 0.546875) + 4 * len(MATRICES)
