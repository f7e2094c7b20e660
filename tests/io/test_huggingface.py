"""Reading Hugging Face folders: both spellings of the configs, shards, dtypes, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import infopt as ip
from infopt.errors import CheckpointError
from infopt.io import load
from infopt.io.huggingface import PUBLISHED, _Json
from infopt.model import Weights
from infopt.models import GptOssConfig
from infopt.spec import LinearRope, YarnRope

FIXTURES = Path(__file__).parents[1] / "fixtures"

Edit = Callable[..., Path]


@pytest.fixture
def edited(tmp_path: Path) -> Edit:
    """`edited(name, config=..., tensors=...)`: a copy of a fixture, its config and its tensors changed in place."""

    def make(
        name: str, config: Callable[[dict], Any] | None = None, tensors: Callable[[dict], Any] | None = None
    ) -> Path:
        folder = tmp_path / name
        shutil.copytree(FIXTURES / name, folder)
        if config:
            values = json.loads((folder / "config.json").read_text())
            config(values)
            (folder / "config.json").write_text(json.dumps(values))
        if tensors:
            arrays = load_file(folder / "model.safetensors")
            tensors(arrays)
            save_file(arrays, folder / "model.safetensors")
        return folder

    return make


def refused(folder: Path, *said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert "\n" not in caught.value.one_line
    for part in said:
        assert part in str(caught.value)


def weights(folder: Path, dtype: str = "float32") -> Weights:
    model, params = load(folder, dtype)
    return Weights.of(model.spec, params)


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32", "float32"), ("float32", "float16")],
)
def test_loading_takes_little_more_than_the_params(
    stored: str, dtype: str, edited: Edit, anonymous_memory: Callable
) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 8192, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
    axis = {32: 1024, 36: 4096, 173: 8192, 48: 1024, 24: 256}  # the fixture's sizes

    def grow(tensors: dict[str, np.ndarray]) -> None:
        for name, x in tensors.items():
            tensors[name] = np.ones([axis[n] for n in x.shape], stored)

    folder = edited("llama", config=lambda c: c.update(sizes | heads), tensors=grow)
    anonymous, params = anonymous_memory(folder, dtype)
    assert params > 50e6
    assert anonymous <= 1.5 * params


# -------------------------------------------------------------------------------------------------------------- values


def test_weights_are_the_files(edited: Edit) -> None:
    file, ours = load_file(FIXTURES / "llama" / "model.safetensors"), weights(FIXTURES / "llama")
    assert len(file) == len(ours)
    np.testing.assert_array_equal(ours["embed"], file["model.embed_tokens.weight"])
    np.testing.assert_array_equal(ours["head"], file["lm_head.weight"])
    np.testing.assert_array_equal(ours["layers.2.attn.k"], file["model.layers.2.self_attn.k_proj.weight"])
    np.testing.assert_array_equal(ours["layers.1.mlp_norm"], file["model.layers.1.post_attention_layernorm.weight"])


def test_gemma3_norms_keep_their_places() -> None:
    file, ours = load_file(FIXTURES / "gemma3" / "model.safetensors"), weights(FIXTURES / "gemma3")
    for name, theirs in {
        "attn_norm": "input_layernorm",
        "attn_out_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
        "attn.q_norm": "self_attn.q_norm",
        "attn.k_norm": "self_attn.k_norm",
    }.items():
        np.testing.assert_array_equal(ours[f"layers.5.{name}"], file[f"model.layers.5.{theirs}.weight"])


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16, np.float64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "keep"])
def test_every_float_type_is_read(stored: Any, dtype: str, edited: Edit) -> None:
    def store(arrays: dict[str, np.ndarray]) -> None:
        arrays |= {name: x.astype(stored) for name, x in arrays.items()}

    folder = edited("llama", tensors=store)
    embed = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    expected = jnp.dtype("float32" if dtype == "keep" else dtype)
    ours = weights(folder, dtype)
    assert ours["layers.0.attn_norm"].dtype == ours["embed"].dtype == expected
    np.testing.assert_array_equal(ours["embed"], embed.astype(expected))


def test_shards_equal_one_file(tmp_path: Path) -> None:
    source = FIXTURES / "llama_tied"
    arrays: dict[str, np.ndarray] = {}
    for shard in source.glob("*.safetensors"):
        arrays |= load_file(shard)
    save_file(arrays, tmp_path / "model.safetensors")
    shutil.copy(source / "config.json", tmp_path)
    one, shards = load(tmp_path)[1], load(source)[1]
    jax.tree.map(np.testing.assert_array_equal, one, shards)


# ------------------------------------------------------------------------------------------------------------- configs


def test_older_gemma3_config_says_the_same() -> None:
    folder = FIXTURES / "gemma3"
    config = load(folder)[0].spec.config
    assert config.pattern == (True,) * 5 + (False,)
    assert (config.rope_scaling, config.rope_theta, config.local_rope_theta) == (LinearRope(factor=3.0), 5000.0, 300.0)


def test_older_gemma3_spelling_equals_the_present_one(edited: Edit) -> None:
    folder = edited("gemma3")
    present = load(folder)[0].spec
    shutil.move(folder / "config_hub.json", folder / "config.json")
    assert load(folder)[0].spec == present


def test_older_llama_spelling_equals_the_present_one(edited: Edit) -> None:
    def older(config: dict[str, Any]) -> None:
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        rope["type"] = rope.pop("rope_type")
        config["rope_scaling"] = rope

    assert load(edited("llama", older))[0].spec == load(FIXTURES / "llama")[0].spec
    assert load(FIXTURES / "llama")[0].spec.config.rope_scaling.factor == 4.0


def test_text_part_of_a_multimodal_gemma3_is_read(edited: Edit) -> None:
    def nest(config: dict[str, Any]) -> None:
        text = dict(config)
        config.clear()
        config |= {"model_type": "gemma3", "text_config": text, "vision_config": {}}

    def rename(arrays: dict[str, np.ndarray]) -> None:
        for name in list(arrays):
            arrays["language_model." + name] = arrays.pop(name)
        arrays["vision_tower.patch.weight"] = np.zeros((2, 2), np.float32)

    folder = edited("gemma3", nest, rename)
    model, params = load(folder)
    text, expected = load(FIXTURES / "gemma3")
    assert model.spec == text.spec
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_gemma3_defaults_are_the_published_ones(edited: Edit) -> None:
    folder = edited("gemma3", lambda c: (c.pop("vocab_size"), c.pop("tie_word_embeddings")))
    refused(folder, "[131, 27], not [262208, 27]")


# ----------------------------------------------------------------------------------------------------------- tolerated


def test_rotary_buffers_are_left_out(edited: Edit) -> None:
    folder = edited("llama", tensors=lambda a: a.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(6)}))
    load(folder)


def tie(config: dict[str, Any]) -> None:
    config["tie_word_embeddings"] = True


def test_copy_of_a_tied_head_is_left_out(edited: Edit) -> None:
    folder = edited("llama", tie, lambda a: a.update({"lm_head.weight": a["model.embed_tokens.weight"].copy()}))
    model, params = load(folder)
    assert model.spec.config.tied and "head" not in params


def test_tied_head_that_differs_is_refused(edited: Edit) -> None:
    refused(edited("llama", tie), "lm_head.weight differs from the embedding", '"tie_word_embeddings": false')


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("name, key, value, said", [
    ("llama", "model_type", "lama", "nearest known one is 'llama'; what differs: nothing that its config or"),
    ("llama", "model_type", "bloom", "'bloom'"),
    ("llama", "attention_bias", True, "attention_bias=True"),
    ("llama", "mlp_bias", True, "mlp_bias=True"),
    ("llama", "hidden_act", "gelu", "hidden_act='gelu'"),
    ("llama", "quantization_config", {"quant_method": "hqq"}, "weights are quantised by 'hqq'"),
    ("llama", "rope_parameters", {"rope_type": "ntk", "rope_theta": 1e4, "factor": 2.0}, "'ntk'"),
    ("llama", "rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}, "'factor' is missing"),
    ("llama", "hidden_size", None, "'hidden_size' is missing"),
    ("llama", "hidden_size", "big", "'hidden_size' is 'big'"),
    ("llama", "num_key_value_heads", 3, "describes a model that cannot be"),
    ("llama", "num_hidden_layers", 10**9, "asks for 1000000000 layers"),
    ("llama", "num_hidden_layers", 4, "has no tensor 'model.layers.3."),
    ("gemma3", "final_logit_softcapping", 30.0, "final_logit_softcapping=30.0"),
    ("gemma3", "use_bidirectional_attention", True, "use_bidirectional_attention=True"),
    ("gemma3", "hidden_activation", "silu", "hidden_activation='silu'"),
    ("gemma3", "layer_types", ["sliding_attention"] * 7, "layer_types"),
    ("gpt_oss", "sliding_window", None, "'sliding_window' is missing"),
    ("gpt_oss", "attention_bias", False, "attention_bias=False"),
    ("gpt_oss", "num_experts_per_tok", 6, "describes a model that cannot be"),
    ("gpt_oss", "num_local_experts", 2**31 - 1, "has shape [5, 14, 36], not [2147483647, 14, 36]"),
    ("gemma3", "layer_types", ["sliding_attention"] * 7 + ["linear_attention"], "layer_types"),
])  # fmt: skip
def test_config_beyond_the_families_is_refused(name: str, key: str, value: Any, said: str, edited: Edit) -> None:
    refused(edited(name, lambda config: config.update({key: value})), said)


@pytest.mark.parametrize("name, changes", [
    ("llama", {"max_position_embeddings": 0}),
    ("llama", {"rms_norm_eps": float("nan")}),
    ("llama", {"num_attention_heads": 10**400}),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": -3.0}}),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 1e308}}),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}}),
    ("llama", {"partial_rotary_factor": -1.0}),
    ("llama", {"eos_token_id": [[1]]}),
    ("qwen3_moe", {"num_experts": 2**31 - 1}),
    ("mistral", {"sliding_window": -1}),
    ("gemma3", {"query_pre_attn_scalar": 0}),
], ids=str)  # fmt: skip
def test_numbers_that_no_model_has_are_refused(name: str, changes: dict[str, Any], edited: Edit) -> None:
    folder = edited(name, lambda config: config.update(changes))
    made = ip.io.tokenizer.Tokenizer.from_tables(["a"], [], [1], "gpt-2")
    (folder / "tokenizer.json").write_text(made.backend.to_str())
    refused(folder, "")


def test_a_config_of_brackets_is_refused(edited: Edit) -> None:
    folder = edited("llama")
    (folder / "config.json").write_text("[" * 100_000)
    refused(folder, "config.json cannot be read")
    (folder / "config.json").write_text('{"a": [' + "[]," * (1 << 20) + "0]}")
    refused(folder, "bytes, more than")


def test_a_header_that_is_most_of_a_file_is_refused(edited: Edit) -> None:
    folder = edited("llama")
    header = b'{"__metadata__":{' + b",".join(b'"%x":""' % i for i in range(1 << 18)) + b"}}"
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    refused(folder, "its header has")


def test_missing_tensor_is_refused(edited: Edit) -> None:
    refused(
        edited("llama", tensors=lambda a: a.pop("model.layers.1.mlp.up_proj.weight")),
        "has no tensor 'model.layers.1.mlp.up_proj.weight'",
    )


@pytest.mark.parametrize("name", ["self_attn.sinks", "self_attn.o_proj.bias", "mlp.router.bias",
                                  "mlp.experts.gate_up_proj", "mlp.experts.down_proj_bias"])  # fmt: skip
def test_nothing_of_a_gpt_oss_may_be_missing(name: str, edited: Edit) -> None:
    full = f"model.layers.1.{name}"
    refused(edited("gpt_oss", tensors=lambda a: a.pop(full)), f"has no tensor '{full}'")


def test_gpt_oss_is_read_as_it_is_published() -> None:
    """The 20B model's own config.json, in the spelling of its release, and one that leaves all that it can unsaid."""
    sizes = {"vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
             "num_attention_heads": 64, "num_key_value_heads": 8}  # fmt: skip
    rope = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096}  # fmt: skip
    said = sizes | {
        "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4, "experts_per_token": 4,
        "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 12, "attention_bias": True,
        "rope_theta": 150000, "rope_scaling": rope, "max_position_embeddings": 131072, "initial_context_length": 4096,
        "swiglu_limit": 7.0, "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "hidden_act": "silu",
    }  # fmt: skip
    read = PUBLISHED["gpt_oss"].read
    config = read(_Json("config.json", said), None)
    assert config == GptOssConfig(
        vocab=201088, dim=2880, layers=24, heads=64, kv_heads=8, head_dim=64, context=131072, mlp=2880, norm_eps=1e-5,
        rope_theta=150000.0, tied=False, window=128, local=(True, False), experts=32, experts_used=4,
        swiglu_alpha=1.702, swiglu_limit=7.0,
        rope_scaling=YarnRope(
            factor=32.0, original_context=4096, attention_factor=0.1 * math.log(32) + 1, truncate=False
        ),
    )  # fmt: skip
    assert read(_Json("config.json", sizes | {"num_local_experts": 32}), None) == config


