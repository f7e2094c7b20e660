"""GGUF files that are written: read back they are the model, bit for bit, and what they cannot say is refused."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as package
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from gguf import GGMLQuantizationType, GGUFReader

import infopt as ip
from infopt.errors import CheckpointError, ParamsError
from infopt.io import gguf
from infopt.io.chat_template import ChatTemplate
from infopt.io.tokenizer import Tokenizer
from infopt.model import Weights
from infopt.qtensor import Format, dequantize_array, is_qtensor
from infopt.spec import LinearRope, Llama3Rope, TableRope, YarnRope
from infopt.testing import base_of

sys.path.insert(0, str(Path(__file__).parent))
from test_gguf_families import ARCHITECTURES, convert
from test_tokenizer_tables import KINDS, fields_of, read, strings_of

SIZES = dict(layers=2, dim=64, heads=2, kv_heads=1, mlp=96, vocab=61, context=64)
DIVISORS = tuple(map(float, np.linspace(1, 3, 12, dtype=np.float32)))
STRETCH = {
    "linear": LinearRope(factor=4.0),
    "llama3": Llama3Rope(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64),
    "yarn": YarnRope(factor=4.0, original_context=32, attention_factor=0.1 * float(np.log(4.0)) + 1.0),
    "longrope": TableRope(divisors=DIVISORS, attention_factor=1.25),
}
MODELS: dict[str, Callable[[], ip.Model]] = {
    "llama": lambda: ip.models.llama(**SIZES),
    "llama, untied, wide heads": lambda: ip.models.llama(**SIZES, tied=False, head_dim=48),
    "llama, linear": lambda: ip.models.llama(**SIZES, rope_scaling=STRETCH["linear"]),
    "llama, llama3": lambda: ip.models.llama(**SIZES, rope_theta=500_000.0, rope_scaling=STRETCH["llama3"]),
    "mixtral": lambda: ip.models.mixtral(**SIZES, experts=4),
    "qwen2": lambda: ip.models.qwen2(**SIZES),
    "qwen3, yarn": lambda: ip.models.qwen3(**SIZES, rope_scaling=STRETCH["yarn"]),
    "qwen3_moe": lambda: ip.models.qwen3_moe(**SIZES, experts=4, experts_used=3),
    "smollm3": lambda: ip.models.smollm3(**SIZES | dict(layers=4)),
    "phi3": lambda: ip.models.phi3(**SIZES, window=9),
    "phi3, longrope": lambda: ip.models.phi3(**SIZES, rotated=24, rope_scaling=STRETCH["longrope"]),
    "gemma2": lambda: ip.models.gemma2(**SIZES | dict(layers=3), window=7),
    "gemma3": lambda: ip.models.gemma3(**SIZES | dict(layers=7)),
    "gemma3, another period": lambda: ip.models.gemma3(**SIZES | dict(layers=4), pattern=(True, True, False)),
    "gpt2": lambda: ip.models.gpt2(**SIZES | dict(kv_heads=2)),
}  # fmt: skip
STACKS = {
    "dense": "",
    "Q8_0": "quantize(bits=8, group=32)",
    "Q4_0": "quantize(bits=4, group=32)",
    "Q8_0 embedding": "quantize(bits=8, group=32, where='embed') | quantize(bits=4) | gqa(1)",
    "cached": "cache_kv() | paged(4)",
}


def logits(model: ip.Model, params: Any) -> np.ndarray:
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (1, 20)))
    return np.asarray(model.apply(params, tokens)[0])


def made(name: str, stack: str = "") -> tuple[ip.Model, Any]:
    """A model and its params; Gemma's norms are such that 1 + w is a float32, as a file holds them."""
    base = MODELS[name]()
    params = jax.tree.map(lambda w: (w + 1) - 1 if "gemma" in name else w, base.init(jax.random.key(3)))
    model = ip.parse_stack(stack)(base)
    return model, model.convert(params)


# --------------------------------------------------------------------------------------------------------- round trips


