"""GGUF out: what `infopt.save("x.gguf", ...)` writes, for llama.cpp and for `infopt.load`.

Where a weight lies, in which order, and what a key means, the reader says (gguf.py): its tables are used here the other
way round. What is about to be written is first read back by it, weights aside, and refused where it would be read as
something else: so the two cannot drift apart, and nothing is dropped in silence.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType

from infopt.errors import CheckpointError
from infopt.io import disk, gguf
from infopt.io.blocks import KEPT, put_together
from infopt.io.checkpoint import CHUNK, DTYPES, file_shapes
from infopt.io.export import said_by
from infopt.io.tokenizer import BYTE_PIECE, CONTROL, SPACE, SPLITTINGS, UNKNOWN, USER_DEFINED, Tokenizer
from infopt.model import Model, Weights, check_params, shapes
from infopt.models import LlamaConfig, MistralConfig
from infopt.models.base import shortest_period
from infopt.qtensor import Format, is_qtensor
from infopt.spec import Config, LinearRope, Llama3Rope, TableRope, YarnRope
from infopt.typing import Params

BLOCKS = {fmt: kind for kind, fmt in KEPT.items()} | {
    Format(kind.name.lower(), 32, "float16"): kind
    for kind in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1)
}
"""By format: the blocks that are its very bits. Those of llama.cpp's own rounding lie as ours do."""
FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
FILE_TYPES = {"F32": "ALL_F32", "Q4_K": "MOSTLY_Q4_K_M", "Q5_K": "MOSTLY_Q5_K_M"}
"""What a file is called whose tensors are mostly of a type, where that is not MOSTLY and the type."""
WIDE = ("positions", "mlp.router")
"""Matrices that, where they are dense, llama.cpp's own converter writes as F32, as it does all vectors."""
ARCHITECTURE = {family: arch for arch, families in gguf.ARCHITECTURES.items() for family in families}
STRETCHED = {Llama3Rope: ("llama",), TableRope: ("phi3",)}
"""Stretches of the positions that are tensors: the architectures of which llama.cpp reads them."""
NORMAL, UNUSED, BYTE = 1, 5, 6  # GGUF's token types that are not matched as a whole


def save(path: Path, model: Model, params: Params) -> None:
    """Write a model as a GGUF file, which is there whole or not at all; an older one is replaced by a whole one.

    Packed weights are written as they lie, bit for bit, in the blocks that are their format (Q8_0, Q4_0, Q4_1; Q4_K,
    Q5_K, Q6_K that were read from one); dense ones as F32, F16 or BF16 by their own type, vectors always as F32. A
    cache and its pages are left out, as they change nothing of what is computed. The tokenizer goes along as tables,
    with its chat template.

    Args:
      path: the file.
      model, params: the stack and its params.

    Raises:
      CheckpointError: a packing is no block of GGUF's; the stack, its config or its tokenizer is one that a GGUF file
        cannot say; the family has no architecture; the file cannot be written, or another kind of file is there.
      ParamsError: the params are not the model's.

    >>> import infopt as ip, jax, tempfile
    >>> model = ip.quantize(bits=8, group=32)(ip.models.llama())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ip.save(folder + "/small.gguf", model, model.init(jax.random.key(0)))
    ...     loaded, params = ip.load(folder + "/small.gguf", dtype="keep")
    >>> loaded.spec == model.spec
    True
    """
    path = Path(path).expanduser().resolve()
    family, config = _said(model)
    check_params(model.spec, params)
    weights = Weights.of(model.spec, jax.tree.map(np.asarray, params))
    tensors = _tensors(family, config, weights, shapes(model.spec))
    factors = _factors(family, config)
    fields = _fields(family, config, tensors)
    _check_config(path.name, family, config, fields, tensors, factors)
    fields |= _tables(model.tokenizer, config.vocab, fields, path.name)
    with disk.written_beside(path) as temporary:
        _check_replaceable(path)
        _write(temporary / path.name, fields, tensors, factors)
        disk.sync(temporary)
        os.replace(temporary / path.name, path)
        disk.sync_entries(path.parent)


