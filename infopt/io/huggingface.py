"""Hugging Face folders: config.json in its older and present spellings, safetensors in one file or in shards."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from infopt.errors import CheckpointError
from infopt.io import prequantised
from infopt.io.chat_template import MAX_SOURCE, ChatTemplate, read_template
from infopt.io.checkpoint import (
    DTYPES,
    Checkpoint,
    LazyWeights,
    Source,
    bound_layers,
    check_layers,
    check_rotation,
    check_tensors,
    converting,
    file_shapes,
    make_config,
    row_chunks,
    shown,
)
from infopt.io.tokenizer import Tokenizer, read_text
from infopt.io.unknown import Asked, Candidate, unknown_architecture
from infopt.model import FAMILIES, Model, aligned_empty, is_matrix, shapes
from infopt.models import (
    Gemma2Config,
    Gemma3Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)
from infopt.models.base import DecoderConfig, shortest_period
from infopt.qtensor import Format
from infopt.spec import Config, LinearRope, Llama3Rope, TableRope, YarnRope

DTYPES_READ = ("F64", "F32", "F16", "BF16")
MOST_JSON = 2 << 20
"""Bytes of a JSON file that are read: as Python's values they may take thirty times as many."""

SHARD = re.compile(r"[^/\\\x00-\x1f]+\.safetensors")

OTHER_SENSES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


# ---------------------------------------------------------------------------------------------------------- the configs


_KINDS = {
    int: "a whole number from 0 to 2**31",
    float: "a finite number",
    bool: "true or false",
    str: "a text",
    list: "a list",
    dict: "an object",
}


class _Json:
    """A JSON object of a folder, whose values are checked as they are read."""

    def __init__(self, where: str, values: dict[str, Any]) -> None:
        self.where, self.values = where, values

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.values.get(key)
        value = default if value is None else value
        if kind is float and type(value) is int and abs(value) < 2**63:
            value = float(value)
        right = isinstance(value, kind) and not (isinstance(value, bool) and kind is int)
        if not right or (kind is int and not 0 <= value < 2**31) or (kind is float and not math.isfinite(value)):
            state = "is missing" if value is None else f"is {shown(value)}"
            raise CheckpointError(
                f"{self.where}: {key!r} {state}.",
                why="without it the model cannot be told."
                if value is None
                else f"it must be {_KINDS.get(kind, kind)}.",
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
                    f"{self.where}: {key}={shown(value)} is not computed here.",
                    why=f"only {key}={known!r} is.",
                    fix="use a checkpoint of the plain architecture",
                )


def _read_json(path: Path, most: int = MOST_JSON) -> _Json:
    try:
        values = json.loads(read_text(path, most))
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read.", why=str(error), fix="fetch the model again") from error
    return _Json(str(path), values)


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
    """The fields `rope_theta`, `rope_scaling` and `context` of a config."""
    try:
        return _stretched(c, common, context, theta, kind)
    except ArithmeticError as error:
        raise CheckpointError(
            f"{c.where} stretches its positions by numbers that give none.",
            why=f"{error} in what they are computed from.",
            fix="fetch the model again",
        ) from error


def _stretched(c: _Json, common: dict[str, Any], context: int | None, theta: float, kind: str) -> dict[str, Any]:
    """The same; division by zero and overflow are left to the caller.

    Two stretches depend on how long a text is to be. Keys are stored rotated, so they are settled here, by `context`.
    """
    rope = _rope_part(c, kind)
    theta = rope.get("rope_theta", float, theta)
    trained, name = common["context"], rope.get("rope_type", str, rope.values.get("type", "default"))
    before = "original_max_position_embeddings"
    original = rope.get(before, int, c.get(before, int, trained))
    if min(trained, original) < 1:
        raise ZeroDivisionError("a context of no tokens")
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
            if factor <= 0:
                raise ArithmeticError("a factor that is not positive")
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
    rotated = _rope_part(c).get("partial_rotary_factor", float, c.get("partial_rotary_factor", float, 1.0))
    if not 0 < rotated <= 1:
        raise CheckpointError(
            f"{c.where}: partial_rotary_factor={rotated} is not a part.",
            why="so much of a head would be turned.",
            fix="fetch the model again",
        )
    return rotated


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