def stored(params: Any) -> Any:
    """What a file holds of params: not how well they were rounded."""
    return jax.tree.map(
        lambda q: dataclasses.replace(q, error=None) if is_qtensor(q) else q, params, is_leaf=is_qtensor
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stack", ["dense", "Q8_0", "Q4_0"])
def test_a_written_model_is_read_again_bit_for_bit(name: str, stack: str, tmp_path: Path) -> None:
    model, params = made(name, STACKS[stack])
    ip.save(tmp_path / "m.gguf", model, params)
    loaded, again = ip.load(tmp_path / "m.gguf", dtype="keep")
    assert loaded.spec == model.spec
    jax.tree.map(np.testing.assert_array_equal, stored(again), stored(params))
    np.testing.assert_array_equal(logits(loaded, again), logits(model, params))


@pytest.mark.parametrize("stack", ["Q8_0 embedding", "cached"])
def test_a_cache_is_left_out_and_pooled_heads_are_said(stack: str, tmp_path: Path) -> None:
    base = ip.models.llama(**SIZES | dict(kv_heads=2))
    stacked = STACKS[stack] if stack == "cached" else "gqa(1) | " + STACKS[stack].removesuffix(" | gqa(1)")
    model = ip.parse_stack(stacked)(base)
    params = model.convert(base.init(jax.random.key(3)))
    ip.save(tmp_path / "m.gguf", model, params)
    loaded, again = ip.load(tmp_path / "m.gguf", dtype="keep")
    assert loaded.spec == model.spec.replace(cache=False, page=None)
    jax.tree.map(np.testing.assert_array_equal, stored(again), stored(params))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_floats_are_written_as_they_are_and_vectors_as_f32(dtype: str, tmp_path: Path) -> None:
    model, params = made("llama")
    params = jax.tree.map(lambda w: w.astype(dtype), params)
    ip.save(tmp_path / "m.gguf", model, params)
    kinds = {name: (t.type.name, len(t.shape)) for name, t in gguf.open_file(tmp_path / "m.gguf").tensors.items()}
    assert set(kinds.values()) == {("F16" if dtype == "float16" else "BF16", 2), ("F32", 1)}
    loaded, again = ip.load(tmp_path / "m.gguf", dtype=dtype)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    np.testing.assert_array_equal(logits(loaded, again), logits(model, params))


def test_routers_and_positions_are_f32_as_llama_cpps_converter_has_them(tmp_path: Path) -> None:
    for name, tensor in (("mixtral", "blk.0.ffn_gate_inp.weight"), ("gpt2", "position_embd.weight")):
        model, params = made(name)
        ip.save(tmp_path / "m.gguf", model, jax.tree.map(lambda w: w.astype(jnp.float16), params))
        assert gguf.open_file(tmp_path / "m.gguf").tensors[tensor].type.name == "F32"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_converters_file_goes_through_unchanged(name: str, tmp_path: Path) -> None:
    """Its tensors' bytes, and what its metadata means."""
    model, params = ip.load(convert(name, tmp_path / "a.gguf"))
    ip.save(tmp_path / "b.gguf", model, params)
    a, b = (gguf.open_file(tmp_path / f"{which}.gguf") for which in "ab")
    lost = {gguf.LONG_FACTORS, gguf.SHORT_FACTORS}  # one of the two is what was loaded
    assert set(a.tensors) == set(b.tensors)
    for key in set(a.tensors) - lost:
        assert (a.tensors[key].type, a.tensors[key].shape) == (b.tensors[key].type, b.tensors[key].shape)
        np.testing.assert_array_equal(a.tensors[key].rows, b.tensors[key].rows)
    loaded, again = ip.load(tmp_path / "b.gguf")
    assert loaded.spec == model.spec
    np.testing.assert_array_equal(logits(loaded, again), logits(model, params))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "F16", "F32"])
