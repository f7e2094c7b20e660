"""Damages valid model files in thousands of ways: each must give an error of ours, or the right answer.

    python tests/io/fuzz.py                                          # all kinds, as in CI
    python tests/io/fuzz.py --kind gguf --count 100000               # more of one
    python tests/io/fuzz.py --kind gguf --start 4711 --count 1 --keep damaged    # one again, and its files

Whatever is loaded is compared with a reader of this file's own, which knows the formats but no bounds. Each mutation
is read under a limit of 64 MB and twice the file (Linux's RLIMIT_DATA: numpy's, Rust's and C++'s memory alike), in a
process of its own, which is killed where it hangs: the process that started it says which mutation it was.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import faulthandler
import functools
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

FIXTURES = Path(__file__).parents[1] / "fixtures"
SPARE = 64 << 20
SECONDS = 60  # of the clock, when a mutation is killed; and 10 of the processor's are too many
EXPECTED_WARNINGS = "(.*is of the kind .*no text|.*dequantised to float32 were)"


class Wrong(Exception):
    """Something was loaded, and is not what the file says."""


def require(holds: Any, what: str) -> None:
    if not holds:
        raise Wrong(what)


@dataclasses.dataclass
class Case:
    """A damaged file: how it is read (under the limits), how big it is, and how what was read is judged."""

    size: int
    read: Callable[[], Any]
    judge: Callable[[Any], None]


# --------------------------------------------------------------------------------------------------------------- damage

EDGES = (0, 1, 2, 127, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
FLOAT_EDGES = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-300, 1e38, 1e308, float("inf"), float("-inf"), float("nan"))
NAMES = ("", ".", "..", "../x", "/etc/passwd", "a/b", "a\0b", "\ud800", "x" * 5000, "\x1b[2J\n", "é\u202e", "C:\\x")


def pick(rng: np.random.Generator, options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def damaged_bytes(rng: np.random.Generator, data: bytes, header: int) -> bytes:
    """`data` with some bytes changed, most often among the first `header`."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        end = max(1, header if rng.random() < 0.7 else len(out))
        at = int(rng.integers(end))
        other = int(rng.integers(end))
        length = int(rng.integers(1, 64))
        match int(rng.integers(8)):
            case 0:
                for i in rng.integers(0, end, int(rng.integers(1, 9))):
                    if i < len(out):
                        out[i] ^= 1 << int(rng.integers(8))
            case 1:
                out[at : at + 1] = bytes([int(rng.integers(256))])
            case 2:
                del out[int(rng.integers(len(out) + 1)) :]
            case 3:
                out += bytes(rng.integers(0, 256, length, np.uint8))
            case 4:
                out[at : at + length] = out[other : other + length]
            case 5:
                out[at:at] = out[other : other + length]
            case 6:
                del out[at : at + length]
            case _:
                wide = rng.random() < 0.5
                edges = (*EDGES, len(data), len(data) - 1, len(data) + 1, len(data) - at)
                value = pick(rng, edges) % (2**64 if wide else 2**32)
                out[at : at + (8 if wide else 4)] = struct.pack("<Q" if wide else "<I", value)
    return bytes(out)


class Raw(str):
    """Text that stands in a JSON as it is."""


def dumps(tree: Any) -> bytes:
    """JSON, with what `Raw` says; whole numbers of any size, NaN, and lone surrogates as escapes."""
    raws: list[str] = []

    def plain(x: Any) -> Any:
        if isinstance(x, Raw):
            raws.append(x)
            return f"@raw{len(raws) - 1}@"
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items()}
        return [plain(v) for v in x] if isinstance(x, list) else x

    text = json.dumps(plain(tree))
    return re.sub(r'"@raw(\d+)@"', lambda m: raws[int(m[1])], text).encode()


