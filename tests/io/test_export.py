"""Exported folders: what `transformers` reads of them is what was computed here."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import sys
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
from infopt.io.huggingface import PUBLISHED
from infopt.io.tokenizer import Tokenizer
from infopt.model import FAMILIES as DEFINED
from infopt.model import Weights
from infopt.spec import LinearRope, Llama3Rope, TableRope, YarnRope
from infopt.testing import base_of

FIXTURES = Path(__file__).parents[1] / "fixtures"
sys.path.insert(0, str(FIXTURES))
from make_export_golden import MODELS, changed  # noqa: E402

CHECKPOINTS = ["llama", "llama_tied", "gemma3", "mistral", "smollm3", "qwen2", "qwen3", "phi3", "gemma2", "gpt2",
               "mixtral", "qwen3_moe", "gpt_oss"]  # fmt: skip


def same_weights(a: tuple[ip.Model, Any], b: tuple[ip.Model, Any]) -> bool:
    one, two = (Weights.of(model.spec, params) for model, params in (a, b))
    return set(one) == set(two) and all(
        one[name].dtype == two[name].dtype and np.array_equal(one[name], two[name]) for name in one
    )


def small(family: str) -> tuple[ip.Model, Any]:
    """A family's small model; GPT-2's heads are dim / heads wide, as a config.json of it cannot say another width."""
    if family != "gpt2":
        return base_of(family)
    model = ip.models.gpt2(layers=2, dim=32, heads=4, mlp=48, vocab=61, context=64, tied=False)
    return model, model.init(jax.random.key(3))


def words(ends: tuple[int, ...]) -> Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend, ends)


def tensors(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Each tensor of a folder: its type, shape and bytes, read without the library."""
    found = {}
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        for name, about in json.loads(data[8:end]).items():
            if name != "__metadata__":
                start, stop = about["data_offsets"]
                found[name] = about["dtype"], about["shape"], data[end + start : end + stop]
    return found


def test_every_family_is_published_and_each_has_a_golden(own_families: frozenset[str]) -> None:
    defined = {name: DEFINED[name] for name in own_families}
    assert set(PUBLISHED) == set(defined) == {source for source, _, _ in MODELS.values()} - {"llama_tied", "ropes"}
    assert {row.config for row in PUBLISHED.values()} == {family.config for family in defined.values()}


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same_with_an_exported_folder(name: str, tmp_path: Path) -> None:
    golden = np.load(FIXTURES / "export_golden.npz")
    model, params = changed(name)
    ip.export(tmp_path / "out", model, params)
    # The very files that transformers read when the golden was made:
    assert (tmp_path / "out" / "config.json").read_text() == str(golden[f"{name}/config"])
    digest = hashlib.sha256((tmp_path / "out" / "model.safetensors").read_bytes()).hexdigest()
    assert digest == str(golden[f"{name}/sha256"])
    want = golden[f"{name}/logits"]
    got = np.asarray(model.apply(params, jnp.asarray(golden[f"{name}/tokens"]))[0][0])[golden["positions"]]
    assert np.abs(got - want).max() < 1e-4 * want.std()


@pytest.mark.parametrize("source", CHECKPOINTS)
def test_a_published_checkpoint_goes_through_unchanged(source: str, tmp_path: Path) -> None:
    model, params = ip.load(FIXTURES / source)
    ip.export(tmp_path / "out", model, params)
    loaded = ip.load(tmp_path / "out")
    assert loaded[0] == model
    assert same_weights(loaded, (model, params))
    assert tensors(tmp_path / "out") == tensors(FIXTURES / source)


