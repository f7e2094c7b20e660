"""The models on this machine: `infopt pull`, `infopt list`, `infopt show`, `infopt rm`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from infopt.errors import FetchError, human
from infopt.io import hf, hub, is_saved, names

if TYPE_CHECKING:
    from infopt.model import Model


def pull(args: argparse.Namespace) -> int:
    """Fetches models, and says where they are."""
    for name in args.names:
        path = names.follow(name).pull()
        licence = _card(path) if path.is_dir() else None  # a GGUF file's own is read with JAX: `show` tells it
        print(f"{name}: {human(_size(path))} in {path}" + (f"; licence: {licence}" if licence else ""))
    return 0


def rm(args: argparse.Namespace) -> int:
    """Deletes models from the caches, and says what was freed."""
    for name in args.names:
        target = names.follow(name)
        freed = target.remove()
        print(f"{name}: {human(freed)} freed")
        if target.alias:
            print(f"the alias {name} is still in {names.config_file()}", file=sys.stderr)
    return 0


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of `infopt list`; a size or date that is not known is None."""

    name: str
    size: int | None
    modified: float | None
    where: str


def rows() -> list[Row]:
    """The models that have a name: infopt's own, those in the hub's cache, and the user's aliases."""
    return [*_own(), *_of_the_hub(), *_aliases()]


def _own() -> Iterator[Row]:
    for name in hub.known():
        if path := hub.cached(name):
            yield Row(name, _size(path), path.stat().st_mtime, str(path))
        else:
            yield Row(name, None, None, f"not here: infopt pull {name}")


def _of_the_hub() -> Iterator[Row]:
    for entry in hf.entries():
        where = str(entry.path) if entry.whole else f"unfinished: infopt pull {entry.name}"
        yield Row(entry.name, entry.size, entry.modified, where)


def _aliases() -> Iterator[Row]:
    for name, end in sorted(names.aliases().items()):
        try:
            path = names.follow(name).cached()
        except FetchError as error:
            yield Row(name, None, None, error.what)
            continue
        if path is None:
            yield Row(name, None, None, f"{end} (not here)")
        else:
            yield Row(name, _size(path), path.stat().st_mtime, end)


def list_(args: argparse.Namespace) -> int:
    """Prints what is here: names, sizes, dates, and where."""
    table = [("NAME", "SIZE", "MODIFIED", "WHERE")]
    for row in rows():
        date = "-" if row.modified is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(row.modified))
        table.append((row.name, "-" if row.size is None else human(row.size), date, row.where))
    widths = [max(len(line[i]) for line in table) for i in range(3)]
    for name, size, date, where in table:
        print(f"{name:<{widths[0]}}  {size:>{widths[1]}}  {date:<{widths[2]}}  {where}")
    return 0


def families(args: argparse.Namespace) -> int:
    """Prints the families that there are, and what their checkpoints are called."""
    print(families_table())
    return 0


def families_table() -> str:
    """The registry as a Markdown table, which the README holds."""
    import importlib

    from infopt.io import gguf, huggingface
    from infopt.model import FAMILIES

    of_hub: dict[str, list[str]] = {}
    for kind, family in huggingface.MODEL_TYPES.items():
        of_hub.setdefault(family, []).append(f"`{kind}`")
    lines = ["| family | what it is | Hugging Face `model_type` | GGUF architecture |", "|---|---|---|---|"]
    for family in sorted(of_hub):
        module = importlib.import_module(FAMILIES[family].block.__module__)
        told = " ".join((module.__doc__ or "").split("\n\n")[0].split()).rstrip(".")
        archs = ", ".join(f"`{arch}`" for arch, name in gguf.ARCHITECTURES.items() if family in name)
        lines.append(f"| {family} | {told} | {', '.join(of_hub[family])} | {archs or 'none of its own'} |")
    return "\n".join(lines)