def _check_replaceable(path: Path) -> None:
    if not path.exists():
        return
    if not path.is_file():
        why = "it is no plain file."
    else:
        with path.open("rb") as file:
            if file.read(4) in (b"", b"GGUF"):
                return
        why = "it is not a GGUF file, and overwriting it might lose something."
    raise CheckpointError(
        f"{path} is there already, and is left alone.", why=why, fix="give another name, or remove this one"
    )


# ---------------------------------------------------------------------------------------------------------- the config


def _said(model: Model) -> tuple[str, Any]:
    """The family and the config that say all that the stack computes; raises where there are none."""
    spec, config = model.spec, said_by(model, "a GGUF file")
    if isinstance(config, MistralConfig) and config.window is None:  # then it is a Llama, and its files say so
        fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(LlamaConfig)}
        return "llama", LlamaConfig(**fields)
    if spec.family not in ARCHITECTURE:
        windowed = spec.family == "mistral"
        raise CheckpointError(
            f"a {spec.family} " + ("with windows " if windowed else "") + "cannot be written as a GGUF file.",
            why="a Mistral's file says that it is a Llama, which has none."
            if windowed
            else f"of its families, llama.cpp's are known of {', '.join(ARCHITECTURE)}.",
            fix="ip.save to a folder keeps it, for ip.load",
        )
    return spec.family, config


def _fields(family: str, c: Any, tensors: Mapping[str, _Tensor]) -> dict[str, Any]:
    """The metadata, tokenizer aside: what the reader makes the config of, and what llama.cpp asks for."""
    arch = ARCHITECTURE[family]
    fields: dict[str, Any] = {
        "block_count": c.layers,
        "context_length": c.context,
        "embedding_length": c.dim,
        "feed_forward_length": c.mlp,
        "attention.head_count": c.heads,
        "attention.head_count_kv": c.kv_heads,
        "attention.layer_norm_epsilon" if arch == "gpt2" else "attention.layer_norm_rms_epsilon": float(c.norm_eps),
        "vocab_size": c.vocab,
    }
    if c.head_dim != c.dim // c.heads:
        fields |= {"attention.key_length": c.head_dim, "attention.value_length": c.head_dim}
    if hasattr(c, "rope_theta"):
        rotated = c.rotated if family == "phi3" and c.rotated else c.head_dim
        fields |= {"rope.freq_base": float(c.rope_theta), "rope.dimension_count": rotated} | _stretch(c)
    if hasattr(c, "experts"):
        fields |= {"expert_count": c.experts, "expert_used_count": c.experts_used}
    if family == "qwen3_moe":
        fields["expert_feed_forward_length"] = c.mlp
    if family in ("phi3", "gemma2", "gemma3"):
        fields["attention.sliding_window"] = c.window or c.context
    if family == "gemma2":
        caps = {"attn_logit_softcapping": c.score_cap, "final_logit_softcapping": c.logit_cap}
        fields |= {key: float(cap) for key, cap in caps.items() if cap is not None}
    if family == "gemma3":
        fields["rope.freq_base_swa"] = float(c.local_rope_theta)
        period = len(c.pattern)
        if period != 6 and c.pattern == (*(True,) * (period - 1), False):
            fields["attention.sliding_window_pattern"] = period
    sizes: dict[GGMLQuantizationType, int] = {}
    for t in tensors.values():
        sizes[t.type] = sizes.get(t.type, 0) + t.rows * t.row_bytes
    most = max(sizes, key=lambda kind: sizes[kind])
    about: dict[str, Any] = {
        "general.architecture": arch,
        "general.type": "model",
        "general.file_type": int(LlamaFileType[FILE_TYPES.get(most.name, f"MOSTLY_{most.name}")]),
    }
    if sizes.keys() & KEPT.keys():
        about["general.quantization_version"] = 2
    return about | {f"{arch}.{key}": value for key, value in fields.items()}


