"""Hugging Face folders: config.json in its older and present spellings, safetensors in one file or in shards."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from infopt.errors import CheckpointError
from infopt.io.chat_template import MAX_SOURCE, ChatTemplate, read_template
from infopt.io.checkpoint import (
    DTYPES,
    Checkpoint,
    LazyWeights,
    Source,
    check_layers,
    check_tensors,
    file_shapes,
    make_config,
    row_chunks,
)
from infopt.io.tokenizer import Tokenizer
from infopt.io.unknown import Asked, Candidate, unknown_architecture
from infopt.model import FAMILIES, Model, aligned_empty, shapes
from infopt.models import (
    Gemma2Config,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)
from infopt.models.base import shortest_period
from infopt.spec import Config, LinearRope, Llama3Rope, TableRope, YarnRope

DTYPES_READ = ("F64", "F32", "F16", "BF16")

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

    def default(self, **values: Any) -> _Json:
        """The same, with values for keys that are absent or null."""
        return _Json(self.where, self.values | {k: v for k, v in values.items() if self.values.get(k) is None})

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
        use_bidirectional_attention=False,
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


def _rope_part(c: _Json, kind: str = "") -> _Json:
    """What config.json says of the rope, in its present spelling or the older one, for one kind of layer."""
    parameters = c.part("rope_parameters") if c.values.get("rope_parameters") else c.part("rope_scaling")
    part = parameters.part(kind) if kind in parameters.values else parameters
    if not isinstance(part.values.get("rope_theta"), float | int):
        part = _Json(part.where, part.values | {"rope_theta": c.values.get("rope_theta")})
    return part


def _rope(
    c: _Json, common: dict[str, Any], context: int | None, theta: float = 10_000.0, kind: str = ""
) -> dict[str, Any]:
    """The fields `rope_theta`, `rope_scaling` and `context` of a config.

    Two stretches depend on how long a text is to be. Keys are stored rotated, so they are settled here, by `context`.
    """
    rope = _rope_part(c, kind)
    theta = rope.get("rope_theta", float, theta)
    trained, name = common["context"], rope.get("rope_type", str, rope.values.get("type", "default"))
    before = "original_max_position_embeddings"
    original = rope.get(before, int, c.get(before, int, trained))
    width = int(common["head_dim"] * _rotated(c))
    limit, scaling = trained, None
    match name:
        case "default":
            pass
        case "linear":
            scaling = LinearRope(factor=rope.get("factor", float))
        case "llama3":
            scaling = make_config(
                Llama3Rope,
                c.where,
                factor=rope.get("factor", float),
                low_freq_factor=rope.get("low_freq_factor", float),
                high_freq_factor=rope.get("high_freq_factor", float),
                original_context=rope.get("original_max_position_embeddings", int),
            )
        case "yarn":
            factor = rope.get("factor", float, trained / original)
            scaling = YarnRope(
                factor=factor,
                original_context=original,
                beta_fast=rope.get("beta_fast", float, 32.0),
                beta_slow=rope.get("beta_slow", float, 1.0),
                attention_factor=rope.get("attention_factor", float, _yarn_size(rope, factor)),
                truncate=rope.get("truncate", bool, True),
            )
        case "dynamic":
            factor = rope.get("factor", float)
            limit = int(original * factor)
            length = max(context or original, original)
            theta *= (factor * length / original - (factor - 1)) ** (width / max(width - 2, 1))
        case "longrope" | "su":
            long = (context or trained) > original
            divisors = rope.get("long_factor" if long else "short_factor", list)
            if len(divisors) != width // 2 or not all(isinstance(x, float | int) and x > 0 for x in divisors):
                raise CheckpointError(
                    f"{rope.where}: {'long' if long else 'short'}_factor does not hold {width // 2} positive numbers.",
                    why="each pair of a head's values has its own.",
                    fix="fetch the model again",
                )
            stretch = max(rope.get("factor", float, trained / original), 1.0)
            size = 1.0 if stretch == 1 else math.sqrt(1 + math.log(stretch) / math.log(original))
            size = rope.get("attention_factor", float, size)
            scaling = TableRope(divisors=tuple(map(float, divisors)), attention_factor=size)
        case _:
            raise CheckpointError(
                f"{rope.where}: positions stretched by {name!r} are not computed here.",
                why="known are default, linear, llama3, yarn, dynamic and longrope.",
                fix="use a checkpoint without it",
            )
    if context is not None and not 1 <= context <= limit:
        raise CheckpointError(
            f"{c.where}: context={context} is beyond what the model reads, {limit} tokens.",
            why="it was not trained on such distances.",
            fix=f"context={limit}, or less",
        )
    return common | dict(rope_theta=theta, rope_scaling=scaling, context=context or trained)


def _yarn_size(rope: _Json, factor: float) -> float:
    """By what yarn multiplies cosines and sines, where config.json does not say."""

    def size(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    above, below = (rope.get(key, float, 0.0) for key in ("mscale", "mscale_all_dim"))
    return size(above) / size(below) if above and below else size(1.0)


def _rotated(c: _Json) -> float:
    return _rope_part(c).get("partial_rotary_factor", float, c.get("partial_rotary_factor", float, 1.0))


def _window(c: _Json, used: bool = True) -> int | None:
    return c.get("sliding_window", int) if used and c.values.get("sliding_window") is not None else None


def _locals(c: _Json, layers: int, default: Callable[[int], bool]) -> tuple[bool, ...]:
    """Which layers see a window, as a period."""
    kinds = c.get("layer_types", list) if c.values.get("layer_types") else None
    if kinds is None:
        return shortest_period([default(i) for i in range(layers)])
    if len(kinds) != layers or not {*map(str, kinds)} <= {"sliding_attention", "full_attention"}:
        raise CheckpointError(
            f"{c.where}: layer_types does not name one of the two known kinds for each layer.",
            why="a layer sees either all positions or a window of them.",
            fix="use a checkpoint of the plain architecture",
        )
    return shortest_period([kind == "sliding_attention" for kind in kinds])


def _llama(c: _Json, context: int | None) -> Config:
    c.refuse(hidden_act="silu")
    _plain_width(c)
    return make_config(LlamaConfig, c.where, **_rope(c, _common(c, tied=False), context))


def _plain_width(c: _Json) -> None:
    if _rotated(c) != 1:
        raise CheckpointError(
            f"{c.where}: partial_rotary_factor={_rotated(c)} is not computed here.",
            why="in this family all of a head is turned.",
            fix="use a checkpoint of the plain architecture",
        )


def _mistral(c: _Json, context: int | None) -> Config:
    c.refuse(hidden_act="silu")
    _plain_width(c)
    c = c.default(sliding_window=4096) if "sliding_window" not in c.values else c
    return make_config(MistralConfig, c.where, window=_window(c), **_rope(c, _common(c, tied=False), context))


def _smollm3(c: _Json, context: int | None) -> Config:
    c.refuse(hidden_act="silu", use_sliding_window=False)
    _plain_width(c)
    common = _common(c, tied=True)
    interval = max(1, c.get("no_rope_layer_interval", int, 4))
    turned = c.get("no_rope_layers", list, [int((i + 1) % interval != 0) for i in range(common["layers"])])
    if len(turned) != common["layers"]:
        raise CheckpointError(
            f"{c.where}: no_rope_layers has {len(turned)} entries for {common['layers']} layers.",
            why="it says of each layer whether it has positions.",
            fix="fetch the model again",
        )
    rotated = shortest_period([bool(x) for x in turned])
    return make_config(SmolLM3Config, c.where, rotated=rotated, **_rope(c, common, context, theta=2_000_000.0))


def _qwen_windows(c: _Json, layers: int) -> dict[str, Any]:
    used = c.get("use_sliding_window", bool, False)
    first = c.get("max_window_layers", int, 28)
    window = _window(c, used)
    local = _locals(c, layers, lambda i: window is not None and i >= first)
    return dict(window=window, local=local if window is not None else (False,))


def _qwen2(c: _Json, context: int | None) -> Config:
    c.refuse(hidden_act="silu")
    _plain_width(c)
    common = _common(c, tied=False)
    return make_config(Qwen2Config, c.where, **_qwen_windows(c, common["layers"]), **_rope(c, common, context))


def _qwen3(c: _Json, context: int | None) -> Config:
    c.refuse(hidden_act="silu")
    _plain_width(c)
    common = _common(c.default(head_dim=128), tied=False)
    return make_config(Qwen3Config, c.where, **_qwen_windows(c, common["layers"]), **_rope(c, common, context))


def _phi3(c: _Json, context: int | None) -> Config:
    c.refuse(hidden_act="silu")
    common = _common(c, tied=False)
    rotated = int(common["head_dim"] * _rotated(c))
    fields = _rope(c, common, context)
    turned = None if rotated == common["head_dim"] else rotated
    return make_config(Phi3Config, c.where, window=_window(c), rotated=turned, **fields)


def _mixtral(c: _Json, context: int | None) -> Config:
    c.refuse(hidden_act="silu")
    _plain_width(c)
    return make_config(
        MixtralConfig,
        c.where,
        experts=c.get("num_local_experts", int, 8),
        experts_used=c.get("num_experts_per_tok", int, 2),
        window=_window(c),
        **_rope(c, _common(c, tied=False), context, theta=1_000_000.0),
    )


def _qwen3_moe(c: _Json, context: int | None) -> Config:
    c.refuse(hidden_act="silu", decoder_sparse_step=1)
    if c.values.get("mlp_only_layers"):
        c.refuse(mlp_only_layers=[])
    _plain_width(c)
    common = _common(c, tied=False) | dict(mlp=c.get("moe_intermediate_size", int, 768))
    return make_config(
        Qwen3MoeConfig,
        c.where,
        experts=c.get("num_experts", int, c.get("num_local_experts", int, 128)),
        experts_used=c.get("num_experts_per_tok", int, 8),
        normalise=c.get("norm_topk_prob", bool, False),
        window=_window(c, c.get("use_sliding_window", bool, False)),
        **_rope(c, common, context),
    )


def _gemma2(c: _Json, context: int | None) -> Config:
    caps = [  # null is none, and no key is the class's own
        None if c.values.get(key, own) is None else c.get(key, float, own)
        for key, own in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0))
    ]
    c = c.default(head_dim=256, max_position_embeddings=8192, sliding_window=4096)
    c.refuse(hidden_activation="gelu_pytorch_tanh")
    _plain_width(c)
    common = _common(c, tied=True)
    return make_config(
        Gemma2Config,
        c.where,
        window=c.get("sliding_window", int),
        local=_locals(c, common["layers"], lambda i: i % 2 == 0),
        query_scale=c.get("query_pre_attn_scalar", float, 256.0),
        score_cap=caps[0],
        logit_cap=caps[1],
        **_rope(c, common, context),
    )


def _gemma3(c: _Json, context: int | None) -> Config:
    # Published configs leave out what the class has by default.
    c = c.default(
        vocab_size=262_208,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        head_dim=256,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=131_072,
        sliding_window=4096,
    )
    common = _common(c, tied=True)
    c.refuse(hidden_activation="gelu_pytorch_tanh", attn_logit_softcapping=None, final_logit_softcapping=None)
    period = max(1, c.get("sliding_window_pattern", int, 6))
    near = _rope_part(c, "sliding_attention") if c.values.get("rope_parameters") else c.default(rope_type="default")
    if near.get("rope_type", str, near.values.get("type", "default")) != "default":
        raise CheckpointError(
            f"{near.where}: local positions that are stretched are not computed here.",
            why="a window is always within what was trained.",
            fix="use a checkpoint of the plain architecture",
        )
    local = near.get("rope_theta", float, 1e4) if c.values.get("rope_parameters") else None
    return make_config(
        Gemma3Config,
        c.where,
        window=c.get("sliding_window", int),
        pattern=_locals(c, common["layers"], lambda i: (i + 1) % period != 0),
        query_scale=c.get("query_pre_attn_scalar", float, 256.0),
        local_rope_theta=c.get("rope_local_base_freq", float, 1e4) if local is None else local,
        **_rope(c, common, context, theta=1e6, kind="full_attention"),
    )


def _gpt2(c: _Json, context: int | None) -> Config:
    c.refuse(
        activation_function="gelu_new",
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    dim, heads, trained = c.get("n_embd", int), c.get("n_head", int), c.get("n_positions", int)
    if context is not None and context > trained:
        raise CheckpointError(
            f"{c.where}: context={context} is beyond the model's {trained} positions.",
            why="they are rows of a table, which has no more.",
            fix=f"context={trained}, or less",
        )
    return make_config(
        GPT2Config,
        c.where,
        vocab=c.get("vocab_size", int),
        dim=dim,
        layers=c.get("n_layer", int),
        heads=heads,
        kv_heads=heads,
        head_dim=dim // max(heads, 1),
        context=trained,
        mlp=c.get("n_inner", int, 4 * dim),
        norm_eps=c.get("layer_norm_epsilon", float, 1e-5),
        tied=c.get("tie_word_embeddings", bool, True),
    )


CONFIGS: dict[str, tuple[str, Callable[[_Json, int | None], Config]]] = {
    "llama": ("llama", _llama),
    "mistral": ("mistral", _mistral),
    "smollm3": ("smollm3", _smollm3),
    "qwen2": ("qwen2", _qwen2),
    "qwen3": ("qwen3", _qwen3),
    "phi3": ("phi3", _phi3),
    "mixtral": ("mixtral", _mixtral),
    "qwen3_moe": ("qwen3_moe", _qwen3_moe),
    "gemma2": ("gemma2", _gemma2),
    "gemma3_text": ("gemma3", _gemma3),
    "gemma3": ("gemma3", lambda c, context: _gemma3(_Json(c.where, c.get("text_config", dict)), context)),
    "gpt2": ("gpt2", _gpt2),
}
"""By model_type: the family, and how its config is read, for texts of at most so many tokens."""


# ------------------------------------------------------------------------------------------------------------ the names

_LLAMA = {
    "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj", "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm",
    "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}  # fmt: skip
_GEMMA = _LLAMA | {
    "attn_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}
LAYER_NAMES: dict[str, dict[str, str]] = {
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "mixtral": _LLAMA | {
        "mlp.router": "block_sparse_moe.gate", "mlp.experts.gate": "block_sparse_moe.experts.{}.w1",
        "mlp.experts.up": "block_sparse_moe.experts.{}.w3", "mlp.experts.down": "block_sparse_moe.experts.{}.w2",
    },
    "qwen3_moe": _LLAMA | {
        "mlp.router": "mlp.gate", "mlp.experts.gate": "mlp.experts.{}.gate_proj",
        "mlp.experts.up": "mlp.experts.{}.up_proj", "mlp.experts.down": "mlp.experts.{}.down_proj",
    },
    "gpt2": {
        "attn_norm": "ln_1", "mlp_norm": "ln_2", "attn.o": "attn.c_proj", "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    },
}  # fmt: skip
"""What a layer's weights are called, where it is not as in Llama; `{}` is an expert."""
TOP_NAMES = {"embed": "embed_tokens", "final_norm": "norm"}
GPT2_TOP = {"embed": "wte", "positions": "wpe", "final_norm": "ln_f"}