def test_kept_blocks_are_written_as_they_lie(kind: str, llama_gguf: Callable[..., Any], tmp_path: Path) -> None:
    source = llama_gguf(kind, tied=False).write(tmp_path / "a.gguf")
    model, params = ip.load(source, dtype="keep" if kind[0] == "Q" else {"F16": "float16", "F32": "float32"}[kind])
    ip.save(tmp_path / "b.gguf", model, params)
    a, b = GGUFReader(source), GGUFReader(tmp_path / "b.gguf")  # the package's own reader, not ours
    ours = {t.name: t for t in b.tensors}
    assert len(ours) == len(a.tensors) == len(b.tensors)
    for t in a.tensors:
        assert ours[t.name].tensor_type == t.tensor_type
        data = t.data if kind != "F16" else t.data.astype(np.float16)  # to which norms were read
        np.testing.assert_array_equal(ours[t.name].data, data)


def test_our_own_rounding_is_what_the_package_dequantises(tmp_path: Path) -> None:
    model, params = made("llama", "quantize(bits=4, group=32)")
    ip.save(tmp_path / "m.gguf", model, params)
    found = {t.name: t for t in GGUFReader(tmp_path / "m.gguf").tensors}
    dense = ip.dequantize()(model)
    weights = Weights.of(dense.spec, dense.convert(params, source=model))
    t = found["blk.1.ffn_up.weight"]
    assert t.tensor_type == GGMLQuantizationType.Q4_0
    np.testing.assert_array_equal(package.quants.dequantize(t.data, t.tensor_type), weights["layers.1.mlp.up"])


def test_the_keys_and_names_are_llama_cpps(tmp_path: Path) -> None:
    """By the package's tables of them, which the converter of llama.cpp writes by."""
    for name in MODELS:
        model, params = made(name)
        ip.save(tmp_path / "m.gguf", model, params)
        f = gguf.open_file(tmp_path / "m.gguf")
        arch = f.fields["general.architecture"]
        groups = [getattr(package.Keys, g) for g in ("General", "LLM", "Attention", "Rope", "Tokenizer")]
        known = {
            v.replace("{arch}", arch) for g in groups for k, v in vars(g).items() if isinstance(v, str) and k.isupper()
        }
        known |= {f"{arch}.rope.freq_base_swa"}  # newer than some of the packages that are served
        assert set(f.fields) <= known
        number = next(key for key, value in package.MODEL_ARCH_NAMES.items() if value == arch)
        stems = {package.TENSOR_NAMES[t] for t in package.MODEL_TENSORS[number]} | {"rope_factors_long"}
        for tensor in f.tensors:
            stem = re.sub(r"blk\.\d+", "blk.{bid}", tensor.rpartition(".")[0])
            assert stem in stems | {"rope_factors_short"}, (arch, tensor)


def test_smollm2s_own_file_goes_through_unchanged(smollm2: Path, tmp_path: Path) -> None:
    model, params = ip.load(smollm2, dtype="keep")
    ip.save(tmp_path / "m.gguf", model, params)
    a, b = gguf.open_file(smollm2), gguf.open_file(tmp_path / "m.gguf")
    assert set(a.tensors) == set(b.tensors)
    for name, t in a.tensors.items():
        assert (t.type, t.shape) == (b.tensors[name].type, b.tensors[name].shape)
        assert np.array_equal(t.rows, b.tensors[name].rows), name
    titles = {"name", "organization", "finetune", "basename", "size_label", "license", "languages"}
    meant = {key: value for key, value in a.fields.items() if key.removeprefix("general.") not in titles}
    assert {key: b.fields.get(key) for key in meant} == meant
    assert set(b.fields) - set(meant) == {"tokenizer.ggml.add_eos_token"}
    loaded = ip.load(tmp_path / "m.gguf", dtype="keep")[0]
    assert loaded.spec == model.spec and loaded.tokenizer == model.tokenizer
    assert loaded.tokenizer.backend.to_str() == model.tokenizer.backend.to_str()