def _stretch(c: Any) -> dict[str, Any]:
    """The keys of how positions are stretched."""
    match c.rope_scaling:
        case LinearRope(factor=factor):
            return {"rope.scaling.type": "linear", "rope.scaling.factor": float(factor)}
        case YarnRope(factor=factor, original_context=original):
            known = {"rope.scaling.type": "yarn", "rope.scaling.factor": float(factor)}
            return known | {"rope.scaling.original_context_length": original}
        case Llama3Rope(original_context=original):
            return {"rope.scaling.original_context_length": original}
        case TableRope(attention_factor=size):
            # One table for all lengths, so it stands for the short ones and the long ones.
            known = {"rope.scaling.type": "longrope", "rope.scaling.attn_factor": float(size)}
            return known | {"rope.scaling.original_context_length": c.context}
        case _:
            return {}


def _factors(family: str, c: Any) -> dict[str, np.ndarray]:
    """The tensors that say how positions are stretched: the divisor of each pair's frequency."""
    scaling = getattr(c, "rope_scaling", None)
    if scaling is not None and ARCHITECTURE[family] not in STRETCHED.get(type(scaling), (ARCHITECTURE[family],)):
        raise CheckpointError(
            f"a {family} with positions stretched as {scaling.kind!r} cannot be written as a GGUF file.",
            why="llama.cpp reads no such stretch of this architecture.",
            fix="ip.save to a folder keeps it, for ip.load",
        )
    if isinstance(scaling, TableRope):
        return dict.fromkeys((gguf.LONG_FACTORS, gguf.SHORT_FACTORS), np.array(scaling.divisors, np.float32))
    if isinstance(scaling, Llama3Rope):
        return {gguf.ROPE_FACTORS: gguf.llama3_divisors(scaling, c.rope_theta, c.head_dim).astype(np.float32)}
    return {}


def _check_config(
    name: str,
    family: str,
    config: Config,
    fields: dict[str, Any],
    tensors: Mapping[str, _Tensor],
    factors: Mapping[str, np.ndarray],
) -> None:
    """Raise unless the reader would make this very config of the file."""
    empty = np.empty((0, 0), np.uint8)
    held = {key: gguf.Tensor(t.type, t.shape, empty) for key, t in tensors.items()}
    for key, x in factors.items():
        held[key] = gguf.Tensor(GGMLQuantizationType.F32, x.shape, x.view(np.uint8)[None])
    stored = {k: float(str(np.float32(v))) if type(v) is float else v for k, v in fields.items()}
    try:
        read_family, read = gguf.CONFIGS[ARCHITECTURE[family]](gguf.File(name, stored, held), None)
    except CheckpointError as error:
        raise CheckpointError(
            f"this {family} cannot be written as a GGUF file.",
            why=f"it could not be read back: {error.what} {error.why}",
            fix="ip.save to a folder keeps it, for ip.load",
        ) from error
    ours, theirs = _plain(config), _plain(read)
    if read_family != family or type(read) is not type(config):
        field, was, is_ = "family", family, read_family
    else:
        differ = [field for field in ours if not _same(ours[field], theirs[field])]
        if not differ:
            return
        field, was, is_ = differ[0], ours[differ[0]], theirs[differ[0]]
    raise CheckpointError(
        f"a {family} with {field}={was} cannot be written as a GGUF file.",
        why=f"the format has no word for it: it would be read as {field}={is_}, and compute something else.",
        fix="ip.save to a folder keeps it, for ip.load",
    )


def _plain(c: Config) -> dict[str, Any]:
    """A config's fields, patterns of layers in their shortest form: other forms compute the same."""
    fields = {f.name: getattr(c, f.name) for f in dataclasses.fields(c)}
    for name, value in fields.items():
        if isinstance(value, tuple) and value and all(isinstance(x, bool) for x in value):
            fields[name] = shortest_period([value[i % len(value)] for i in range(c.layers)])
    if "local" in fields and not any(c.windows()):
        fields |= {"local": (False,), "window": None}
    return fields


def _same(a: Any, b: Any) -> bool:
    """Whether two values are one in a file, whose floats have 32 bits."""
    if dataclasses.is_dataclass(a) or dataclasses.is_dataclass(b):
        return type(a) is type(b) and all(_same(x, vars(b)[name]) for name, x in vars(a).items())
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, int | float):
        return np.float32(a) == np.float32(b)
    return a == b