def _write_rope(c: DecoderConfig) -> dict[str, Any]:
    """The older spelling, which every release reads: one that knows only it would take a missing `rope_theta` for
    10000 without a word.

    A stretch that `context` settled is written as what it was settled to.
    """
    match c.rope_scaling:
        case None:
            scaling = None
        case LinearRope() as s:
            scaling = {"rope_type": "linear", "factor": s.factor}
        case Llama3Rope() as s:
            scaling = {
                "rope_type": "llama3",
                "factor": s.factor,
                "low_freq_factor": s.low_freq_factor,
                "high_freq_factor": s.high_freq_factor,
                "original_max_position_embeddings": s.original_context,
            }
        case YarnRope() as s:
            scaling = {
                "rope_type": "yarn",
                "factor": s.factor,
                "original_max_position_embeddings": s.original_context,
                "beta_fast": s.beta_fast,
                "beta_slow": s.beta_slow,
                "attention_factor": s.attention_factor,
                "truncate": s.truncate,
            }
        case TableRope() as s:  # both tables are the one that is here, so that it holds for texts of any length
            scaling = {
                "rope_type": "longrope",
                "factor": 1.0,
                "original_max_position_embeddings": c.context,
                "attention_factor": s.attention_factor,
                "short_factor": list(s.divisors),
                "long_factor": list(s.divisors),
            }
    return {"rope_theta": c.rope_theta, "rope_scaling": scaling}


# --------------------------------------------------------------------------------------------------------- the families


@dataclasses.dataclass(frozen=True)
class _Part:
    """Fields of a config that are more than the value of one key: read one way, written the other.

    Args:
      read: `(settings, the plain fields) -> fields`.
      write: `config -> settings`.
    """

    read: Callable[[_Json, dict[str, Any]], dict[str, Any]]
    write: Callable[[Any], dict[str, Any]]


def _unsaid(what: str, read: str) -> CheckpointError:
    return CheckpointError(
        f"{what} cannot be exported.", why=f"transformers reads {read}.", fix="ip.save keeps it, for ip.load"
    )


def _read_window(c: _Json, absent: int | None = None) -> int | None:
    """Null is no window; no key is the class's own."""
    return None if c.values.get("sliding_window", absent) is None else c.get("sliding_window", int, absent)


def _read_used_window(c: _Json) -> int | None:
    return _read_window(c) if c.get("use_sliding_window", bool, False) else None


def _one_window(absent: int | None = None) -> _Part:
    return _Part(lambda c, f: {"window": _read_window(c, absent)}, lambda c: {"sliding_window": c.window})


def _write_locals(c: Any) -> dict[str, Any]:
    kinds = ["full_attention" if window is None else "sliding_attention" for window in c.windows()]
    return {"sliding_window": c.window, "layer_types": kinds}


def _write_used_window(c: Any) -> dict[str, Any]:
    # what releases before layer_types read, where it can say it: the first layer that sees a window
    near = [window is not None for window in c.windows()]
    first = near.index(True) if True in near else c.layers
    upper = {"max_window_layers": first} if all(near[first:]) else {}
    return {"use_sliding_window": c.window is not None, "sliding_window": c.window} | upper


def _read_upper(c: _Json, fields: dict[str, Any]) -> dict[str, Any]:
    window, first = _read_used_window(c), c.get("max_window_layers", int, 28)
    local = _locals(c, fields["layers"], lambda i: window is not None and i >= first)
    return {"window": window, "local": local if window is not None else (False,)}


_UPPER = _Part(_read_upper, lambda c: _write_locals(c) | _write_used_window(c))
_EVERY_LAYER = _Part(lambda c, f: {"window": _read_used_window(c)}, _write_used_window)


def _read_turned(c: _Json, fields: dict[str, Any]) -> dict[str, Any]:
    interval = max(1, c.get("no_rope_layer_interval", int, 4))
    turned = c.get("no_rope_layers", list, [int((i + 1) % interval != 0) for i in range(fields["layers"])])
    if len(turned) != fields["layers"]:
        raise CheckpointError(
            f"{c.where}: no_rope_layers has {len(turned)} entries for {fields['layers']} layers.",
            why="it says of each layer whether it has positions.",
            fix="fetch the model again",
        )
    return {"rotated": shortest_period([bool(x) for x in turned])}


def _read_rotated(c: _Json, fields: dict[str, Any]) -> dict[str, Any]:
    rotated = int(fields["head_dim"] * _rotated(c))
    return {"rotated": None if rotated == fields["head_dim"] else rotated}


