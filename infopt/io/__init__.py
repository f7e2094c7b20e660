"""Reading models: GGUF files, Hugging Face folders, saved stacks, and models by name; and writing them."""

from __future__ import annotations

from pathlib import Path

from infopt.errors import CheckpointError, nearest
from infopt.io.checkpoint import DTYPES, Checkpoint
from infopt.model import FAMILIES, Model, assemble
from infopt.typing import Params

__all__ = ["load"]


def load(name_or_path: str | Path, dtype: str = "float32") -> tuple[Model, Params]:
    """A model and its params, from a file, a folder or a name.

    Args:
      name_or_path: a .gguf file, a Hugging Face folder (config.json, safetensors, tokenizer.json), a folder that
        `infopt.save` wrote, or a name that `infopt.io.hub` knows, such as "smollm2-135m".
      dtype: what the weights become: "float32", "bfloat16" or "float16"; or "keep": a GGUF file's Q4_0, Q4_1 and Q8_0
        blocks stay packed, without loss, as QTensors, and all else becomes float32 (a warning lists what was packed
        in other ways). A saved stack's weights keep the types in which they were saved.

    Returns:
      The model, with its tokenizer where the checkpoint has one, and its params. The weights are read one by one out
      of mapped files: memory is little more than the params' own.

    Raises:
      CheckpointError: the file or folder is damaged, foreign, or holds what this library does not compute.
      FetchError: the name is unknown, or could not be fetched.

    >>> load("model.gguf")
    Traceback (most recent call last):
    infopt.errors.CheckpointError: there is no file or folder 'model.gguf'.
      why: a name with a slash or a file's ending is taken for a path.
      fix: check the path; for a model by name write infopt.load("smollm2-135m")
    """
    if dtype not in DTYPES:
        raise CheckpointError(
            f"weights cannot be read as dtype={dtype!r}.",
            why="those are the types that weights are read to.",
            fix=nearest(str(dtype), list(DTYPES)),
        )
    if (path := Path(name_or_path).expanduser()).is_dir() and (path / "stack.json").exists():
        from infopt.io import saved

        return saved.load(path, dtype)
    checkpoint = _open(str(name_or_path), dtype)
    model = Model.of(
        FAMILIES[checkpoint.family], checkpoint.config, checkpoint.tokenizer, tuple(checkpoint.formats.items())
    )
    return model, assemble(model.spec, checkpoint.weights)


def _open(name: str, dtype: str) -> Checkpoint:
    # The readers are imported where they are needed: each brings a package that the other does without.
    path = Path(name).expanduser()
    if path.is_dir():
        from infopt.io import huggingface

        return huggingface.open_checkpoint(path, dtype)
    if not path.exists():
        if any(mark in name for mark in "/\\~") or path.suffix in (".gguf", ".safetensors", ".bin", ".json"):
            raise CheckpointError(
                f"there is no file or folder {name!r}.",
                why="a name with a slash or a file's ending is taken for a path.",
                fix='check the path; for a model by name write infopt.load("smollm2-135m")',
            )
        from infopt.io import hub

        path = hub.resolve(name)
    if path.name.endswith((".safetensors", ".safetensors.index.json")) or path.name == "config.json":
        raise CheckpointError(
            f"{name!r} is one file of a Hugging Face folder.",
            why="the config and the tokenizer stand in files beside it.",
            fix=f"infopt.load({str(path.parent)!r})",
        )
    from infopt.io import gguf

    return gguf.open_checkpoint(path, dtype)
