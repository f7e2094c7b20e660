"""GGUF files: mapped, checked, and read tensor by tensor.

The `gguf` package knows the format's constants and takes its blocks apart. Its reader is not used: it makes a numpy
array of every token of the vocabulary, which costs five seconds and hundreds of MB for 49,152 words.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import mmap
import re
import struct
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, quants

from infopt.errors import CheckpointError
from infopt.io.blocks import KEPT, take_apart
from infopt.io.chat_template import read_template
from infopt.io.checkpoint import (
    DTYPES,
    Checkpoint,
    LazyWeights,
    Source,
    check_layers,
    check_rotation,
    check_tensors,
    converting,
    file_shapes,
    make_config,
    row_chunks,
    shown,
)
from infopt.io.tokenizer import SPLITTINGS, Tokenizer
from infopt.io.unknown import Candidate, unknown_architecture
from infopt.model import FAMILIES, Model, aligned_empty, shapes
from infopt.models import (
    Gemma2Config,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)
from infopt.models.base import shortest_period
from infopt.qtensor import Format, QTensor, unknown_error
from infopt.spec import Config, LinearRope, Llama3Rope, TableRope, YarnRope

FLOATS = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16, GGMLQuantizationType.F64)

TOP_NAMES = {"embed": "token_embd", "positions": "position_embd", "final_norm": "output_norm", "head": "output"}
LAYER_NAMES = {
    "attn_norm": "attn_norm", "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v", "attn.o": "attn_output",
    "attn.q_norm": "attn_q_norm", "attn.k_norm": "attn_k_norm", "attn_out_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm", "mlp.gate": "ffn_gate", "mlp.up": "ffn_up", "mlp.down": "ffn_down",
    "mlp_out_norm": "post_ffw_norm", "mlp.router": "ffn_gate_inp", "mlp.experts.gate": "ffn_gate_exps",
    "mlp.experts.up": "ffn_up_exps", "mlp.experts.down": "ffn_down_exps",
}  # fmt: skip
ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
INTERLEAVED = ("llama", "mixtral", "smollm3")
"""Families whose files store the rows of q and k so that a head's two halves alternate."""

PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")

SCALARS = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i", GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f", GGUFValueType.FLOAT64: "d", GGUFValueType.BOOL: "?",
}  # fmt: skip


MOST_HEADER = 32 << 20
"""Bytes that metadata may take as Python's values, beside as many as the file has."""


# ------------------------------------------------------------------------------------------------------- the container


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of a mapped file.

    Args:
      type: how its values are stored.
      shape: `[out, in]`, or `[in]`.
      rows: its bytes, uint8 `[out, bytes of a row]`, a view into the map.
    """

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    rows: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class File:
    """A mapped GGUF file: its metadata, and its tensors by name."""

    name: str
    fields: dict[str, Any]
    tensors: dict[str, Tensor]

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The metadata at `key`; a key that is absent and has no default, or a value of another kind, is an error."""
        value = self.fields.get(key, default)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            state = "is missing" if value is None else f"is {shown(value)}"
            raise CheckpointError(
                f"{self.name}: its metadata {key!r} {state}.",
                why="without it the model cannot be told.",
                fix="fetch or convert the model again",
            )
        return value

    def list_of(self, key: str, kind: type, default: Any = None) -> list[Any]:
        """The metadata at `key`, a list of values of one kind."""
        values = self.get(key, list, default)
        if bad := [x for x in values if type(x) is not kind]:
            raise CheckpointError(
                f"{self.name}: its metadata {key!r} holds {shown(bad[0])}.",
                why=f"it must be a list of {kind.__name__} values.",
                fix="fetch or convert the model again",
            )
        return values