def source(family: str, c: Any, logical: str, shape: tuple[int, ...], prefix: str, head: str) -> Source:
    """Where a weight lies: its tensors, and which part of them."""
    stem, kind = (logical.removesuffix("_bias"), "bias") if logical.endswith("_bias") else (logical, "weight")
    if logical == "head":
        return Source((head,))
    if not logical.startswith("layers."):
        return Source((f"{prefix}{(GPT2_TOP if family == 'gpt2' else TOP_NAMES)[stem]}.{kind}",))
    _, layer, rest = stem.split(".", 2)
    start = f"{prefix}{'h' if family == 'gpt2' else 'layers'}.{layer}."
    names = LAYER_NAMES.get(family, _LLAMA)
    transposed = family == "gpt2" and len(shape) == 2
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    if family in ("phi3", "gpt2") and rest in ("attn.q", "attn.k", "attn.v"):
        first = {"attn.q": 0, "attn.k": q, "attn.v": q + kv}[rest]
        fused = "attn.c_attn" if family == "gpt2" else "self_attn.qkv_proj"
        return Source((f"{start}{fused}.{kind}",), first, q + 2 * kv, transposed)
    if family == "phi3" and rest in ("mlp.gate", "mlp.up"):
        return Source((f"{start}mlp.gate_up_proj.{kind}",), c.mlp * (rest == "mlp.up"), 2 * c.mlp)
    if rest.startswith("mlp.experts."):
        return Source(tuple(f"{start}{names[rest].format(e)}.{kind}" for e in range(shape[0])))
    return Source((f"{start}{names[rest]}.{kind}",), transposed=transposed)


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


