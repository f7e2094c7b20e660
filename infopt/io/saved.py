"""Saved stacks: weights as an orbax checkpoint; Spec, Recipe and what else makes a Model as JSON beside it.

    stack.json                 the version, Spec, Recipe, the tokenizer's digest, which data folder is meant, and the
                               CRC-32 of each array's file (not in stacks that were saved before there were any)
    data-<hex>/arrays/         an orbax checkpoint: zarr arrays without compression, one chunk each
    data-<hex>/tokenizer.json  where the model has a tokenizer

Arrays have their logical names ("layers.0.attn.q", a draft's behind "draft."), and stand for themselves: how layers
are stacked in memory may change without touching what is on disk. Without compression a file cannot unpack to more
than its size. stack.json is replaced last, by one rename: a save that is killed leaves the old stack or the new one.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import re
import secrets
import shutil
import stat
import types
import typing
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import infopt.models  # noqa: F401 (a Spec names its family: the library's own must be defined)
from infopt.errors import CheckpointError, InfoptError
from infopt.io import disk
from infopt.io.chat_template import ChatTemplate
from infopt.io.checkpoint import LazyWeights, check_layers
from infopt.io.tokenizer import Tokenizer
from infopt.model import Model, Weights, assemble, check_params, is_matrix, shapes, spec_from_json
from infopt.ops import CACHED
from infopt.qtensor import Format, QTensor
from infopt.spec import Recipe, Spec
from infopt.typing import Params

HEADER, FORMAT, VERSION = "stack.json", "infopt stack", 2
"""Version 1 had no errors of rounding beside packed weights: they are not known when it is loaded."""
DATA_NAME = re.compile(r"data-[0-9a-f]{16}")
MOST_JSON = 16 << 20
"""Bytes of JSON that are read: a Spec of a thousand layers takes less than one MB."""

FLOATS = {"<f4": "float32", "<f2": "float16", "bfloat16": "bfloat16", "<f8": "float64"}
SMALL = {name: name for name in ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")}
KINDS = {kind: {zarr: kind} for zarr, kind in (FLOATS | SMALL | {"|i1": "int8", "|u1": "uint8"}).items()}
"""Types of arrays, by zarr's name: of dense weights, scales and minima; of small scales and codes; each alone."""
ZARR = {
    "zarr_format": 2,
    "order": "C",
    "compressor": None,
    "filters": None,
    "fill_value": None,
    "dimension_separator": ".",
}
"""What an array's .zarray says beside its shape and type: its one file holds its bytes, and nothing else."""

AGAIN = "save the stack again, or fetch the folder again"


def save(folder: str | Path, model: Model, params: Params) -> None:
    """Save a stack: `ip.load(folder)` gives a model that computes the same, and its params, bit for bit.

    A name that ends in `.gguf` is a GGUF file's, for llama.cpp too: `infopt.io.gguf_out.save` says what one can hold.

    What holds of the loaded model: Spec, Recipe, tokenizer, `exact` and repr are the saved one's, and the two are
    equal. It takes further transforms. It is a base: `convert` of it, and of what is made from it, starts from its own
    params, not from those of the model that it was once made from.

    Args:
      folder: a new folder, an empty one, or a saved stack, which is replaced. A save that is killed leaves the old
        stack or the new one, and perhaps a hidden folder `.<name>.saving-*` beside it, which the next save removes.
      model, params: the stack and its params, of any dtype.

    Raises:
      CheckpointError: the folder holds something else or cannot be written, or the model's config or tokenizer cannot
        be saved.
      ParamsError: the params are not the model's.

    >>> import infopt as ip, jax, tempfile
    >>> model = (ip.quantize(bits=4) | ip.cache_kv())(ip.models.llama())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ip.save(folder + "/stack", model, model.init(jax.random.key(0)))
    ...     loaded, params = ip.load(folder + "/stack")
    >>> loaded == model, loaded.exact
    (True, False)
    """
    if Path(folder).suffix == ".gguf":
        from infopt.io import gguf_out  # it brings the gguf package

        return gguf_out.save(Path(folder), model, params)
    folder = Path(folder).expanduser().resolve()
    check_params(model.spec, params)
    tokenizer, header = model.tokenizer, _header_of(model)
    arrays = _arrays(model.spec, params)
    header["checksums"] = _checksums(arrays, list(_leaves(model.spec)))
    with disk.written_beside(folder) as temporary:
        earlier = _data_of(folder)
        (temporary / header["data"]).mkdir()
        if tokenizer is not None:
            (temporary / header["data"] / "tokenizer.json").write_text(tokenizer.backend.to_str(), encoding="utf-8")
        with _orbax() as checkpointer:
            checkpointer.save(temporary / header["data"] / "arrays", arrays)
        (temporary / HEADER).write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
        disk.sync(temporary)
        if earlier is None:
            os.rename(temporary, folder)  # fails on a folder that somebody else has filled meanwhile
        else:
            _replace(temporary, folder, header["data"])
        disk.sync_entries(folder.parent)
    if earlier is not None:
        shutil.rmtree(folder / earlier, ignore_errors=True)
        _remove_unnamed(folder)