def test_extra_tensor_is_refused(edited: Edit) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    refused(edited("llama", tensors=lambda a: a.update({name: np.zeros(48, np.float32)})), f"does not use: '{name}'")


def test_misshapen_tensor_is_refused(edited: Edit) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    refused(
        edited("llama", tensors=lambda a: a.update({name: a[name].T.copy()})),
        f"{name} has shape [32, 48], not [48, 32]",
    )


def test_integer_tensor_is_refused(edited: Edit) -> None:
    name = "model.norm.weight"
    refused(edited("llama", tensors=lambda a: a.update({name: np.ones(32, np.int8)})), f"{name} is stored as I8")


def test_truncated_safetensors_is_refused(edited: Edit) -> None:
    folder = edited("llama")
    whole = (folder / "model.safetensors").read_bytes()
    for size in (0, 5, 100, 5000, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:size])
        refused(folder, "model.safetensors is truncated or damaged", "fetch the file again")


def test_missing_shard_is_refused(edited: Edit) -> None:
    folder = edited("llama_tied")
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "model-00002-of-00002.safetensors is missing", "model.safetensors.index.json names it")


def test_index_of_other_tensors_is_refused(edited: Edit) -> None:
    folder = edited("llama_tied")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.extra"] = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "has no tensor 'model.extra'")


