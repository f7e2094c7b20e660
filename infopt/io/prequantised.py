"""Hugging Face checkpoints that are quantised already: GPTQ, AWQ, FP8, MXFP4 and compressed-tensors, read as they lie.

A module's packed tensors become one `Packed` under the name that its dense weight would have: to the reader it is a
tensor `[out, in]` of the file, of which rows are read as float32 values, or as a QTensor's codes and scales. Which
weights are packed is told by the tensors that are there, never by the config's patterns.

With codes q, scales s and zero points z of a group of neighbours along the input axis, a weight is
  GPTQ     s * (q - z); qweight and qzeros hold z and q in 32-bit words, the first lowest, and a v1 file holds z - 1
           (subtracted from whole words by GPTQModel, so it is added to whole words here, as transformers has it; where
           all bits of a stored z are 1, AutoGPTQ and vLLM read others);
  AWQ      s * (q - z); a word holds the outputs 0, 2, 4, 6, 1, 3, 5, 7, the first lowest;
  FP8      s * q; s of the whole, of a row, or of a block of rows and columns (whose name ends in `_inv`, but which is
           the factor nonetheless); a block's scale is repeated for each of its rows;
  MXFP4    s * e2m1, of gpt-oss's experts, all of a layer in one tensor `_blocks` and one of exponents, `_scales`;
  compressed-tensors: the last of the former; s * (q - z) of int8; the same of words, q and z with 2 ** (bits - 1)
           added; NVFP4, s / S * e2m1, S one number of the matrix, of which 1 / S is kept.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from infopt.errors import CheckpointError
from infopt.formats import FORMATS
from infopt.io.checkpoint import Source, row_chunks, shown
from infopt.model import aligned_empty
from infopt.qtensor import Format, QTensor, unknown_error

METHODS = ("gptq", "awq", "fp8", "mxfp4", "compressed-tensors")
"""What `quant_method` may be."""
SYMMETRIC = {2: "int2", 4: "int4", 8: "int8"}
"""Formats of whole codes by bits, where all zero points are the middle one."""
WITH_ZERO = {2: "int2_zero", 4: "int4_zero", 8: "int8_zero"}
BITS = f"codes are of {', '.join(map(str, SYMMETRIC))} bits here"
FLOAT8 = {"F8_E4M3": "fp8_e4m3", "F8_E5M2": "fp8_e5m2"}
SCALES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F8_E8M0": "float8_e8m0fnu"}
MAPPED: dict[str, Any] = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
"""Types that the safetensors package does not hand to numpy."""

ACTIVATIONS = (".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale", ".output_zero_point",
               ".activation_scale", ".q_scale", ".k_scale", ".v_scale", ".k_zero_point", ".v_zero_point")  # fmt: skip
"""Ends of the names of tensors that say how activations, keys and values were to be rounded."""

Rows = Callable[[slice], np.ndarray]
"""Some rows of a matrix."""


class Mapped:
    """A tensor of 8-bit floats, with the face of the safetensors package's slices."""

    def __init__(self, values: np.ndarray, kind: str) -> None:
        self.values, self.kind = values, kind

    def get_shape(self) -> list[int]:
        return list(self.values.shape)

    def get_dtype(self) -> str:
        return self.kind

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.values[index]