def junk(rng: np.random.Generator) -> Any:
    match int(rng.integers(8)):
        case 0:
            return pick(rng, (None, True, False, [], {}, [[]], [1, "a", None], {"a": 1}, "x"))
        case 1:
            return pick(rng, EDGES) * int(pick(rng, (1, -1)))
        case 2:
            return Raw(pick(rng, ("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "9" * 400, "9" * 5000, "1e-400")))
        case 3:
            return pick(rng, FLOAT_EDGES)
        case 4:
            return pick(rng, NAMES)
        case 5:
            depth = int(pick(rng, (10, 200, 100_000)))
            return Raw(pick(rng, ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth)))
        case 6:
            return [pick(rng, (0, 1, 1.5, "a", None))] * int(pick(rng, (1, 3, 1000)))
        case _:
            return int(rng.integers(0, 300))


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every container and key."""
    out, stack = [], [tree]
    while stack:
        x = stack.pop()
        if isinstance(x, dict | list):
            inner = list(x.items()) if isinstance(x, dict) else list(enumerate(x))
            out += [(x, key) for key, _ in inner[:200]]
            stack += [value for _, value in inner]
    return out


def damaged_json(rng: np.random.Generator, text: bytes, most: int = 3) -> bytes:
    """A JSON with some values of other types and sizes, keys gone, doubled or renamed; or with some bytes changed."""
    if rng.random() < 0.15:
        return damaged_bytes(rng, text, len(text))
    tree: Any = {"": json.loads(text)}
    for _ in range(int(rng.integers(1, most + 1))):
        every = places(tree)
        if not every:
            break
        inside, key = pick(rng, every)
        value = inside[key]
        if isinstance(value, Raw):
            continue
        match int(rng.integers(10)):
            case 0 | 1 | 2:
                inside[key] = junk(rng)
            case 3:
                if isinstance(value, bool) or not isinstance(value, int | float):
                    inside[key] = junk(rng)
                else:
                    inside[key] = pick(
                        rng, (-value, value + 1, value - 1, value * 2, value / 2, value // 2, str(value))
                    )
            case 4:
                del inside[key]
            case 5 if isinstance(inside, dict):
                inside[key] = Raw(dumps(value).decode() + f", {json.dumps(key)}: " + dumps(junk(rng)).decode())
            case 6:
                other, there = pick(rng, every)
                if (there in other) if isinstance(other, dict) else (there < len(other)):
                    inside[key] = copy.deepcopy(other[there]) if not isinstance(other[there], dict) else junk(rng)
            case 7:
                inside[key] = [value] if rng.random() < 0.5 else {"a": value}
            case 8 if isinstance(inside, dict):
                inside[pick(rng, (*NAMES, f"{key}x", str(key)[:-1]))] = inside.pop(key)
            case _ if isinstance(value, list) and value:
                match int(rng.integers(4)):
                    case 0:
                        value *= int(pick(rng, (2, 100)))
                    case 1:
                        del value[int(rng.integers(len(value)))]
                    case 2:
                        value.append(copy.deepcopy(pick(rng, value)) if rng.random() < 0.5 else junk(rng))
                    case _:
                        value.reverse()
            case _:
                inside[key] = junk(rng)
    return dumps(tree[""]) if "" in tree else b""


# ------------------------------------------------------------------------------------------------------ what was loaded


def leaves(model: Any, params: Any) -> dict[str, Any]:
    """Every weight by its logical name, as numpy arrays that are views of the params'."""
    import jax

    from infopt.model import segments

    plain = jax.tree.map(np.asarray, params)
    out = {name: x for name, x in plain.items() if name != "segments"}
    for segment, phases in zip(segments(model.spec), plain["segments"]):
        for phase, stacks in enumerate(phases):
            for name, stack in stacks.items():
                for r in range(segment.repeats):
                    out[f"layers.{segment.layer(r, phase)}.{name}"] = jax.tree.map(lambda x, r=r: x[r], stack)
    return out


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def judge_spec(model: Any) -> None:
    """The config's numbers are such that the model can be computed with them."""
    from infopt.model import spec_from_json

    spec = model.spec
    text = spec.to_json()
    require("NaN" not in text and "Infinity" not in text, "a number of the config is not finite")
    require(spec_from_json(text) == spec, "the Spec is another one after JSON")

    def numbers(x: Any) -> None:
        if isinstance(x, dict):
            for key, value in x.items():
                if type(value) in (int, float):
                    require(0 < value < 2**63 or (key == "norm_eps" and value == 0), f"{key}={value} makes no sense")
                    require(type(value) is float or value < 2**31, f"{key}={value} is too large for an index")
                numbers(value)
        elif isinstance(x, list):
            for value in x:
                numbers({"": value})

    numbers(json.loads(text)["config"])
    if hash(spec) not in _computed:
        _computed.add(hash(spec))
        _trace(model)


_computed: set[int] = set()


def _trace(model: Any) -> None:
    import jax

    from infopt.model import shapes

    with warnings.catch_warnings():
        shape = jax.eval_shape(model.init, jax.random.key(0))
        length = min(3, model.spec.config.context)
        tokens = jax.ShapeDtypeStruct((1, length), np.dtype(np.int32))
        require(shapes(model.spec), "the model has no weights")
        logits, _ = jax.eval_shape(lambda p, t: model.apply(p, t, model.init_state(1, length)), shape, tokens)
    require(logits.shape[-1] == model.spec.config.vocab, "the logits are not one a word")


TEXTS = ("", "ab a", "hello wörld 🎉 日本", "<s>x</s> y", " " * 40, "ab" * 200, "\n\t\x00\x7f")


def use(tokenizer: Any) -> list[list[int]]:
    """What a tokenizer is read for; under the limits too."""
    out = []
    for text in TEXTS:
        ids = tokenizer.encode(text)
        whole = tokenizer.decode(ids)
        stream = tokenizer.stream()
        streamed = "".join([stream.push([i]) for i in ids]) + stream.flush()
        require(isinstance(whole, str) and streamed == whole, f"{text!r} streams as {streamed!r}, not as {whole!r}")
        out.append(ids)
    return out


def judge_tokenizer(tokenizer: Any, used: list[list[int]]) -> None:
    size = tokenizer.vocab_size
    require(all(0 <= i < size for ids in used for i in ids), "a token is outside the vocabulary")
    require(all(type(i) is int and i >= 0 for i in tokenizer.eos_ids), f"texts end with tokens {tokenizer.eos_ids}")


def load(path: Path, dtype: str = "float32", context: int | None = None) -> Any:
    """A model, its params, what its tokenizer makes of texts, and its template of messages."""
    import infopt as ip

    model, params = ip.load(path, dtype, context)
    tokenizer: Any = model.tokenizer
    if tokenizer is None:
        return model, params, None, None
    used, text = use(tokenizer), None
    if tokenizer.template is not None:
        try:
            text = tokenizer.chat([{"role": "user", "content": "Hello"}])
        except ip.InfoptError:
            text = None
    return model, params, used, text


# ----------------------------------------------------------------------------------------------------------------- GGUF

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclasses.dataclass
class Info:
    name: bytes
    dims: list[int]
    kind: int
    offset: int


@dataclasses.dataclass
class Gguf:
    """A GGUF file taken apart; `counts` are lies about how many there are, by what they count."""

    version: int
    fields: list[list[Any]]  # key, type, value; a list is (type, values)
    infos: list[Info]
    data: bytes
    counts: dict[Any, int] = dataclasses.field(default_factory=dict)

    def get(self, key: str, default: Any = None) -> Any:
        return {k.decode("utf-8", "surrogateescape"): v for k, _, v in self.fields}.get(key, default)

    @property
    def alignment(self) -> int:
        return self.get("general.alignment", 32)


def parse(blob: bytes) -> Gguf:
    """By the format's description, with no care for files that are wrong."""
    at = 4

    def read(code: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + code, blob, at)
        at += struct.calcsize("<" + code)
        return value

    def text() -> bytes:
        nonlocal at
        size = read("Q")
        at += size
        return blob[at - size : at]

    def value(kind: int) -> Any:
        if kind == STRING:
            return text()
        if kind == ARRAY:
            item = read("I")
            return item, [value(item) for _ in range(read("Q"))]
        return read(SCALARS[kind])

    version, tensors, fields = read("I"), read("Q"), read("Q")
    table: list[list[Any]] = []
    for _ in range(fields):
        key, kind = text(), read("I")
        table.append([key, kind, value(kind)])
    infos = [Info(text(), [read("Q") for _ in range(read("I"))], read("I"), read("Q")) for _ in range(tensors)]
    out = Gguf(version, table, infos, b"")
    out.data = blob[-(-at // out.alignment) * out.alignment :]
    return out


def pack(g: Gguf) -> bytes:
    def text(x: bytes) -> bytes:
        return struct.pack("<Q", g.counts.get(x, len(x))) + x

    def value(kind: int, x: Any, name: Any) -> bytes:
        if kind == STRING:
            return text(x)
        if kind != ARRAY:
            return struct.pack("<" + SCALARS[kind], x)
        item, values = x
        inner = b"".join(value(item, v, None) for v in values)
        return struct.pack("<IQ", item, g.counts.get(("items", name), len(values))) + inner

    out = bytearray(b"GGUF" + struct.pack("<I", g.version))
    out += struct.pack("<QQ", g.counts.get("tensors", len(g.infos)), g.counts.get("fields", len(g.fields)))
    out += b"".join(text(k) + struct.pack("<I", kind) + value(kind, v, k) for k, kind, v in g.fields)
    for info in g.infos:
        out += text(info.name) + struct.pack("<I", g.counts.get(("axes", info.name), len(info.dims)))
        out += struct.pack(f"<{len(info.dims)}QIQ", *info.dims, info.kind, info.offset)
    alignment = g.alignment if isinstance(g.alignment, int) and 0 < g.alignment < 2**16 else 32
    return bytes(out) + b"\0" * (-len(out) % alignment) + g.data


def random_value(rng: np.random.Generator, kind: int, size: int) -> Any:
    if kind == STRING:
        return pick(rng, (*NAMES, "linear", "yarn", "llama", "gemma3", "gpt-2")).encode("utf-8", "surrogatepass")
    if kind == ARRAY:
        item = int(rng.integers(13))
        return item, [
            random_value(rng, item, size) for _ in range(int(pick(rng, (0, 1, 3, 500) if item != 9 else (0, 1))))
        ]
    code = SCALARS[kind]
    if code in "fd":
        value = float(pick(rng, (*FLOAT_EDGES, 1e-5, 2.0)))
        return value if code == "d" or abs(value) < 3e38 else float("inf")
    if code == "?":
        return bool(rng.integers(2))
    bits = 8 * struct.calcsize("<" + code)
    value = int(pick(rng, (*EDGES, size, size + 1, -1))) % 2**bits
    return value if code.isupper() or value < 2 ** (bits - 1) else value - 2**bits


def damaged_gguf(rng: np.random.Generator, blob: bytes, only: str = "") -> bytes:
    """A GGUF file with other metadata, other tensors, wrong counts; or with some bytes changed."""
    g = parse(blob)
    if rng.random() < (0.15 if only else 0.35):
        return damaged_bytes(rng, blob, len(blob) - len(g.data))
    fields = [f for f in g.fields if f[0].startswith(only.encode())]
    for _ in range(int(rng.integers(1, 4))):
        field = pick(rng, fields)
        info = pick(rng, g.infos)
        match int(rng.integers(8 if only else 16)):
            case 0:
                field[1] = int(rng.integers(13))
                field[2] = random_value(rng, field[1], len(blob))
            case 1 | 2:
                if field[1] == ARRAY:
                    item, values = field[2]
                    values = list(values)
                    for _ in range(int(rng.integers(1, 4))):
                        if values:
                            at = int(rng.integers(len(values)))
                            match int(rng.integers(5)):
                                case 0:
                                    values[at] = random_value(rng, item, len(values))
                                case 1:
                                    values[at] = pick(rng, values)
                                case 2:
                                    del values[at]
                                case 3:
                                    values.insert(at, pick(rng, values))
                                case _ if item == STRING:
                                    values[at] = damaged_bytes(rng, values[at] + b" ", len(values[at]))
                                case _:
                                    values.reverse()
                    field[2] = item, values
                else:
                    field[2] = random_value(rng, field[1], len(blob))
            case 3:
                if field in g.fields:
                    g.fields.remove(field)
            case 4:
                g.fields.append([field[0], field[1], random_value(rng, field[1], len(blob))])
            case 5:
                g.counts["items", field[0]] = int(pick(rng, (*EDGES, len(blob), len(blob) // 8)))
            case 6:
                if isinstance(field[2], int) and not isinstance(field[2], bool):
                    field[2] = max(0, field[2] + int(pick(rng, (-1, 1, 2))))
                    field[1] = 4 if field[1] in (0, 2, 4) else field[1]
                    field[2] = min(field[2], 127)
                else:
                    field[2] = random_value(rng, field[1], len(blob))
            case 7:
                other = pick(rng, fields)
                field[1:] = [other[1], copy.deepcopy(other[2])]
            case 8:
                g.counts[pick(rng, ("tensors", "fields", ("axes", info.name), info.name))] = int(
                    pick(rng, (*EDGES, len(blob), len(g.infos) + 1, len(g.infos) - 1)) % 2**32
                )
            case 9:
                info.dims[:] = [pick(rng, (*EDGES, len(blob))) if rng.random() < 0.4 else d for d in info.dims]
            case 10:
                info.dims = pick(rng, (info.dims[::-1], [*info.dims, 1], [*info.dims, 2**32, 2**32], [], [1] * 5))
            case 11:
                info.kind = int(rng.integers(40))
            case 12:
                edges = (*EDGES, info.offset + 1, info.offset + 32, info.offset - 32, len(g.data) - 32)
                info.offset = int(pick(rng, (*edges, pick(rng, g.infos).offset))) % 2**64
            case 13:
                info.name = pick(rng, (pick(rng, g.infos).name, *(n.encode("utf-8", "surrogatepass") for n in NAMES)))
            case 14:
                g.infos.append(copy.deepcopy(info)) if rng.random() < 0.5 else g.infos.remove(info)
                if not g.infos:
                    break
            case _:
                flipped = bytearray(g.data)
                for at in rng.integers(0, len(flipped), 20):
                    flipped[at] ^= 1 << int(rng.integers(8))
                g.data = bytes(flipped)
    return pack(g)


def expected_gguf(
    model: Any, parts: list[Gguf], dtype: np.dtype[Any]
) -> Callable[[str], tuple[np.ndarray, np.ndarray, int]]:
    """By logical name: a weight's values, and the bytes of its rows with the type that they are in."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    from infopt.io import gguf

    floats = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 28: np.dtype("<f8")}
    where = {info.name.decode(): (info, part.data) for part in parts for info in part.infos}
    family, c = model.spec.family, model.spec.config

    def weight(name: str) -> tuple[np.ndarray, np.ndarray, int]:
        source = gguf.source(family, c, name)
        info, data = where[source.files[0]]
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(info.kind)]
        shape = tuple(info.dims[::-1])
        raw = np.frombuffer(data, np.uint8, int(np.prod(shape)) // block * size, info.offset)
        raw = raw.reshape(-1, shape[-1] // block * size)
        if info.kind in floats:
            x = raw.view(floats[info.kind]).astype(np.float32)
        else:
            x = quants.dequantize(raw, GGMLQuantizationType(info.kind))
        if len(shape) == 1:
            x, raw = x.reshape(-1), raw.reshape(-1)
        if source.of is not None:
            rows = shapes_of(model)[name][0]
            x, raw = x[source.start : source.start + rows], raw[source.start : source.start + rows]
        if family in ("llama", "mixtral", "smollm3") and name.endswith((".attn.q", ".attn.k")):
            # from a head's two halves in turn to one after the other
            x, raw = (y.reshape(-1, c.head_dim // 2, 2, y.shape[-1]).swapaxes(1, 2).reshape(y.shape) for y in (x, raw))
        if family.startswith("gemma") and name.endswith("norm"):
            x = x - np.float32(1)
        return x.reshape(shapes_of(model)[name]).astype(dtype), raw, info.kind

    return weight


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    from infopt.model import shapes

    return shapes(model.spec)


GGUF_FIELDS = {
    "block_count": "layers", "context_length": "context", "embedding_length": "dim", "attention.head_count": "heads",
    "attention.head_count_kv": "kv_heads", "attention.key_length": "head_dim", "vocab_size": "vocab",
    "feed_forward_length": "mlp", "attention.sliding_window": "window", "expert_count": "experts",
    "expert_used_count": "experts_used",
}  # fmt: skip


@np.errstate(all="ignore")
def judge_gguf(found: Any, blobs: list[bytes], dtype: str, context: int | None) -> None:
    import ml_dtypes

    model, params, used, _ = found
    parts = [parse(blob) for blob in blobs]
    arch, c = parts[0].get("general.architecture").decode(), model.spec.config
    for key, field in GGUF_FIELDS.items():
        value = parts[0].get(f"{arch}.{key}")
        if value and not isinstance(value, tuple) and hasattr(c, field):
            ours = getattr(c, field)
            value = context if field == "context" and context else value
            require(ours == value or (field == "window" and ours is None), f"{field} is {ours!r}, not {value!r}")
    judge_spec(model)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16 if dtype == "float16" else np.float32
    weight = expected_gguf(model, parts, np.dtype(kind))
    every = leaves(model, params)
    require(set(every) == set(shapes_of(model)), "the weights are not the config's")
    for name, x in every.items():
        want, raw, stored = weight(name)
        if isinstance(x, np.ndarray):
            require(same_bits(x, want), f"{name} is not what the file holds")
            continue
        head = {2: 2, 3: 4, 8: 2}[stored]
        blocks = raw.reshape(-1, want.shape[-1] // 32, raw.shape[-1] // (want.shape[-1] // 32))
        codes = np.ascontiguousarray(x.codes).view(np.uint8).reshape(*blocks.shape[:2], -1)
        require(np.array_equal(codes, blocks[..., head:]), f"{name} has other codes than the file")
        scales = np.ascontiguousarray(blocks[..., :2]).tobytes()
        require(np.ascontiguousarray(x.scale).tobytes() == scales, f"{name} has other scales than the file")
    if used is not None:
        judge_tokenizer(model.tokenizer, used)


# ------------------------------------------------------------------------------------------------------- the GGUF seeds


def write_gguf(arch: str, fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray], kind: str) -> bytes:
    from gguf import GGMLQuantizationType, quants

    def typed(x: Any) -> tuple[int, Any]:
        if isinstance(x, list):
            item = typed(x[0])[0] if x else 4
            return ARRAY, (item, [typed(v)[1] for v in x])
        return {bool: (7, x), int: (4, x), float: (6, x)}.get(type(x)) or (STRING, x.encode())

    table = [[key.encode(), *typed(x)] for key, x in {"general.architecture": arch, **fields}.items()]
    infos, data = [], b""
    for name, x in tensors.items():
        stored = GGMLQuantizationType[kind if x.ndim > 1 and x.shape[-1] % 32 == 0 else "F32"]
        raw = quants.quantize(np.ascontiguousarray(x, np.float32), stored).tobytes()
        infos.append(Info(name.encode(), list(x.shape[::-1]), int(stored), len(data)))
        data += raw + b"\0" * (-len(raw) % 32)
    return pack(Gguf(3, table, infos, data))


def tables() -> dict[str, Any]:
    from tokenizers.pre_tokenizers import ByteLevel

    words = [*sorted(ByteLevel.alphabet()), "ab", "he", "ll", "hell", "Ġa", "<s>", "</s>", "<|user|>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [1] * (len(words) - 3) + [3, 3, 4],
        "tokenizer.ggml.merges": ["a b", "h e", "l l", "he ll", "Ġ a"],
        "tokenizer.ggml.bos_token_id": len(words) - 3,
        "tokenizer.ggml.eos_token_id": len(words) - 2,
        "tokenizer.ggml.eot_token_id": len(words) - 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
    }


def pieces() -> dict[str, Any]:
    """SentencePiece's kind of tables, with a token for each byte."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<|user|>"]
    joined = ["▁a", "he", "ll", "hell", "▁hell", "▁▁"]
    single = ["▁", *"abcdehlnotw"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*words, *joined, *single],
        "tokenizer.ggml.scores": [0.0] * len(words) + [-1.0 - i for i in range(len(joined) + len(single))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [4] + [1] * (len(joined) + len(single)),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": True,
    }


def model_fields(arch: str, c: dict[str, int], extra: Mapping[str, Any]) -> dict[str, Any]:
    fields = {
        "block_count": c["layers"], "context_length": 64, "embedding_length": c["dim"], "feed_forward_length": c["mlp"],
        "attention.head_count": c["heads"], "attention.head_count_kv": c["kv"], "attention.key_length": c["head_dim"],
        "attention.value_length": c["head_dim"], "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e4,
        **extra,
    }  # fmt: skip
    return {f"{arch}.{key}": value for key, value in fields.items()}


def gguf_seed(
    arch: str,
    kind: str,
    extra: Mapping[str, Any] | None = None,
    vocab: int = 96,
    words: Mapping[str, Any] | None = None,
) -> bytes:
    """A small model of an architecture, by llama.cpp's names."""
    c = {"dim": 32, "layers": 2, "heads": 4, "kv": 2, "head_dim": 16, "mlp": 64}
    rng = np.random.default_rng(1)
    d, f, q, kv = c["dim"], c["mlp"], c["heads"] * c["head_dim"], c["kv"] * c["head_dim"]
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (d,),
        "attn_output.weight": (d, q),
        "ffn_norm.weight": (d,),
    }
    gated = {"ffn_gate.weight": (f, d), "ffn_up.weight": (f, d), "ffn_down.weight": (d, f)}
    apart = {"attn_q.weight": (q, d), "attn_k.weight": (kv, d), "attn_v.weight": (kv, d)}
    match arch:
        case "phi3":
            layer |= {"attn_qkv.weight": (q + 2 * kv, d), "ffn_up.weight": (2 * f, d), "ffn_down.weight": (d, f)}
        case "llama" if extra and "expert_count" in extra:
            layer |= apart | {"ffn_gate_inp.weight": (3, d), "ffn_gate_exps.weight": (3, f, d)}
            layer |= {"ffn_up_exps.weight": (3, f, d), "ffn_down_exps.weight": (3, d, f)}
        case "qwen2":
            layer |= apart | gated | {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
        case "gemma3":
            layer |= apart | gated | {"attn_q_norm.weight": (16,), "attn_k_norm.weight": (16,)}
            layer |= {"post_attention_norm.weight": (d,), "post_ffw_norm.weight": (d,)}
        case _:
            layer |= apart | gated
    if words:
        vocab = len(words["tokenizer.ggml.tokens"])
    shapes = {"token_embd.weight": (vocab, d), "output_norm.weight": (d,)}
    shapes |= {f"blk.{i}.{name}": shape for i in range(c["layers"]) for name, shape in layer.items()}
    tensors = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    if extra and "rope.scaling.attn_factor" in extra:
        tensors |= {f"rope_factors_{n}.weight": np.linspace(1, 4, 8) for n in ("long", "short")}
    fields = model_fields(arch, c, extra or {}) | (words or {"general.alignment": 32})
    return write_gguf(arch, fields, tensors, kind)


@functools.cache
def gguf_seeds() -> list[list[bytes]]:
    """Files, each as its parts."""
    split = parse(gguf_seed("llama", "F32"))
    parts = []
    for n in range(3):
        infos = split.infos[n::3]
        data, moved = b"", []
        for info in infos:
            size = int(np.prod(info.dims)) * 4
            moved.append(Info(info.name, info.dims, info.kind, len(data)))
            data += split.data[info.offset : info.offset + size] + b"\0" * (-size % 32)
        counts = [[b"split.no", 2, n], [b"split.count", 2, 3]]
        parts.append(pack(Gguf(3, (split.fields if n == 0 else []) + counts, moved, data)))
    return [
        [gguf_seed("llama", "F32")],
        [gguf_seed("llama", "Q8_0", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0})],
        [gguf_seed("llama", "Q4_1", {"expert_count": 3, "expert_used_count": 2})],
        [gguf_seed("gemma3", "Q4_0", {"attention.sliding_window": 8, "rope.freq_base_swa": 1e4})],
        [gguf_seed("qwen2", "F16")],
        [gguf_seed("phi3", "BF16", {"rope.dimension_count": 16, "rope.scaling.attn_factor": 1.2,
                                    "rope.scaling.original_context_length": 32})],
        parts,
    ]  # fmt: skip


def gguf_case(rng: np.random.Generator, folder: Path) -> Case:
    blobs = list(pick(rng, gguf_seeds()))
    at = int(rng.integers(len(blobs)))
    blobs[at] = damaged_gguf(rng, blobs[at])
    dtype = pick(rng, ("float32", "float32", "keep", "bfloat16", "float16"))
    names = ["m.gguf"] if len(blobs) == 1 else [f"m-{n + 1:05}-of-{len(blobs):05}.gguf" for n in range(len(blobs))]
    for name, blob in zip(names, blobs):
        (folder / name).write_bytes(blob)
    context = pick(rng, (None, None, 16))

    def judge(found: Any) -> None:
        read = blobs if parse(blobs[0]).get("split.count", 1) > 1 else blobs[:1]
        judge_gguf(found, read, dtype, context)

    return Case(sum(map(len, blobs)), lambda: load(folder / names[0], dtype, context), judge)


@functools.cache
def words_seeds() -> list[bytes]:
    return [gguf_seed("llama", "F32", words=made) for made in (tables(), pieces())]


def tables_case(rng: np.random.Generator, folder: Path) -> Case:
    blob = damaged_gguf(rng, pick(rng, words_seeds()), only="tokenizer.")
    path = folder / "m.gguf"
    path.write_bytes(blob)
    return Case(len(blob), lambda: load(path), lambda found: judge_gguf(found, [blob], "float32", None))


# ------------------------------------------------------------------------------------------------- Hugging Face folders

FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
FAMILIES = ("llama", "mistral", "smollm3", "qwen2", "qwen3", "qwen3_moe", "mixtral", "phi3", "gemma2", "gemma3", "gpt2",
            "gpt_oss")  # fmt: skip


def parse_safetensors(blob: bytes) -> dict[str, np.ndarray]:
    """By the format's description, with no care for files that are wrong; bfloat16 as float32."""
    (size,) = struct.unpack_from("<Q", blob)
    out = {}
    for name, entry in json.loads(blob[8 : 8 + size]).items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        if entry["dtype"] not in FLOATS:
            continue
        x = np.frombuffer(blob[8 + size + start : 8 + size + end], FLOATS[entry["dtype"]]).reshape(entry["shape"])
        out[name] = (x.astype(np.uint32) << 16).view(np.float32) if entry["dtype"] == "BF16" else x
    return out


CONFIG_FIELDS = {
    "vocab_size": "vocab", "hidden_size": "dim", "num_hidden_layers": "layers", "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads", "head_dim": "head_dim", "intermediate_size": "mlp", "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied", "n_embd": "dim", "n_layer": "layers", "n_head": "heads", "n_inner": "mlp",
    "layer_norm_epsilon": "norm_eps", "num_local_experts": "experts", "num_experts_per_tok": "experts_used",
}  # fmt: skip


@np.errstate(all="ignore")
def judge_folder(found: Any, config: bytes, blobs: list[bytes], dtype: str) -> None:
    """Params are the files' values, where the config says."""
    import ml_dtypes

    from infopt.io import huggingface

    model, params, used, _ = found
    values, c, family = json.loads(config), model.spec.config, model.spec.family
    for key, field in CONFIG_FIELDS.items():
        if (
            values.get(key) is not None
            and hasattr(c, field)
            and not (family == "gpt2" and not key.startswith(("n_", "l")))
        ):
            if (family, key) == ("qwen3_moe", "intermediate_size"):
                continue
            require(
                getattr(c, field) in (values[key], float(values[key])),
                f"{field} is {getattr(c, field)!r}, not {values[key]!r}",
            )
    judge_spec(model)
    tensors: dict[str, np.ndarray] = {}
    for blob in blobs:
        tensors |= parse_safetensors(blob)
    row = huggingface.PUBLISHED[family]
    prefix = next(p for p in row.prefixes if f"{p}{row.top['embed']}.weight" in tensors)
    kind = np.dtype({"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}.get(dtype, np.float32))
    every, shapes = leaves(model, params), shapes_of(model)
    require(set(every) == set(shapes), "the weights are not the config's")
    sources = row.sources(shapes, prefix)
    for name, x in every.items():
        source = sources[name]
        many = [tensors[file] for file in source.files]
        want = many[0] if len(many) == 1 and (len(shapes[name]) < 3 or source.stacked) else np.stack(many)
        want = np.swapaxes(want, -1, -2) if source.transposed else want
        if source.stacked:
            want = want[:, source.start :: source.step]
        elif source.of is not None:
            want = want[source.start : source.start + shapes[name][0]]
        require(same_bits(x, want.astype(kind)), f"{name} is not what the file holds")
    if used is not None:
        judge_tokenizer(model.tokenizer, used)


def safetensors_case(rng: np.random.Generator, folder: Path) -> Case:
    name = pick(rng, FAMILIES)
    config = (FIXTURES / name / "config.json").read_bytes()
    blob = (FIXTURES / name / "model.safetensors").read_bytes()
    (size,) = struct.unpack_from("<Q", blob)
    if rng.random() < 0.3:
        blob = damaged_bytes(rng, blob, 8 + size)
    elif rng.random() < 0.2:
        data = bytearray(blob)
        for at in rng.integers(8 + size, len(blob), 20):
            data[at] ^= 1 << int(rng.integers(8))
        blob = bytes(data)
    else:
        header = damaged_json(rng, blob[8 : 8 + size])
        lie = int(pick(rng, EDGES)) if rng.random() < 0.1 else len(header)
        blob = struct.pack("<Q", lie) + header + blob[8 + size :]
    dtype = pick(rng, ("float32", "bfloat16", "float16"))
    (folder / "config.json").write_bytes(config)
    (folder / "model.safetensors").write_bytes(blob)
    size = len(config) + len(blob)
    return Case(size, lambda: load(folder, dtype), lambda found: judge_folder(found, config, [blob], dtype))


def index_case(rng: np.random.Generator, folder: Path) -> Case:
    """The index of shards; beside the folder lies a whole model that no name may reach."""
    source, inside = FIXTURES / "llama_tied", folder / "inside"
    inside.mkdir()
    config = (source / "config.json").read_bytes()
    index = json.loads((source / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    outside = [f"../{shards[0]}", str(folder / shards[0]), f"x/../../{shards[0]}", f"..\\{shards[0]}", shards[0] + "\0",
               "link.safetensors", "..", "", ".", "config.json", "gone.safetensors", "\ud800.safetensors"]  # fmt: skip
    for place in (folder, inside):
        for shard in shards:
            shutil.copy(source / shard, place)
    (inside / "link.safetensors").mkdir()
    (inside / "config.json").write_bytes(config)
    blobs = [(source / shard).read_bytes() for shard in shards]
    if rng.random() < 0.5:
        for key in list(index["weight_map"]):
            if rng.random() < 0.3:
                index["weight_map"][key] = pick(rng, (*outside, *shards))
        text = damaged_json(rng, dumps(index), 1) if rng.random() < 0.3 else dumps(index)
    else:
        text = damaged_json(rng, dumps(index))
    (inside / "model.safetensors.index.json").write_bytes(text)
    size = len(text) + len(config) + sum(map(len, blobs))
    return Case(size, lambda: load(inside), lambda found: judge_folder(found, config, blobs, "float32"))


@functools.cache
def small_tokenizer() -> bytes:
    from infopt.io.tokenizer import Tokenizer

    t = tables()
    words, types, merges = (t[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "merges"))
    return (
        Tokenizer.from_tables(words, merges, types, "llama-bpe", bos=t["tokenizer.ggml.bos_token_id"])
        .backend.to_str()
        .encode()
    )


def config_case(rng: np.random.Generator, folder: Path) -> Case:
    """config.json, and the small files beside it."""
    name = pick(rng, (*FAMILIES, "llama_dynamic", "llama_linear", "llama_yarn", "gemma3_hub"))
    source, _, variant = name.partition("_") if name[-1] in "crnb" and "_" in name else (name, "", "")
    source = FIXTURES / ("ropes" if source == "llama" and variant else source)
    files = {
        "config.json": (source / (f"config_{variant}.json" if variant else "config.json")).read_bytes(),
        "model.safetensors": (source / "model.safetensors").read_bytes(),
        "generation_config.json": b'{"eos_token_id": [2, 3], "bos_token_id": 1}',
        "tokenizer_config.json": dumps({
            "bos_token": "<s>", "eos_token": {"content": "</s>", "special": True},
            "chat_template": "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
        }),
        "tokenizer.json": small_tokenizer(),
    }  # fmt: skip
    which = pick(rng, ("config.json",) * 8 + ("generation_config.json", "tokenizer_config.json"))
    if which == "config.json":
        for key in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            if rng.random() < 0.8:
                files.pop(key)
    files[which] = damaged_json(rng, files[which])
    if which == "config.json" and rng.random() < 0.1:
        files[which] = files[which].replace(
            b'"model_type": ', b'"model_type": "%s", "was": ' % pick(rng, FAMILIES).encode()
        )
    for key, data in files.items():
        (folder / key).write_bytes(data)
    context = pick(rng, (None, None, None, 16))

    def judge(found: Any) -> None:
        judge_folder(found, files["config.json"], [files["model.safetensors"]], "float32")
        require(found[3] is None or isinstance(found[3], str), "a template gave no text")

    return Case(sum(map(len, files.values())), lambda: load(folder, "float32", context), judge)


# ------------------------------------------------------------------------------------------------ tokenizers, templates


@functools.cache
def tokenizer_seeds() -> list[bytes]:
    import tokenizers
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

    words = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "▁ab", "é", "▁▁"]
    merges = [("▁", "a"), ("▁a", "b"), ("▁", "▁")]
    fallback = tokenizers.Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges,
                                               unk_token="<unk>", byte_fallback=True, fuse_unk=True))  # fmt: skip
    fallback.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fallback.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fallback.add_special_tokens([AddedToken("<s>", special=True, normalized=False), "</s>"])
    fallback.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A </s> $B", special_tokens=[("<s>", len(words)), ("</s>", len(words) + 1)]
    )
    unigram = tokenizers.Tokenizer(
        models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("a", -2.0), ("ab", -2.5), ("▁h", -3.0)], 0)
    )
    unigram.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " "), normalizers.Lowercase()]
    )
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    pieces = {w: i for i, w in enumerate(["[UNK]", "[CLS]", "[SEP]", "a", "##b", "ab", "hello", "##w"])}
    piece = tokenizers.Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    piece.normalizer = normalizers.BertNormalizer()
    piece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    piece.decoder = decoders.WordPiece()
    piece.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    word = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(5)}, unk_token="w0"))
    word.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(True), pre_tokenizers.Split("b", "removed")]
    )
    return [small_tokenizer(), *(t.to_str().encode() for t in (fallback, unigram, piece, word))]