# ---------------------------------------------------------------------------------------------------------- the tensors


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """A weight within a tensor: itself, the rows of it in the tensor's order (None: its own), and what is added."""

    weight: Any
    order: np.ndarray | None
    added: float


@dataclasses.dataclass(frozen=True, eq=False)
class _Tensor:
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    parts: list[_Part]

    @property
    def rows(self) -> int:
        return int(np.prod(self.shape[:-1]))

    @property
    def row_bytes(self) -> int:
        values, size = GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // values * size


def _tensors(
    family: str, config: Any, weights: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]]
) -> dict[str, _Tensor]:
    """What each tensor of the file holds."""
    sources = {name: gguf.source(family, config, name) for name in wanted}
    held: dict[str, list[str]] = {}
    for name in sorted(sources, key=lambda name: sources[name].start):
        held.setdefault(sources[name].files[0], []).append(name)
    out = {}
    for file, shape in file_shapes(sources, wanted).items():
        kinds = {name: _type_of(name, weights[name]) for name in held[file]}
        if len(set(kinds.values())) > 1 and any(kind in KEPT for kind in kinds.values()):
            listed = ", ".join(f"{name} ({kind.name})" for name, kind in kinds.items())
            raise CheckpointError(
                f"{listed} cannot be written as a GGUF file.",
                why=f"they are one tensor there, {file}, and it has one type.",
                fix="quantize(..., where=...) that packs all of them alike, or dequantize() and quantize(...) again",
            )
        kind = next(iter(kinds.values())) if len(set(kinds.values())) == 1 else GGMLQuantizationType.F32
        parts = []
        for name in held[file]:
            order = gguf.row_order(family, config, name, wanted[name])
            inverse = None if order is None else np.argsort(order)
            parts.append(_Part(weights[name], inverse, gguf.added(family, name)))
        out[file] = _Tensor(kind, shape, parts)
    return out


def _type_of(name: str, x: Any) -> GGMLQuantizationType:
    """How a weight is stored."""
    if not is_qtensor(x):
        if x.dtype.name not in FLOATS:
            raise CheckpointError(
                f"{name} cannot be written as a GGUF file: it is {x.dtype.name}.",
                why=f"the types that can be are {', '.join(FLOATS)}.",
                fix="params = jax.tree.map(lambda x: x.astype('float32'), params)",
            )
        wide = x.ndim == 1 or name.endswith(WIDE)
        return GGMLQuantizationType["F32" if wide else FLOATS[x.dtype.name]]
    if x.format.activations is not None:
        raise CheckpointError(
            f"{name} cannot be written as a GGUF file: its inputs are rounded to {x.format.activations} bits.",
            why="such a file says nothing of inputs, and whoever read it would compute something else.",
            fix="the same quantize without activations, and params that were converted for it; or model.save(...)",
        )
    if (kind := BLOCKS.get(x.format)) is None:
        alike = [fmt for fmt in BLOCKS if fmt.name == x.format.name] or list(BLOCKS)
        blocks = " or ".join(f"{fmt.name} in groups of {fmt.group} ({BLOCKS[fmt].name})" for fmt in alike)
        raise CheckpointError(
            f"{name} cannot be written as a GGUF file: it is packed as {x.format.name}, "
            f"group={x.format.group}, with {x.format.scale} scales.",
            why=f"GGUF's block of that kind is {blocks}, with {alike[0].scale} scales.",
            fix="dense = ip.dequantize()(model), dense.convert(params, source=model); or pack the model anew, with "
            "quantize(bits=8, group=32) or quantize(bits=4, group=32)",
        )
    fmt, leaves = x.format, [x.scale, *([] if x.minimum is None else [x.minimum])]
    if wrong := [leaf.dtype.name for leaf in leaves if leaf.dtype.name != fmt.scale]:
        raise CheckpointError(
            f"{name} cannot be written as a GGUF file: its scales are {wrong[0]}.",
            why=f"its format says {fmt.scale}, as GGUF's blocks have them.",
            fix="params = model.convert(base_params), and no change of the types of packed weights",
        )
    return kind


