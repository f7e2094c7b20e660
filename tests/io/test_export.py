"""Exported folders: what `transformers` reads of them is what was computed here."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors import safe_open

import infopt as ip
from infopt.errors import CheckpointError, ParamsError
from infopt.io.chat_template import ChatTemplate
from infopt.io.export import CONFIGS
from infopt.io.tokenizer import Tokenizer
from infopt.model import FAMILIES as DEFINED
from infopt.model import Weights
from infopt.testing import base_of

FIXTURES = Path(__file__).parents[1] / "fixtures"
GOLDEN = {"llama": ("llama", ""), "llama_pooled": ("llama", "gqa(1)"), "llama_tied": ("llama_tied", ""),
          "gemma3": ("gemma3", "")}  # fmt: skip


def same_weights(a: tuple[ip.Model, Any], b: tuple[ip.Model, Any]) -> bool:
    one, two = (Weights.of(model.spec, params) for model, params in (a, b))
    return set(one) == set(two) and all(
        one[name].dtype == two[name].dtype and np.array_equal(one[name], two[name]) for name in one
    )


def words(ends: tuple[int, ...]) -> Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend, ends)


@pytest.mark.parametrize("name", GOLDEN)
def test_transformers_computes_the_same_with_an_exported_folder(name: str, tmp_path: Path) -> None:
    golden = np.load(FIXTURES / "export_golden.npz")
    source, stack = GOLDEN[name]
    model, params = ip.load(FIXTURES / source)
    transform = ip.parse_stack(stack)
    pooled = transform(model)
    params = pooled.convert(params)
    ip.export(tmp_path / "out", pooled, params)
    # The very files that transformers read when the golden was made:
    assert (tmp_path / "out" / "config.json").read_text() == str(golden[f"{name}/config"])
    digest = hashlib.sha256((tmp_path / "out" / "model.safetensors").read_bytes()).hexdigest()
    assert digest == str(golden[f"{name}/sha256"])
    want = golden[f"{name}/logits"]
    got = np.asarray(pooled.apply(params, jnp.asarray(golden[f"{name}/tokens"]))[0][0])[golden["positions"]]
    assert np.abs(got - want).max() < 1e-4 * want.std()


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("stack", ["", "gqa(1)", "gqa(1) | cache_kv() | paged(4)", "quantize(bits=8) | dequantize()"])
def test_an_exported_model_loads_again_bit_for_bit(family: str, stack: str, tmp_path: Path) -> None:
    base, params = base_of(family)
    model = ip.parse_stack(stack)(base)
    params = model.convert(params)
    ip.export(tmp_path / "out", model, params)
    loaded = ip.load(tmp_path / "out")
    assert loaded[0].spec == model.spec.replace(cache=False, page=None)
    assert same_weights(loaded, (model, params))
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["num_key_value_heads"] == model.spec.config.kv_heads
    )


@pytest.mark.parametrize("source", ["llama", "llama_tied", "gemma3"])
def test_a_published_checkpoint_goes_through_unchanged(source: str, tmp_path: Path) -> None:
    model, params = ip.load(FIXTURES / source)
    ip.export(tmp_path / "out", model, params)
    loaded = ip.load(tmp_path / "out")
    assert loaded[0] == model
    assert same_weights(loaded, (model, params))


def test_a_pattern_that_the_older_key_cannot_say_is_said_by_layer(tmp_path: Path) -> None:
    model = ip.models.gemma3(layers=4, pattern=(False, True), window=3)
    ip.export(tmp_path / "out", model, model.init(jax.random.key(0)))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_types"] == ["full_attention", "sliding_attention"] * 2
    assert "sliding_window_pattern" not in config
    assert ip.load(tmp_path / "out")[0] == model


@pytest.mark.parametrize(("dtype", "stored"), [("float32", "F32"), ("bfloat16", "BF16"), ("float16", "F16")])
def test_weights_are_written_in_the_type_asked_for(dtype: str, stored: str, tmp_path: Path) -> None:
    model, params = base_of("llama")
    ip.export(tmp_path / "out", model, params, dtype=dtype)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {stored}  # noqa: SIM118 (not a dict)
        assert file.metadata() == {"format": "pt"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype
    half = jax.tree.map(lambda x: x.astype(dtype), params)
    loaded = ip.load(tmp_path / "out", dtype=dtype)
    assert same_weights(loaded, (model, half))
    ip.export(tmp_path / "kept", model, half)
    assert (tmp_path / "kept" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes(), "without a type asked for, each weight keeps its own"


@pytest.mark.parametrize(("ends", "said"), [((7,), 7), ((7, 9), [7, 9]), ((), None)])
def test_the_tokenizer_goes_along(ends: tuple[int, ...], said: Any, tmp_path: Path) -> None:
    base, params = base_of("llama")
    model = ip.Model(base.spec, tokenizer=words(ends))
    ip.export(tmp_path / "out", model, params)
    tokenizer = ip.load(tmp_path / "out")[0].tokenizer
    assert tokenizer == model.tokenizer
    assert tokenizer.eos_ids == ends
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == said
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings.get("eos_token") == (f"w{ends[0]}" if ends else None)


@pytest.mark.parametrize(
    ("stack", "what", "fix"),
    [
        ("quantize(bits=4, group=16)", "packed as int4", "ip.dequantize()"),
        ("cache_kv() | speculative(self_draft(), k=2)", "speculative stack", "params['target']"),
        ("sliding_window(6)", "windows", "before sliding_window"),
        ("cache_kv(bits=8)", "rounded keys and values", "cache_kv(bits=...)"),
    ],
)
def test_what_a_config_cannot_say_is_refused_with_the_fix(stack: str, what: str, fix: str, tmp_path: Path) -> None:
    base, params = base_of("llama")
    model = ip.parse_stack(stack)(base)
    with pytest.raises(CheckpointError) as refused:
        ip.export(tmp_path / "out", model, model.convert(params))
    assert what in refused.value.what
    assert fix in refused.value.fix
    assert list(tmp_path.iterdir()) == []


def test_the_fix_for_packed_weights_works(tmp_path: Path) -> None:
    base, params = base_of("llama")
    model = ip.quantize(bits=8)(base)
    params = model.convert(params)
    dense = ip.dequantize()(model)
    ip.export(tmp_path / "out", dense, dense.convert(params, source=model))
    assert ip.load(tmp_path / "out")[0].spec == base.spec


def test_a_family_without_a_counterpart_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEFINED, "own", dataclasses.replace(DEFINED["llama"], name="own"))
    model = ip.Model.of(DEFINED["own"], base_of("llama")[0].spec.config)
    with pytest.raises(CheckpointError, match=r"family 'own' cannot be exported"):
        ip.export(tmp_path / "out", model, model.init(jax.random.key(0)))


def test_wrong_params_types_and_tokenizers_are_refused(tmp_path: Path) -> None:
    model, params = base_of("llama")
    with pytest.raises(ParamsError):
        ip.export(tmp_path / "out", model, base_of("gemma3")[1])
    with pytest.raises(CheckpointError, match="dtype='int8'"):
        ip.export(tmp_path / "out", model, params, dtype="int8")
    with pytest.raises(CheckpointError, match="it is int32"):
        ip.export(tmp_path / "out", model, jax.tree.map(lambda x: x.astype(jnp.int32), params))
    with pytest.raises(CheckpointError, match="a str cannot be exported as the model's tokenizer"):
        ip.export(tmp_path / "out", dataclasses.replace(model, tokenizer="bytes"), params)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [lambda p: p.write_text("mine"), lambda p: (p.mkdir(), (p / "a").write_text("mine"))])
def test_what_is_there_is_left_alone(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / "out")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    model, params = base_of("llama")
    with pytest.raises(CheckpointError, match="left alone"):
        ip.export(tmp_path / "out", model, params)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    model, params = base_of("llama")
    ip.export(tmp_path, model, params)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("call", ["rename", "fsync", "mkdir"])
def test_an_export_that_fails_leaves_nothing(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    model, params = base_of("llama")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(CheckpointError, match="could not be written") as refused:
            ip.export(tmp_path / "out", model, params)
    assert os.strerror(number) in refused.value.why
    assert ("space" in refused.value.fix) == (number == errno.ENOSPC)
    assert list(tmp_path.iterdir()) == []


def test_the_chat_template_goes_along(tmp_path: Path) -> None:
    template = ChatTemplate("{{ bos_token }}{{ messages[0].content }}", "{{ tools }}", {"bos_token": "<s>"})
    model, params = ip.load(FIXTURES / "llama")
    model = dataclasses.replace(model, tokenizer=dataclasses.replace(words((3,)), template=template))
    ip.export(tmp_path / "out", model, params)
    tokenizer = ip.load(tmp_path / "out")[0].tokenizer
    assert tokenizer.chat([{"role": "user", "content": "Hi"}]) == "<s>Hi"
    assert tokenizer.template.tool_use == "{{ tools }}"