def tokenizer_case(rng: np.random.Generator, folder: Path) -> Case:
    from infopt.io.tokenizer import Tokenizer

    text = damaged_json(rng, pick(rng, tokenizer_seeds()))
    path = folder / "tokenizer.json"
    path.write_bytes(text)

    def read() -> Any:
        tokenizer = Tokenizer.from_file(path, [1])
        return tokenizer, use(tokenizer)

    return Case(len(text), read, lambda found: judge_tokenizer(*found))


EXPRESSIONS = (
    "range(10**9)",
    "range(10**9) | list",
    "''.__class__.__mro__[1].__subclasses__()",
    "messages.__class__",
    "x ~ x",
    "'a' * 10**9",
    "[messages] * 10**8",
    "7 ** 7 ** 7 ** 7",
    "10 ** 4000 * 10 ** 4000",
    "'%999999999d' % 1",
    "self",
    "self.__dict__",
    "loop",
    "loop.index0",
    "loop(messages)",
    "caller()",
    "cycler.__init__.__globals__",
    "messages",
    "messages | tojson(indent=10**9)",
    "joiner('x' * 10**6)",
    "messages.append(1)",
    "messages | sort(attribute='role')",
    "(messages | string) * 1000000",
    "raise_exception('x' * 10**5)",
    "strftime_now('%Y' * 100000)",
    "cycler(1, 2).next()",
    "messages | groupby('role')",
    "'{:>999999999}'.format(1)",
    "messages | map(attribute='__class__') | list",
    "('" + "a" * 100 + "' | upper) * 5000 | replace('a', 'b' * 5000)",
    "namespace(a=messages).a",
    "dict(a=messages)",
    "messages | attr('append')",
    "1 / 0",
    "none.x",
    "undefined",
    "undefined + 1",
    "messages[0].content[::-1]",
    "bos_token",
    "not " * 500 + "x",
    "1+" * 3000 + "1",
    "[" * 200 + "]" * 200,
    "(" * 90 + "1" + ")" * 90,
    "a" + ".b" * 3000,
    "'a'.join(range(10**7) | map('string'))",
    "messages | batch(2)",
    "messages | xmlattr",
    "{'a': messages}",
    "-" * 500 + "1",
    "'\\ud800'",
    "'\\x00' ~ '\\U0010ffff'",
    "9" * 4400,
    "1e999",
    "0x" + "f" * 500,
    "messages | join(',', 'role')",
    "messages | sum(attribute='content')",
    "'a' in 'b' * 1000000",
    "([1] * 1000000) | unique | list",
    "'a'.__mod__",
    "'x' if messages else 'y'",
    "messages | selectattr('role', 'equalto', 'user') | list",
    "lipsum(1000)",
    "get_flashed()",
)
STATEMENTS = (
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for a in messages %}{% for b in messages %}{{ b }}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% set x = 'x' * 1000 %}",
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "{% set x = x ~ x %}" * 40,
    "{% include '/etc/passwd' %}",
    "{% macro n(a) %}{{ caller() }}{% endmacro %}{% call n(1) %}{{ n }}{% endcall %}",
    "{% import 'os' as os %}{{ os }}",
    "{% filter upper %}a{% endfilter %}",
    "{% raw %}{{ x }}{% endraw %}",
    "{# {{ #}",
    "{% if x %}" * 30 + "{% endif %}" * 30,
    "{% break %}",
    "{% continue %}",
    "{% generation %}g{% endgeneration %}",
    "{% set messages = messages + messages %}" * 30,
    "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a }}",
    "{% set ns = namespace() %}{% set ns.ns = ns %}{{ ns }}{{ ns == ns }}",
    "{% extends messages[0] %}",
    "{% block b %}x{% endblock %}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{% with a = messages %}{{ a }}{% endwith %}",
    "{% set a, b = messages %}",
    "{% set _ = messages.pop() %}",
    "{% do messages.append(1) %}",
    "{% for %}",
    "{{",
    "{%",
    "#}",
    "{% autoescape true %}{{ '<' }}{% endautoescape %}",
    "{% set dict.x = 1 %}",
    "\0",
    "\u202e",
    "{%- -%}",
    "{% endfor %}",
    "-%}",
)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello\n  there"}]


