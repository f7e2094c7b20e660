"""Dense models as Hugging Face folders: config.json and model.safetensors, which `transformers` loads."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from infopt.errors import CheckpointError, nearest
from infopt.io import disk
from infopt.io.checkpoint import DTYPES, Source, file_shapes, row_chunks
from infopt.io.huggingface import PUBLISHED
from infopt.io.tokenizer import Tokenizer
from infopt.model import Model, Weights, check_params, shapes
from infopt.spec import Config, Spec
from infopt.typing import Params

STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def export(folder: str | Path, model: Model, params: Params, dtype: str | None = None) -> None:
    """Write a dense model as a Hugging Face folder, for `transformers`, and for `ip.load`.

    config.json, model.safetensors, and tokenizer.json with its settings where the model has a tokenizer. A cache and
    its pages are left out, as they change nothing of what is computed. Fewer key/value heads, and windows where the
    family can have them, stand in config.json; what the format cannot say is refused.

    Args:
      folder: a new folder, or an empty one. It is there whole or not at all.
      model, params: a model without packed weights and its params.
      dtype: of the weights: "float32", "bfloat16" or "float16"; by default each keeps its own.

    Raises:
      CheckpointError: weights are packed; the stack computes what a config.json cannot say; the family has no
        counterpart; the folder holds something or cannot be written.
      ParamsError: the params are not the model's.

    >>> import infopt as ip, jax, tempfile
    >>> model = ip.gqa(1)(ip.models.llama())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ip.export(folder + "/pooled", model, model.init(jax.random.key(0)))
    ...     ip.load(folder + "/pooled")[0].spec.config.kv_heads
    1
    """
    folder = Path(folder).expanduser().resolve()
    config = _config_of(model)
    check_params(model.spec, params)
    if dtype is not None and dtype not in STORED:
        raise CheckpointError(
            f"weights cannot be exported as dtype={dtype!r}.",
            why=f"those that can be are {', '.join(STORED)}.",
            fix=nearest(str(dtype), list(STORED)),
        )
    weights = Weights.of(model.spec, jax.tree.map(np.asarray, params))
    types = {name: dtype or weights[name].dtype.name for name in shapes(model.spec)}
    if wrong := [name for name in types if types[name] not in STORED]:
        raise CheckpointError(
            f"{wrong[0]} cannot be exported: it is {types[wrong[0]]}.",
            why=f"the types that can be are {', '.join(STORED)}.",
            fix='dtype="float32"',
        )
    widest = max(types.values(), key=lambda name: DTYPES[name].itemsize)
    settings = PUBLISHED[model.spec.family].write(config) | {"torch_dtype": widest}
    if model.tokenizer is not None:
        ids = [*model.tokenizer.eos_ids]
        settings["eos_token_id"] = (ids if len(ids) > 1 else ids[0]) if ids else None
    with disk.written_beside(folder) as temporary:
        if not disk.is_free(folder):
            raise CheckpointError(
                f"{folder} is there already, and is left alone.",
                why="overwriting might lose something.",
                fix="give another folder, or remove this one",
            )
        _write_json(temporary / "config.json", settings)
        if model.tokenizer is not None:
            _write_tokenizer(temporary, model.tokenizer)
        _write_safetensors(temporary / "model.safetensors", model.spec, weights, types)
        disk.sync(temporary)
        os.rename(temporary, folder)  # fails on a folder that somebody else has filled meanwhile
        disk.sync_entries(folder.parent)


def _config_of(model: Model) -> Config:
    """A config that says all that the stack computes; raises where there is none."""
    spec = model.spec
    if spec.family not in PUBLISHED:
        raise CheckpointError(
            f"a model of the family {spec.family!r} cannot be exported.",
            why=f"those with a counterpart in transformers are {', '.join(PUBLISHED)}.",
            fix="ip.save keeps it, for ip.load",
        )
    config = said_by(model, "a config.json")
    if spec.weights:
        raise CheckpointError(
            f"packed weights cannot be exported: {spec.weights[0][0]} is packed as {spec.weights[0][1].name}.",
            why="transformers has other packings.",
            fix="dense = ip.dequantize()(model); ip.export(folder, dense, dense.convert(params, source=model))",
        )
    return config


def said_by(model: Model, form: str) -> Config:
    """A config that says all that the stack computes, packed weights aside; raises where there is none.

    Args:
      form: what is to say it.
    """
    spec = model.spec
    if spec.program is not None:
        raise CheckpointError(
            "a speculative stack cannot be exported.",
            why="it is two models, and the format holds one.",
            fix="export its target, params['target'], with the model before speculative(...)",
        )
    if spec.kv is not None:
        raise CheckpointError(
            "a stack with rounded keys and values cannot be exported.",
            why=f"{form} cannot say them, and what is written would compute something else.",
            fix="export the model before cache_kv(bits=...), with its params",
        )
    if spec.online:
        raise CheckpointError(
            f"a stack that turns what goes into {', '.join(spec.online)} cannot be exported.",
            why=f"{form} cannot say it, and what is written would compute something else.",
            fix="rotate() without online=True; ip.save keeps it, for ip.load",
        )
    if model.tokenizer is not None and not isinstance(model.tokenizer, Tokenizer):
        raise CheckpointError(
            f"a {type(model.tokenizer).__name__} cannot be exported as the model's tokenizer.",
            why="only infopt's own tokenizers can be written.",
            fix="dataclasses.replace(model, tokenizer=None)",
        )
    return _with_windows(spec, form)


def _with_windows(spec: Spec, form: str) -> Config:
    """The config, with the stack's windows as the family's own."""
    config, seen = spec.config, {window for window in spec.window if window is not None}
    if config.windows() == spec.window:
        return config
    fields = {field.name for field in dataclasses.fields(config)}
    if any(window.sinks for window in seen):
        why = f"{form} cannot say sinks"
    elif "window" not in fields:
        why = f"{form} of {spec.family} cannot say windows"
    elif len(seen) > 1:
        why = f"{form} has one size for all windows, and these are {', '.join(sorted(map(str, seen)))} positions"
    else:
        (window,) = seen
        local = {"local": tuple(window is not None for window in spec.window)} if "local" in fields else {}
        said = dataclasses.replace(config, **{"window": window.size} | local)
        if said.windows() == spec.window:
            return said
        why = f"{form} of {spec.family} cannot say which layers have windows"
    raise CheckpointError(
        f"a {spec.family} with these windows cannot be exported.",
        why=f"{why}, and what is written would compute something else.",
        fix="export the model before sliding_window(...), with its params; ip.save keeps it, for ip.load",
    )


# ---------------------------------------------------------------------------------------------------------- the files


def _write_safetensors(path: Path, spec: Spec, weights: Weights, types: dict[str, str]) -> None:
    """One tensor after another: the library's own writer takes a copy of all of them."""
    wanted = shapes(spec)
    sources = PUBLISHED[spec.family].sources(wanted)
    held: dict[str, list[str]] = {}  # what each tensor holds, in order
    for name in sorted(sources, key=lambda name: sources[name].start):
        for file in sources[name].files:
            held.setdefault(file, []).append(name)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stored: dict[str, np.dtype[Any]] = {}
    end = 0
    for file, shape in file_shapes(sources, wanted).items():
        kinds = {types[name] for name in held[file]}
        kind = kinds.pop() if len(kinds) == 1 else "float32"
        stored[file] = DTYPES[kind]
        start, end = end, end + math.prod(shape) * DTYPES[kind].itemsize
        header[file] = {"dtype": STORED[kind], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begin on a multiple of eight bytes
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for file, dtype in stored.items():
            for rows in _rows(file, [(sources[name], weights[name]) for name in held[file]]):
                out.write(rows.astype(dtype).tobytes())


def _rows(file: str, parts: list[tuple[Source, np.ndarray]]) -> Iterator[np.ndarray]:
    """A tensor out of the weights that it holds, a few rows at a time."""
    if parts[0][0].stacked:  # an expert after the other, the rows of several weights in turn
        for expert in zip(*(x for _, x in parts)):
            rows = np.stack(expert, 1).reshape(-1, *expert[0].shape[1:])
            yield rows.T if parts[0][0].transposed else rows
        return
    held = [x[where.files.index(file)] if len(where.files) > 1 else x for where, x in parts]
    if parts[0][0].transposed:
        shape = held[0].shape[1], sum(x.shape[0] for x in held)
        yield from (np.concatenate([x[:, part].T for x in held], axis=1) for part in row_chunks(shape))
    else:
        yield from (x[part] for x in held for part in row_chunks(x.shape))


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    (folder / "tokenizer.json").write_text(tokenizer.backend.to_str(), encoding="utf-8")
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if tokenizer.eos_ids:
        settings["eos_token"] = tokenizer.backend.id_to_token(tokenizer.eos_ids[0])
    if (template := tokenizer.template) is not None:
        settings |= template.special
        (folder / "chat_template.jinja").write_text(template.source, encoding="utf-8")
        if template.tool_use is not None:
            (folder / "additional_chat_templates").mkdir()
            (folder / "additional_chat_templates" / "tool_use.jinja").write_text(template.tool_use, encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