def _remove_unnamed(folder: Path) -> None:
    """Remove data that stack.json does not name: a save was killed between the two renames."""
    with contextlib.suppress(OSError, CheckpointError):
        data = [name for name in os.listdir(folder) if DATA_NAME.fullmatch(name)]
        if not disk.is_being_written(folder):  # asked after looking, or its data might be new
            named = _data_of(folder)
            for name in data:
                if name != named:
                    shutil.rmtree(folder / name, ignore_errors=True)


def _replace(new: Path, folder: Path, data: str) -> None:
    """Take the new data into the folder of an older stack, then the JSON that names it."""
    try:
        os.rename(new / data, folder / data)
        disk.sync_entries(folder)
        os.replace(new / HEADER, folder / HEADER)
        disk.sync_entries(folder)
    except BaseException:
        if _data_of(folder) != data:  # an interrupt may come after the last rename
            shutil.rmtree(folder / data, ignore_errors=True)
        raise


@dataclasses.dataclass(frozen=True, eq=False)
class Opened:
    """A saved stack whose arrays are checked, and not read.

    Args:
      model: the stack.
      arrays: the folder of its arrays.
      stored: of each weight, its type (where it is packed, its format's name) and its bytes on the disk.
      checksums: of each array, by name; None where an older version saved it.
      version: of the format in which it was saved.
    """

    model: Model
    arrays: Path
    stored: dict[str, tuple[str, int]]
    checksums: dict[str, str] | None
    version: int

    @property
    def dtype(self) -> str:
        """The type of dense weights when they are loaded; of several types, the widest."""
        formats = {fmt.name for fmt in _formats(self.model.spec).values()}
        kinds = {jax.dtypes.canonicalize_dtype(kind) for kind, _ in self.stored.values() if kind not in formats}
        return str(max(kinds, key=lambda kind: kind.itemsize, default=np.dtype(np.float32)))


def open_stack(folder: Path, dtype: str) -> Opened:
    """A stack that `save` wrote, without its params: all that `load` checks is checked here.

    Args:
      folder: the saved stack.
      dtype: as in `infopt.load`; what is saved in one type is not read into another.

    Raises:
      CheckpointError: the folder is damaged, made by a newer version, or does not hold what its Spec says.
    """
    if dtype not in ("float32", "keep"):
        raise CheckpointError(
            f"{folder} is a saved stack, and is not read as dtype={dtype!r}.",
            why="its weights keep the types in which they were saved.",
            fix=f"infopt.load({str(folder)!r}), and jax.tree.map(lambda x: x.astype(...), params) for another type",
        )
    header = _read_header(folder)
    data = folder / header["data"]
    _check_folder(data, folder)
    _check_folder(data / "arrays", folder)
    spec = _read_spec(folder, header["spec"], len(os.listdir(data / "arrays")))
    model = Model(spec, Recipe(header["recipe"]), _read_tokenizer(data, header), restored_exact=header["exact"])
    stored = _check_arrays(data / "arrays", spec, header["version"])
    return Opened(model, data / "arrays", stored, header["checksums"], header["version"])