def _bytes(part: _Part, t: _Tensor) -> Iterator[np.ndarray]:
    """The bytes of a weight as the file has them, some rows at a time."""
    x, names = part.weight, ("scale", "minimum", "codes", "inner")
    leaves = {name: leaf for name in names if (leaf := getattr(x, name)) is not None} if is_qtensor(x) else {"": x}
    leaves = {name: leaf.reshape(-1, leaf.shape[-1]) for name, leaf in leaves.items()}
    step, total = max(1, CHUNK // t.shape[-1]), len(next(iter(leaves.values())))
    for start in range(0, total, step):
        rows: Any = slice(start, start + step) if part.order is None else part.order[start : start + step]
        taken = {name: np.ascontiguousarray(leaf[rows]) for name, leaf in leaves.items()}
        if is_qtensor(x):
            yield put_together(t.type, taken)
        else:
            values = taken[""].astype(np.float32) + np.float32(part.added) if part.added else taken[""]
            dtype = next(DTYPES[name] for name, kind in FLOATS.items() if kind == t.type.name)
            yield values.astype(dtype, copy=False)


def _write(
    path: Path, fields: dict[str, Any], tensors: Mapping[str, _Tensor], factors: Mapping[str, np.ndarray]
) -> None:
    writer = GGUFWriter(path, fields["general.architecture"])
    for key, value in fields.items():
        if key == "general.architecture":
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add[type(value)](key, value)
    for key, x in factors.items():
        writer.add_tensor_info(key, x.shape, x.dtype, x.nbytes)
    for key, t in tensors.items():
        writer.add_tensor_info(key, t.shape, np.dtype(np.float32), t.rows * t.row_bytes, t.type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        (out,) = writer.fout
        # Not by the writer's own method: it takes whole tensors, and an error of numpy's says nothing of the disk.
        each = itertools.chain(([x] for x in factors.values()), (_chunks(t) for t in tensors.values()))
        for chunks in each:
            writer.write_padding(out, out.tell())
            for chunk in chunks:
                out.write(chunk.view(np.uint8).data if chunk.flags.c_contiguous else chunk.tobytes())
        writer.write_padding(out, out.tell())
    finally:
        writer.close()


def _chunks(t: _Tensor) -> Iterator[np.ndarray]:
    return itertools.chain.from_iterable(_bytes(part, t) for part in t.parts)


# -------------------------------------------------------------------------------------------------------- the tokenizer


def _tables(tokenizer: Tokenizer | None, vocab: int, about: dict[str, Any], name: str) -> dict[str, Any]:
    """The tokenizer's keys, of which the reader makes this very tokenizer; raises where there are none."""
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    if tokenizer.vocab_size > vocab:
        raise _untold(f"it has {tokenizer.vocab_size} tokens, and the model {vocab} words")
    state = json.loads(tokenizer.backend.to_str())
    words = {i: token for token, i in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    # As llama.cpp's converter fills them up: it has as many tokens as the embedding has rows.
    tokens = [words.get(i, f"[PAD{i}]") for i in range(vocab)]
    types = [NORMAL if i in words else UNUSED for i in range(vocab)]
    for token in state["added_tokens"]:
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    model, merges = state["model"], _merges(state["model"])
    if model.get("type") != "BPE":
        raise _untold(f"it is of the kind {model.get('type')!r}, not BPE")
    fields: dict[str, Any] = {}
    if _decoder(state) == [{"type": "ByteLevel"}]:
        kind = "gpt2"
        prefix, fields["pre"] = _splitting(state)
        fields["merges"] = [f"{left} {right}" for left, right in merges]
    else:
        kind, fields["pre"] = "llama", "default"
        prefix = any(step["type"] == "Prepend" for step in _flat(state["normalizer"]))
        unknown = model.get("unk_token")
        types = [
            UNKNOWN if token == unknown else BYTE if kind == NORMAL and BYTE_PIECE.fullmatch(token) else kind
            for token, kind in zip(tokens, types)
        ]
        fields["scores"] = _scores(tokens, types, merges, spaces_first=not prefix)
    fields |= {"model": kind, "tokens": tokens, "token_type": types, "add_space_prefix": prefix}
    fields |= _special(tokenizer, state, kind)
    fields = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    if (template := tokenizer.template) is not None:
        fields["tokenizer.chat_template"] = template.source
        if template.tool_use is not None:
            fields["tokenizer.chat_template.tool_use"] = template.tool_use
    if any(token["rstrip"] for token in state["added_tokens"]) and about["general.architecture"] == "phi3":
        fields["general.name"] = "Phi-3"  # by which llama.cpp knows that blanks after its special tokens are dropped
    _check_tables(tokenizer, about | fields, set(words), name)
    return fields


def _splitting(state: dict[str, Any]) -> tuple[bool, str]:
    """Whether a byte-level BPE begins a text with a space, and llama.cpp's name of how it splits one."""
    found = _flat(state["pre_tokenizer"])
    prefix = any(step.get("add_prefix_space") for step in found)
    nfc, whole = _flat(state["normalizer"]) == [{"type": "NFC"}], bool(state["model"].get("ignore_merges"))
    for pre, splitting in SPLITTINGS.items():
        known = _flat(json.loads(splitting.pre_tokenizer(prefix).__getstate__()))
        if (known, splitting.nfc, splitting.whole) == (found, nfc, whole):
            return prefix, pre
    raise _untold("how it splits a text into words is none of the ways that are known by a name of llama.cpp's")


def _special(tokenizer: Tokenizer, state: dict[str, Any], kind: str) -> dict[str, Any]:
    """The keys of the tokens that begin and end texts, and of what else has a role."""
    begin, end = _around(state["post_processor"])
    words = tokenizer.backend.get_vocab(with_added_tokens=True)
    texts = {} if tokenizer.template is None else tokenizer.template.special
    ids = {key: words.get(texts.get(f"{key}_token", "")) for key in gguf.SPECIAL}
    ends = list(tokenizer.eos_ids)
    if begin is not None:
        ids["bos"] = begin
    if end is not None:
        ids["eos"] = end
    elif ids["eos"] not in ends:
        ids["eos"] = ends[0] if ends else None
    if kind == "llama" and (unknown := state["model"].get("unk_token")) is not None:
        ids["unk"] = words.get(unknown)
    more = [i for i in ends if i != ids["eos"]]
    if len(more) > 2:
        raise _untold(f"{len(ends)} of its tokens end a text, and a GGUF file names three at most")
    named = {gguf.SPECIAL[key]: i for key, i in ids.items()} | dict(zip(("eot", "eom"), more))
    around = {"add_bos_token": begin is not None, "add_eos_token": end is not None}
    return around | {f"{key}_token_id": i for key, i in named.items() if i is not None}


def _around(post: dict[str, Any] | None) -> tuple[int | None, int | None]:
    """The tokens that are put before and after every text."""
    steps = [step for step in _flat(post) if step["type"] != "ByteLevel"]
    if not steps:
        return None, None
    pieces = steps[0]["single"] if len(steps) == 1 and steps[0]["type"] == "TemplateProcessing" else []
    if sum("Sequence" in piece for piece in pieces) == 1:
        at, known = ["Sequence" in piece for piece in pieces].index(True), steps[0]["special_tokens"]
        sides = [
            [i for p in side for i in known[p["SpecialToken"]["id"]]["ids"]] for side in (pieces[:at], pieces[at + 1 :])
        ]
        if all(len(side) <= 1 for side in sides):
            before, after = (side[0] if side else None for side in sides)
            return before, after
    raise _untold("it puts something else around a text than one token before and one after it")


def _scores(tokens: list[str], types: list[int], merges: list[tuple[str, str]], spaces_first: bool) -> list[float]:
    """Scores by which the pieces come about in the order of the merges. Marks what SentencePiece's user defined.

    Pieces whose merges are mixed have one score. Runs of spaces that are merged before all else, where none is put
    before a text, are Gemma's, which are matched as a whole, and written as spaces.
    """
    last = {left + right: n for n, (left, right) in enumerate(merges)}
    first = {left + right: n for n, (left, right) in reversed(list(enumerate(merges)))}
    order = sorted(first, key=lambda token: first[token])
    spaces = set(itertools.takewhile(lambda token: not token.strip(SPACE), order)) if spaces_first else set()
    rank, end, ranks = 0, -1, {}
    for token in order:
        if token not in spaces:
            rank += first[token] > end
            ranks[token] = rank
        end = max(end, last[token])
    for i, token in enumerate(tokens):
        if token in spaces:
            types[i], tokens[i] = USER_DEFINED, " " * len(token)
    return [-float(ranks.get(token, rank + 1)) if kind == NORMAL else 0.0 for token, kind in zip(tokens, types)]


def _check_tables(tokenizer: Tokenizer, fields: dict[str, Any], ids: set[int], name: str) -> None:
    """Raise unless the reader would make this very tokenizer of the tables."""
    try:
        read = gguf._tokenizer(gguf.File(name, fields, {}))
    except CheckpointError as error:
        raise _untold(f"it could not be read back: {error.what} {error.why.rstrip('.')}") from error
    assert read is not None
    ours, theirs = _essence(tokenizer, ids), _essence(read, ids)
    if differ := [part for part in ours if ours[part] != theirs[part]]:
        raise _untold(f"its {differ[0]} would be read as another")


def _essence(tokenizer: Tokenizer, ids: set[int]) -> dict[str, Any]:
    """What decides a tokenizer's tokens and texts, by what it is called in a message; of the tokens `ids` only."""
    state = json.loads(tokenizer.backend.to_str())
    model, template = state["model"], tokenizer.template
    steps = {part: _flat(state[part]) for part in ("normalizer", "pre_tokenizer")}
    spaced = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    if any(step["type"] == "Replace" for step in steps["normalizer"]) and steps["pre_tokenizer"] == [spaced]:
        steps["pre_tokenizer"] = []  # Gemma's: there are no spaces left to split at
    whole = [
        {k: v for k, v in token.items() if k != "normalized" or steps["normalizer"]} for token in state["added_tokens"]
    ]
    said = None
    if template is not None:
        texts = template.source + (template.tool_use or "")
        said = template.source, template.tool_use, {k: v for k, v in template.special.items() if k in texts}
    unknown = model.get("unk_token") or None
    return {
        "vocabulary": {t: i for t, i in tokenizer.backend.get_vocab(with_added_tokens=True).items() if i in ids},
        "merges": _grouped(_merges(model)),
        "model": [
            *(model.get(key) or None for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")),
            *(bool(model.get(key)) for key in ("byte_fallback", "ignore_merges")),
            (unknown, unknown and model["fuse_unk"]),
        ],
        "normalizer": steps["normalizer"],
        "tokens that are matched whole": [token for token in whole if token["id"] in ids],
        "pre-tokenizer": steps["pre_tokenizer"],
        "decoder": _decoder(state),
        "tokens around a text": _around(state["post_processor"]),
        "tokens that end a text": set(tokenizer.eos_ids),
        "chat template": said,
    }


def _grouped(merges: Iterable[tuple[str, str]]) -> list[set[tuple[str, str]]]:
    """Merges in order; those of one piece that follow each other in any order, as published files have them."""
    return [set(group) for _, group in itertools.groupby(merges, key="".join)]


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    return [(left, right) for left, right in pairs]


def _flat(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a part of a tokenizer, without what changes no tokens and no texts."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        lists = [step[key] for key in ("normalizers", "pretokenizers", "processors", "decoders") if key in step]
        return [inner for each in lists for one in each for inner in _flat(one)]
    return [{k: v for k, v in step.items() if k != "trim_offsets"}]


def _decoder(state: dict[str, Any]) -> list[dict[str, Any]]:
    """A decoder's steps; of a byte-level one, its settings change nothing."""
    return [{"type": "ByteLevel"} if step["type"] == "ByteLevel" else step for step in _flat(state["decoder"])]


def _untold(why: str) -> CheckpointError:
    return CheckpointError(
        "the model's tokenizer cannot be written into a GGUF file.",
        why=f"{why}.",
        fix="dataclasses.replace(model, tokenizer=None), and take the text's tokens from its own tokenizer",
    )