def small_floats(path: Path) -> dict[str, Mapped]:
    """The 8-bit floats of a safetensors file that has been opened, and so checked, before."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    found: dict[str, Mapped] = {}
    for name, entry in header.items():
        if name != "__metadata__" and (kind := entry["dtype"]) in MAPPED:
            start = 8 + length + entry["data_offsets"][0]
            values = np.memmap(path, MAPPED[kind], "r", start, tuple(entry["shape"])) if all(entry["shape"]) else None
            found[name] = Mapped(np.empty(entry["shape"], MAPPED[kind]) if values is None else values, kind)
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """A matrix that is stored packed.

    Args:
      name: that of its dense weight.
      shape: `[out, in]`.
      format: of its QTensor.
      codes: one a value, `[rows, in]`.
      scale: `[rows, groups]`.
      zero: `[rows, groups]`, where the format has zero points.
      outer: what scales are relative to, where they are.
      group_of: the group of each input, where groups are not neighbours; then there is no QTensor of it.
    """

    name: str
    shape: tuple[int, int]
    format: Format
    codes: Rows
    scale: Rows
    zero: Rows | None = None
    outer: np.float32 | None = None
    group_of: np.ndarray | None = None

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows of values, float32, computed as a QTensor's are."""
        row, width = self.format.row, self.shape[1]
        at = np.arange(width) // self.format.group_of(width) if self.group_of is None else self.group_of
        codes, scale = self.codes(rows), self.scale(rows).astype(np.float32)
        levels = codes.astype(np.float32) - row.zero if row.levels is None else np.array(row.levels, np.float32)[codes]
        if self.zero is not None:
            levels = levels - self.zero(rows)[:, at]
        return levels * (scale if self.outer is None else scale * self.outer)[:, at]

    def leaves(self, rows: slice) -> dict[str, np.ndarray]:
        """Rows of a QTensor's arrays."""
        row, width = self.format.row, self.shape[1]
        codes = self.codes(rows)
        if (more := self.format.padded(width) - width) > 0:
            codes = np.concatenate([codes, np.zeros((len(codes), more), codes.dtype)], 1)
        if (n := row.codes) > 1:
            planes = codes.reshape(len(codes), -1, n, self.format.group_of(width) // n)
            words = functools.reduce(operator.or_, (planes[:, :, k] << k * row.bits for k in range(n)))
            codes = words.reshape(len(codes), -1)
        return {"codes": codes, "scale": self.scale(rows)} | ({"zero": self.zero(rows)} if self.zero else {})


@dataclasses.dataclass(frozen=True, eq=False)
class Experts:
    """The packed matrices of all experts, where they are stored as one tensor `[experts, out, in]`."""

    each: tuple[Packed, ...]

    def get_shape(self) -> list[int]:
        return [len(self.each), *self.each[0].shape]

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, at: tuple[int, slice]) -> np.ndarray:
        """Rows of an expert's values, float32."""
        expert, rows = at
        return self.each[expert][rows]


def _matrices(tensors: Mapping[str, Any], where: Source) -> list[Any]:
    """The tensors that a weight lies in, those of experts apart."""
    found = [tensors[file] for file in where.files]
    return list(found[0].each) if isinstance(found[0], Experts) else found


def read(tensors: Mapping[str, Any], where: Source, shape: tuple[int, ...]) -> QTensor:
    """A weight as a QTensor, out of the packed matrices it lies in."""
    matrices: list[Packed] = _matrices(tensors, where)
    rows, width = shape[-2:]
    leaves: dict[str, np.ndarray] = {}
    for i, matrix in enumerate(matrices):
        for part in row_chunks((rows, width)):
            found = matrix.leaves(where.rows(part))
            for name, x in found.items():
                if name not in leaves:
                    leaves[name] = aligned_empty((len(matrices), rows, x.shape[-1]), x.dtype)
                leaves[name][i, part] = x
    if matrices[0].outer is not None:
        leaves["outer"] = np.array([m.outer for m in matrices], np.float32).reshape(-1, 1, 1)
    leaves["error"] = unknown_error((len(matrices),))
    kept = leaves if len(shape) == 3 else {name: x[0] for name, x in leaves.items()}
    codes, scale = kept.pop("codes"), kept.pop("scale")
    return QTensor(codes, scale, None, matrices[0].format, (rows, width), **kept)


def kept_format(tensors: Mapping[str, Any], where: Source, name: str) -> Format | None:
    """The format in which a weight stays packed; None for a dense one.

    Raises:
      CheckpointError: it is packed as no QTensor can be.
    """
    matrices = _matrices(tensors, where)
    found = [matrix.format if isinstance(matrix, Packed) else None for matrix in matrices]
    if len(set(found)) > 1:
        raise CheckpointError(
            f"{name} cannot be kept packed: its experts are packed in several ways.",
            why="they are one array here.",
            fix='dtype="float32"',
        )
    for matrix in matrices if found[0] else ():
        if matrix.group_of is not None:
            raise CheckpointError(
                f"{matrix.name} cannot be kept packed: its groups are not of neighbours (desc_act, actorder).",
                why="it was quantised in another order of its inputs (g_idx), and a QTensor's groups lie in a row.",
                fix='dtype="float32", or a checkpoint made with desc_act=False',
            )
    return found[0]


# ----------------------------------------------------------------------------------------------------------- the parts


