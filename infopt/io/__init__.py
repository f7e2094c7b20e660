"""Reading models: GGUF files, Hugging Face folders, saved stacks, and models by name; and writing them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from infopt.errors import CheckpointError, nearest

# What brings JAX is imported inside: `infopt list`, `pull` and `rm` need none of it.
if TYPE_CHECKING:
    from infopt.io.checkpoint import Checkpoint
    from infopt.model import Model
    from infopt.typing import Params

__all__ = ["load", "open_checkpoint", "open_model"]


def load(name_or_path: str | Path, dtype: str = "float32", context: int | None = None) -> tuple[Model, Params]:
    """A model and its params, from a file, a folder or a name.

    Args:
      name_or_path: a .gguf file, a Hugging Face folder (config.json, safetensors, tokenizer.json), a folder that
        `infopt.save` wrote, or a name: one of infopt's own ("smollm2-135m"), a model of the Hugging Face hub
        ("hf:owner/name", "hf:owner/name@revision", "hf:owner/name:file.gguf"), or an alias of your own. What is not on
        this machine is fetched.
      dtype: what the weights become: "float32", "bfloat16" or "float16"; or "keep": what a quantised checkpoint holds
        packed stays so, without loss, as QTensors, and all else becomes float32. That is a GGUF file's Q4_0, Q4_1,
        Q8_0, Q4_K, Q5_K and Q6_K blocks (a warning lists what was packed in other ways), and the codes and scales of
        GPTQ, AWQ, FP8, MXFP4 and compressed-tensors. A saved stack's weights keep the types in which they were saved.
      context: tokens that a text will have at most. Models whose positions are stretched by how long a text is (dynamic
        and longrope scaling) are stretched for this length; others are just held to it. The model's own by default.

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
    from infopt.io import names
    from infopt.model import assemble

    path = names.locate(name_or_path)
    if is_saved(path):
        from infopt.io import saved

        if context is not None:
            raise CheckpointError(
                f"{path} is a saved stack, whose context is settled.",
                why="its positions may be stretched for it.",
                fix="leave context out, or load the checkpoint that the stack was made of",
            )
        return saved.load(path, dtype)
    checkpoint = open_checkpoint(path, dtype, context)
    model = _model_of(checkpoint)
    return model, assemble(model.spec, checkpoint.weights)


def open_model(name_or_path: str | Path, dtype: str = "float32", fetch: bool = True) -> tuple[Model, str]:
    """What `load` would give without its params, and the type that their dense weights would have. Reads no weights.

    Args:
      name_or_path, dtype: as for `load`.
      fetch: whether a model that is not on this machine is fetched.

    Raises:
      CheckpointError, FetchError: as for `load`.
    """
    from infopt.io import names
    from infopt.io.checkpoint import DTYPES

    path = names.locate(name_or_path, fetch)
    if is_saved(path):
        from infopt.io import saved

        opened = saved.open_stack(path, dtype)
        return opened.model, opened.dtype
    return _model_of(open_checkpoint(path, dtype)), str(DTYPES[dtype])


def is_saved(path: Path) -> bool:
    """Whether a folder is one that `infopt.save` wrote."""
    return (path / "stack.json").is_file()


def _model_of(checkpoint: Checkpoint) -> Model:
    from infopt.model import FAMILIES, Model

    formats = tuple(checkpoint.formats.items())
    return Model.of(FAMILIES[checkpoint.family], checkpoint.config, checkpoint.tokenizer, formats)


def open_checkpoint(
    name_or_path: str | Path, dtype: str = "float32", context: int | None = None, fetch: bool = True
) -> Checkpoint:
    """A model's config and tokenizer, and its weights to be read when they are asked for.

    Args:
      name_or_path, dtype, context: as for `load`.
      fetch: whether a model that is not on this machine is fetched.

    Raises:
      CheckpointError, FetchError: as for `load`.
    """
    from infopt.io import names
    from infopt.io.checkpoint import DTYPES

    if dtype not in DTYPES:
        raise CheckpointError(
            f"weights cannot be read as dtype={dtype!r}.",
            why="those are the types that weights are read to.",
            fix=nearest(str(dtype), list(DTYPES)),
        )
    path = names.locate(name_or_path, fetch)
    # The readers are imported where they are needed: each brings a package that the other does without.
    if path.is_dir():
        from infopt.io import huggingface

        return huggingface.open_checkpoint(path, dtype, context)
    if path.name.endswith((".safetensors", ".safetensors.index.json")) or path.name == "config.json":
        raise CheckpointError(
            f"{str(name_or_path)!r} is one file of a Hugging Face folder.",
            why="the config and the tokenizer stand in files beside it.",
            fix=f"infopt.load({str(path.parent)!r})",
        )
    from infopt.io import gguf

    return gguf.open_checkpoint(path, dtype, context)