def load(folder: Path, dtype: str) -> tuple[Model, Params]:
    """A stack that `save` wrote, and its params as they were saved. Takes and raises what `open_stack` does."""
    opened = open_stack(folder, dtype)
    model, spec = opened.model, opened.model.spec
    weights = _SavedWeights(opened, spec)
    if spec.program is None:
        return model, assemble(spec, weights)
    return model, {
        "target": assemble(spec.replace(program=None), weights),
        "draft": assemble(spec.program.draft, _SavedWeights(opened, spec.program.draft, "draft.")),
    }


# ------------------------------------------------------------------------------------------------------------ the JSON


def _header_of(model: Model) -> dict[str, Any]:
    """What stack.json will say; refuses what could not be read back."""
    try:
        text = model.spec.to_json()
        same = _checked(spec_from_json(text), 1 << 30) == model.spec
    except (TypeError, InfoptError) as error:
        raise _unsaveable(model, getattr(error, "one_line", str(error))) from error
    if not same:
        raise _unsaveable(model, "as JSON and back it is another Spec")
    tokenizer = model.tokenizer
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise CheckpointError(
            f"a {type(tokenizer).__name__} cannot be saved as the model's tokenizer.",
            why="a tokenizer.json is what is kept of it.",
            fix="dataclasses.replace(model, tokenizer=infopt.io.tokenizer.Tokenizer.from_file(...)), or tokenizer=None",
        )
    return {
        "format": FORMAT,
        "version": VERSION,
        "spec": json.loads(text),
        "recipe": model.recipe.steps,
        "exact": model.exact,
        "tokenizer": None
        if tokenizer is None
        else {
            "digest": tokenizer.digest,
            "eos_ids": [int(i) for i in tokenizer.eos_ids],
            "template": _template_of(tokenizer),
        },
        "data": f"data-{secrets.token_hex(8)}",
    }


def _template_of(tokenizer: Tokenizer) -> dict[str, Any] | None:
    if (template := tokenizer.template) is None:
        return None
    return {"source": template.source, "tool_use": template.tool_use, "special": dict(template.special)}


def _read_template(folder: Path, plain: Any) -> ChatTemplate | None:
    """A chat template; stacks saved before there were any have no key for it."""
    if plain is None:
        return None
    try:
        source, tool_use, special = plain["source"], plain["tool_use"], plain["special"]
        texts = [source, *([] if tool_use is None else [tool_use]), *special.keys(), *special.values()]
        if not all(isinstance(x, str) for x in texts):
            raise TypeError("a value is no text")
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, f"{HEADER}: the chat template: {type(error).__name__}: {error}") from error
    return ChatTemplate(source, tool_use, special, where=str(folder))


def _unsaveable(model: Model, why: str) -> CheckpointError:
    return CheckpointError(
        f"the Spec of this {model.spec.family} cannot be saved.",
        why=f"{why}.",
        fix=f"in {type(model.spec.config).__name__}: whole numbers, floats, truths, texts, or tuples of them, each of "
        "the type that its field declares",
    )


def _data_of(folder: Path) -> str | None:
    """The data folder of the stack that is there, None where nothing is; raises where something else is."""
    if disk.is_free(folder):
        return None
    try:
        return _read_header(folder)["data"]
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder} is not a saved stack that could be replaced, and is left alone.",
            why=f"overwriting might lose something else: {error.why}",
            fix="give another folder, or remove this one",
        ) from error


def _read_header(folder: Path) -> dict[str, Any]:
    """stack.json, each value of the right kind."""
    path = folder / HEADER
    header = _read_json(path)
    if header.get("format") != FORMAT:
        raise _damaged(folder, f"{HEADER} does not say that it is an {FORMAT}")
    if type(version := header.get("version")) is not int or version < 1:
        raise _damaged(folder, f"{HEADER} gives no version of the format")
    if version > VERSION:
        raise CheckpointError(
            f"{folder} was saved by a newer infopt: its format has version {version}, here at most {VERSION} is read.",
            why="what a newer version adds is not known here.",
            fix="pip install --upgrade infopt",
        )
    try:
        tokenizer = header["tokenizer"]
        ids = [] if tokenizer is None else tokenizer["eos_ids"]
        texts = [x for step in header["recipe"] for x in step] + ([] if tokenizer is None else [tokenizer["digest"]])
        header["recipe"] = tuple((text, digest) for text, digest in header["recipe"])
        header.setdefault("checksums", None)
        kinds = isinstance(header["spec"], dict) and type(header["exact"]) is bool
        kinds = kinds and isinstance(header["checksums"], dict | None)
        right = kinds and all(type(i) is int for i in ids) and all(isinstance(x, str) for x in texts)
        if not right or not DATA_NAME.fullmatch(header["data"]):
            raise ValueError("a value is of another kind")
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(folder, f"{HEADER}: {type(error).__name__}: {error}") from error
    return header