@pytest.mark.parametrize("family", PUBLISHED)
@pytest.mark.parametrize("stack", ["", "gqa(1) | cache_kv() | paged(4)", "quantize(bits=8) | dequantize()"])
def test_an_exported_model_loads_again_bit_for_bit(family: str, stack: str, tmp_path: Path) -> None:
    base, params = small(family)
    model = ip.parse_stack(stack)(base)
    params = model.convert(params)
    if family == "gpt2" and "gqa" in stack:
        with pytest.raises(CheckpointError, match=r"(?s)gpt2 with kv_heads=1 cannot be .* it would be read as 4"):
            ip.export(tmp_path / "out", model, params)
        return
    ip.export(tmp_path / "out", model, params)
    loaded = ip.load(tmp_path / "out")
    assert loaded[0].spec == model.spec.replace(cache=False, page=None)
    assert same_weights(loaded, (model, params))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("num_key_value_heads", 4) == model.spec.config.kv_heads


@pytest.mark.parametrize("family", PUBLISHED)
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_written_where_there_is_one(family: str, tied: bool, tmp_path: Path) -> None:
    base = small(family)[0].spec
    model = ip.Model.of(DEFINED[family], dataclasses.replace(base.config, tied=tied))
    params = model.init(jax.random.key(1))
    ip.export(tmp_path / "out", model, params)
    assert ("lm_head.weight" in tensors(tmp_path / "out")) == (not tied)
    loaded = ip.load(tmp_path / "out")
    assert loaded[0].spec == model.spec
    assert same_weights(loaded, (model, params))


WINDOWED = [
    ("mistral", "sliding_window(5)", 5), ("mixtral", "sliding_window(5)", 5), ("qwen3_moe", "sliding_window(5)", 5),
    ("phi3", "sliding_window(5)", 5), ("qwen2", "sliding_window(5)", 5), ("gemma2", "sliding_window(5)", 5),
    ("qwen2", "sliding_window(5, layers=[1, 2])", 5), ("qwen3", "sliding_window(5, layers=[0])", 5),
    ("gpt_oss", "sliding_window(5)", 5), ("gpt_oss", "sliding_window(5, layers=[0, 2])", 5),
    ("gemma3", "sliding_window(5, layers=[0, 2, 4])", 5), ("gemma2", "sliding_window(5, layers=[0, 2])", 5),
]  # fmt: skip


@pytest.mark.parametrize(("family", "stack", "size"), WINDOWED)
def test_windows_that_a_family_can_have_become_its_own(family: str, stack: str, size: int, tmp_path: Path) -> None:
    base, params = small(family)
    model = ip.parse_stack(stack)(base)
    params = model.convert(params)
    ip.export(tmp_path / "out", model, params)
    loaded, again = ip.load(tmp_path / "out")
    assert loaded.spec.window == loaded.spec.config.windows() == model.spec.window
    assert json.loads((tmp_path / "out" / "config.json").read_text())["sliding_window"] == size
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, base.spec.config.vocab, (1, 20)))
    np.testing.assert_array_equal(loaded.apply(again, tokens)[0], model.apply(params, tokens)[0])


@pytest.mark.parametrize(
    ("family", "stack", "why"),
    [
        ("llama", "sliding_window(6)", "of llama cannot say windows"),
        ("smollm3", "sliding_window(6)", "of smollm3 cannot say windows"),
        ("gpt2", "sliding_window(6)", "of gpt2 cannot say windows"),
        ("mistral", "sliding_window(6, sinks=2)", "cannot say sinks"),
        ("mistral", "sliding_window(6, layers=[1])", "one size for all windows, and these are 6, 9 positions"),
        ("mixtral", "sliding_window(6, layers=[1])", "of mixtral cannot say which layers"),
        ("gemma3", "sliding_window(6)", "of gemma3 cannot say which layers"),
        ("gemma2", "sliding_window(9)", "these are 7, 9 positions"),
    ],
)
def test_windows_that_a_family_cannot_have_are_refused(family: str, stack: str, why: str, tmp_path: Path) -> None:
    base, params = small(family)
    with pytest.raises(CheckpointError) as refused:
        ip.export(tmp_path / "out", ip.parse_stack(stack)(base), params)
    assert why in refused.value.why
    assert "before sliding_window" in refused.value.fix
    assert list(tmp_path.iterdir()) == []


