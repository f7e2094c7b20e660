"""A file that may not be read: one error that names it, whatever the format. By injected errors: root may read all."""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

import infopt as ip
from infopt.errors import CheckpointError
from infopt.io import huggingface
from infopt.io.tokenizer import Tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`closed(name)`: from now on no file of that name is opened."""
    real, real_safetensors = io.open, huggingface.safe_open

    def close(name: str) -> None:
        def refuse(path: Any) -> None:
            if isinstance(path, str | os.PathLike) and Path(path).name == name:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

        def opened(path: Any, *args: Any, **kwargs: Any) -> Any:
            refuse(path)
            return real(path, *args, **kwargs)

        def opened_safetensors(path: Any, *args: Any, **kwargs: Any) -> Any:
            refuse(path)
            return real_safetensors(path, *args, **kwargs)

        for module in (builtins, io):
            monkeypatch.setattr(module, "open", opened)
        monkeypatch.setattr(huggingface, "safe_open", opened_safetensors)

    return close


FILES = (
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_folder_with_a_closed_file_is_refused(name: str, tmp_path: Path, closed: Callable[[str], None]) -> None:
    folder = tmp_path / "m"
    shutil.copytree(FIXTURES / "llama", folder)
    tokenizer = Tokenizer.from_tables(["a", "<s>"], [], [1, 3], "gpt-2").backend.to_str()
    texts = {"tokenizer.json": tokenizer, "chat_template.jinja": "x"}
    for file in FILES[2:]:
        (folder / file).write_text(texts.get(file, "{}"))
    ip.load(folder)
    closed(name)
    with pytest.raises(CheckpointError) as caught:
        ip.load(folder)
    assert name in caught.value.what and "Permission denied" in caught.value.why


def test_a_closed_gguf_file_is_refused(
    llama_gguf: Callable[..., Any], tmp_path: Path, closed: Callable[[str], None]
) -> None:
    path = llama_gguf().write(tmp_path / "m.gguf")
    closed("m.gguf")
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        ip.load(path)
    assert caught.value.why == "Permission denied" and "permissions" in caught.value.fix


@pytest.mark.parametrize("name", ["stack.json", "_METADATA", ".zarray"])
def test_a_saved_stack_with_a_closed_file_is_refused(
    name: str, tmp_path: Path, closed: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ip.models.llama(layers=1, dim=8, heads=2, kv_heads=1, head_dim=4, mlp=8, vocab=11, context=32)
    ip.save(tmp_path / "stack", model, model.init(jax.random.key(0)))
    closed(name)
    with pytest.raises(CheckpointError) as caught:
        ip.load(tmp_path / "stack")
    assert "Permission denied" in caught.value.why and name in caught.value.why