def _write_rotated(c: Phi3Config) -> dict[str, Any]:
    if c.rope_scaling is not None and not isinstance(c.rope_scaling, TableRope):
        raise _unsaid(f"a phi3 whose positions are stretched by {c.rope_scaling.kind!r}", "by a table, or not at all")
    if c.rope_scaling is not None and c.head_dim != c.dim // c.heads:
        raise _unsaid(
            "a phi3 with a table for positions and head_dim other than dim / heads", "the table by dim / heads"
        )
    share = 1.0 if c.rotated is None else c.rotated / c.head_dim
    if c.rotated is not None and int(c.head_dim * share) < c.rotated:  # readers cut off what rounding left
        share = math.nextafter(share, 1.0)
    first = {} if c.rope_scaling is None else {"original_max_position_embeddings": c.context}  # or the class's own
    return {"partial_rotary_factor": share} | first


def _read_caps(c: _Json, fields: dict[str, Any]) -> dict[str, Any]:
    own = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}  # null is none, and no key is these
    attn, final = (None if c.values.get(k, v) is None else c.get(k, float, v) for k, v in own.items())
    return {"score_cap": attn, "logit_cap": final}


def _write_caps(c: Gemma2Config) -> dict[str, Any]:
    return {"attn_logit_softcapping": c.score_cap, "final_logit_softcapping": c.logit_cap}


def _write_query_scale(c: Any) -> dict[str, Any]:
    if c.query_scale != int(c.query_scale):
        raise _unsaid(f"a model with query_scale={c.query_scale}", "a whole number for it (query_pre_attn_scalar)")
    return {"query_pre_attn_scalar": int(c.query_scale)}


def _read_experts(c: _Json, fields: dict[str, Any]) -> dict[str, Any]:
    return {"experts": c.get("num_experts", int, c.get("num_local_experts", int, 128))}


_QUERY_SCALE = _Part(
    lambda c, f: {"query_scale": c.get("query_pre_attn_scalar", float, 256.0)},
    _write_query_scale,
)


def _read_gemma2_windows(c: _Json, fields: dict[str, Any]) -> dict[str, Any]:
    return {"window": c.get("sliding_window", int), "local": _locals(c, fields["layers"], lambda i: i % 2 == 0)}


def _read_gemma3_layers(c: _Json, fields: dict[str, Any]) -> dict[str, Any]:
    period = max(1, c.get("sliding_window_pattern", int, 6))
    present = bool(c.values.get("rope_parameters"))
    near = _rope_part(c, "sliding_attention") if present else c.default(rope_type="default")
    if near.get("rope_type", str, near.values.get("type", "default")) != "default":
        raise CheckpointError(
            f"{near.where}: local positions that are stretched are not computed here.",
            why="a window is always within what was trained.",
            fix="use a checkpoint of the plain architecture",
        )
    return {
        "window": c.get("sliding_window", int),
        "pattern": _locals(c, fields["layers"], lambda i: (i + 1) % period != 0),
        "local_rope_theta": near.get("rope_theta" if present else "rope_local_base_freq", float, 1e4),
    }


def _write_gemma3_layers(c: Gemma3Config) -> dict[str, Any]:
    settings = _write_locals(c) | {"rope_local_base_freq": c.local_rope_theta}
    if c.pattern == (True,) * (c.period - 1) + (False,):  # what releases before layer_types read
        settings["sliding_window_pattern"] = c.period
    return settings


def _read_each_other(c: _Json, fields: dict[str, Any]) -> dict[str, Any]:
    local = _locals(c, fields["layers"], lambda i: i % 2 == 0)
    absent = None if "sliding_window" in c.values else 128  # null is no window, and layers of one then have no size
    return {"window": c.get("sliding_window", int, absent) if True in local else None, "local": local}


def _write_each_other(c: GptOssConfig) -> dict[str, Any]:
    # a size is said even of no window, and plain positions are said, as transformers has defaults of its own for both
    plain = {"rope_scaling": {"rope_type": "default"}} if c.rope_scaling is None else {}
    return _write_locals(c) | ({"sliding_window": c.context} if c.window is None else {}) | plain