def show(args: argparse.Namespace) -> int:
    """Prints what a model is, without reading its weights."""
    from infopt.io import open_model  # it brings JAX, which the other commands do without

    path = names.locate(args.name, fetch=False)
    model, _ = open_model(path, "keep")
    c, tokenizer = model.spec.config, model.tokenizer
    config = {key: value for key, value in dataclasses.asdict(c).items() if value is not None}
    stored = ", ".join(f"{kind} {human(size)} ({count})" for kind, (size, count) in _stored(path).items())
    lines = {
        "where": f"{path} ({human(_size(path))})",
        "family": model.spec.family,
        "stack": f"{model.recipe}, {'exact' if model.exact else 'not exact'}" if is_saved(path) else None,
        "licence": _licence(path) or "the files do not say",
        "parameters": _parameters(model),
        "weights": f"{stored}: the type, the bytes and the number of weights",
        "context": f"{c.context:,} tokens",
        "cache": _token_bytes(model),
        "tokenizer": f"{tokenizer.vocab_size:,} tokens, ends a text at {list(tokenizer.eos_ids)}"
        if tokenizer
        else "none",
        "config": ", ".join(f"{key}={json.dumps(value)}" for key, value in config.items()),
    }
    for key, value in lines.items():
        if value is not None:
            print(f"{key:<10}  {value}")
    return 0


def _parameters(model: Model) -> str:
    from infopt.model import shapes

    program = model.spec.program
    own, draft = (
        sum(math.prod(shape) for shape in shapes(spec).values()) if spec else 0
        for spec in (model.spec, program and program.draft)
    )
    return f"{own:,}" + f", and {draft:,} of its draft" * (program is not None)


def _token_bytes(model: Model) -> str:
    """Cache bytes a token: the stack's own, or, where it has no cache yet, with one."""
    from infopt.transforms import cache_kv

    if model.spec.cache:
        return f"{model.token_bytes():,} bytes a token"
    dense, packed = (cache_kv(bits)(model).token_bytes() for bits in (None, 8))
    return f"{dense:,} bytes a token in float32, {packed:,} with cache_kv(bits=8)"


def _size(path: Path) -> int:
    """Bytes of a file (and the parts that it is split into), or of a folder's files."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return sum(file.stat().st_size for part in hf.parts(path.name) if (file := path.with_name(part)).is_file())


def _stored(path: Path) -> dict[str, tuple[int, int]]:
    """How the weights lie in the file: by type, the bytes and the number of tensors, the most bytes first."""
    out: dict[str, tuple[int, int]] = {}

    def add(kind: str, size: int) -> None:
        out[kind] = (out.get(kind, (0, 0))[0] + size, out.get(kind, (0, 0))[1] + 1)

    if is_saved(path):
        from infopt.io import saved

        for kind, size in saved.open_stack(path, "keep").stored.values():
            add(kind, size)
    elif path.is_dir():
        index = path / hf.INDEX
        for file in hf.shards(index) if index.exists() else [hf.WEIGHTS]:
            for tensor in _safetensors_header(path / file).values():
                add(tensor["dtype"], tensor["data_offsets"][1] - tensor["data_offsets"][0])
    else:
        from infopt.io import gguf

        for tensor in gguf.open_file(path).tensors.values():
            add(tensor.type.name, tensor.rows.nbytes)
    return dict(sorted(out.items(), key=lambda item: -item[1][0]))


def _safetensors_header(path: Path) -> dict[str, dict]:
    # `open_checkpoint` has read the file: it is whole, and its header is sound.
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    return {name: tensor for name, tensor in header.items() if name != "__metadata__"}


def _licence(path: Path) -> str | None:
    """What a GGUF file's metadata, or the card beside a folder's files, says."""
    if path.is_dir():
        return _card(path)
    from infopt.io import gguf

    said = gguf.open_file(path).fields.get("general.license")
    return _printable(said) if isinstance(said, str) else None


def _card(folder: Path) -> str | None:
    """What the first lines of a folder's README.md say of its licence, or else the first line of its LICENSE."""
    front = re.match(r"---\n(.*?)\n---", _beginning(folder / "README.md"), re.S)
    said = dict(re.findall(r"^(license(?:_name)?):[ \t]*['\"]?([\w.+-]+)", front[1], re.M)) if front else {}
    if found := said.get("license"):
        return f"{found} ({said['license_name']})" if "license_name" in said else found
    texts = [_beginning(folder / name).strip() for name in hf.CARDS[1:]]
    return next((_printable(text.splitlines()[0]) for text in texts if text), None)


def _beginning(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(1 << 16).decode("utf-8", "replace").replace("\r\n", "\n")
    except OSError:  # it is not there, or not for us to read: what it would have said is not worth an error
        return ""


def _printable(text: str) -> str:
    """A stranger's words as a terminal may show them."""
    return "".join(c if c.isprintable() else " " for c in text[:100]).strip()