class _Cursor:
    """Reads little-endian values one after another out of a map, and never past its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0
        self.left = MOST_HEADER + len(data)

    def charge(self, count: int, each: int) -> None:
        """Pay for values that are to be made, at about so many bytes each, before they are."""
        self.left -= count * each
        if self.left < 0:
            raise ValueError("it holds more values than a model has use for")

    def read(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        # The shortest decimal that is this float32: 1e-5, and not 9.999999747378752e-06.
        return float(str(np.float32(value))) if code == "f" else value

    def text(self) -> str:
        size = self.read("Q")
        if size > len(self.data) - self.at:
            raise EOFError
        self.at += size
        self.charge(1, 60 + 2 * size)
        return self.data[self.at - size : self.at].decode()

    def value(self, kind: GGUFValueType, nested: bool = False) -> Any:
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind != GGUFValueType.ARRAY:
            return self.read(SCALARS[kind])
        if nested:
            raise ValueError("lists of lists are not read")
        kind, count = GGUFValueType(self.read("I")), self.read("Q")
        if kind in SCALARS:
            item = np.dtype("<" + SCALARS[kind])
            if count * item.itemsize > len(self.data) - self.at:
                raise EOFError
            self.charge(count, 8 if item.itemsize == 1 else 40)
            start, self.at = self.at, self.at + count * item.itemsize
            return np.frombuffer(self.data[start : self.at], item).tolist()
        if count * 8 > len(self.data) - self.at:  # a string takes eight bytes at least
            raise EOFError
        return [self.value(kind, nested=True) for _ in range(count)]


def open_file(path: Path) -> File:
    """Map a GGUF file, or all parts of one that is split, and read everything but the tensors' values.

    Raises:
      CheckpointError: not GGUF, of another version or byte order, truncated or damaged, or a part is missing.
    """
    first = _open_part(path)
    count = first.get("split.count", int, 1)
    if count <= 1:
        return first
    match = PART.fullmatch(path.name)
    if not match or int(match[2]) != 1 or int(match[3]) != count:
        start = f"{match[1]}-00001-of-{match[3]}.gguf" if match else "NAME-00001-of-0000N.gguf"
        raise CheckpointError(
            f"{path.name} is one of {count} parts.",
            why="the first part holds the metadata, and the parts' names say where the others are.",
            fix=f"give {start}, with all its parts beside it under their own names",
        )
    tensors = dict(first.tensors)
    for n in range(2, count + 1):
        part = _open_part(path.with_name(f"{match[1]}-{n:05}-of-{match[3]}.gguf"))
        if again := tensors.keys() & part.tensors.keys():
            raise CheckpointError(
                f"{part.name} holds {min(again)!r}, which an earlier part holds too.",
                why="the parts are not of one model.",
                fix="fetch the parts again",
            )
        tensors |= part.tensors
    return File(first.name, first.fields, tensors)


def _open_part(path: Path) -> File:
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read.", why=error.strerror or str(error), fix="check the file and its permissions"
        ) from error
    if data is None or data[:4] != b"GGUF":
        raise CheckpointError(
            f"{path} is not a GGUF file.",
            why="it is empty." if data is None else f"it begins with {data[:4]!r}, not b'GGUF'.",
            fix="give a .gguf file, a Hugging Face folder, or a model's name",
        )
    try:
        return _parse(path.name, data)
    except (EOFError, struct.error) as error:
        raise CheckpointError(
            f"{path} is truncated.",
            why=f"its header runs on past the file's {size:,} bytes.",
            fix="fetch the file again",
        ) from error
    except (ValueError, KeyError, OverflowError, MemoryError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path} is damaged.", why=f"its header cannot be read: {error}", fix="fetch the file again"
        ) from error


def _parse(name: str, data: mmap.mmap) -> File:
    cursor = _Cursor(data)
    cursor.at = 4
    version = cursor.read("I")
    if version not in (2, 3):
        kind = "is big-endian" if version and version & 0xFFFF == 0 else f"has version {version} of the format"
        raise CheckpointError(
            f"{name} {kind}.",
            why="little-endian files of versions 2 and 3 are read.",
            fix="convert the model again with a present converter",
        )
    tensor_count, field_count = cursor.read("Q"), cursor.read("Q")
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        key = cursor.text()
        cursor.charge(1, 150)
        if key in fields:
            raise ValueError(f"its metadata {key!r:.60} comes twice")
        fields[key] = cursor.value(GGUFValueType(cursor.read("I")))
    infos: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int]] = {}
    for _ in range(tensor_count):
        key = cursor.text()
        axes = cursor.read("I")
        cursor.charge(1, 1000)
        if axes > 4 or key in infos:
            raise ValueError(f"tensor {key!r:.60} " + ("comes twice" if key in infos else f"has {axes} axes"))
        shape = tuple(cursor.read("Q") for _ in range(axes))[::-1]  # the file lists the fastest axis first
        infos[key] = shape, GGMLQuantizationType(cursor.read("I")), cursor.read("Q")
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    tensors = {key: _tensor(name, data, start, key, *info) for key, info in infos.items()}
    # Bytes that are read several times would be more memory than the file has.
    end, before = 0, ""
    for key, (_, _, offset) in sorted(infos.items(), key=lambda item: item[1][2]):
        if offset < end or offset % alignment:
            raise ValueError(
                f"tensor {key!r:.60} "
                + (f"overlaps {before!r:.60}" if offset < end else f"is not aligned to {alignment}")
            )
        end, before = offset + tensors[key].rows.nbytes, key
    return File(name, fields, tensors)


def _tensor(
    file: str, data: mmap.mmap, start: int, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, offset: int
) -> Tensor:
    block, bytes_per_block = GGML_QUANT_SIZES[kind]
    width = shape[-1] if shape else 1
    if width % block or 0 in shape:
        raise ValueError(f"tensor {name!r:.60} of {kind.name} has shape {list(shape)}")
    row, count = width // block * bytes_per_block, 1
    for axis in shape[:-1]:
        count *= axis
    end = start + offset + row * count
    if end > len(data):
        raise CheckpointError(
            f"{file} is truncated.",
            why=f"its tensor {name!r:.60} ends at byte {end:,}, but the file has {len(data):,}.",
            fix="fetch the file again",
        )
    return Tensor(kind, shape, np.frombuffer(data, np.uint8, row * count, start + offset).reshape(count, row))


# ---------------------------------------------------------------------------------------------------------- the configs


def _common(f: File, arch: str, eps: str = "layer_norm_rms_epsilon") -> dict[str, Any]:
    """The fields that every family's config has."""

    def number(key: str, default: Any = None) -> int:
        return f.get(f"{arch}.{key}", int, default)

    if f.fields.get(f"{arch}.attention.clamp_kqv"):
        raise CheckpointError(
            f"{f.name} has clamped projections ({arch}.attention.clamp_kqv), which are not computed here.",
            why="without them every logit would be wrong.",
            fix="use a checkpoint of the plain architecture",
        )
    if f.fields.get(f"{arch}.attention.causal") is False:
        raise CheckpointError(
            f"{f.name} is not a model that writes text.", why="its attention looks ahead.", fix="use a decoder's file"
        )
    heads, dim = number("attention.head_count"), number("embedding_length")
    kv_heads = f.fields.get(f"{arch}.attention.head_count_kv", heads)
    if isinstance(kv_heads, list) and len(set(kv_heads)) == 1:
        kv_heads = kv_heads[0]
    if isinstance(kv_heads, list):
        raise CheckpointError(
            f"{f.name} has layers of different numbers of key/value heads.",
            why="the layers' weights are stacked, so their shapes must agree.",
            fix="use a checkpoint whose layers are alike",
        )
    layers = number("block_count")
    check_layers(f.name, layers, len(f.tensors))
    head_dim = number("attention.key_length", dim // max(heads, 1))
    for key in ("attention.value_length", *(("rope.dimension_count",) if arch not in ("phi3", "gpt2") else ())):
        if number(key, head_dim) != head_dim:
            raise CheckpointError(
                f"{f.name}: {arch}.{key} is {number(key)}, but its heads are {head_dim} wide.",
                why="rotary positions over a part of a head are not computed for this family.",
                fix="use a checkpoint of the plain architecture",
            )
    tokens = f.get("tokenizer.ggml.tokens", list, [])
    embed = f.tensors.get("token_embd.weight")
    vocab = number("vocab_size", len(tokens) if tokens else embed.shape[0] if embed and embed.shape else None)
    return dict(
        vocab=vocab,
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context=number("context_length"),
        mlp=number("feed_forward_length"),
        norm_eps=f.get(f"{arch}.attention.{eps}", float),
        tied="output.weight" not in f.tensors,
    )


def _rotary(f: File, arch: str, common: dict[str, Any], context: int | None) -> dict[str, Any]:
    """`common`, and the fields `rope_theta`, `rope_scaling` and `context`."""
    theta = f.get(f"{arch}.rope.freq_base", float, 10000.0)
    kind = f.get(f"{arch}.rope.scaling.type", str, "linear")
    factor = f.get(f"{arch}.rope.scaling.factor", float, f.fields.get(f"{arch}.rope.scale_linear", 1.0))
    trained = common["context"]
    original = f.get(f"{arch}.rope.scaling.original_context_length", int, trained)
    if context is not None and not 1 <= context <= trained:
        raise CheckpointError(
            f"{f.name}: context={context} is beyond what the model reads, {trained} tokens.",
            why="it was not trained on such distances.",
            fix=f"context={trained}, or less",
        )
    scaling: Any = None
    if ROPE_FACTORS in f.tensors:
        scaling = _llama3_rope(f, theta, common["head_dim"])
    elif LONG_FACTORS in f.tensors:
        tensor = f.tensors.get(LONG_FACTORS if (context or trained) > original else SHORT_FACTORS)
        if tensor is None:
            raise CheckpointError(
                f"{f.name} has no tensor {SHORT_FACTORS!r}.",
                why="short texts need it.",
                fix="fetch or convert the model again",
            )
        divisors = _dense(tensor, np.dtype(np.float32)).ravel()
        size = f.get(f"{arch}.rope.scaling.attn_factor", float, 1.0)
        scaling = TableRope(divisors=tuple(map(float, divisors)), attention_factor=size)
    elif kind == "yarn" and factor > 1:
        scaling = YarnRope(factor=factor, original_context=original, attention_factor=0.1 * math.log(factor) + 1.0)
    elif kind == "linear" and factor not in (0.0, 1.0):
        scaling = LinearRope(factor=factor)
    elif kind not in ("none", "linear", "yarn"):
        raise CheckpointError(
            f"{f.name} stretches its positions by {kind!r}, which is not computed here.",
            why="with plain positions every logit would be wrong.",
            fix="use a checkpoint with plain, linear, yarn, longrope or Llama 3 positions",
        )
    return common | dict(rope_theta=theta, rope_scaling=scaling, context=context or trained)


def _refuse(f: File, arch: str, keys: dict[str, str]) -> None:
    for key, what in keys.items():
        if f.fields.get(f"{arch}.{key}"):
            raise CheckpointError(
                f"{f.name} has {what} ({arch}.{key}), which are not computed here.",
                why="without them every logit would be wrong.",
                fix="use a checkpoint of the plain architecture",
            )


WINDOW, EXPERTS = {"attention.sliding_window": "a sliding window"}, {"expert_count": "mixtures of experts"}
CAPS = {"attn_logit_softcapping": "capped attention scores", "final_logit_softcapping": "capped logits"}
SCALE = {"attention.scale": "a scale of its own"}


def _llama(f: File, context: int | None) -> tuple[str, Config]:
    _refuse(f, "llama", WINDOW | CAPS | SCALE)
    fields = _rotary(f, "llama", _common(f, "llama"), context)
    if not f.fields.get("llama.expert_count"):
        return "llama", make_config(LlamaConfig, f.name, **fields)
    return "mixtral", make_config(MixtralConfig, f.name, **_experts(f, "llama"), **fields)


def _experts(f: File, arch: str) -> dict[str, int]:
    return dict(experts=f.get(f"{arch}.expert_count", int), experts_used=f.get(f"{arch}.expert_used_count", int))


def _llama3_rope(f: File, theta: float, head_dim: int) -> Llama3Rope | None:
    """Llama 3's stretch, of which the file has only the resulting divisor of each frequency.

    All published ones stretch between wavelengths of a quarter of the original context and the whole of it, so factor
    and context are what there is to find, and whether they give the file's divisors says whether that holds.
    """
    factors = _dense(f.tensors[ROPE_FACTORS], np.dtype(np.float32)).ravel()
    if np.allclose(factors, 1):
        return None
    factor = float(str(factors.max()))
    contexts = [f.fields.get("llama.rope.scaling.original_context_length", 8192), *(2**n for n in range(4, 18))]
    for context in contexts:
        rope = Llama3Rope(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_context=int(context))
        expected = llama3_divisors(rope, theta, head_dim)
        if factors.shape == expected.shape and np.allclose(factors, expected, rtol=1e-4):
            return rope
    raise CheckpointError(
        f"{f.name} stretches its rotary wavelengths ({ROPE_FACTORS}) in a way that is not Llama 3's.",
        why="with factors of another kind every logit would be wrong.",
        fix="load the Hugging Face folder of this model, whose config.json says how",
    )


def llama3_divisors(rope: Llama3Rope, theta: float, head_dim: int) -> np.ndarray:
    """What Llama 3's stretch divides each pair's frequency by, `[D / 2]`, float64."""
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    spread = rope.high_freq_factor - rope.low_freq_factor
    smooth = np.clip((rope.original_context / wavelength - rope.low_freq_factor) / spread, 0, 1)
    return 1 / ((1 - smooth) / rope.factor + smooth)


def _smollm3(f: File, context: int | None) -> tuple[str, Config]:
    _refuse(f, "smollm3", WINDOW | CAPS | EXPERTS | SCALE)
    return "smollm3", make_config(SmolLM3Config, f.name, **_rotary(f, "smollm3", _common(f, "smollm3"), context))


def _qwen2(f: File, context: int | None) -> tuple[str, Config]:
    _refuse(f, "qwen2", WINDOW | CAPS | EXPERTS | SCALE)
    return "qwen2", make_config(Qwen2Config, f.name, **_rotary(f, "qwen2", _common(f, "qwen2"), context))


def _qwen3(f: File, context: int | None) -> tuple[str, Config]:
    _refuse(f, "qwen3", WINDOW | CAPS | EXPERTS | SCALE)
    return "qwen3", make_config(Qwen3Config, f.name, **_rotary(f, "qwen3", _common(f, "qwen3"), context))


def _qwen3_moe(f: File, context: int | None) -> tuple[str, Config]:
    _refuse(f, "qwen3moe", WINDOW | CAPS | SCALE)
    common = _common(f, "qwen3moe") | dict(mlp=f.get("qwen3moe.expert_feed_forward_length", int))
    fields = _rotary(f, "qwen3moe", common, context)
    return "qwen3_moe", make_config(Qwen3MoeConfig, f.name, normalise=True, **_experts(f, "qwen3moe"), **fields)


def _phi3(f: File, context: int | None) -> tuple[str, Config]:
    _refuse(f, "phi3", CAPS | EXPERTS | SCALE)
    common = _common(f, "phi3")
    window = f.get("phi3.attention.sliding_window", int, 0)
    rotated = f.get("phi3.rope.dimension_count", int, common["head_dim"])
    return "phi3", make_config(
        Phi3Config,
        f.name,
        window=window if 0 < window < common["context"] else None,  # converters write the context where there is none
        rotated=None if rotated == common["head_dim"] else rotated,
        **_rotary(f, "phi3", common, context),
    )


def _gpt2(f: File, context: int | None) -> tuple[str, Config]:
    return "gpt2", make_config(GPT2Config, f.name, **_common(f, "gpt2", eps="layer_norm_epsilon"))


def _gemma2(f: File, context: int | None) -> tuple[str, Config]:
    common = _common(f, "gemma2")
    wide = common["layers"] == 46  # the 27B model alone does not divide queries by its heads' width
    return "gemma2", make_config(
        Gemma2Config,
        f.name,
        window=f.get("gemma2.attention.sliding_window", int),
        query_scale=float(common["dim"] // common["heads"] if wide else common["head_dim"]),
        score_cap=f.get("gemma2.attn_logit_softcapping", float, 50.0),
        logit_cap=f.get("gemma2.final_logit_softcapping", float, 30.0),
        **_rotary(f, "gemma2", common, context),
    )


def _gemma3(f: File, context: int | None) -> tuple[str, Config]:
    _refuse(f, "gemma3", CAPS | EXPERTS)
    common = _common(f, "gemma3")
    window = f.get("gemma3.attention.sliding_window", int)
    pattern = f.fields.get("gemma3.attention.sliding_window_pattern", 6)  # a period, or each layer's own
    if isinstance(pattern, int) and pattern > 0:
        pattern = [(i + 1) % pattern != 0 for i in range(min(pattern, common["layers"]))]
    if not isinstance(pattern, list) or not pattern or not all(isinstance(local, bool) for local in pattern):
        raise CheckpointError(
            f"{f.name}: its metadata 'gemma3.attention.sliding_window_pattern' is {pattern!r:.40}.",
            why="it must be a period, or say of each layer whether it is local.",
            fix="fetch or convert the model again",
        )
    # The file has no key for the scale of queries. The 27B model alone does not divide by its heads' width.
    wide = common["layers"] == 62
    fields = _rotary(f, "gemma3", common, context)
    return "gemma3", make_config(
        Gemma3Config,
        f.name,
        window=window,
        pattern=shortest_period(pattern),
        query_scale=float(common["dim"] // common["heads"] if wide else common["head_dim"]),
        local_rope_theta=f.get("gemma3.rope.freq_base_swa", float, 10_000.0),
        **fields | dict(rope_theta=f.get("gemma3.rope.freq_base", float, 1_000_000.0)),
    )


CONFIGS: dict[str, Callable[[File, int | None], tuple[str, Config]]] = {
    "llama": _llama,
    "smollm3": _smollm3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3_moe,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
}
"""By architecture: how its family and config are read, for texts of at most so many tokens."""
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    arch: {"llama": ("llama", "mixtral"), "qwen3moe": ("qwen3_moe",)}.get(arch, (arch,)) for arch in CONFIGS
}
"""By architecture: the families that its files may be of."""


# ---------------------------------------------------------------------------------------------------------- the weights


def source(family: str, c: Any, logical: str) -> Source:
    """A logical name's tensor, and which of its rows.

    >>> source("llama", None, "layers.3.mlp.up").files
    ('blk.3.ffn_up.weight',)
    """
    stem, kind = (logical.removesuffix("_bias"), "bias") if logical.endswith("_bias") else (logical, "weight")
    if not logical.startswith("layers."):
        return Source((f"{TOP_NAMES[stem]}.{kind}",))
    _, layer, rest = stem.split(".", 2)
    if family in ("phi3", "gpt2") and rest in ("attn.q", "attn.k", "attn.v"):
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        first = {"attn.q": 0, "attn.k": q, "attn.v": q + kv}[rest]
        return Source((f"blk.{layer}.attn_qkv.{kind}",), first, q + 2 * kv)
    if family == "phi3" and rest in ("mlp.gate", "mlp.up"):
        return Source((f"blk.{layer}.ffn_up.{kind}",), c.mlp * (rest == "mlp.up"), 2 * c.mlp)
    return Source((f"blk.{layer}.{LAYER_NAMES[rest]}.{kind}",))


def _rows(t: Tensor, where: Source, shape: tuple[int, ...]) -> Tensor:
    """The part of a tensor that is one weight."""
    if where.of is None:
        return t
    if len(shape) == 1:  # a bias: all in one row
        each = t.rows.shape[1] // t.shape[0]
        return Tensor(t.type, shape, t.rows[:, where.start * each : (where.start + shape[0]) * each])
    return Tensor(t.type, shape, t.rows[where.start : where.start + shape[0]])


def half_split_rows(heads: int, head_dim: int) -> np.ndarray:
    """Which row of a file's q or k stands where in the half-split layout: the file interleaves a head's two halves."""
    return np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2).swapaxes(1, 2).ravel()


def row_order(family: str, config: Any, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """Which row of a weight's tensor is each of its rows; None where they stand as they are."""
    if family in INTERLEAVED and name.endswith((".attn.q", ".attn.k")):
        return half_split_rows(shape[0] // config.head_dim, config.head_dim)
    return None


def added(family: str, name: str) -> float:
    """What a tensor's values have more than the weight's: Gemma's norms multiply by 1 + w, and a file holds 1 + w."""
    return 1.0 if family in ("gemma2", "gemma3") and name.endswith("norm") else 0.0


def _dense(t: Tensor, dtype: np.dtype[Any], order: np.ndarray | None = None, shift: float = 0.0) -> np.ndarray:
    """A tensor's values in `dtype`, its rows in the given order, `shift` added to each."""
    out = aligned_empty((len(t.rows), t.shape[-1] if t.shape else 1), dtype)
    with converting("a tensor of the file", dtype):
        for part in row_chunks(out.shape):
            x = quants.dequantize(t.rows[part] if order is None else t.rows[order[part]], t.type)
            out[part] = x + np.float32(shift) if shift else x
    return out.reshape(t.shape)


def _packed(t: Tensor, order: np.ndarray | None = None) -> QTensor:
    """A tensor's blocks as they are: their codes and their scales apart."""
    fmt, (out, width), leaves = KEPT[t.type], (len(t.rows), t.shape[-1]), dict[str, np.ndarray]()
    for part in row_chunks((out, width)):
        rows = t.rows[part] if order is None else t.rows[order[part]]
        blocks = rows.reshape(len(rows), width // fmt.group_of(width), -1)
        for name, x in take_apart(t.type, blocks).items():
            if name not in leaves:
                leaves[name] = aligned_empty((out, x.shape[-1]), x.dtype)
            leaves[name][part] = x
    found = {name: x.reshape(*t.shape[:-1], x.shape[-1]) for name, x in leaves.items()}
    error = unknown_error(t.shape[:-2])
    return QTensor(format=fmt, shape=t.shape[-2:], error=error, **{"minimum": None} | found)


def _unknown(f: File, arch: str) -> CheckpointError:
    """The error that names the nearest known architecture and what differs."""

    def candidate(known: str) -> Candidate:
        own = {key: value for key, value in f.fields.items() if key.startswith(f"{arch}.")}
        rest = {key: value for key, value in f.fields.items() if key not in own}
        renamed = {f"{known}.{key.removeprefix(f'{arch}.')}": value for key, value in own.items()}
        read = CONFIGS[known]
        return Candidate(
            rest | renamed, lambda values: read(File(f.name, values, f.tensors), None), f"{known}.", f.name
        )

    def names(found: tuple[str, Config]) -> tuple[Iterable[str], Iterable[str]]:
        family, config = found
        check_layers(f.name, config.layers, len(f.tensors), getattr(config, "experts", 0))
        expected = shapes(Model.of(FAMILIES[family], config).spec)
        wanted = file_shapes({name: source(family, config, name) for name in expected}, expected)
        return wanted, [name for name in f.tensors if name not in (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)]

    return unknown_architecture(f.name, arch, {known: candidate(known) for known in CONFIGS}, names)


def open_checkpoint(path: Path, dtype: str, context: int | None = None) -> Checkpoint:
    """Open a GGUF file: all is checked here; the weights are read when they are asked for.

    Args:
      path: the file.
      dtype: a key of `DTYPES`.
      context: tokens that texts will have at most; the model's own by default.

    Raises:
      CheckpointError: the file is damaged, foreign, or not a model that this library computes.
    """
    f = open_file(path)
    arch = f.get("general.architecture", str)
    if arch not in CONFIGS:
        raise _unknown(f, arch)
    family, found = CONFIGS[arch](f, context)
    config: Any = found
    expected = shapes(Model.of(FAMILIES[family], config).spec)
    sources = {name: source(family, config, name) for name in expected}
    factors = (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)
    check_tensors(
        f.name, file_shapes(sources, expected), {name: t.shape for name, t in f.tensors.items() if name not in factors}
    )
    check_rotation(f.name, config)
    for name, t in f.tensors.items():
        try:
            with np.errstate(all="ignore"):
                quants.dequantize(t.rows[:1], t.type)
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(
                f"{f.name}: {name} is stored as {t.type.name}, which cannot be dequantised.",
                why="the gguf package has no values for that type.",
                fix="use a file quantised otherwise, such as Q8_0",
            ) from error

    formats: dict[str, Format] = {}
    readers: dict[str, Callable[[], Any]] = {}
    for name, shape in expected.items():
        t = _rows(f.tensors[sources[name].files[0]], sources[name], shape)
        order = row_order(family, config, name, shape)
        if dtype == "keep" and t.type in KEPT and len(shape) > 1:
            formats[name] = KEPT[t.type]
            readers[name] = functools.partial(_packed, t, order)
        else:
            readers[name] = functools.partial(_dense, t, DTYPES[dtype], order, -added(family, name))
    if dtype == "keep":
        _warn_of_unkept(f)
    return Checkpoint(family, config, formats, LazyWeights(readers), _tokenizer(f))


def _warn_of_unkept(f: File) -> None:
    by_type: dict[str, list[str]] = {}
    for name, t in f.tensors.items():
        if t.type not in KEPT and t.type not in FLOATS:
            by_type.setdefault(t.type.name, []).append(name)
    if by_type:
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in by_type.items())
        kept = ", ".join(kind.name for kind in KEPT)
        warnings.warn(f"{f.name}: dtype='keep' keeps {kept}; dequantised to float32 were {listed}", stacklevel=5)


# -------------------------------------------------------------------------------------------------------- the tokenizer


SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Special tokens by their names in chat templates, and in a GGUF file."""
TEMPLATES = {"default": "", "tool_use": ".tool_use"}


def _tokenizer(f: File) -> Tokenizer | None:
    kind = f.fields.get("tokenizer.ggml.model")
    if kind in (None, "none", "no_vocab"):
        return None
    if kind not in ("gpt2", "llama"):
        what = {"t5": " (Unigram)", "bert": " (WordPiece)", "rwkv": " (a trie)"}.get(str(kind), "")
        raise CheckpointError(
            f"{f.name}: its tokenizer is of the kind {kind!r:.40}{what}.",
            why="from a GGUF file's tables are built byte-level BPE ('gpt2') and SentencePiece BPE ('llama').",
            fix="load the Hugging Face folder of this model, with its tokenizer.json",
        )
    pre = f.get("tokenizer.ggml.pre", str) if kind == "gpt2" else ""
    # Files may leave the flag out, and mean yes.
    begins = kind == "llama" or (pre in SPLITTINGS and SPLITTINGS[pre].bos)
    around: dict[str, Any] = {}
    if f.get("tokenizer.ggml.add_bos_token", bool, begins):
        around["bos"] = f.get("tokenizer.ggml.bos_token_id", int)
    if f.get("tokenizer.ggml.add_eos_token", bool, False):
        around["eos"] = f.get("tokenizer.ggml.eos_token_id", int)
    keys = [f"tokenizer.ggml.{key}_token_id" for key in ("eos", "eot", "eom")]
    around["eos_ids"] = tuple(dict.fromkeys(f.get(key, int) for key in keys if key in f.fields))
    around["prefix"] = f.get("tokenizer.ggml.add_space_prefix", bool, kind == "llama")
    words, types = f.list_of("tokenizer.ggml.tokens", str), f.list_of("tokenizer.ggml.token_type", int, [])
    if kind == "gpt2":
        merges = f.list_of("tokenizer.ggml.merges", str)
        tokenizer = Tokenizer.from_tables(words, merges, types, pre, where=f.name, **around)
    else:
        tokenizer = Tokenizer.from_pieces(
            words,
            f.list_of("tokenizer.ggml.scores", float),
            types,
            unknown=f.fields.get("tokenizer.ggml.unknown_token_id"),
            strip=f.get("general.architecture", str) == "phi3",
            where=f.name,
            **around,
        )
    named = {f"{key}_token": f.fields.get(f"tokenizer.ggml.{name}_token_id") for key, name in SPECIAL.items()}
    special = {k: words[i] for k, i in named.items() if isinstance(i, int) and 0 <= i < len(words)}
    templates = {name: f.fields.get(f"tokenizer.chat_template{end}") for name, end in TEMPLATES.items()}
    known = {name: text for name, text in templates.items() if text is not None}
    return dataclasses.replace(tokenizer, template=read_template(known or None, special, f.name))
