"""A GGUF file and a Hugging Face folder of the same weights are the same model.

The files are written as llama.cpp's converter would: names by the gguf package's own table, rows of q and k of some
architectures interleaved, Gemma's norms stored as 1 + w, experts stacked, GPT-2's matrices transposed.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import infopt as ip
from infopt.model import Weights
from infopt.qtensor import is_qtensor

FIXTURES = Path(__file__).parents[1] / "fixtures"
ARCHITECTURES = {
    "llama_tied": "llama",
    "mixtral": "llama",
    "smollm3": "smollm3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "phi3": "phi3",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gpt2": "gpt2",
}


def interleave(w: np.ndarray, heads: int) -> np.ndarray:
    """A head's two halves, which lie one after the other, row by row in turn."""
    return w.reshape(heads, 2, -1, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)


def fields_of(arch: str, c: dict[str, Any]) -> dict[str, Any]:
    """The metadata that the converter writes, of what these fixtures' configs hold."""
    heads, dim = c.get("num_attention_heads", c.get("n_head")), c.get("hidden_size", c.get("n_embd"))
    width = c.get("head_dim") or dim // heads
    fields = {
        "block_count": c.get("num_hidden_layers", c.get("n_layer")),
        "context_length": c.get("max_position_embeddings", c.get("n_positions")),
        "embedding_length": dim,
        "feed_forward_length": c.get("intermediate_size", c.get("n_inner")),
        "attention.head_count": heads,
        "attention.head_count_kv": c.get("num_key_value_heads", heads),
        "attention.key_length": width,
        "attention.value_length": width,
        "vocab_size": c["vocab_size"],
    }
    if arch == "gpt2":
        return fields | {"attention.layer_norm_epsilon": c["layer_norm_epsilon"]}
    rope = c.get("rope_parameters") or {"rope_theta": c.get("rope_theta")}
    rope = rope.get("full_attention", rope)
    fields |= {"attention.layer_norm_rms_epsilon": c["rms_norm_eps"], "rope.freq_base": float(rope["rope_theta"])}
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        fields |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if "original_max_position_embeddings" in rope:
        fields["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if kind == "longrope":
        stretch = c["max_position_embeddings"] / rope["original_max_position_embeddings"]
        size = float(np.sqrt(1 + np.log(stretch) / np.log(rope["original_max_position_embeddings"])))
        fields |= {"rope.scaling.attn_factor": size, "rope.dimension_count": int(width * rope["partial_rotary_factor"])}
    if c.get("sliding_window") and arch in ("phi3", "gemma2", "gemma3"):
        fields["attention.sliding_window"] = c["sliding_window"]
    if arch == "gemma2":
        fields |= {"attn_logit_softcapping": c["attn_logit_softcapping"]}
        fields |= {"final_logit_softcapping": c["final_logit_softcapping"]}
    if arch == "gemma3":
        fields["rope.freq_base_swa"] = float(c["rope_parameters"]["sliding_attention"]["rope_theta"])
    experts = c.get("num_local_experts", c.get("num_experts"))
    if experts:
        fields |= {"expert_count": experts, "expert_used_count": c["num_experts_per_tok"]}
    if c.get("moe_intermediate_size"):
        fields["expert_feed_forward_length"] = c["moe_intermediate_size"]
    return fields


def convert(name: str, path: Path, kind: str = "F32") -> Path:
    arch = ARCHITECTURES[name]
    c = json.loads((FIXTURES / name / "config.json").read_text())
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted((FIXTURES / name).glob("*.safetensors")):
        tensors |= load_file(shard)
    fields = fields_of(arch, c)
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    names = gguf.get_tensor_name_map(number, fields["block_count"])
    out: dict[str, np.ndarray] = {}
    stacked: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    for key, tensor in tensors.items():
        w = tensor.astype(np.float32)
        if ".experts." in key:
            start, rest = key.split(".experts.")
            index, which = rest.split(".", 1)
            stacked[f"{start}.experts.{which}"][int(index)] = w
            continue
        if arch in ("llama", "smollm3") and key.endswith(("q_proj.weight", "k_proj.weight")):
            heads = fields["attention.head_count" + ("_kv" if "k_proj" in key else "")]
            w = interleave(w, heads)
        if arch == "gpt2" and key.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")):
            w = w.T
        if arch.startswith("gemma") and "norm" in key:
            w = w + np.float32(1)
        out[key] = w
    for key, parts in stacked.items():
        out[key] = np.stack([parts[i] for i in range(len(parts))])
    writer = gguf.GGUFWriter(path, arch)
    for key, value in fields.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_string if isinstance(value, str)
         else writer.add_uint32)(f"{arch}.{key}", value)  # fmt: skip
    for key, w in out.items():
        found = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert found is not None, key
        as_ = gguf.GGMLQuantizationType[kind if w.ndim > 1 and w.shape[-1] % 32 == 0 else "F32"]
        writer.add_tensor(found, gguf.quants.quantize(np.ascontiguousarray(w), as_), raw_dtype=as_)
    rope = c.get("rope_parameters") or {}
    for length in ("long", "short"):
        if f"{length}_factor" in rope:
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# What the converter drops or the engine fixes, so that a file cannot say it.
LOST: dict[str, dict[str, Any]] = {
    "qwen2": {"window": None, "local": (False,)},
    "qwen3_moe": {"normalise": True},
    "gemma2": {"query_scale": 10.0},
    "gemma3": {"query_scale": 10.0},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_gguf_file_is_the_folders_model(name: str, tmp_path: Path) -> None:
    model, params = ip.load(convert(name, tmp_path / "m.gguf"))
    folder, expected = ip.load(FIXTURES / name)
    config = folder.spec.config
    for field in LOST.get(name, {}):
        assert hasattr(config, field)
    ours, theirs = vars(model.spec.config).copy(), vars(config) | LOST.get(name, {})
    scaling, wanted = (fields.pop("rope_scaling", None) for fields in (ours, dict(theirs)))
    for field, value in ours.items():
        if isinstance(value, float):
            assert value == pytest.approx(theirs[field], rel=1e-6), field
        else:
            assert value == theirs[field], field
    assert type(scaling) is type(wanted)
    if scaling is not None:
        for field, value in vars(scaling).items():
            assert value == pytest.approx(getattr(wanted, field), rel=1e-6), field
    found, weights = Weights.of(model.spec, params), Weights.of(folder.spec, expected)
    assert set(found) == set(weights)
    for key in found:
        shift = 1e-6 if "gemma" in name and "norm" in key else 0.0
        np.testing.assert_allclose(found[key], weights[key], rtol=0, atol=shift, err_msg=key)


def test_packed_experts_stay_packed(tmp_path: Path) -> None:
    """Of five experts, the rows whose width fills blocks: dequantised, they are what a float32 load gives."""
    rng = np.random.default_rng(0)
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    fields = fields_of("llama", json.loads((FIXTURES / "mixtral" / "config.json").read_text()))
    fields |= {"embedding_length": 64, "feed_forward_length": 32, "attention.key_length": 16, "vocab_size": 96}
    fields |= {"attention.value_length": 16, "attention.head_count": 4, "attention.head_count_kv": 2}
    for key, value in fields.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"llama.{key}", value)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (96, 64), "output": (96, 64), "output_norm": (64,)}
    for i in range(2):
        layer = {
            "attn_norm": (64,), "ffn_norm": (64,), "attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64),
            "attn_output": (64, 64), "ffn_gate_inp": (5, 64), "ffn_gate_exps": (5, 32, 64), "ffn_up_exps": (5, 32, 64),
            "ffn_down_exps": (5, 64, 32),
        }  # fmt: skip
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType["Q4_0" if len(shape) > 1 and "inp" not in name else "F32"]
        x = (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    model, params = ip.load(path, dtype="keep")
    assert is_qtensor(params["segments"][0][0]["mlp.experts.up"])
    assert "layers.0.mlp.router" not in dict(model.spec.weights)
    plain, dense = ip.load(path)
    tokens = jnp.asarray(rng.integers(0, 96, (1, 9)))
    a, _ = jax.jit(model.apply)(params, tokens, model.init_state(1, 9))
    b, _ = jax.jit(plain.apply)(dense, tokens, plain.init_state(1, 9))
    np.testing.assert_allclose(a, b, atol=2e-4)


def split(path: Path, parts: int) -> list[Path]:
    """The tensors of a file dealt out to several, as llama.cpp's gguf-split names them."""
    reader, out = gguf.GGUFReader(path), []
    for n in range(parts):
        file = path.with_name(f"{path.stem}-{n + 1:05}-of-{parts:05}.gguf")
        writer = gguf.GGUFWriter(file, "llama")
        if n == 0:
            for key, field in reader.fields.items():
                if key.startswith("llama."):
                    kind = field.types[0]
                    writer.add_key_value(key, field.contents(), kind)
        writer.add_uint16("split.no", n)
        writer.add_uint16("split.count", parts)
        for tensor in reader.tensors[n::parts]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        out.append(file)
    return out


def test_a_split_file_is_read_from_its_first_part(tmp_path: Path) -> None:
    whole = convert("llama_tied", tmp_path / "m.gguf")
    parts = split(whole, 3)
    model, params = ip.load(parts[0])
    expected, weights = ip.load(whole)
    assert model.spec == expected.spec
    jax.tree.map(np.testing.assert_array_equal, params, weights)
    with pytest.raises(ip.InfoptError, match="one of 3 parts") as e:
        ip.load(parts[1])
    assert "m-00001-of-00003.gguf" in e.value.fix
    parts[2].unlink()
    with pytest.raises(ip.InfoptError, match="m-00003-of-00003"):
        ip.load(parts[0])