_LAYER = {
    "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj", "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm",
    "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}  # fmt: skip
_GEMMA_LAYER = _LAYER | {
    "attn_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}
_KEYS = {
    "vocab": "vocab_size", "dim": "hidden_size", "mlp": "intermediate_size", "layers": "num_hidden_layers",
    "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    "context": "max_position_embeddings", "norm_eps": "rms_norm_eps", "tied": "tie_word_embeddings",
}  # fmt: skip
_PLAIN = {"attention_bias": False, "mlp_bias": False, "use_bidirectional_attention": False}
_SILU = {"hidden_act": "silu"}
_GELU = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}
_TEXT = ("model.", "model.language_model.", "language_model.model.", "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """How a family is published: read by `ip.load`, written by `ip.export`.

    Args:
      config: the family's config.
      model_type, architecture: what config.json calls it.
      plain: keys with the one value that is computed here.
      keys: each field of the config that is the value of one key.
      defaults: what `transformers` takes for an absent or null key.
      parts: the other fields, apart from those of the rope.
      rope_theta: the default; rope_layers: which layers' rope it is, where there are two.
      turned_in_part: not all of a head need be turned.
      layer: what a layer's weights are called; `{}` is an expert; where several are called the same, they are the rows
        of one tensor, in this order.
      bare: those of these names that have no `.weight` behind them, and `_bias` in place of `.bias`. Such a tensor of
        experts holds all of them, `[experts, in, out]`; the rows of several in one alternate.
      top: what the other weights are called; layers: what the list of layers is.
      prefixes: what may stand before a name; the first is written.
      transposed: matrices are stored `[in, out]`.
      unused: ends of the names of tensors that are no weights.
      heads_divide: `transformers` reads only models whose `heads` divide `dim`.
    """

    config: type[Config]
    model_type: str
    architecture: str
    plain: Mapping[str, Any] = dataclasses.field(default_factory=lambda: dict(_SILU))
    keys: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(_KEYS))
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    parts: tuple[_Part, ...] = ()
    rope_theta: float = 10_000.0
    rope_layers: str = ""
    turned_in_part: bool = False
    layer: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(_LAYER))
    bare: tuple[str, ...] = ()
    top: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"embed": "embed_tokens", "final_norm": "norm"})
    layers: str = "layers"
    prefixes: tuple[str, ...] = _TEXT
    transposed: bool = False
    unused: tuple[str, ...] = ("rotary_emb.inv_freq",)  # follows from the config
    heads_divide: bool = False

    def read(self, c: _Json, context: int | None) -> Config:
        """The config that config.json describes, for texts of at most so many tokens."""
        c = c.default(**{"rms_norm_eps": 1e-6, "tie_word_embeddings": False} | dict(self.defaults))
        c.refuse(**_PLAIN | dict(self.plain))
        kinds = typing.get_type_hints(self.config)
        fields = {
            field: c.get(key, kinds[field]) for field, key in self.keys.items() if field not in ("kv_heads", "head_dim")
        }
        # bounded before anything is listed for each; the tensors tell later whether it is right
        bound_layers(c.where, fields["layers"])
        derived = {"kv_heads": fields["heads"], "head_dim": fields["dim"] // max(fields["heads"], 1)}
        fields |= {f: c.get(self.keys[f], int, x) if f in self.keys else x for f, x in derived.items()}
        for part in self.parts:
            fields |= part.read(c, fields)
        if "rope_theta" in kinds:
            if not self.turned_in_part and _rotated(c) != 1:
                raise CheckpointError(
                    f"{c.where}: partial_rotary_factor={_rotated(c)} is not computed here.",
                    why="in this family all of a head is turned.",
                    fix="use a checkpoint of the plain architecture",
                )
            fields = _rope(c, fields, context, self.rope_theta, self.rope_layers)
        elif context is not None and context > fields["context"]:
            raise CheckpointError(
                f"{c.where}: context={context} is beyond the model's {fields['context']} positions.",
                why="they are rows of a table, which has no more.",
                fix=f"context={fields['context']}, or less",
            )
        return make_config(self.config, c.where, **fields)

    def write(self, c: Any) -> dict[str, Any]:
        """A config.json that is read as this config, here and by `transformers`.

        Raises:
          CheckpointError: there is none.
        """
        if self.heads_divide and c.dim % c.heads:
            raise _unsaid(f"a model with dim={c.dim} and heads={c.heads}", "only models whose heads divide dim")
        settings = {"architectures": [self.architecture], "model_type": self.model_type}
        settings |= {key: getattr(c, field) for field, key in self.keys.items()} | dict(self.plain)
        if isinstance(c, DecoderConfig):
            settings |= _write_rope(c)
        for part in self.parts:
            settings |= part.write(c)
        # Said, or transformers' defaults for the class would mean tokens of another vocabulary.
        settings |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        for field, (ours, read) in _differences(c, self.read(_Json("config.json", settings), None)).items():
            raise CheckpointError(
                f"a {self.model_type} with {field}={ours!r:.60} cannot be exported.",
                why=f"its config.json cannot say that: it would be read as {read!r:.60}.",
                fix="ip.save keeps it, for ip.load",
            )
        return settings

    def experts_apart(self, c: Config) -> int:
        """How many experts have tensors of their own."""
        return getattr(c, "experts", 0) if any("{}" in name for name in self.layer.values()) else 0

    def sources(
        self, shapes: Mapping[str, tuple[int, ...]], prefix: str | None = None, head: str = "lm_head.weight"
    ) -> dict[str, Source]:
        """Where each weight lies: its tensors, and which part of them.

        Args:
          shapes: of the weights, by logical name.
          prefix: of the names; the one that is written by default.
          head: the name of an untied head.
        """
        prefix = self.prefixes[0] if prefix is None else prefix
        found: dict[str, Source] = {}
        for logical, shape in shapes.items():
            stem, bias = logical.removesuffix("_bias"), logical.endswith("_bias")
            kind = "bias" if bias else "weight"
            if logical == "head":
                found[logical] = Source((head,))
                continue
            if not logical.startswith("layers."):
                found[logical] = Source((f"{prefix}{self.top[stem]}.{kind}",))
                continue
            _, i, rest = stem.split(".", 2)
            name = f"{prefix}{self.layers}.{i}.{self.layer[rest]}"
            bare, own = self.layer[rest] in self.bare, logical.removeprefix(f"layers.{i}.")
            name += ("_bias" if bias else "") if bare else f".{kind}"
            files = tuple(map(name.format, range(shape[0]))) if "{}" in name else (name,)
            stacked = bare and ".experts." in own
            start, of, step = 0, None, 1
            together = [x for x, theirs in self.layer.items() if theirs == self.layer[rest]]
            if len(together) > 1 and stacked:
                start, of, step = together.index(rest), len(together) * shape[1], len(together)
            elif len(together) > 1:
                rows = [shapes[f"layers.{i}.{x}{'_bias' if bias else ''}"][0] for x in together]
                start, of = sum(rows[: together.index(rest)]), sum(rows)
            turned = is_matrix(own, shape) if stacked else self.transposed and len(shape) == 2
            found[logical] = Source(files, start, of, turned, step, stacked)
        return found


def _differences(a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configs of one family describe different models, and the values of both."""

    def of(c: Any) -> dict[str, Any]:
        fields = {f.name: getattr(c, f.name) for f in dataclasses.fields(c)}
        each = {k: tuple(v[i % len(v)] for i in range(c.layers)) for k, v in fields.items() if type(v) is tuple}
        windows = {k: c.windows() for k in ("window", "local") if k in fields}
        return fields | each | windows

    one, two = of(a), of(b)
    return {name: (getattr(a, name), getattr(b, name)) for name in one if one[name] != two[name]}


PUBLISHED: dict[str, Published] = {
    "llama": Published(
        config=LlamaConfig,
        model_type="llama",
        architecture="LlamaForCausalLM",
        plain=_SILU | {"attention_bias": False, "mlp_bias": False},
        heads_divide=True,
    ),
    "mistral": Published(
        config=MistralConfig,
        model_type="mistral",
        architecture="MistralForCausalLM",
        parts=(_one_window(absent=4096),),
    ),
    "smollm3": Published(
        config=SmolLM3Config,
        model_type="smollm3",
        architecture="SmolLM3ForCausalLM",
        plain=_SILU | {"attention_bias": False, "mlp_bias": False, "use_sliding_window": False},
        defaults={"tie_word_embeddings": True},
        parts=(_Part(_read_turned, lambda c: {"no_rope_layers": [int(x) for x in c.layers_rotated]}),),
        rope_theta=2_000_000.0,
    ),
    "qwen2": Published(
        config=Qwen2Config,
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        parts=(_UPPER,),
    ),
    "qwen3": Published(
        config=Qwen3Config,
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        plain=_SILU | {"attention_bias": False},
        defaults={"head_dim": 128},
        parts=(_UPPER,),
    ),
    "phi3": Published(
        config=Phi3Config,
        model_type="phi3",
        architecture="Phi3ForCausalLM",
        parts=(_one_window(), _Part(_read_rotated, _write_rotated)),
        turned_in_part=True,
        layer=_LAYER
        | dict.fromkeys(("attn.q", "attn.k", "attn.v"), "self_attn.qkv_proj")
        | dict.fromkeys(("mlp.gate", "mlp.up"), "mlp.gate_up_proj"),
    ),
    "mixtral": Published(
        config=MixtralConfig,
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        keys=_KEYS | {"experts": "num_local_experts", "experts_used": "num_experts_per_tok"},
        defaults={"num_local_experts": 8, "num_experts_per_tok": 2},
        parts=(_one_window(),),
        rope_theta=1_000_000.0,
        layer=_LAYER
        | {
            "mlp.router": "block_sparse_moe.gate",
            "mlp.experts.gate": "block_sparse_moe.experts.{}.w1",
            "mlp.experts.up": "block_sparse_moe.experts.{}.w3",
            "mlp.experts.down": "block_sparse_moe.experts.{}.w2",
        },
    ),
    "qwen3_moe": Published(
        config=Qwen3MoeConfig,
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        plain=_SILU | {"attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
        keys=_KEYS
        | {
            "mlp": "moe_intermediate_size",
            "experts_used": "num_experts_per_tok",
            "normalise": "norm_topk_prob",
        },
        defaults={"moe_intermediate_size": 768, "num_experts_per_tok": 8, "norm_topk_prob": False},
        parts=(_EVERY_LAYER, _Part(_read_experts, lambda c: {"num_experts": c.experts})),
        layer=_LAYER
        | {
            "mlp.router": "mlp.gate",
            "mlp.experts.gate": "mlp.experts.{}.gate_proj",
            "mlp.experts.up": "mlp.experts.{}.up_proj",
            "mlp.experts.down": "mlp.experts.{}.down_proj",
        },
    ),
    "gpt_oss": Published(
        config=GptOssConfig,
        model_type="gpt_oss",
        architecture="GptOssForCausalLM",
        plain=_SILU | {"attention_bias": True},
        keys=_KEYS
        | {
            "experts": "num_local_experts",
            "experts_used": "num_experts_per_tok",
            "swiglu_alpha": "swiglu_alpha",
            "swiglu_limit": "swiglu_limit",
        },
        defaults={
            "head_dim": 64,
            "max_position_embeddings": 131_072,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "rms_norm_eps": 1e-5,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
        parts=(_Part(_read_each_other, _write_each_other),),
        rope_theta=150_000.0,
        layer=_LAYER
        | {"attn.sinks": "self_attn.sinks", "mlp.router": "mlp.router", "mlp.experts.down": "mlp.experts.down_proj"}
        | dict.fromkeys(("mlp.experts.gate", "mlp.experts.up"), "mlp.experts.gate_up_proj"),
        bare=("self_attn.sinks", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    ),
    "gemma2": Published(
        config=Gemma2Config,
        model_type="gemma2",
        architecture="Gemma2ForCausalLM",
        plain=_GELU,
        defaults={
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
        },
        parts=(
            _Part(_read_gemma2_windows, _write_locals),
            _QUERY_SCALE,
            _Part(_read_caps, _write_caps),
        ),
        layer=_GEMMA_LAYER,
        heads_divide=True,
    ),
    "gemma3": Published(
        config=Gemma3Config,
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        plain=_GELU | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        defaults={
            "vocab_size": 262_208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "head_dim": 256,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131_072,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
        },
        parts=(_Part(_read_gemma3_layers, _write_gemma3_layers), _QUERY_SCALE),
        rope_theta=1_000_000.0,
        rope_layers="full_attention",
        layer=_GEMMA_LAYER,
        heads_divide=True,
    ),
    "gpt2": Published(
        config=GPT2Config,
        model_type="gpt2",
        architecture="GPT2LMHeadModel",
        plain={
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        keys={
            "vocab": "vocab_size",
            "dim": "n_embd",
            "layers": "n_layer",
            "heads": "n_head",
            "context": "n_positions",
            "norm_eps": "layer_norm_epsilon",
            "tied": "tie_word_embeddings",
        },
        defaults={"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
        parts=(_Part(lambda c, f: {"mlp": c.get("n_inner", int, 4 * f["dim"])}, lambda c: {"n_inner": c.mlp}),),
        layer={"attn_norm": "ln_1", "mlp_norm": "ln_2"}
        | dict.fromkeys(("attn.q", "attn.k", "attn.v"), "attn.c_attn")
        | {"attn.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"},
        top={"embed": "wte", "positions": "wpe", "final_norm": "ln_f"},
        layers="h",
        prefixes=("transformer.", ""),
        transposed=True,
        unused=(".attn.bias", ".attn.masked_bias"),  # causal masks
    ),
}
"""By family."""
MODEL_TYPES = {row.model_type: family for family, row in PUBLISHED.items()} | {"gemma3": "gemma3"}
"""The family of each model_type. A "gemma3" also sees; its text_config is a "gemma3_text"."""


# ---------------------------------------------------------------------------------------------------------- the weights


def _open_shards(folder: Path) -> dict[str, Any]:
    """Each tensor of the folder, as a slice of a mapped file."""
    index = folder / "model.safetensors.index.json"
    where: dict[str, str] = {}
    if index.exists():
        # Large models have large ones.
        sizes = sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.is_file())
        where = _read_json(index, MOST_JSON + sizes // 16).get("weight_map", dict)
        if not all(isinstance(shard, str) and SHARD.fullmatch(shard) for shard in where.values()):
            raise CheckpointError(
                f"{index} names files outside its folder, or that are not safetensors.",
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
            _check_header(folder / file)
            shard = safe_open(folder / file, framework="numpy")
            found = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 (not a dict)
            small = any(x.get_dtype() in prequantised.MAPPED for x in found.values())
            tensors |= found | (prequantised.small_floats(folder / file) if small else {})
        except (SafetensorError, OSError, ValueError) as error:
            missing = not (folder / file).exists()
            raise CheckpointError(
                f"{folder / file} " + ("is missing." if missing else "is truncated or damaged."),
                why=f"{index.name} names it." if missing else str(error),
                fix="fetch the file again",
            ) from error
    if lost := [name for name in where if name not in tensors]:
        raise CheckpointError(
            f"{folder} has no tensor {lost[0]!r:.100}.",
            why=f"{index.name} says {where[lost[0]]:.100} has it.",
            fix="fetch the file again",
        )
    return tensors


def _check_header(path: Path) -> None:
    """Raise where the table of a file's tensors is longer than its tensors make likely: it is all read into memory."""
    with path.open("rb") as file:
        start, size = file.read(8), os.fstat(file.fileno()).st_size
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        raise ValueError(f"its header runs on past the file's {size:,} bytes")
    if length > MOST_JSON + size // 16:
        raise ValueError(f"its header has {length:,} of the file's {size:,} bytes")


def _read(tensors: dict[str, Any], where: Source, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """A weight, out of the tensors it lies in, a few rows at a time."""
    out = aligned_empty(shape, dtype)
    files = where.files * len(out) if where.stacked else where.files
    for i, (file, into) in enumerate(zip(files, out if len(files) > 1 or where.stacked else out[None], strict=True)):
        lead = (i,) if where.stacked else ()
        for part in row_chunks(into.shape):
            rows = where.rows(part)
            with converting(file, dtype):
                if where.transposed:  # neighbours are read in one, and sorted out here
                    found = tensors[file][*lead, :, rows.start : rows.stop].T
                    into[part] = found[:: where.step]
                else:
                    into[part] = tensors[file][*lead, rows] if lead else tensors[file][rows]
    return out


def _equal(a: Any, b: Any) -> bool:
    shape = tuple(a.get_shape())
    return shape == tuple(b.get_shape()) and all(np.array_equal(a[part], b[part]) for part in row_chunks(shape))


def _unknown(folder: Path, settings: _Json, kind: str) -> CheckpointError:
    """The error that names the nearest known architecture and what differs."""

    def reader(known: str) -> Callable[[Asked], tuple[str, Config]]:
        return lambda values: (MODEL_TYPES[known], _read_config(_Json(settings.where, values), known, None))

    tensors = functools.cache(lambda: _open_shards(folder))

    def names(found: tuple[str, Config]) -> tuple[Iterable[str], Iterable[str]]:
        family, config = found
        there = tensors()
        check_layers(str(folder), config.layers, len(there), PUBLISHED[family].experts_apart(config))
        expected = shapes(Model.of(FAMILIES[family], config).spec)
        wanted = file_shapes(PUBLISHED[family].sources(expected, ""), expected)
        bare = (re.sub(r"^((transformer|model|language_model)\.)+", "", name) for name in there)
        return wanted, [name for name in bare if not name.endswith("rotary_emb.inv_freq")]

    top, text = settings.values, settings.values.get("text_config")
    whole = isinstance(text, dict)  # as a "gemma3": its text is a part, which the others are compared with
    inner = {**{k: v for k, v in top.items() if k != "text_config"}, **text} if whole else top
    candidates = {
        known: Candidate(inner if plain else top, reader(known), where=settings.where)
        for known, family in MODEL_TYPES.items()
        if (plain := known == PUBLISHED[family].model_type) or whole
    }
    return unknown_architecture(str(folder), kind, candidates, names, str(inner.get("model_type")))


def _read_config(settings: _Json, kind: str, context: int | None) -> Config:
    """The config of a known architecture, which may be a part of a larger one."""
    row = PUBLISHED[MODEL_TYPES[kind]]
    text = settings if kind == row.model_type else _Json(settings.where, settings.get("text_config", dict))
    return row.read(text, context)


def _quantisation(settings: _Json) -> dict[str, Any]:
    """What config.json says of packed weights; a model that also sees may say it of its text."""
    text = settings.values.get("text_config")
    inner = text if isinstance(text, dict) else {}
    return settings.default(quantization_config=inner.get("quantization_config")).get("quantization_config", dict, {})


def _is_packed(tensors: Mapping[str, Any], where: Source) -> bool:
    return any(isinstance(tensors.get(file), prequantised.Packed | prequantised.Experts) for file in where.files)


def open_checkpoint(folder: Path, dtype: str, context: int | None = None) -> Checkpoint:
    """Open a Hugging Face folder: all is checked here; the weights are read when they are asked for.

    Args:
      folder: with config.json, model.safetensors or its shards and index, and tokenizer.json where there is one.
      dtype: a key of `DTYPES`; "keep" keeps what a quantised checkpoint holds packed.
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
    if kind not in MODEL_TYPES:
        raise _unknown(folder, settings, kind)
    family = MODEL_TYPES[kind]
    row = PUBLISHED[family]
    config: Any = _read_config(settings, kind, context)
    tensors = _open_shards(folder)
    if quantised := _quantisation(settings):
        tensors = prequantised.unpack(settings.where, quantised, tensors)
    check_layers(str(folder), config.layers, len(tensors), row.experts_apart(config))
    prefix = next((p for p in row.prefixes if f"{p}{row.top['embed']}.weight" in tensors), row.prefixes[0])
    head = "language_model.lm_head.weight" if prefix == "language_model.model." else "lm_head.weight"

    expected = shapes(Model.of(FAMILIES[family], config).spec)
    sources = {
        name: dataclasses.replace(source, transposed=source.transposed and not _is_packed(tensors, source))
        for name, source in row.sources(expected, prefix, head).items()
    }
    wanted = file_shapes(sources, expected)
    ignored = prequantised.empty_biases(tensors) - wanted.keys()
    ignored |= {name for name in tensors if name.endswith(row.unused)}
    if kind == "gemma3":
        ignored |= {name for name in tensors if name.startswith(OTHER_SENSES)}  # images: not text
    if config.tied and head in tensors and (embed := tensors.get(sources["embed"].files[0])) is not None:
        if not _equal(tensors[head], embed):
            raise CheckpointError(
                f"{folder}: {head} differs from the embedding.",
                why="config.json says that the two are one (tie_word_embeddings).",
                fix='write "tie_word_embeddings": false into config.json, if the head is meant',
            )
        ignored.add(head)
    used = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    check_tensors(str(folder), wanted, {n: tuple(t.get_shape()) for n, t in used.items()})
    check_rotation(str(folder), config)
    for name, tensor in used.items():
        if tensor.get_dtype() not in DTYPES_READ:
            raise CheckpointError(
                f"{folder}: {name} is stored as {tensor.get_dtype()}, not as floats.",
                why=f"read are {', '.join(DTYPES_READ)}.",
                fix="use the float checkpoint",
            )
    formats: dict[str, Format] = {}
    readers: dict[str, Callable[[], Any]] = {}
    for name, shape in expected.items():
        if dtype == "keep" and (kept := prequantised.kept_format(tensors, sources[name], name)) is not None:
            formats[name] = kept
            readers[name] = functools.partial(prequantised.read, tensors, sources[name], shape)
        else:
            readers[name] = functools.partial(_read, tensors, sources[name], shape, DTYPES[dtype])
    return Checkpoint(family, config, formats, LazyWeights(readers), _tokenizer(folder, settings))


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
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if bad := [i for i in ends if type(i) is not int or not 0 <= i < 2**31]:
        raise CheckpointError(
            f"{folder}: eos_token_id is {shown(bad[0])}.", why="it is a token, or several.", fix="fetch the model again"
        )
    tokenizer = Tokenizer.from_file(path, ends)
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