@pytest.mark.parametrize(
    "shard", ["../other.safetensors", "/x.safetensors", "..", "", "a\0.safetensors", "config.json"]
)
def test_index_that_leaves_its_folder_is_refused(shard: str, edited: Edit) -> None:
    folder = edited("llama_tied")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    refused(folder, "names files outside its folder")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_unreadable_config_is_refused(text: str, edited: Edit) -> None:
    folder = edited("llama")
    (folder / "config.json").write_text(text)
    refused(folder, "config.json cannot be read")


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "has no config.json")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    refused(tmp_path, f"infopt.load('{tmp_path / 'm.gguf'}')")


def test_folder_of_pickles_is_refused(edited: Edit) -> None:
    folder = edited("llama")
    shutil.move(folder / "model.safetensors", folder / "pytorch_model.bin")
    refused(folder, "has neither model.safetensors", "it has pytorch_model.bin", "safe_serialization=True")


def test_one_file_of_a_folder_is_refused(edited: Edit) -> None:
    folder = edited("llama")
    refused(folder / "model.safetensors", "is one file of a Hugging Face folder", f"infopt.load('{folder}')")


# ----------------------------------------------------------------------------------------------------------- tokenizer


def test_folder_without_tokenizer_takes_token_ids() -> None:
    assert load(FIXTURES / "llama")[0].tokenizer is None


def test_tokenizer_and_ends_of_text_are_read(edited: Edit) -> None:
    folder = edited("llama", lambda config: config.update(eos_token_id=1))
    made = ip.io.tokenizer.Tokenizer.from_tables(["a", "b", "ab", "<end>"], ["a b"], [1, 1, 1, 3], "gpt-2")
    (folder / "tokenizer.json").write_text(made.backend.to_str())
    read = load(folder)[0].tokenizer
    assert read == made and read.eos_ids == (1,) and read.encode("abba<end>") == [2, 1, 0, 3]
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 1]}')
    assert load(folder)[0].tokenizer.eos_ids == (3, 1)


def test_tokenizer_without_its_json_is_warned_of(edited: Edit) -> None:
    folder = edited("llama")
    (folder / "tokenizer.model").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"no tokenizer\.json.*takes token ids"):
        assert load(folder)[0].tokenizer is None


def test_damaged_tokenizer_is_refused(edited: Edit) -> None:
    folder = edited("llama")
    (folder / "tokenizer.json").write_text('{"model": 3}')
    refused(folder, "tokenizer.json is not a tokenizer that can be read")