def _read_spec(folder: Path, plain: dict[str, Any], arrays: int) -> Spec:
    try:
        return _checked(spec_from_json(json.dumps(plain)), arrays, str(folder))
    except CheckpointError:
        raise
    except InfoptError as error:
        raise CheckpointError(f"{folder}: {error.what}", why=error.why, fix=error.fix) from error


def _checked(spec: Spec, arrays: int, where: str = "the stack") -> Spec:
    """The Spec, if it is one that transforms could have made of a model with at most `arrays` arrays."""
    if not _fits(spec, Spec):
        raise _damaged(where, "a value in its Spec is of another kind than its name says, or beyond all bounds")
    check_layers(where, spec.config.layers, arrays)
    if problem := _problem(spec):
        raise _damaged(where, problem)
    if spec.program is not None:
        _checked(spec.program.draft, arrays, where)
    return spec


def _problem(spec: Spec) -> str | None:
    """What no transform would have made."""
    try:
        known = shapes(spec)
    except Exception as error:  # sizes that overflow, a pattern that does not fit: whatever a family's init meets
        return f"its config describes a model that cannot be: {error}"
    names = [name for name, _ in spec.weights]
    if len(spec.window) != spec.config.layers:
        return f"it gives {len(spec.window)} windows for {spec.config.layers} layers"
    if any(w is not None and (w.size < 1 or not 0 <= w.sinks <= w.size) for w in spec.window):
        return "a window is empty, or narrower than its sinks"
    if names != sorted(set(names)) or any(len(known.get(name, ())) < 2 for name in names):
        return "it packs a weight twice, or one that is no matrix of this model"
    widths = [(name, known[name][-1], f) for name, f in spec.weights]
    if (kv := spec.kv) is not None:
        head = spec.config.head_dim
        widths += [("a head", head, kv.format), ("keys", kv.split or head, kv.keys)]
        if kv.split < 0 or kv.tail < 0 or (kv.tail and not kv.split) or (kv.rotate and head & (head - 1)):
            return f"its codec of keys and values, {kv}, fits no head of {head} channels"
    for name, width, fmt in widths:
        if fmt.scale not in {**FLOATS, **SMALL}.values():
            return f"{name} has scales of an unknown type, {fmt.scale!r:.20}"
        try:
            fmt.check_width(width, name)
        except InfoptError as error:
            return error.one_line
    matrices = {n.split(".", 2)[2] for n, shape in known.items() if n.startswith("layers.") and is_matrix(n, shape)}
    if spec.online != tuple(sorted(set(spec.online) & matrices)):
        return "it turns the input of what is no matrix of its layers"
    if any(f.activations is not None and n != "head" and not n.startswith("layers.") for n, f in spec.weights):
        return "it rounds the inputs of a table, which has none"
    if spec.kv is not None and spec.kv.format.activations is not None:
        return "it rounds the inputs of keys and values, which have none"
    if spec.attention not in CACHED:
        return f"its attention, {spec.attention!r:.40}, is no implementation here"
    if spec.page is not None and spec.kv is not None and spec.kv.split and spec.page % spec.kv.split:
        return f"its pages of {spec.page} slots hold no whole groups of {spec.kv.split}"
    if spec.page is not None and not (spec.page >= 1 and spec.cache):
        return f"it has pages of {spec.page} slots and {'a' if spec.cache else 'no'} cache"
    if (program := spec.program) is not None:
        draft = program.draft
        if program.k < 1 or draft.program is not None or not (spec.cache and draft.cache):
            return "its draft guesses nothing, is speculative itself, or a cache is missing"
        if draft.config.vocab != spec.config.vocab:
            return f"its draft knows {draft.config.vocab} words, the model {spec.config.vocab}"
    return None


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON is of the annotated type; whole numbers below 2**31, floats finite."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if inner[-1] is not Ellipsis and len(inner) != len(value):
            return False
        return all(_fits(x, h) for x, h in zip(value, inner[:1] * len(value) if inner[-1] is Ellipsis else inner))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, typing.cast(type, hint)):
            return False
        hints = typing.get_type_hints(type(value))
        return all(_fits(getattr(value, f.name), hints[f.name]) for f in dataclasses.fields(value))
    if hint is int:
        return type(value) is int and abs(value) < 2**31
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    if hint in (bool, str, types.NoneType):
        return type(value) is hint
    return True  # a family's own annotation


