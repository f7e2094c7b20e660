"""Hugging Face folders: config.json in its older and present spellings, safetensors in one file or in shards."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from infopt.errors import CheckpointError, nearest
from infopt.io.checkpoint import (
    DTYPES,
    Checkpoint,
    LazyWeights,
    check_layers,
    check_tensors,
    make_config,
    row_chunks,
    shortest_period,
)
from infopt.io.tokenizer import Tokenizer
from infopt.model import FAMILIES, Model, aligned_empty, shapes
from infopt.models.gemma3 import Gemma3Config
from infopt.models.llama import LlamaConfig
from infopt.spec import Config, Llama3Rope

DTYPES_READ = ("F64", "F32", "F16", "BF16")

TOP_NAMES = {"embed": "embed_tokens", "final_norm": "norm"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj", "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm",
    "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}  # fmt: skip
NORM_NAMES = {  # the names after attention and before the MLP mean different norms in the two families
    "llama": {"mlp_norm": "post_attention_layernorm"},
    "gemma3": {"attn_out_norm": "post_attention_layernorm", "mlp_norm": "pre_feedforward_layernorm",
               "mlp_out_norm": "post_feedforward_layernorm"},
}  # fmt: skip

PREFIXES = ("model.", "model.language_model.", "language_model.model.", "")
OTHER_SENSES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


# ---------------------------------------------------------------------------------------------------------- the configs


class _Json:
    """A JSON object of a folder, whose values are checked as they are read."""

    def __init__(self, where: str, values: dict[str, Any]) -> None:
        self.where, self.values = where, values

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.values.get(key)
        value = default if value is None else value
        if kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            state = "is missing" if value is None else f"is {value!r:.40}"
            raise CheckpointError(
                f"{self.where}: {key!r} {state}.",
                why="without it the model cannot be told.",
                fix="fetch the model again",
            )
        return value

    def part(self, key: str) -> _Json:
        return _Json(f"{self.where}: {key}", self.get(key, dict, {}))

    def refuse(self, **plain: Any) -> None:
        """Raise unless each key is absent, null or the one value that this library computes."""
        for key, known in plain.items():
            if (value := self.values.get(key)) is not None and value != known:
                raise CheckpointError(
                    f"{self.where}: {key}={value!r:.60} is not computed here.",
                    why=f"only {key}={known!r} is.",
                    fix="use a checkpoint of the plain architecture",
                )


def _read_json(path: Path) -> _Json:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read.", why=str(error), fix="fetch the model again") from error
    return _Json(str(path), values)


def _common(c: _Json, tied: bool) -> dict[str, Any]:
    c.refuse(
        attention_bias=False,
        mlp_bias=False,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        partial_rotary_factor=1,
        use_bidirectional_attention=False,
    )
    if c.values.get("quantization_config"):
        raise CheckpointError(
            f"{c.where}: the weights are quantised (quantization_config).",
            why="their packing is not known here.",
            fix="use the float checkpoint, and quantize(...) here; or a GGUF file",
        )
    heads = c.get("num_attention_heads", int)
    return dict(
        vocab=c.get("vocab_size", int),
        dim=c.get("hidden_size", int),
        layers=c.get("num_hidden_layers", int),
        heads=heads,
        kv_heads=c.get("num_key_value_heads", int, heads),
        head_dim=c.get("head_dim", int, c.get("hidden_size", int) // max(heads, 1)),
        context=c.get("max_position_embeddings", int),
        mlp=c.get("intermediate_size", int),
        norm_eps=c.get("rms_norm_eps", float, 1e-6),
        tied=c.get("tie_word_embeddings", bool, tied),
    )


def _kind(rope: _Json, *known: str) -> str:
    kind = rope.get("rope_type", str, rope.values.get("type", "default"))
    if kind not in known:
        raise CheckpointError(
            f"{rope.where}: positions stretched by {kind!r} are not computed here.",
            why=f"this family has: {', '.join(known)}.",
            fix="use a checkpoint without it",
        )
    return kind


def _llama(c: _Json) -> LlamaConfig:
    common = _common(c, tied=False)
    c.refuse(hidden_act="silu")
    rope = c.part("rope_parameters" if c.values.get("rope_parameters") else "rope_scaling")
    rope.refuse(partial_rotary_factor=1)
    scaling = None
    if _kind(rope, "default", "llama3") == "llama3":
        scaling = make_config(
            Llama3Rope,
            c.where,
            factor=rope.get("factor", float),
            low_freq_factor=rope.get("low_freq_factor", float),
            high_freq_factor=rope.get("high_freq_factor", float),
            original_context=rope.get("original_max_position_embeddings", int),
        )
    theta = rope.get("rope_theta", float, c.get("rope_theta", float, 10_000.0))
    return make_config(LlamaConfig, c.where, rope_theta=theta, rope_scaling=scaling, **common)


def _gemma3(c: _Json) -> Gemma3Config:
    # Published configs leave out what the class has by default.
    defaults = dict(
        vocab_size=262_208,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        head_dim=256,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=131_072,
    )
    c = _Json(c.where, defaults | {k: v for k, v in c.values.items() if v is not None})
    common = _common(c, tied=True)
    c.refuse(hidden_activation="gelu_pytorch_tanh")
    if c.values.get("layer_types"):
        kinds = c.get("layer_types", list)
        if len(kinds) != common["layers"] or not {*kinds} <= {"sliding_attention", "full_attention"}:
            raise CheckpointError(
                f"{c.where}: layer_types does not name one of the two known kinds for each layer.",
                why="a layer sees either all positions or a window of them.",
                fix="use a checkpoint of the plain architecture",
            )
        layers = [kind == "sliding_attention" for kind in kinds]
    else:
        period = max(1, c.get("sliding_window_pattern", int, 6))
        layers = [(i + 1) % period != 0 for i in range(min(period, common["layers"]))]
    if c.values.get("rope_parameters"):
        both = c.part("rope_parameters")
        far, near = both.part("full_attention"), both.part("sliding_attention")
        _kind(near, "default")
        theta, local = far.get("rope_theta", float, 1e6), near.get("rope_theta", float, 1e4)
    else:
        far = c.part("rope_scaling")
        theta, local = c.get("rope_theta", float, 1e6), c.get("rope_local_base_freq", float, 1e4)
    factor = far.get("factor", float) if _kind(far, "default", "linear") == "linear" else 1.0
    return make_config(
        Gemma3Config,
        c.where,
        window=c.get("sliding_window", int, 4096),
        pattern=shortest_period(layers),
        query_scale=c.get("query_pre_attn_scalar", float, 256.0),
        rope_theta=theta,
        local_rope_theta=local,
        rope_factor=factor,
        **common,
    )


CONFIGS: dict[str, tuple[str, Callable[[_Json], Config]]] = {
    "llama": ("llama", _llama),
    "gemma3_text": ("gemma3", _gemma3),
    "gemma3": ("gemma3", lambda c: _gemma3(_Json(c.where, c.get("text_config", dict)))),
}
"""By model_type: the family, and how its config is read."""


# ---------------------------------------------------------------------------------------------------------- the weights


def _open_shards(folder: Path) -> dict[str, Any]:
    """Each tensor of the folder, as a slice of a mapped file."""
    index = folder / "model.safetensors.index.json"
    where: dict[str, str] = {}
    if index.exists():
        where = _read_json(index).get("weight_map", dict)
        if not all(isinstance(shard, str) and Path(shard).name == shard for shard in where.values()):
            raise CheckpointError(
                f"{index} names files outside its folder.",
                why="a checkpoint does not get to read the rest of the disk.",
                fix="fetch the model again",
            )
        files = sorted(set(where.values()))
    else:
        files = ["model.safetensors"]
        if not (folder / files[0]).exists():
            other = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".gguf"))
            raise CheckpointError(
                f"{folder} has neither model.safetensors nor {index.name}.",
                why=f"it has {', '.join(other[:3])}." if other else "there are no weights.",
                fix="give the path of the .gguf file itself"
                if any(".gguf" in p for p in other)
                else "save the model with save_pretrained(..., safe_serialization=True)",
            )
    tensors: dict[str, Any] = {}
    for file in files:
        try:
            shard = safe_open(folder / file, framework="numpy")
            tensors |= {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            missing = not (folder / file).exists()
            raise CheckpointError(
                f"{folder / file} " + ("is missing." if missing else "is truncated or damaged."),
                why=f"{index.name} names it." if missing else str(error),
                fix="fetch the file again",
            ) from error
    if lost := [name for name in where if name not in tensors]:
        raise CheckpointError(
            f"{folder} has no tensor {lost[0]!r}.",
            why=f"{index.name} says {where[lost[0]]} has it.",
            fix="fetch the file again",
        )
    return tensors


def _dense(tensor: Any, dtype: np.dtype[Any]) -> np.ndarray:
    out = aligned_empty(tuple(tensor.get_shape()), dtype)
    for part in row_chunks(out.shape):
        out[part] = tensor[part]
    return out


def _equal(a: Any, b: Any) -> bool:
    shape = tuple(a.get_shape())
    return shape == tuple(b.get_shape()) and all(np.array_equal(a[part], b[part]) for part in row_chunks(shape))


def open_checkpoint(folder: Path, dtype: str) -> Checkpoint:
    """Open a Hugging Face folder: all is checked here; the weights are read when they are asked for.

    Args:
      folder: with config.json, model.safetensors or its shards and index, and tokenizer.json where there is one.
      dtype: a key of `DTYPES`; "keep" is float32, as nothing here is packed.

    Raises:
      CheckpointError: the folder is incomplete, damaged, or not a model that this library computes.
    """
    if not (folder / "config.json").exists():
        ggufs = sorted(folder.glob("*.gguf"))
        raise CheckpointError(
            f"{folder} has no config.json.",
            why="it names the architecture and its sizes.",
            fix=f"infopt.load({str(ggufs[0])!r})"
            if ggufs
            else "give a Hugging Face folder, a .gguf file or a model's name",
        )
    settings = _read_json(folder / "config.json")
    kind = settings.get("model_type", str)
    if kind not in CONFIGS:
        raise CheckpointError(
            f"{folder} is of an architecture that is not computed here: {kind!r}.",
            why=nearest(kind, list(CONFIGS)),
            fix="use a model of a known one, or define the family with ip.define",
        )
    family, read_config = CONFIGS[kind]
    config: Any = read_config(settings)
    tensors = _open_shards(folder)
    check_layers(str(folder), config, len(tensors))
    prefix = next((p for p in PREFIXES if f"{p}embed_tokens.weight" in tensors), PREFIXES[0])
    head = "language_model.lm_head.weight" if prefix == PREFIXES[2] else "lm_head.weight"

    def file_name(logical: str) -> str:
        if logical == "head":
            return head
        if not logical.startswith("layers."):
            return f"{prefix}{TOP_NAMES[logical]}.weight"
        _, layer, rest = logical.split(".", 2)
        return f"{prefix}layers.{layer}.{(LAYER_NAMES | NORM_NAMES[family])[rest]}.weight"

    expected = shapes(Model.of(FAMILIES[family], config).spec)
    ignored = {name for name in tensors if name.endswith("rotary_emb.inv_freq")}  # follows from the config
    if kind == "gemma3":
        ignored |= {name for name in tensors if name.startswith(OTHER_SENSES)}  # images: not text
    if config.tied and head in tensors and (embed := tensors.get(file_name("embed"))) is not None:
        if not _equal(tensors[head], embed):
            raise CheckpointError(
                f"{folder}: {head} differs from the embedding.",
                why="config.json says that the two are one (tie_word_embeddings).",
                fix='write "tie_word_embeddings": false into config.json, if the head is meant',
            )
        ignored.add(head)
    used = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    check_tensors(
        str(folder),
        {file_name(name): shape for name, shape in expected.items()},
        {name: tuple(tensor.get_shape()) for name, tensor in used.items()},
    )
    for name, tensor in used.items():
        if tensor.get_dtype() not in DTYPES_READ:
            raise CheckpointError(
                f"{folder}: {name} is stored as {tensor.get_dtype()}, not as floats.",
                why=f"read are {', '.join(DTYPES_READ)}.",
                fix="use the float checkpoint",
            )
    readers = {name: functools.partial(_dense, tensors[file_name(name)], DTYPES[dtype]) for name in expected}
    return Checkpoint(family, config, {}, LazyWeights(readers), _tokenizer(folder, settings))


# -------------------------------------------------------------------------------------------------------- the tokenizer


def _tokenizer(folder: Path, settings: _Json) -> Tokenizer | None:
    path = folder / "tokenizer.json"
    if not path.exists():
        if (folder / "tokenizer.model").exists() or (folder / "vocab.json").exists():
            warnings.warn(
                f"{folder} has a tokenizer, but no tokenizer.json: the model takes token ids, but no text. "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder) of transformers writes one.",
                stacklevel=5,
            )
        return None
    eos = None
    if (generation := folder / "generation_config.json").exists():
        eos = _read_json(generation).values.get("eos_token_id")
    eos = settings.values.get("eos_token_id") if eos is None else eos
    return Tokenizer.from_file(path, [eos] if isinstance(eos, int) else eos or [])