ROPES = {
    "linear": LinearRope(factor=2.5),
    "llama3": Llama3Rope(factor=4.0, low_freq_factor=1.0, high_freq_factor=3.0, original_context=16),
    "yarn": YarnRope(factor=3.0, original_context=16, beta_fast=4.0, attention_factor=1.25, truncate=False),
    "table": TableRope(divisors=(1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0), attention_factor=1.1),
}


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("family", [name for name in PUBLISHED if name not in ("gpt2", "phi3")])
def test_stretched_positions_are_said(family: str, kind: str, tmp_path: Path) -> None:
    base = base_of(family)[0].spec
    model = ip.Model.of(DEFINED[family], dataclasses.replace(base.config, rope_scaling=ROPES[kind]))
    ip.export(tmp_path / "out", model, model.init(jax.random.key(0)))
    assert ip.load(tmp_path / "out")[0] == model


@pytest.mark.parametrize("context", [16, 40])
def test_a_stretch_that_the_context_settled_is_written_as_settled(context: int, tmp_path: Path) -> None:
    ropes = tmp_path / "ropes"
    ropes.mkdir()
    shutil.copy(FIXTURES / "ropes" / "config_dynamic.json", ropes / "config.json")
    shutil.copy(FIXTURES / "ropes" / "model.safetensors", ropes)
    for source in (ropes, FIXTURES / "phi3"):
        model, params = ip.load(source, context=context)
        ip.export(tmp_path / source.name / "out" if source == ropes else tmp_path / "out", model, params)
        assert ip.load(ropes / "out" if source == ropes else tmp_path / "out")[0] == model


@pytest.mark.parametrize("head_dim", [8, 10, 16, 24, 96, 98, 126, 128])
def test_heads_turned_in_part_are_said_to_the_last_value(head_dim: int) -> None:
    row = PUBLISHED["phi3"]
    for rotated in range(2, head_dim, 2):
        config = ip.models.phi3(head_dim=head_dim, rotated=rotated).spec.config
        assert int(head_dim * row.write(config)["partial_rotary_factor"]) == rotated


@pytest.mark.parametrize(
    ("family", "options", "what"),
    [
        ("phi3", {"rope_scaling": ROPES["yarn"]}, "stretched by 'yarn'"),
        ("phi3", {"rope_scaling": TableRope(divisors=(1.0,) * 4), "head_dim": 8}, "head_dim other than dim / heads"),
        ("gemma2", {"query_scale": 6.5}, "query_scale=6.5"),
        ("llama", {"dim": 30, "head_dim": 8}, "dim=30 and heads=4"),
        ("gpt2", {"head_dim": 8}, "gpt2 with head_dim=8"),
    ],
)
def test_a_config_that_transformers_would_not_read_is_refused(
    family: str, options: dict[str, Any], what: str, tmp_path: Path
) -> None:
    model = getattr(ip.models, family)(**options)
    with pytest.raises(CheckpointError) as refused:
        ip.export(tmp_path / "out", model, model.init(jax.random.key(0)))
    assert what in refused.value.what
    assert list(tmp_path.iterdir()) == []


def test_weights_that_share_a_tensor_and_differ_in_type_are_widened(tmp_path: Path) -> None:
    model, params = base_of("phi3")
    (blocks,) = params["segments"]
    stacks = blocks[0] | {"attn.k": blocks[0]["attn.k"].astype("bfloat16")}
    ip.export(tmp_path / "out", model, params | {"segments": [[stacks, *blocks[1:]]]})
    assert {dtype for dtype, _, _ in tensors(tmp_path / "out").values()} == {"F32"}
    again = Weights.of(model.spec, ip.load(tmp_path / "out")[1])
    np.testing.assert_array_equal(again["layers.1.attn.k"], np.asarray(stacks["attn.k"][1], np.float32))


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