def _read_tokenizer(data: Path, header: dict[str, Any]) -> Tokenizer | None:
    if header["tokenizer"] is None:
        return None
    _size(data / "tokenizer.json")
    template = _read_template(data.parent, header["tokenizer"].get("template"))
    tokenizer = Tokenizer.from_file(data / "tokenizer.json", header["tokenizer"]["eos_ids"])
    if tokenizer.digest != header["tokenizer"]["digest"]:
        raise _damaged(data.parent, "its tokenizer.json has another vocabulary than was saved")
    return dataclasses.replace(tokenizer, template=template)


def _read_json(path: Path) -> dict[str, Any]:
    if (size := _size(path)) > MOST_JSON:
        raise _damaged(path.parent, f"{path.name} has {size} bytes")
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path.parent, f"{path.name} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise _damaged(path.parent, f"{path.name} is not a JSON object")
    return values


# ---------------------------------------------------------------------------------------------------------- the arrays


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One array: what it is a part of ("" : the whole of a dense weight), its shape, and the types it may have."""

    weight: str
    part: str
    shape: tuple[int, ...]
    dtypes: dict[str, str]

    @property
    def file_name(self) -> str:
        return f"{self.weight}.{self.part}" if self.part else self.weight


def _leaves(spec: Spec, prefix: str = "", version: int = VERSION) -> Iterator[_Leaf]:
    """Every array of a Spec's params, as a version of the format has them."""
    formats = dict(spec.weights)
    for name, shape in shapes(spec).items():
        name, fmt = prefix + name, formats.get(name)
        if fmt is None:
            yield _Leaf(name, "", shape, FLOATS)
            continue
        *rows, width = shape
        codes, row = fmt.padded(width), fmt.row
        scales, floats = (*rows, codes // fmt.group_of(width)), KINDS[fmt.scale] if fmt.scale in SMALL else FLOATS
        yield _Leaf(name, "codes", (*rows, codes * row.bits // 8 if row.bits < 8 else codes), KINDS[row.code_dtype])
        if version > 1:
            yield _Leaf(name, "error", (*rows[:-1], 1, 1), FLOATS)
        if row.rule == "none":
            continue
        yield _Leaf(name, "scale", scales, floats)
        if row.minimum:
            yield _Leaf(name, "minimum", scales, floats)
        if row.rule == "zero":
            yield _Leaf(name, "zero", scales, KINDS["uint8"])
        if row.tensor:
            yield _Leaf(name, "outer", (*rows[:-1], 1, 1), FLOATS)
        if fmt.static:
            yield _Leaf(name, "input", (*rows[:-1], 1, 1), FLOATS)
        if row.sub:
            yield _Leaf(name, "inner", (*rows, scales[-1] * row.sub_bytes), KINDS[row.sub_dtype])
    if spec.program is not None:
        yield from _leaves(spec.program.draft, "draft.", version)


def _arrays(spec: Spec, params: Params) -> dict[str, Any]:
    """The weights as orbax gets them: by logical name, an array, or a QTensor's arrays by their names.

    On a CPU these are views of the params: nothing is copied.
    """
    weights, tree = Weights.of(spec, jax.tree.map(np.asarray, params)), {}
    for leaf in _leaves(spec):
        weight = weights[leaf.weight]
        x = getattr(weight, leaf.part) if leaf.part else weight
        if x is None or x.shape != leaf.shape or x.dtype.name not in leaf.dtypes.values():
            found = "nothing" if x is None else f"{x.dtype}{list(x.shape)}"
            raise CheckpointError(
                f"{leaf.file_name} cannot be saved: it is {found}, not {'|'.join(leaf.dtypes.values())}"
                f"{list(leaf.shape)}.",
                why="what is saved must be what the Spec says.",
                fix="params = model.convert(base_params), and no change of their types but between floats",
            )
        _put(tree, leaf, x)
    return tree


class _SavedWeights(LazyWeights):
    """Weights read when they are asked for: those of one stack of layers together, and let go as they are taken."""

    def __init__(self, opened: Opened, spec: Spec, prefix: str = "") -> None:
        self._folder, self._checksums, self._version = opened.arrays, opened.checksums, opened.version
        self._spec, self._prefix = spec, prefix
        self._read: dict[str, Any] = {}
        super().__init__({name: functools.partial(self._take, name) for name in shapes(spec)})

    def _take(self, name: str) -> Any:
        if name not in self._read:
            alike = {self._prefix + n for n in shapes(self._spec) if _within_layer(n) == _within_layer(name)}
            plain = self._spec.replace(program=None)
            leaves = [leaf for leaf in _leaves(plain, self._prefix, self._version) if leaf.weight in alike]
            read = _restore(self._folder, leaves)
            if self._checksums is not None:
                _check_values(self._folder, self._checksums, _checksums(read, leaves))
            self._read |= {n.removeprefix(self._prefix): x for n, x in read.items()}
        x, fmt = self._read.pop(name), self._spec.format_of(name)
        if fmt is None:
            return x
        codes, scale, shape = x.pop("codes"), x.pop("scale", None), shapes(self._spec)[name]
        x.setdefault("error", np.full((*shape[:-2], 1, 1), np.nan, np.float32))
        return QTensor(codes, scale, x.pop("minimum", None), fmt, shape[-2:], **x)


def _within_layer(name: str) -> str:
    return name.split(".", 2)[2] if name.startswith("layers.") else f".{name}"


def _restore(folder: Path, leaves: list[_Leaf]) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    tree: dict[str, Any] = {}
    for leaf in leaves:
        _put(tree, leaf, ocp.RestoreArgs(restore_type=np.ndarray))
    wanted = ocp.args.PyTreeRestore(item=jax.tree.map(lambda _: 0, tree), restore_args=tree, partial_restore=True)
    try:
        with _orbax() as checkpointer:
            return checkpointer.restore(folder, args=wanted)
    except Exception as error:  # orbax and what it stands on raise of many kinds
        raise _damaged(folder.parent.parent, str(error) or type(error).__name__) from error


def _checksums(tree: dict[str, Any], leaves: list[_Leaf]) -> dict[str, str]:
    """The CRC-32 of each array's bytes, which are those of its file, by the name of its folder."""

    def of(leaf: _Leaf) -> str:
        x = tree[leaf.weight][leaf.part] if leaf.part else tree[leaf.weight]
        return f"{zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data):08x}"

    with concurrent.futures.ThreadPoolExecutor() as threads:  # it runs without Python's lock
        return dict(zip((leaf.file_name for leaf in leaves), threads.map(of, leaves), strict=True))


def _check_values(folder: Path, saved: dict[str, str], read: dict[str, str]) -> None:
    for name, found in read.items():
        if saved.get(name) != found:
            raise _damaged(
                folder.parent.parent,
                f"{name} holds other values than were saved (CRC-32 {found}, {HEADER}: {saved.get(name)!r:.20})",
            )


def _put(tree: dict[str, Any], leaf: _Leaf, x: Any) -> None:
    if leaf.part:
        tree.setdefault(leaf.weight, {})[leaf.part] = x
    else:
        tree[leaf.weight] = x


def _formats(spec: Spec) -> dict[str, Format]:
    """The format of each packed weight, a draft's too."""
    own = dict(spec.weights)
    return own if spec.program is None else own | {f"draft.{n}": f for n, f in spec.program.draft.weights}


def _check_arrays(folder: Path, spec: Spec, version: int) -> dict[str, tuple[str, int]]:
    """Raise unless each array is on disk, in the size that the Spec gives it; what `Opened.stored` says."""
    leaves, formats, stored = list(_leaves(spec, version=version)), _formats(spec), dict[str, tuple[str, int]]()
    _check_tree(folder, leaves)
    for leaf in leaves:
        kind, size = _check_array(folder, leaf)
        fmt, (_, before) = formats.get(leaf.weight), stored.get(leaf.weight, ("", 0))
        stored[leaf.weight] = (fmt.name if fmt else kind, before + size)
    return stored


def _check_tree(folder: Path, leaves: list[_Leaf]) -> None:
    """Raise unless orbax's own table lists these arrays, and no other storage than the one that is checked here."""
    table = _read_json(folder / "_METADATA")
    _size(folder / "_CHECKPOINT_METADATA")
    try:
        entries = table["tree_metadata"].values()
        found = {".".join(key["key"] for key in entry["key_metadata"]) for entry in entries}
        plain = all(entry["value_metadata"]["value_type"] == "np.ndarray" for entry in entries)
        plain = plain and not table["use_ocdbt"] and not table["use_zarr3"]
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder.parent.parent, f"_METADATA: {type(error).__name__}: {error}") from error
    wanted = {leaf.file_name for leaf in leaves}
    if missing := sorted(wanted - found):
        raise _damaged(folder.parent.parent, f"it has no array {missing[0]!r}, which its Spec asks for")
    if extra := sorted(found - wanted):
        raise _damaged(folder.parent.parent, f"it holds an array that its Spec does not use, {extra[0]!r:.60}")
    if not plain:
        raise _damaged(folder.parent.parent, "its arrays are stored in another way than save writes")


def _check_array(folder: Path, leaf: _Leaf) -> tuple[str, int]:
    """Its type and bytes; raises unless it has the Spec's shape and a known type, and its file that very size."""
    stack, place = folder.parent.parent, folder / leaf.file_name
    _check_folder(place, stack)
    table = _read_json(place / ".zarray")
    shape = list(leaf.shape)
    if table.get("shape") != shape:
        raise _damaged(stack, f"{leaf.file_name} has shape {table.get('shape')!r:.40}, and its Spec says {shape}")
    if not isinstance(kind := table.get("dtype"), str) or kind not in leaf.dtypes:
        raise _damaged(stack, f"{leaf.file_name} is of type {kind!r:.20}, not {' or '.join(leaf.dtypes.values())}")
    if table != ZARR | {"shape": shape, "chunks": shape, "dtype": kind}:
        raise _damaged(stack, f"{leaf.file_name} is stored in another way than save writes")
    bytes_ = math.prod(shape) * np.dtype(leaf.dtypes[kind]).itemsize
    if (size := _size(place / (".".join("0" * len(shape)) or "0"), stack)) != bytes_:
        raise _damaged(stack, f"{leaf.file_name} has {size} bytes, not {bytes_}")
    return leaf.dtypes[kind], bytes_


@contextlib.contextmanager
def _orbax() -> Iterator[Any]:
    """A checkpointer that copies no arrays, without its remarks on other people's settings."""
    import orbax.checkpoint as ocp

    handlers = ocp.type_handlers
    remarks = logging.getLogger("absl")
    level = remarks.level
    remarks.setLevel(logging.ERROR)
    try:
        registry = handlers.create_type_handler_registry(
            (np.ndarray, handlers.NumpyHandler(deepcopy_host_arrays=False))
        )
        plain = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False, type_handler_registry=registry)
        with ocp.Checkpointer(plain) as checkpointer:
            yield checkpointer
    finally:
        remarks.setLevel(level)


# -------------------------------------------------------------------------------------------------- what is on the disk


def _damaged(folder: Path | str, why: str) -> CheckpointError:
    return CheckpointError(f"the saved stack {folder} is damaged.", why=f"{why}.", fix=AGAIN)


def _size(path: Path, stack: Path | None = None) -> int:
    """Bytes of a plain file; raises where there is none (a link might lead out of the folder, a pipe never end)."""
    try:
        found = path.lstat()
    except OSError as error:
        raise _damaged(stack or path.parent, f"{path.name}: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise _damaged(stack or path.parent, f"{path.name} is not a plain file")
    return found.st_size


def _check_folder(path: Path, stack: Path) -> None:
    """Raise unless a folder is there, and is no link to another place."""
    if path.is_symlink() or not path.is_dir():
        raise _damaged(stack, f"there is no folder {path.name} in it")