WRITE = """
import sys, jax, infopt as ip
base = ip.models.llama(layers=8, dim=512, heads=8, kv_heads=8, head_dim=64, mlp=1536, vocab=2000)
model = ip.quantize(bits=8, group=32)(base)
params = jax.block_until_ready(model.init(jax.random.key(0)))
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
import threading, time
import infopt.io.gguf_out
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
ip.save(sys.argv[1], model, params)
done = True
thread.join()
print(peak - before, sum(x.nbytes for x in jax.tree.leaves(params)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RssAnon is read from Linux's /proc")
def test_writing_takes_no_copy_of_the_model(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITE, str(tmp_path / "m.gguf")]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    taken, held = map(int, run.stdout.split())
    assert held > 25e6 and taken < 10e6


# -------------------------------------------------------------------------------------------------------- the tokenizer


def with_tokenizer(tokenizer: Any, vocab: int | None = None, arch: str = "llama") -> tuple[ip.Model, Any]:
    sizes = dict(layers=1, dim=32, heads=2, kv_heads=1, mlp=32, context=64, vocab=vocab or tokenizer.vocab_size)
    model = getattr(ip.models, arch)(**sizes)
    return dataclasses.replace(model, tokenizer=tokenizer), model.init(jax.random.key(0))


def again(tokenizer: Tokenizer, folder: Path, **how: Any) -> Tokenizer:
    ip.save(folder / "m.gguf", *with_tokenizer(tokenizer, **how))
    found = ip.load(folder / "m.gguf")[0].tokenizer
    assert isinstance(found, Tokenizer)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_out_of_tables_goes_back_into_them(kind: str, tmp_path: Path) -> None:
    fields = fields_of(kind)
    tokenizer = read(fields)
    found = again(tokenizer, tmp_path)
    assert found == tokenizer and found.eos_ids == tokenizer.eos_ids
    assert found.backend.to_str() == tokenizer.backend.to_str()
    assert {text: found.encode(text, special=False) for text, _ in strings_of(kind)} == dict(strings_of(kind))
    written = gguf.open_file(tmp_path / "m.gguf").fields
    for key in set(fields) - {"tokenizer.ggml.scores"}:  # of which a tokenizer keeps the order
        assert written[key] == fields[key], key


@pytest.mark.parametrize("kind", ["llama", "gemma", "qwen2"])
@pytest.mark.parametrize("bos, eos", [(True, False), (False, True), (True, True), (False, False)])
def test_what_is_put_around_a_text_goes_along(kind: str, bos: bool, eos: bool, tmp_path: Path) -> None:
    fields = fields_of(kind) | {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
    fields = {"tokenizer.ggml.bos_token_id": 7, "tokenizer.ggml.eos_token_id": 8} | fields
    tokenizer = read(fields)
    assert again(tokenizer, tmp_path).encode("Hello") == tokenizer.encode("Hello")
    assert len(tokenizer.encode("Hello")) == len(tokenizer.encode("Hello", special=False)) + bos + eos


def test_phi3s_blanks_are_dropped_still_and_llama_cpp_is_told_by_the_name(tmp_path: Path) -> None:
    tokenizer = read(fields_of("llama"), "phi3")
    found = again(tokenizer, tmp_path, arch="phi3")
    assert found.backend.to_str() == tokenizer.backend.to_str()
    assert "phi-3" in gguf.open_file(tmp_path / "m.gguf").fields["general.name"].lower()
    with pytest.raises(CheckpointError, match="matched whole"):
        again(tokenizer, tmp_path, arch="llama")


def test_chat_template_special_tokens_and_several_ends_go_along(tmp_path: Path) -> None:
    tokenizer = read(fields_of("qwen2"))
    words = [str(tokenizer.backend.id_to_token(i)) for i in range(tokenizer.vocab_size)]
    template = ChatTemplate(
        "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
        "{{ tools }}",
        {"bos_token": words[-4], "eos_token": words[-3], "pad_token": words[-2], "sep_token": words[9]},
    )
    end = tokenizer.vocab_size - 3
    tokenizer = dataclasses.replace(tokenizer, template=template, eos_ids=(end - 2, end, end + 1))
    found = again(tokenizer, tmp_path)
    assert set(found.eos_ids) == set(tokenizer.eos_ids) and found.eos_ids[0] == end
    messages = [{"role": "user", "content": "Hi"}]
    assert found.chat(messages) == tokenizer.chat(messages) == f"{words[-4]}Hi{words[-3]}"
    assert found.template is not None and found.template.tool_use == "{{ tools }}"
    assert found.template.special["pad_token"] == words[-2]


def test_words_without_a_token_are_filled_up_as_llama_cpps_converter_does(tmp_path: Path) -> None:
    tokenizer = read(fields_of("smollm"))
    size = tokenizer.vocab_size
    found = again(tokenizer, tmp_path, vocab=size + 3)
    fields = gguf.open_file(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.tokens"][size:] == [f"[PAD{i}]" for i in range(size, size + 3)]
    assert fields["tokenizer.ggml.token_type"][size:] == [5, 5, 5]
    assert all(found.encode(text) == tokenizer.encode(text) for text in ("Hello [PAD1507]", f"[PAD{size}]"))


def test_a_model_without_a_tokenizer_is_written_without(tmp_path: Path) -> None:
    model, params = made("llama")
    ip.save(tmp_path / "m.gguf", model, params)
    assert ip.load(tmp_path / "m.gguf")[0].tokenizer is None
    assert gguf.open_file(tmp_path / "m.gguf").fields["tokenizer.ggml.model"] == "none"


def changed(change: Callable[[dict[str, Any]], object], kind: str = "qwen2") -> Tokenizer:
    state = json.loads(read(fields_of(kind)).backend.to_str())
    change(state)
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(state)))


def test_a_published_tokenizer_json_that_says_the_same_is_written(tmp_path: Path) -> None:
    """As Hugging Face writes it: other settings of what changes no tokens, and steps within steps."""

    def change(state: dict[str, Any]) -> None:
        state["pre_tokenizer"]["pretokenizers"][-1]["trim_offsets"] = False
        state["decoder"] |= {"add_prefix_space": False, "use_regex": False}
        state["post_processor"] = {**state["decoder"], "type": "ByteLevel"}
        state["model"] |= {"continuing_subword_prefix": None, "end_of_word_suffix": None}

    tokenizer = changed(change)
    found = again(tokenizer, tmp_path)
    assert {text: found.encode(text) for text, _ in strings_of("qwen2")} == dict(strings_of("qwen2"))


def _template_of_two(state: dict[str, Any]) -> None:
    piece = {"SpecialToken": {"id": "x", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    state["post_processor"] = {
        "type": "TemplateProcessing", "single": [piece, piece, text], "pair": [text],
        "special_tokens": {"x": {"id": "x", "ids": [3], "tokens": ["x"]}},
    }  # fmt: skip


UNTOLD: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "splitting": ("qwen2", lambda s: s["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="x"), "splits"),
    "normalizer": ("smollm", lambda s: s.update(normalizer={"type": "Lowercase"}), "its normalizer would"),
    "around": ("qwen2", _template_of_two, "puts something else around"),
    "stripped": ("qwen2", lambda s: s["added_tokens"][0].update(lstrip=True), "matched whole would"),
    "dropout": ("qwen2", lambda s: s["model"].update(dropout=0.5), "its model would"),
    "merges": ("llama", lambda s: s["model"]["merges"].pop(), "its merges would"),
    "decoder": ("llama", lambda s: s["decoder"]["decoders"].pop(), "its decoder would"),
}


@pytest.mark.parametrize("name", UNTOLD)
def test_a_tokenizer_that_tables_cannot_tell_is_refused(name: str, tmp_path: Path) -> None:
    kind, change, why = UNTOLD[name]
    with pytest.raises(CheckpointError, match="tokenizer cannot be written into a GGUF file") as refused:
        again(changed(change, kind), tmp_path)
    assert why in refused.value.why and "tokenizer=None" in refused.value.fix
    assert list(tmp_path.iterdir()) == []


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    words = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    with pytest.raises(CheckpointError, match="'WordLevel', not BPE"):
        again(words, tmp_path)
    with pytest.raises(CheckpointError, match="2 tokens, and the model 1 words"):
        again(words, tmp_path, vocab=1)
    ends = dataclasses.replace(read(fields_of("qwen2")), eos_ids=(1, 2, 3, 4))
    with pytest.raises(CheckpointError, match="4 of its tokens end a text"):
        again(ends, tmp_path)
    template = ChatTemplate("{{ sep_token }}", None, {"sep_token": "a"})
    with pytest.raises(CheckpointError, match="chat template would"):
        again(dataclasses.replace(read(fields_of("qwen2")), template=template), tmp_path)
    model, params = made("llama")
    with pytest.raises(CheckpointError, match="a str cannot be exported as the model's tokenizer"):
        ip.save(tmp_path / "m.gguf", dataclasses.replace(model, tokenizer="bytes"), params)
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------- what cannot be said


REFUSED = [
    ("llama", "sliding_window(6)", "a GGUF file of llama cannot say windows"),
    ("llama", "sliding_window(6, sinks=2)", "a GGUF file cannot say sinks"),
    ("llama", "cache_kv(bits=8)", "a GGUF file cannot say them"),
    ("qwen2", "sliding_window(6)", "read as window=None"),
    ("gemma3", "sliding_window(6)", "cannot say which layers"),
    ("mixtral", "sliding_window(6)", "read as window=None"),
    ("llama", "quantize(bits=8)", "int8 in groups of 32 (Q8_0), with float16 scales"),
    ("llama", "quantize(bits=8, group=16)", "int8 in groups of 32 (Q8_0)"),
    ("llama", "quantize(bits=4, group=64, where='embed')", "int4 in groups of 32 (Q4_0)"),
    ("phi3", "quantize(bits=8, group=32, where='layers.*.attn.q')", "one tensor there, blk.0.attn_qkv.weight"),
]


@pytest.mark.parametrize("name, stack, why", REFUSED)
def test_what_a_file_cannot_say_is_refused(name: str, stack: str, why: str, tmp_path: Path) -> None:
    model, params = made(name, stack)
    with pytest.raises(CheckpointError) as refused:
        ip.save(tmp_path / "m.gguf", model, params)
    assert why in refused.value.why and refused.value.fix
    assert list(tmp_path.iterdir()) == []


CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("gemma2", dict(score_cap=None), "score_cap=None"),
    ("gemma2", dict(query_scale=10.0), "query_scale=10.0"),
    ("gemma2", dict(local=(True, True, False)), "local=(True, True, False)"),
    ("gemma3", dict(pattern=(False, True)), "pattern=(False, True)"),
    ("smollm3", dict(rotated=(True, False)), "rotated=(True, False)"),
    ("qwen3_moe", dict(normalise=False), "normalise=False"),
    ("mistral", dict(window=8), "a mistral with windows"),
    ("llama", dict(rope_scaling=dataclasses.replace(STRETCH["yarn"], beta_fast=16.0)), "rope_scaling=YarnRope"),
    ("llama", dict(rope_scaling=dataclasses.replace(STRETCH["llama3"], low_freq_factor=2.0)), "this llama"),
    ("qwen3", dict(rope_scaling=STRETCH["llama3"]), "stretched as 'llama3'"),
    ("llama", dict(rope_scaling=STRETCH["longrope"]), "stretched as 'table'"),
]


@pytest.mark.parametrize("family, options, what", CONFIGS)
def test_a_config_that_would_be_read_as_another_is_refused(
    family: str, options: dict[str, Any], what: str, tmp_path: Path
) -> None:
    model = getattr(ip.models, family)(**SIZES | dict(layers=6, heads=4, kv_heads=4, dim=96) | options)
    with pytest.raises(CheckpointError, match=r"cannot be written as a GGUF file") as refused:
        ip.save(tmp_path / "m.gguf", model, model.init(jax.random.key(0)))
    assert what in refused.value.what
    assert list(tmp_path.iterdir()) == []


def test_a_gpt_oss_is_neither_written_nor_read(llama_gguf: Callable[..., Any], tmp_path: Path) -> None:
    """llama.cpp's architecture of that name is not computed here."""
    model, params = base_of("gpt_oss")
    with pytest.raises(CheckpointError, match="a gpt_oss cannot be written as a GGUF file"):
        ip.save(tmp_path / "m.gguf", model, params)
    assert list(tmp_path.iterdir()) == []
    file = llama_gguf()
    file.arch = "gpt-oss"
    file.fields = {key.replace("llama.", "gpt-oss."): value for key, value in file.fields.items()}
    with pytest.raises(CheckpointError, match="an architecture that is not computed here: 'gpt-oss'"):
        ip.load(file.write(tmp_path / "m.gguf"))