def _read(tensors: dict[str, Any], where: Source, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """A weight, out of the tensors it lies in, a few rows at a time."""
    out = aligned_empty(shape, dtype)
    for file, into in zip(where.files, out if len(where.files) > 1 else out[None], strict=True):
        for part in row_chunks(into.shape):
            rows = slice(part.start + where.start, part.stop + where.start)
            into[part] = tensors[file][:, rows].T if where.transposed else tensors[file][rows]
    return out


def _equal(a: Any, b: Any) -> bool:
    shape = tuple(a.get_shape())
    return shape == tuple(b.get_shape()) and all(np.array_equal(a[part], b[part]) for part in row_chunks(shape))


def _unknown(folder: Path, settings: _Json, kind: str) -> CheckpointError:
    """The error that names the nearest known architecture and what differs."""

    def reader(known: str) -> Callable[[Asked], tuple[str, Config]]:
        family, read = CONFIGS[known]
        return lambda values: (family, read(_Json(settings.where, values), None))

    def names(found: tuple[str, Config]) -> tuple[Iterable[str], Iterable[str]]:
        family, config = found
        there = _open_shards(folder)
        check_layers(str(folder), config, len(there))
        expected = shapes(Model.of(FAMILIES[family], config).spec)
        sources = {n: source(family, config, n, shape, "", "lm_head.weight") for n, shape in expected.items()}
        bare = (re.sub(r"^((transformer|model|language_model)\.)+", "", name) for name in there)
        return file_shapes(sources, expected), [name for name in bare if not name.endswith("rotary_emb.inv_freq")]

    candidates = {known: Candidate(settings.values, reader(known), where=settings.where) for known in CONFIGS}
    return unknown_architecture(str(folder), kind, candidates, names)


def open_checkpoint(folder: Path, dtype: str, context: int | None = None) -> Checkpoint:
    """Open a Hugging Face folder: all is checked here; the weights are read when they are asked for.

    Args:
      folder: with config.json, model.safetensors or its shards and index, and tokenizer.json where there is one.
      dtype: a key of `DTYPES`; "keep" is float32, as nothing here is packed.
      context: tokens that texts will have at most; the model's own by default.

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
        raise _unknown(folder, settings, kind)
    if settings.values.get("quantization_config"):
        raise CheckpointError(
            f"{settings.where}: the weights are quantised (quantization_config).",
            why="their packing is not known here.",
            fix="use the float checkpoint, and quantize(...) here; or a GGUF file",
        )
    family, read_config = CONFIGS[kind]
    config: Any = read_config(settings, context)
    tensors = _open_shards(folder)
    check_layers(str(folder), config, len(tensors))
    first = "wte" if family == "gpt2" else "embed_tokens"
    prefixes = ("transformer.", "") if family == "gpt2" else PREFIXES
    prefix = next((p for p in prefixes if f"{p}{first}.weight" in tensors), prefixes[0])
    head = "language_model.lm_head.weight" if prefix == "language_model.model." else "lm_head.weight"

    expected = shapes(Model.of(FAMILIES[family], config).spec)
    sources = {name: source(family, config, name, shape, prefix, head) for name, shape in expected.items()}
    ignored = {name for name in tensors if name.endswith("rotary_emb.inv_freq")}  # follows from the config
    if kind == "gemma3":
        ignored |= {name for name in tensors if name.startswith(OTHER_SENSES)}  # images: not text
    if family == "gpt2":
        ignored |= {name for name in tensors if name.endswith((".attn.bias", ".attn.masked_bias"))}  # causal masks
    if config.tied and head in tensors and (embed := tensors.get(sources["embed"].files[0])) is not None:
        if not _equal(tensors[head], embed):
            raise CheckpointError(
                f"{folder}: {head} differs from the embedding.",
                why="config.json says that the two are one (tie_word_embeddings).",
                fix='write "tie_word_embeddings": false into config.json, if the head is meant',
            )
        ignored.add(head)
    used = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    check_tensors(str(folder), file_shapes(sources, expected), {n: tuple(t.get_shape()) for n, t in used.items()})
    for name, tensor in used.items():
        if tensor.get_dtype() not in DTYPES_READ:
            raise CheckpointError(
                f"{folder}: {name} is stored as {tensor.get_dtype()}, not as floats.",
                why=f"read are {', '.join(DTYPES_READ)}.",
                fix="use the float checkpoint",
            )
    readers = {
        name: functools.partial(_read, tensors, sources[name], shape, DTYPES[dtype]) for name, shape in expected.items()
    }
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
    tokenizer = Tokenizer.from_file(path, [eos] if isinstance(eos, int) else eos or [])
    return dataclasses.replace(tokenizer, template=_template(folder))


def _template(folder: Path) -> ChatTemplate | None:
    """Files of their own come before what tokenizer_config.json says: as in transformers, in place of all of it."""
    path, values = folder / "tokenizer_config.json", {}
    if path.exists():
        values = _read_json(path).values
    named = {k: v["content"] if isinstance(v, dict) and "content" in v else v for k, v in values.items()}
    special = {k: v for k, v in named.items() if k.endswith("_token") and isinstance(v, str)}
    places = [("default", folder / "chat_template.jinja")]
    places += [(name, folder / "additional_chat_templates" / f"{name}.jinja") for name in ("default", "tool_use")]
    own = {name: _read_template(place) for name, place in places if place.exists()}
    if own and "default" not in own:
        return None  # transformers renders nothing then, but where there are tools
    return read_template(own or values.get("chat_template"), special, str(folder))


def _read_template(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(4 * MAX_SOURCE + 1).decode("utf-8", "replace")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read.", why=str(error), fix="fetch the model again") from error
