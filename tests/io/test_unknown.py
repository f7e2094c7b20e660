"""An architecture that is not computed here: the nearest one is named, and what differs is what does."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from infopt.errors import CheckpointError
from infopt.io import open_checkpoint
from infopt.io.huggingface import MODEL_TYPES
from infopt.io.unknown import SHOWN, Candidate, compare, unknown_architecture

FIXTURES = Path(__file__).parents[1] / "fixtures"
Tensors = dict[str, np.ndarray]


def why(path: Path) -> str:
    with pytest.raises(CheckpointError, match="not computed here") as caught:
        open_checkpoint(path)
    assert "\n" not in caught.value.one_line
    return caught.value.why


def renamed(
    tmp_path: Path, fixture: str, kind: str, change: dict[str, Any], tensors: Callable[[Tensors], Any] | None = None
) -> Path:
    """A fixture that says it is of another architecture; None in `change` takes a key away."""
    folder = tmp_path / kind
    shutil.copytree(FIXTURES / fixture, folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": kind} | change
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    if tensors:
        arrays = load_file(folder / "model.safetensors")
        tensors(arrays)
        save_file(arrays, folder / "model.safetensors")
    return folder


def test_qwen2_moe_is_a_qwen3_moe_with_shared_experts_and_biases_and_without_norms(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if re.search(r"self_attn\.[qk]_norm", name)]:
            del tensors[name]
        for layer in {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}:
            tensors[f"model.layers.{layer}.mlp.shared_expert.up_proj.weight"] = np.zeros((2, 2), np.float32)
            tensors[f"model.layers.{layer}.self_attn.q_proj.bias"] = np.zeros(2, np.float32)

    folder = renamed(tmp_path, "qwen3_moe", "qwen2_moe", {"shared_expert_intermediate_size": 8}, change)
    said = why(folder)
    assert "nearest known one is 'qwen3_moe'" in said
    assert re.search(r"its config also has: [\w, ]*shared_expert_intermediate_size", said)
    assert "also has the tensors: layers.N.mlp.shared_expert.up_proj.weight, layers.N.self_attn.q_proj.bias;" in said
    assert re.search(
        r"lacks the tensors: layers\.N\.self_attn\.[qk]_norm\.weight, layers\.N\.self_attn\.[qk]_norm", said
    )


@pytest.mark.parametrize(
    ("fixture", "kind", "change", "nearest", "differs"),
    [
        ("llama", "granite", {"embedding_multiplier": 12}, "llama", "its config also has: embedding_multiplier."),
        ("llama", "lama", {}, "llama", "nothing that its config or the names of its tensors show."),
        ("llama", "llama4x", {"attention_bias": True}, "llama", "not computed there: attention_bias=True"),
        ("llama", "llamb", {"hidden_size": None, "vocab_size": None}, "llama", "lacks: vocab_size, hidden_size"),
        ("qwen3", "qwen4", {"conv_kernel": 4}, "qwen3", "its config also has: conv_kernel."),
        ("phi3", "phi4x", {}, "phi3", "nothing that its config"),
        ("gpt2", "gptx", {}, "gpt2", "nothing that its config"),
        ("gemma2", "gemma", {"final_logit_softcapping": 30.0}, "gemma2", "nothing that its config"),
    ],
)
def test_nearest_known_one_is_named_with_what_differs(
    fixture: str, kind: str, change: dict[str, Any], nearest: str, differs: str, tmp_path: Path
) -> None:
    said = why(renamed(tmp_path, fixture, kind, change))
    assert f"nearest known one is {nearest!r}" in said and differs in said


@pytest.mark.parametrize(("kind", "family"), [*MODEL_TYPES.items()])
def test_every_reader_knows_what_its_own_fixture_says(kind: str, family: str, tmp_path: Path) -> None:
    """No key is told to be unknown that is known: it would make a difference of what is none."""
    folder = renamed(tmp_path, family, f"{kind}?", {"text_config": None})
    if kind == "gemma3":  # its text is a part of the config
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({"model_type": "gemma3?", "text_config": config}))
    said = why(folder)
    assert f"nearest known one is {kind!r}" in said
    unknown = re.search(r"its config also has: (.*?)[;.]", said)
    # smollm3: all layers see all; qwen3_moe: the width of layers without experts, which there are none of
    unread = {"smollm3": "layer_types", "qwen3_moe": "intermediate_size"}
    assert (unknown[1] if unknown else "") == unread.get(kind, "")
    assert "lacks" not in said and "tensors:" not in said and "not computed there" not in said


def test_tensors_tell_apart_what_configs_do_not(tmp_path: Path) -> None:
    """By its config alone, a qwen3 of another name could be a qwen2 as well."""
    assert why(renamed(tmp_path, "qwen3", "olmo2", {})).startswith(
        "the nearest known one is 'qwen3'; what differs: nothing"
    )


def test_sizes_under_other_names_are_lacking(tmp_path: Path) -> None:
    t5 = {"model_type": "t5", "d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "vocab_size": 320}
    (tmp_path / "config.json").write_text(json.dumps(t5))
    said = why(tmp_path)
    assert "its config also has: d_model, d_ff, num_layers, num_heads" in said
    assert re.search(r"its config lacks: [\w, ]*hidden_size", said)


def test_the_text_of_a_model_that_sees_is_compared_by_itself(tmp_path: Path) -> None:
    config = json.loads((FIXTURES / "llama" / "config.json").read_text())
    shutil.copy(FIXTURES / "llama" / "model.safetensors", tmp_path)
    for name, added in (("llava", {}), ("llama4", {"model_type": "llama4_text", "interleave_moe_layer_step": 1})):
        whole = {"model_type": name, "text_config": config | added, "vision_config": {"hidden_size": 3}}
        (tmp_path / "config.json").write_text(json.dumps(whole))
        assert why(tmp_path) == (
            "the nearest known one is 'llama'; what differs: its config also has: "
            f"{', '.join(['vision_config', *list(added)[1:]])}."
        )


def test_a_folder_without_readable_tensors_says_so(tmp_path: Path) -> None:
    folder = renamed(tmp_path, "llama", "lama", {})
    (folder / "model.safetensors").write_bytes(b"damaged")
    assert "nothing that its config shows, and its tensors cannot be read." in why(folder)


def test_gguf_metadata_are_compared_without_their_prefix(llama_gguf: Callable[..., Any], tmp_path: Path) -> None:
    gguf = llama_gguf()
    gguf.arch = "llama4"
    gguf.fields = {key.replace("llama.", "llama4."): value for key, value in gguf.fields.items()}
    gguf.fields |= {"llama4.interleave_moe_layer_step": 2, "llama4.attention.sliding_window": 8}
    del gguf.fields["llama4.block_count"]
    said = why(gguf.write(tmp_path / "m.gguf"))
    assert said == (
        "the nearest known one is 'llama'; what differs: its config also has: interleave_moe_layer_step; its config "
        "asks for what is not computed there: attention.sliding_window=8; its config lacks: block_count."
    )


def test_gguf_tensors_are_compared(llama_gguf: Callable[..., Any], tmp_path: Path) -> None:
    gguf = llama_gguf()
    gguf.arch = "lama"
    gguf.fields = {key.replace("llama.", "lama."): value for key, value in gguf.fields.items()}
    gguf.tensors["blk.0.attn_q.bias"] = (np.zeros(64, np.float32), "F32")
    del gguf.tensors["blk.1.ffn_norm.weight"]
    # A tensor that some layer has is not missed: names are compared, not counts.
    assert why(gguf.write(tmp_path / "m.gguf")).endswith("it also has the tensors: blk.N.attn_q.bias.")


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "x"},
        {"model_type": "x", "num_hidden_layers": "many", "hidden_size": [], "rope_scaling": 7},
        {"model_type": "llama-x", "num_attention_heads": 0, "hidden_size": -3, "vocab_size": 1},
        {"model_type": "\x1b[2J" * 500},
        {"model_type": "x", **{f"key{i}" * 40: i for i in range(500)}},
    ],
    ids=["nothing", "other kinds", "impossible", "a long name", "many keys"],
)
def test_whatever_a_config_says_the_answer_is_one_error_of_bounded_length(
    values: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert len(why(tmp_path)) < 1000


def test_a_long_list_is_cut() -> None:
    candidate = Candidate({f"k{i}": i for i in range(SHOWN + 3)}, lambda values: None)
    names: Callable[[Any], tuple[Iterable[str], Iterable[str]]] = lambda found: ((), ())  # noqa: E731
    assert "k5 and 3 more" in unknown_architecture("m", "x", {"a": candidate}, names).why


def test_a_reader_that_fails_in_its_own_way_is_told_of() -> None:
    def read(values: Any) -> None:
        raise ZeroDivisionError("by nothing")

    assert compare(Candidate({}, read)).stopped == "ZeroDivisionError: by nothing"