def test_a_mistral_without_windows_is_written_as_the_llama_that_it_is(tmp_path: Path) -> None:
    model = ip.models.mistral(**SIZES)
    params = model.init(jax.random.key(0))
    ip.save(tmp_path / "m.gguf", model, params)
    loaded, found = ip.load(tmp_path / "m.gguf")
    assert loaded.spec.family == "llama"
    np.testing.assert_array_equal(logits(loaded, found), logits(model, params))


def test_other_families_and_speculation_are_refused(tmp_path: Path) -> None:
    model, params = base_of("nnx")
    with pytest.raises(CheckpointError, match="cannot be written as a GGUF file"):
        ip.save(tmp_path / "m.gguf", model, params)
    base, params = made("llama")
    model = ip.parse_stack("cache_kv() | speculative(draft=self_draft(quantize(bits=8)), k=2)")(base)
    with pytest.raises(CheckpointError, match="a speculative stack") as refused:
        ip.save(tmp_path / "m.gguf", model, model.convert(params))
    assert "params['target']" in refused.value.fix
    assert list(tmp_path.iterdir()) == []


def test_params_of_other_models_and_types_are_refused(tmp_path: Path) -> None:
    model, params = made("llama", "quantize(bits=8, group=32)")
    with pytest.raises(ParamsError):
        ip.save(tmp_path / "m.gguf", model, made("llama")[1])

    def wide(x: Any) -> Any:
        return dataclasses.replace(x, scale=x.scale.astype(jnp.float32)) if is_qtensor(x) else x

    with pytest.raises(CheckpointError, match="its scales are float32"):
        ip.save(tmp_path / "m.gguf", model, jax.tree.map(wide, params, is_leaf=is_qtensor))
    plain, params = made("llama")
    with pytest.raises(CheckpointError, match="it is int32"):
        ip.save(tmp_path / "m.gguf", plain, jax.tree.map(lambda x: x.astype(jnp.int32), params))
    assert list(tmp_path.iterdir()) == []