class _Module:
    """The tensors of one module, each checked as it is taken."""

    def __init__(self, where: str, name: str, tensors: Mapping[str, Any]) -> None:
        self.where, self.name, self.tensors, self.taken = where, name, tensors, set[str]()

    def has(self, part: str) -> bool:
        return f"{self.name}.{part}" in self.tensors

    def take(self, part: str, kinds: Iterable[str], shape: tuple[int, ...] | None = None) -> Any:
        """A part, which must be of one of the types, and of the shape, or a matrix where none is given."""
        name = f"{self.name}.{part}"
        if name not in self.tensors:
            raise self.wrong(f"{self.name} has no {part}", "its codes mean no values without it")
        tensor = self.tensors[name]
        found, kinds = tuple(tensor.get_shape()), tuple(kinds)
        if tensor.get_dtype() not in kinds:
            raise self.wrong(f"{name} is stored as {tensor.get_dtype()}", f"its format has {' or '.join(kinds)} there")
        if shape is not None and found != shape:
            raise self.wrong(f"{name} has shape {list(found)}, not {list(shape)}", "the module's other tensors say so")
        if (shape is None and len(found) != 2) or 0 in found:
            raise self.wrong(f"{name} has shape {list(found)}", "it must be a matrix")
        self.taken.add(name)
        return tensor

    def shape_of(self, part: str) -> tuple[int, ...]:
        return tuple(self.tensors[f"{self.name}.{part}"].get_shape()) if self.has(part) else ()

    def order(self, part: str, width: int, groups: int) -> np.ndarray | None:
        """The group of each input; None where groups are neighbours."""
        if not self.has(part):
            return None
        found = np.asarray(self.take(part, ("I32", "I64"), (width,))[...])
        if found.min() < 0 or found.max() >= groups:
            raise self.wrong(f"{self.name}.{part} names a group that is not there", f"there are {groups}")
        return None if np.array_equal(found, np.arange(width) // (width // groups)) else found

    def wrong(self, what: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {what}.", why=f"{why}.", fix="fetch or quantise the model again")

    def packed(
        self,
        width: int,
        kind: str,
        codes: Rows,
        scale: Rows,
        dtype: str,
        group: int | None,
        out: int,
        **more: Any,
    ) -> Packed:
        group = None if group is None or group >= width else group
        if (group or width) % FORMATS[kind].codes:
            raise self.wrong(f"{self.name} has groups of {group or width} codes", "those of a group fill whole bytes")
        fmt = Format(kind, group, dtype, pad=group is not None and width % group > 0)
        return Packed(f"{self.name}.weight", (out, width), fmt, codes, scale, **more)


def _codes(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes out of 32-bit words `[n, words]`, the first lowest, uint8 `[n, words * 32 / bits]`."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    each = np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts & np.uint32(2**bits - 1)
    return each.astype(np.uint8).reshape(len(words), -1)


def _of_columns(
    words: Callable[[slice], np.ndarray], bits: int, order: list[int], rows: slice, one: int = 0
) -> np.ndarray:
    """Codes `[rows, n]` out of words `[n, out * bits / 32]`, of which `words` gives some columns.

    Args:
      order: the place in a word of each of its outputs.
      one: added to every code, in whole words.
    """
    each = 32 // bits
    first, last = rows.start // each, -(-rows.stop // each)
    x = np.ascontiguousarray(words(slice(first, last))).view(np.uint32)
    x = x + np.uint32(sum(one << k for k in range(0, 32, bits)))
    codes = _codes(x, bits).reshape(len(x), -1, each)[..., order].reshape(len(x), -1)
    return codes[:, rows.start - first * each : rows.stop - first * each].T


def _signed(codes: np.ndarray, bits: int) -> np.ndarray:
    """8-bit codes with 128 added, as int8; others as they are."""
    return (codes ^ np.uint8(128)).view(np.int8) if bits == 8 else codes


def _spread(m: _Module, part: str, kinds: Iterable[str], out: int, width: int, block: Any) -> tuple[int | None, Rows]:
    """The group, and rows of scales or zero points `[rows, groups]`: of the whole, of rows, of groups or of blocks."""
    found = m.shape_of(part)
    tensor = m.take(part, kinds, found)
    if math.prod(found) == 1:
        one = np.asarray(tensor[...]).reshape(1, 1)
        return None, lambda rows: np.repeat(one, rows.stop - rows.start, 0)
    if found in ((out,), (out, 1)):
        return None, lambda rows: np.asarray(tensor[rows]).reshape(-1, 1)
    if len(found) == 2 and found[0] == out and width % found[1] == 0:
        return width // found[1], lambda rows: tensor[rows]
    if block is not None and found == (-(-out // block[0]), -(-width // block[1])):
        high = block[0]

        def rows_of(rows: slice) -> np.ndarray:
            first, last = rows.start // high, (rows.stop - 1) // high + 1
            return tensor[first:last][np.arange(rows.start, rows.stop) // high - first]

        return block[1], rows_of
    raise m.wrong(
        f"{m.name}.{part} has shape {list(found)} for a weight of [{out}, {width}]",
        "it must be one number, one a row, or one a group of a row"
        + (f", or one a block of {list(block)}" if block is not None else ""),
    )


# --------------------------------------------------------------------------------------------------------- the methods


def _gptq(m: _Module, one: int) -> Packed:
    """A matrix with all its zero points, whatever they are."""
    scales, zeros = m.take("scales", ("F16", "BF16", "F32")), m.take("qzeros", ("I32",))
    groups, out = scales.get_shape()
    count = zeros.get_shape()[1]
    bits = next((b for b in SYMMETRIC if b * out == count * 32), None)
    if bits is None:
        raise m.wrong(f"{m.name}.qzeros has {count} words for {out} outputs", BITS)
    width = m.take("qweight", ("I32",)).get_shape()[0] * 32 // bits
    words = m.take("qweight", ("I32",), (width * bits // 32, out))
    zeros = m.take("qzeros", ("I32",), (groups, count))
    if width % groups:
        raise m.wrong(f"{m.name} has {groups} groups for {width} inputs", "the one must divide the other")
    return m.packed(
        width,
        WITH_ZERO[bits],
        lambda rows: _codes(words[:, rows].T, bits),
        lambda rows: scales[:, rows].T,
        SCALES[scales.get_dtype()],
        width // groups,
        out,
        zero=functools.partial(_of_columns, lambda c: zeros[:, c], bits, list(range(32 // bits)), one=one),
        group_of=m.order("g_idx", width, groups),
    )


def _symmetric(packed: Packed) -> Packed:
    """The same without its zero points, which are all the middle one."""
    codes, bits = packed.codes, packed.format.row.bits
    fmt = dataclasses.replace(packed.format, name=SYMMETRIC[bits])
    return dataclasses.replace(packed, format=fmt, zero=None, codes=lambda rows: _signed(codes(rows), bits))


def _is_symmetric(packed: Packed) -> bool:
    assert packed.zero is not None
    return bool((packed.zero(slice(0, packed.shape[0])) == 2 ** (packed.format.row.bits - 1)).all())


def _awq(m: _Module) -> Packed:
    places = [0, 4, 1, 5, 2, 6, 3, 7]  # of outputs 0, 1, 2, ... in a word
    scales, words = m.take("scales", ("F16", "BF16", "F32")), m.take("qweight", ("I32",))
    groups, out = scales.get_shape()
    width = words.get_shape()[0]
    words = m.take("qweight", ("I32",), (width, out // 8))
    zeros = m.take("qzeros", ("I32",), (groups, out // 8))
    if width % groups or out % 8:
        raise m.wrong(f"{m.name} has {groups} groups for {width} inputs, {out} outputs", "groups and words are whole")
    return m.packed(
        width,
        "int4_zero",
        functools.partial(_of_columns, lambda columns: words[:, columns], 4, places),
        lambda rows: scales[:, rows].T,
        SCALES[scales.get_dtype()],
        width // groups,
        out,
        zero=functools.partial(_of_columns, lambda columns: zeros[:, columns], 4, places),
    )


def _plain(m: _Module, kinds: Iterable[str], block: Any) -> Packed:
    """8-bit floats, or whole numbers, one a byte."""
    weight = m.take("weight", kinds)
    kind, (out, width) = weight.get_dtype(), weight.get_shape()
    name = "weight_scale_inv" if m.has("weight_scale_inv") else "weight_scale"
    group, scale = _spread(m, name, SCALES, out, width, block)
    dtype = SCALES[m.tensors[f"{m.name}.{name}"].get_dtype()]
    if kind == "I8" and m.has("weight_zero_point"):
        of, zero = _spread(m, "weight_zero_point", ("I8",), out, width, block)
        if of != group:
            raise m.wrong(f"{m.name}.weight_zero_point is not of the shape of the scales", "a group has one of each")
        flip = np.uint8(128)
        return m.packed(
            width,
            "int8_zero",
            lambda rows: np.asarray(weight[rows]).view(np.uint8) ^ flip,
            scale,
            dtype,
            group,
            out,
            zero=lambda rows: np.asarray(zero(rows)).view(np.uint8) ^ flip,
        )
    if m.has("weight_zero_point"):  # of floats it is 0, as floats are symmetric
        _, zero = _spread(m, "weight_zero_point", ("I8", *FLOAT8, "F16", "BF16", "F32"), out, width, block)
        if np.any(zero(slice(0, out)).astype(np.float32)):
            raise m.wrong(f"{m.name}.weight_zero_point is not 0", "8-bit floats have no zero points")
    return m.packed(width, FLOAT8.get(kind, "int8"), lambda rows: weight[rows], scale, dtype, group, out)


def _words(m: _Module) -> Packed:
    """compressed-tensors' whole codes in 32-bit words."""
    words, sizes = m.take("weight_packed", ("I32",)), m.take("weight_shape", ("I64", "I32"), (2,))
    out, width = (int(x) for x in sizes[...])
    if out < 1 or width < 1:
        raise m.wrong(f"{m.name}.weight_shape is {[out, width]}", "a weight has rows and columns")
    count = words.get_shape()[1]
    bits = next((b for b in SYMMETRIC if count == -(-width * b // 32)), None)
    if bits is None:
        raise m.wrong(f"{m.name}.weight_packed has {count} words a row for {width} codes", BITS)
    m.take("weight_packed", ("I32",), (out, count))
    group, scale = _spread(m, "weight_scale", ("F16", "BF16", "F32"), out, width, None)
    dtype = SCALES[m.tensors[f"{m.name}.weight_scale"].get_dtype()]
    groups = 1 if group is None else width // group
    zero: Rows | None = None
    if m.has("weight_zero_point"):
        zeros = m.take("weight_zero_point", ("I32",), (-(-out * bits // 32), groups))
        zero = functools.partial(_of_columns, lambda columns: zeros[columns].T, bits, list(range(32 // bits)))
    order = m.order("weight_g_idx", width, groups)

    def codes(rows: slice) -> np.ndarray:
        found = _codes(words[rows], bits)[:, :width]
        return found if zero else _signed(found, bits)

    kind = WITH_ZERO[bits] if zero else SYMMETRIC[bits]
    return m.packed(width, kind, codes, scale, dtype, group, out, zero=zero, group_of=order)


def _nvfp4(m: _Module) -> Packed:
    nibbles = m.take("weight_packed", ("U8",))
    out, width = nibbles.get_shape()[0], 2 * nibbles.get_shape()[1]
    if width % 16:
        raise m.wrong(f"{m.name} has rows of {width} values", "sixteen share a scale")
    scale = m.take("weight_scale", ("F8_E4M3",), (out, width // 16))
    whole = np.asarray(m.take("weight_global_scale", ("F32",), (1,))[...])[0]
    if not 2.0**-100 < whole < 2.0**100:
        raise m.wrong(f"{m.name}.weight_global_scale is {whole}", "scales are divided by it")

    def codes(rows: slice) -> np.ndarray:
        x = nibbles[rows]
        return np.stack([x & 15, x >> 4], -1).reshape(len(x), -1)

    fmt, outer = Format("nvfp4", 16, "float8_e4m3fn"), np.float32(1 / whole)
    return Packed(f"{m.name}.weight", (out, width), fmt, codes, lambda rows: scale[rows], outer=outer)


def _mxfp4(m: _Module, stem: str) -> Experts:
    """gpt-oss's experts: two codes a byte, the first of two neighbours low; a power of two, as its exponent + 127."""
    shape = m.shape_of(f"{stem}_blocks")
    if len(shape) != 4 or shape[-1] != 16:
        raise m.wrong(
            f"{m.name}.{stem}_blocks has shape {list(shape)}", "it must be [experts, out, groups, 16]: 32 share a scale"
        )
    nibbles, exponents = m.take(f"{stem}_blocks", ("U8",), shape), m.take(f"{stem}_scales", ("U8",), shape[:3])

    def codes(expert: int, rows: slice) -> np.ndarray:
        x = nibbles[expert, rows]
        return np.stack([x & 15, x >> 4], -1).reshape(len(x), -1)

    def scale(expert: int, rows: slice) -> np.ndarray:
        return np.ascontiguousarray(exponents[expert, rows]).view(ml_dtypes.float8_e8m0fnu)

    fmt, of = Format("mxfp4", 32, "float8_e8m0fnu"), functools.partial
    matrix = of(Packed, f"{m.name}.{stem}", (shape[1], shape[2] * 32), fmt)
    return Experts(tuple(matrix(of(codes, expert), of(scale, expert)) for expert in range(shape[0])))


# --------------------------------------------------------------------------------------------------------- the folder


def _refused(where: str, what: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: {what}.",
        why=f"{why}; read are {', '.join(METHODS)} (GPTQ and AWQ in 32-bit words, AWQ of version gemm; "
        "compressed-tensors as pack-quantized, int-quantized, float-quantized, naive-quantized, nvfp4-pack-quantized).",
        fix="use a checkpoint of one of these, the float checkpoint and quantize(...) here, or a GGUF file",
    )


def _weights_of(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What compressed-tensors' config says of each group of modules."""
    groups = config.get("config_groups")
    found = list(groups.values()) if isinstance(groups, dict) else []
    return [group for group in found if isinstance(group, dict)]


def _block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block that shares a scale, where the config says them."""
    weights = [group.get("weights") for group in _weights_of(config)]
    said = [config.get("weight_block_size"), *(w.get("block_structure") for w in weights if isinstance(w, dict))]
    for block in said:
        if isinstance(block, list) and len(block) == 2 and all(type(x) is int and 0 < x < 2**31 for x in block):
            return block[0], block[1]
    return None


def unpack(where: str, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a folder, those of packed matrices replaced by a `Packed` each.

    Args:
      where: the config's path.
      config: its `quantization_config`.
      tensors: by name, with the face of the safetensors package's slices.

    Raises:
      CheckpointError: the method is none that is read; a part is missing, or of another type or shape.
    """
    method = config.get("quant_method")
    if method not in METHODS:
        raise _refused(where, f"weights are quantised by {shown(method)}", "that packing is not known here")
    if config.get("transform_config") or config.get("sparsity_config", {}) not in ({}, None, {"format": "dense"}):
        raise _refused(where, "weights are transformed or sparse beside being quantised", "that is not computed here")
    block = _block(config)
    said = ("checkpoint_format", "format", "version") if method != "awq" else ("version", "format")
    version = str(next((config[key] for key in said if config.get(key)), "")).lower()
    if version not in {"gptq": ("", "gptq", "gptq_v2"), "awq": ("", "gemm")}.get(method, (version,)):
        raise _refused(where, f"weights are packed as {method}'s {shown(version)}", "that packing is not known here")
    plain = (*FLOAT8, "I8") if method == "compressed-tensors" else tuple(FLOAT8)
    readers: dict[str, Callable[[_Module], Packed]] = {}
    if method == "gptq":
        readers["qweight"] = functools.partial(_gptq, one=int(version != "gptq_v2"))
    elif method == "awq":
        readers["qweight"] = _awq
    elif method != "mxfp4":
        readers["weight"] = functools.partial(_plain, kinds=plain, block=block)
        readers["weight_packed"] = lambda m: _nvfp4(m) if m.has("weight_global_scale") else _words(m)
    found: dict[str, Any] = {}
    taken: set[str] = set()
    for full, tensor in tensors.items():
        name, _, part = full.rpartition(".")
        if method == "mxfp4" and (stem := part.removesuffix("_blocks")) != part:
            module = _Module(where, name, tensors)
            found[f"{name}.{stem}"] = _mxfp4(module, stem)
            taken |= module.taken
        if part not in readers or (part == "weight" and tensor.get_dtype() not in plain):
            continue
        module = _Module(where, name, tensors)
        found[f"{name}.weight"] = readers[part](module)
        taken |= module.taken
    if method == "gptq" and config.get("sym") is not False and all(map(_is_symmetric, found.values())):
        found = {name: _symmetric(packed) for name, packed in found.items()}
    left = {name: t for name, t in tensors.items() if name not in taken and not name.endswith(ACTIVATIONS)}
    if both := found.keys() & left.keys():
        raise CheckpointError(
            f"{where}: {min(both)} is stored packed, and dense too.",
            why="which of the two is meant cannot be told.",
            fix="fetch or quantise the model again",
        )
    rounded = any(group.get("input_activations") for group in _weights_of(config))
    if rounded or config.get("activation_scheme") or config.get("kv_cache_scheme"):
        warnings.warn(
            f"{where}: its activations were meant to be rounded too; here they stay in float, and the weights alone "
            "are as the checkpoint has them",
            stacklevel=5,
        )
    return left | found


def empty_biases(tensors: Mapping[str, Any]) -> set[str]:
    """Biases of 0 of packed matrices: GPTQ's writers add them to models that have none."""
    names = {name.removesuffix("weight") + "bias" for name, t in tensors.items() if isinstance(t, Packed)}
    return {name for name in names & tensors.keys() if not np.any(np.asarray(tensors[name][...], np.float32))}