@functools.cache
def template_seeds() -> list[str]:
    goldens = json.loads((FIXTURES / "chat_goldens.json").read_text())
    plain = "{% for m in messages %}<{{ m.role }}>{{ m['content'] | trim }}{% endfor %}"
    plain += "{% if add_generation_prompt %}!{% endif %}"
    return [plain, *goldens["templates"].values()]


def template_case(rng: np.random.Generator, folder: Path) -> Case:
    from infopt.io import chat_template

    seed = pick(rng, template_seeds())
    tokens = re.findall(r"\{[{%#]-?|-?[}%#]\}|\w+|\s+|.", seed, re.S)
    outer = [i for i, t in enumerate(tokens) if t.startswith(("{{", "{%"))]
    for _ in range(int(rng.integers(0, 4))):
        at = int(rng.integers(len(tokens)))
        match int(rng.integers(9)):
            case 0:
                del tokens[at]
            case 1:
                tokens.insert(at, tokens[int(rng.integers(len(tokens)))])
            case 2:
                other = int(rng.integers(len(tokens)))
                tokens[at], tokens[other] = tokens[other], tokens[at]
            case 3:
                tokens[at] = pick(rng, tokens)
            case 4 | 5:
                tokens.insert(
                    min(pick(rng, outer), len(tokens)) if outer else at, "{{ " + pick(rng, EXPRESSIONS) + " }}"
                )
            case 6:
                tokens.insert(min(pick(rng, outer), len(tokens)) if outer else at, pick(rng, STATEMENTS))
            case 7:
                names = [i for i, t in enumerate(tokens) if t.isidentifier()]
                tokens[pick(rng, names) if names else at] = pick(rng, EXPRESSIONS)
            case _:
                raw = damaged_bytes(rng, "".join(tokens).encode("utf-8", "replace"), 10**6)
                tokens = re.findall(r"\w+|\W+", raw.decode("utf-8", "replace")) or [""]
        if not tokens:
            tokens = [""]
    source = "".join(tokens)
    messages = MESSAGES if rng.random() < 0.9 else MESSAGES * 200
    tools = [{"name": "f", "parameters": {"x": 1}}] if rng.random() < 0.3 else None

    def read() -> Any:
        template = chat_template.read_template(source, {"bos_token": "<s>", "eos_token": "</s>"}, "m")
        assert template is not None
        return template.render(messages, tools)

    def judge(text: Any) -> None:
        require(type(text) is str, f"a template gave a {type(text).__name__}")
        given = chat_template._size([messages, tools, "bos_token", "eos_token", "<s>", "</s>"]) + 100
        require(len(text) <= chat_template.MAX_WORK + 32 * given, f"a text of {len(text)} characters")
        require(messages in (MESSAGES, MESSAGES * 200) and len(MESSAGES) == 2, "the messages were changed")
        if source == template_seeds()[0]:
            one = "<system>Be brief.<user>Hello\n  there"
            require(text == one * (len(messages) // 2) + "!", "another text than the template's")

    return Case(len(source.encode("utf-8", "surrogatepass")), read, judge)


# -------------------------------------------------------------------------------------------------------- stuffed files


STUFFED = 24


def stuffed_case(rng: np.random.Generator, folder: Path, which: int) -> Case:
    """Files of a few MB that are full of the one thing whose reading takes the most memory for its bytes."""
    n = 1 << 19
    plain = [[b"general.architecture", STRING, b"llama"]]
    empty = struct.pack("<Q", 0)

    def gguf(fields: list[list[Any]] = plain, infos: list[Info] | None = None, data: bytes = b"") -> Case:
        blob = pack(Gguf(3, fields, infos or [], data))
        (folder / "m.gguf").write_bytes(blob)
        return Case(len(blob), lambda: load(folder / "m.gguf"), lambda _: require(False, "a stuffed file was loaded"))

    def array(item: int, value: bytes, count: int) -> Case:
        blob = (
            b"GGUF"
            + struct.pack("<IQQ", 3, 0, 1)
            + struct.pack("<Q", 1)
            + b"a"
            + struct.pack("<IIQ", ARRAY, item, count)
        )
        blob += value * count
        (folder / "m.gguf").write_bytes(blob)
        return Case(len(blob), lambda: load(folder / "m.gguf"), lambda _: require(False, "a stuffed file was loaded"))

    def folder_of(name: str, text: bytes) -> Case:
        shutil.copytree(FIXTURES / "llama", folder / "m")
        (folder / "m" / "tokenizer.json").write_bytes(small_tokenizer())
        (folder / "m" / name).write_bytes(text)
        size = sum(path.stat().st_size for path in (folder / "m").iterdir())
        return Case(size, lambda: load(folder / "m"), lambda _: None)

    def entry(at: int) -> str:
        return f'"{at:x}":{{"dtype":"U8","shape":[1],"data_offsets":[{at},{at + 1}]}}'

    def words(count: int, merges: bool) -> Case:
        alphabet = [f"{i:x}" for i in range(count)]
        fields: list[list[Any]] = [[key.encode(), 4, 1] for key in ()]
        table = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": alphabet}
        table |= {"tokenizer.ggml.merges": ["0 0"] * count if merges else ["0 0"]}
        seed = gguf_seed("llama", "F32")
        g = parse(seed)
        for key, value in table.items():
            kind = STRING if isinstance(value, str) else ARRAY
            fields.append(
                [key.encode(), kind, value.encode() if kind == STRING else (STRING, [w.encode() for w in value])]
            )
        g.fields = [f for f in g.fields if f[0] != b"general.alignment"] + fields
        g.fields.append([b"llama.vocab_size", 4, 96])
        blob = pack(g)
        (folder / "m.gguf").write_bytes(blob)
        return Case(len(blob), lambda: load(folder / "m.gguf"), lambda _: None)

    header = lambda body: struct.pack("<Q", len(body)) + body  # noqa: E731
    match which:
        case 0:
            return array(0, b"\1", 16 * n)
        case 1:
            return array(7, b"\1", 16 * n)
        case 2:
            return array(4, b"\xff\xff\xff\x7f", 4 * n)
        case 3:
            return array(12, struct.pack("<d", 1.5), 2 * n)
        case 4:
            return array(STRING, struct.pack("<Q", 2) + b"ab", n)
        case 5:
            return array(STRING, empty, 2 * n)
        case 6:
            return gguf([*plain, *([f"{i:x}".encode(), 0, 1] for i in range(n // 2))])
        case 7:
            return gguf(infos=[Info(f"{i:x}".encode(), [1], 0, 0) for i in range(n // 4)], data=b"\0" * 64)
        case 8:  # all over the same bytes
            layer = gguf_seed("llama", "F32")
            g = parse(layer)
            g.data += b"\0" * (32 * 2**20)
            g.fields = [[k, t, 2**18 if k == b"llama.vocab_size" else v] for k, t, v in g.fields]
            g.infos = [dataclasses.replace(i, offset=0) for i in g.infos]
            g.infos[0].dims[1] = 2**18
            g.infos.append(Info(b"output.weight", [32, 2**18], 0, 0))
            return gguf(g.fields, g.infos, g.data)
        case 9:
            return words(2**18, False)
        case 10:
            return words(2**18, True)
        case 11:
            body = ("{" + ",".join(map(entry, range(n // 8))) + "}").encode()
            return folder_of("model.safetensors", header(body) + b"\0" * (n // 8))
        case 12:
            return folder_of(
                "model.safetensors", header(b'{"__metadata__":{' + b",".join(b'"%x":""' % i for i in range(n)) + b"}}")
            )
        case 13:
            return folder_of("config.json", b"[" + b"[]," * (2 * n) + b"0]")
        case 14:
            return folder_of("config.json", b'{"a":[' + b"{}," * (2 * n) + b"0]}")
        case 15:
            return folder_of(
                "model.safetensors.index.json", b'{"weight_map":{' + b",".join(b'"%x":""' % i for i in range(n)) + b"}}"
            )
        case 16:
            return folder_of("tokenizer_config.json", b'{"a":[' + b"{}," * (2 * n) + b"0]}")
        case 17:
            return folder_of("generation_config.json", b'{"eos_token_id":[' + b"300," * (2 * n) + b"0]}")
        case 18:
            return folder_of("tokenizer_config.json", dumps({"chat_template": "x" * (8 * n)}))
        case 19:
            return folder_of("chat_template.jinja", b"{{x}}" * (2 * n))
        case 20:
            return folder_of("tokenizer.json", b'{"a":[' + b"{}," * (2 * n) + b"0]}")
        case 21:
            text = json.loads(small_tokenizer())
            text["added_tokens"] = [
                text["added_tokens"][0] | {"id": 300 + i, "content": f"{i:x}"} for i in range(n // 32)
            ]
            return folder_of("tokenizer.json", dumps(text))
        case 22:
            steps = [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 60
            text = json.loads(small_tokenizer()) | {"normalizer": {"type": "Sequence", "normalizers": steps}}
            return folder_of("tokenizer.json", dumps(text))
        case _:
            text = json.loads(small_tokenizer())
            text["model"]["vocab"] |= {f"{i:x}": 1000 + i for i in range(n // 8)}
            return folder_of("tokenizer.json", dumps(text))


KINDS: dict[str, Callable[..., Case]] = {
    "gguf": gguf_case,
    "tables": tables_case,
    "safetensors": safetensors_case,
    "index": index_case,
    "config": config_case,
    "tokenizer": tokenizer_case,
    "template": template_case,
    "stuffed": stuffed_case,
}


# -------------------------------------------------------------------------------------------------------------- running


@dataclasses.dataclass
class Totals:
    """What became of one kind's mutations."""

    kind: str
    mutations: int = 0
    refused: int = 0
    loaded: int = 0
    seconds: float = 0.0
    wrong: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.kind:12} {self.mutations:8} mutations {self.refused:8} refused {self.loaded:8} loaded right "
            f"{len(self.wrong):5} wrong {self.seconds:7.1f} s"
        )


def _limited(size: int | None) -> None:
    """From now on at most 64 MB and twice `size` more than now; None lifts it."""
    if not sys.platform.startswith("linux"):
        return  # there is no limit of data that numpy's and Rust's memory counts under
    most = resource.RLIM_INFINITY
    if size is not None:
        with open("/proc/self/statm") as statm:
            most = int(statm.read().split()[5]) * resource.getpagesize() + SPARE + 2 * size
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))


def _chain(error: BaseException | None) -> list[BaseException]:
    out: list[BaseException] = []
    while error is not None and error not in out:
        out.append(error)
        error = error.__cause__ or error.__context__
    return out


def attempt(kind: str, number: int, folder: Path, noise: int) -> str:
    """One mutation: "refused" or "loaded"; raises what is wrong with it."""
    import infopt as ip

    rng = np.random.default_rng([zlib.crc32(kind.encode()), number])
    case = KINDS[kind](rng, folder, number) if kind == "stuffed" else KINDS[kind](rng, folder)
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    began = time.process_time()
    refusal: ip.InfoptError | None = None
    found: Any = None
    try:
        _limited(case.size)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", EXPECTED_WARNINGS, UserWarning)
            found = case.read()
    except ip.InfoptError as error:
        refusal = error
    finally:
        _limited(None)
        faulthandler.cancel_dump_traceback_later()
    seconds = time.process_time() - began
    require(seconds < 10, f"it took {seconds:.1f} seconds of the processor")
    require(os.fstat(noise).st_size == 0, "something was printed")
    if refusal is None:
        case.judge(found)
        return "loaded"
    if any(isinstance(error, MemoryError) for error in _chain(refusal)):
        raise Wrong("more memory than 64 MB and twice the file") from refusal
    require(refusal.what and refusal.why and refusal.fix, "the error does not say what, why and the fix")
    require(len(str(refusal)) < 3100, f"the error has {len(str(refusal))} characters")
    require(refusal.one_line.isprintable(), f"the error holds what a terminal would obey: {refusal.one_line[:200]!r}")
    return "refused"


def work(kind: str, start: int, count: int, at: Path, keep: Path | None) -> None:
    """All mutations of one process: a line of JSON for each that is wrong, and one of totals."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import jax

    jax.config.update("jax_platforms", "cpu")
    import infopt as ip

    # What is made once a process does not count: JAX's start, imports, the tables of `gguf` and `tokenizers`.
    for seed in (FIXTURES / "llama", FIXTURES / "gpt2"):
        _trace(ip.load(seed)[0])
    with tempfile.TemporaryDirectory() as warm:
        (Path(warm) / "m.gguf").write_bytes(words_seeds()[0])
        load(Path(warm) / "m.gguf")
    noise = os.open(at.with_name("noise"), os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.dup2(noise, 2)
    faulthandler.enable()
    totals = {"refused": 0, "loaded": 0}
    for number in range(start, start + count):
        at.write_text(f"{number} {totals['refused']} {totals['loaded']}")
        folder = Path(tempfile.mkdtemp(prefix="fuzz-")) if keep is None else keep
        try:
            totals[attempt(kind, number, folder, noise)] += 1
        except BaseException as error:
            lines = traceback.format_exception(error, limit=-8)
            with open(at.with_name("noise"), errors="replace") as said:
                text = "".join(lines)[-3000:] + said.read()[:1000]
            print(
                json.dumps({"number": number, "error": f"{type(error).__name__}: {str(error)[:300]}", "text": text}),
                flush=True,
            )
            os.ftruncate(noise, 0)
            os.lseek(noise, 0, os.SEEK_SET)
            if isinstance(error, KeyboardInterrupt):
                return
        finally:
            if keep is None:
                shutil.rmtree(folder, ignore_errors=True)
    at.write_text(f"{start + count} {totals['refused']} {totals['loaded']}")


def run(kind: str, count: int, start: int = 0, keep: Path | None = None) -> Totals:
    """`count` mutations of a kind, in processes of their own: a new one goes on where one died."""
    totals, end = Totals(kind), start + count
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        at = Path(place) / "at"
        while start < end and len(totals.wrong) < 1000:
            at.write_text("")
            command = [sys.executable, __file__, "--worker", str(at), "--kind", kind, "--start", str(start)]
            command += ["--count", str(end - start)] + (["--keep", str(keep)] if keep else [])
            # Freed memory goes back to the system, or a limit on new memory would not see it taken again.
            env = os.environ | {"MALLOC_TRIM_THRESHOLD_": "1000000", "MALLOC_MMAP_THRESHOLD_": "1000000"}
            process = subprocess.run(command, capture_output=True, text=True, env=env)
            if not at.read_text():
                raise RuntimeError(f"the process did not start: {process.stderr[-3000:]}")
            for line in process.stdout.splitlines():
                said = json.loads(line)
                again = f"python tests/io/fuzz.py --kind {kind} --start {said['number']} --count 1 --keep damaged"
                totals.wrong.append(f"{said['error']}\n{again}\n{said['text']}")
            reached, refused, loaded = map(int, at.read_text().split())
            totals.refused, totals.loaded = totals.refused + refused, totals.loaded + loaded
            if reached < end:
                noise = at.with_name("noise").read_text(errors="replace") if at.with_name("noise").exists() else ""
                again = f"python tests/io/fuzz.py --kind {kind} --start {reached} --count 1 --keep damaged"
                why = f"exit {process.returncode}, or more than {SECONDS} seconds"
                totals.wrong.append(f"the process died: {why}\n{again}\n{noise[-3000:]}{process.stderr[-2000:]}")
            totals.mutations += min(reached + 1, end) - start
            start = reached + 1
    totals.seconds = time.monotonic() - began
    return totals


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kind", choices=[*KINDS, "all"], default="all")
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a new folder for the damaged files of one mutation")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.keep is not None and options.worker is None:
        options.keep.mkdir()
    if options.worker is not None:
        work(options.kind, options.start, options.count, options.worker, options.keep)
        return 0
    wrong = 0
    for kind in KINDS if options.kind == "all" else (options.kind,):
        count = min(options.count, STUFFED - options.start) if kind == "stuffed" else options.count
        totals = run(kind, count, options.start, options.keep)
        print(totals, flush=True)
        for text in totals.wrong[:20]:
            print("  " + text.replace("\n", "\n  "), flush=True)
        wrong += len(totals.wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