def test_every_kept_block_is_written() -> None:
    """And by formats of its own: a second block of one format could not be told apart."""
    from infopt.io.blocks import KEPT
    from infopt.io.gguf_out import BLOCKS

    assert set(KEPT.values()) <= set(BLOCKS) and set(BLOCKS.values()) == set(KEPT)
    assert all(isinstance(fmt, Format) for fmt in BLOCKS)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1"])
def test_llama_cpps_own_rounding_is_written_as_its_block(kind: str, tmp_path: Path) -> None:
    model = ip.models.llama(layers=1, dim=64, mlp=64, vocab=32)
    params = model.init(jax.random.key(0))
    stack = ip.quantize(format=kind)(model)
    ip.save(tmp_path / "m.gguf", stack, own := stack.convert(params))
    _, again = ip.load(tmp_path / "m.gguf", dtype="keep")
    before, after = (Weights.of(m.spec, p)["layers.0.mlp.up"] for m, p in ((stack, own), (_, again)))
    assert np.array_equal(dequantize_array(before), dequantize_array(after))


# --------------------------------------------------------------------------------------------------------- on the disk


def test_an_older_file_is_replaced_and_what_is_none_is_left_alone(tmp_path: Path) -> None:
    model, params = made("llama")
    path = tmp_path / "m.gguf"
    path.touch()
    ip.save(path, model, jax.tree.map(jnp.zeros_like, params))
    ip.save(path, model, params)
    jax.tree.map(np.testing.assert_array_equal, ip.load(path)[1], params)
    path.write_text("mine")
    with pytest.raises(CheckpointError, match="left alone") as refused:
        ip.save(path, model, params)
    assert path.read_text() == "mine" and "not a GGUF file" in refused.value.why
    (tmp_path / "d.gguf").mkdir()
    with pytest.raises(CheckpointError, match="left alone"):
        ip.save(tmp_path / "d.gguf", model, params)
    assert {p.name for p in tmp_path.iterdir()} == {"m.gguf", "d.gguf"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("call", ["replace", "fsync", "mkdir", "open"])
def test_a_write_that_fails_leaves_the_older_file(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    model, params = made("llama")
    ip.save(tmp_path / "m.gguf", model, params)
    before = (tmp_path / "m.gguf").read_bytes()
    with monkeypatch.context() as patch:
        if call == "open":
            patch.setattr(package.gguf_writer, "open", refuse, raising=False)
        else:
            patch.setattr(os, call, refuse)
        with pytest.raises(CheckpointError, match="could not be written") as refused:
            ip.save(tmp_path / "m.gguf", model, jax.tree.map(jnp.zeros_like, params))
    assert os.strerror(number) in refused.value.why
    assert ("space" in refused.value.fix) == (number == errno.ENOSPC)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"] and (tmp_path / "m.gguf").read_bytes() == before


@pytest.mark.parametrize("most", [10, 3_000, 100_000])
def test_a_disk_that_fills_up_in_the_middle_leaves_nothing(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Small(io.FileIO):
        """A file on a disk with room for so many bytes."""

        def write(self, data: Any) -> int:
            if self.tell() + len(data) > most:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    def opened(path: Any, mode: str) -> Any:
        return io.BufferedWriter(Small(path, "w"))

    model, params = made("llama")
    monkeypatch.setattr(package.gguf_writer, "open", opened, raising=False)
    with pytest.raises(CheckpointError, match="could not be written") as refused:
        ip.save(tmp_path / "m.gguf", model, params)
    assert "No space left" in refused.value.why and "free some space" in refused.value.fix
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_in_the_middle_leaves_nothing(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infopt.io import gguf_out

    real, seen = gguf_out._bytes, []

    def broken(*args: Any) -> Any:
        seen.append(args)
        if len(seen) == 5:
            raise error
        return real(*args)

    monkeypatch.setattr(gguf_out, "_bytes", broken)
    with pytest.raises((error, CheckpointError)):
        ip.save(tmp_path / "m.gguf", *made("llama"))
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, sys, time, jax, infopt as ip
from infopt.io import gguf_out
real = gguf_out._bytes
def slow(part, t):
    print("half", flush=True)
    time.sleep(60)
    return real(part, t)
gguf_out._bytes = slow
model = ip.models.llama()
ip.save(sys.argv[1], model, model.init(jax.random.key(0)))
"""


def test_a_killed_write_leaves_the_older_file_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    model, params = made("llama")
    ip.save(tmp_path / "m.gguf", model, params)
    before = (tmp_path / "m.gguf").read_bytes()
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "m.gguf")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None and process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / "m.gguf").read_bytes() == before and len(list(tmp_path.iterdir())) == 2
    ip.save(tmp_path / "m.gguf", model, params)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
