"""The numpy reference against `transformers`' logits, and its rules against numbers worked by hand."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import types
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from infopt.models import Gemma3Config, GptOssConfig, LlamaConfig
from infopt.qtensor import Format
from infopt.reference import REFERENCES, dequantize, reference, rotary, round_kv
from infopt.spec import Codec, LinearRope, Llama3Rope, Spec, Window, YarnRope

FIXTURES = pathlib.Path(__file__).parent / "fixtures"

# After "model.layers.{i}." in a Hugging Face name; the two families differ in the norms only.
LAYER = {
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.o",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
    "input_layernorm": "attn_norm",
}
NORMS = {
    "llama": {"post_attention_layernorm": "mlp_norm"},
    "gemma3": {
        "post_attention_layernorm": "attn_out_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_out_norm",
        "self_attn.q_norm": "attn.q_norm",
        "self_attn.k_norm": "attn.k_norm",
    },
}
TOP = {"model.embed_tokens": "embed", "model.norm": "final_norm", "lm_head": "head"}

# What the folders' config.json say, written out: reading it is another part's business.
CONFIGS: dict[str, LlamaConfig | Gemma3Config] = {
    "llama": LlamaConfig(
        vocab=173,
        dim=32,
        layers=3,
        heads=4,
        kv_heads=2,
        head_dim=12,
        context=128,
        mlp=36,
        norm_eps=1e-5,
        rope_theta=500.0,
        tied=False,
        rope_scaling=Llama3Rope(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=32),
    ),
    "llama_tied": LlamaConfig(
        vocab=331,
        dim=36,
        layers=2,
        heads=3,
        kv_heads=1,
        head_dim=12,
        context=128,
        mlp=50,
        norm_eps=1e-6,
        rope_theta=2000.0,
        tied=True,
    ),
    "gemma3": Gemma3Config(
        vocab=131,
        dim=27,
        layers=8,
        heads=3,
        kv_heads=1,
        head_dim=10,
        context=128,
        mlp=21,
        window=9,
        query_scale=20.0,
        norm_eps=1e-6,
        rope_theta=5000.0,
        local_rope_theta=300.0,
        rope_scaling=LinearRope(factor=3.0),
        tied=True,
    ),
}


def spec_of(name: str) -> Spec:
    config = CONFIGS[name]
    return Spec(family=name.split("_")[0], config=config, window=config.windows())


def weights_of(name: str) -> dict[str, np.ndarray]:
    family, weights = name.split("_")[0], {}
    for shard in sorted((FIXTURES / name).glob("*.safetensors")):
        for key, value in load_file(shard).items():
            key = key.removesuffix(".weight")
            if key in TOP:
                weights[TOP[key]] = value
            else:
                _, _, layer, rest = key.split(".", 3)
                weights[f"layers.{layer}.{(LAYER | NORMS[family])[rest]}"] = value
    return weights


@pytest.mark.parametrize("name", CONFIGS)
def test_reference_equals_transformers(name: str) -> None:
    golden = np.load(FIXTURES / name / "golden.npz")
    for tokens, logits in zip(golden["tokens"], golden["logits"], strict=True):
        ours = reference(spec_of(name), weights_of(name), tokens)
        assert ours.dtype == np.float64
        assert np.abs(ours[golden["positions"]] - logits).max() < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_goldens_would_show_a_mistake(name: str) -> None:
    """Each field that shapes attention moves the logits by at least ten times the tolerance."""
    golden, spec = np.load(FIXTURES / name / "golden.npz"), spec_of(name)
    assert golden["logits"].std() > 1
    changes: list[dict[str, Any]] = [{"rope_theta": 10000.0}, {"norm_eps": 1e-3}]
    if name == "llama":
        scaling = CONFIGS[name].rope_scaling
        changes += [
            {"rope_scaling": dataclasses.replace(scaling, **{f: 2 * getattr(scaling, f)})}
            for f in ("factor", "low_freq_factor", "high_freq_factor", "original_context")
        ]
    if name == "gemma3":
        changes += [
            {"local_rope_theta": 10000.0},
            {"rope_scaling": None},
            {"query_scale": 10.0},
            {"pattern": (True, True, True, True, False, True)},
        ]
    specs = [spec.replace(config=dataclasses.replace(spec.config, **change)) for change in changes]
    specs += [
        spec.replace(window=tuple(w and Window(w.size + d) for w in spec.window)) for d in (-1, 1) if any(spec.window)
    ]
    for wrong in specs:
        ours = reference(wrong, weights_of(name), golden["tokens"][0])
        assert np.abs(ours[golden["positions"]] - golden["logits"][0]).max() > 1e-3, wrong


GPT_OSS = GptOssConfig(
    vocab=131,
    dim=36,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=12,
    context=128,
    mlp=14,
    rope_theta=800.0,
    tied=False,
    window=7,
    experts=5,
    experts_used=2,
    swiglu_alpha=1.5,
    swiglu_limit=1.2,
    rope_scaling=YarnRope(
        factor=4.0, original_context=64, beta_fast=4.0, attention_factor=0.1 * math.log(4) + 1, truncate=False
    ),
)


def gpt_oss_weights() -> dict[str, np.ndarray]:
    """Of experts in one, gates and ups alternate, and matrices are `[in, out]`."""
    names = LAYER | NORMS["llama"] | {"mlp.router": "mlp.router", "self_attn": "attn.sinks"}
    weights: dict[str, np.ndarray] = {}
    for key, value in load_file(FIXTURES / "gpt_oss" / "model.safetensors").items():
        if key.removesuffix(".weight") in TOP:
            weights[TOP[key.removesuffix(".weight")]] = value
            continue
        _, _, layer, rest = key.split(".", 3)
        start = f"layers.{layer}."
        if ".experts." in rest:
            bias = "_bias" * rest.endswith("_bias")
            rows = value if bias else value.swapaxes(1, 2)
            if "gate_up" in rest:
                weights[f"{start}mlp.experts.gate{bias}"] = rows[:, 0::2]
                weights[f"{start}mlp.experts.up{bias}"] = rows[:, 1::2]
            else:
                weights[f"{start}mlp.experts.down{bias}"] = rows
        else:
            stem, _, kind = rest.rpartition(".")
            weights[start + names[stem] + "_bias" * (kind == "bias")] = value
    return weights


def test_the_reference_of_gpt_oss_equals_transformers_and_its_golden_would_show_a_mistake() -> None:
    golden, weights = np.load(FIXTURES / "gpt_oss" / "golden.npz"), gpt_oss_weights()
    spec = Spec(family="gpt_oss", config=GPT_OSS, window=GPT_OSS.windows())
    assert golden["logits"].std() > 1

    def error(spec: Spec, weights: dict[str, np.ndarray], row: int = 0) -> float:
        ours = reference(spec, weights, golden["tokens"][row])
        return float(np.abs(ours[golden["positions"]] - golden["logits"][row]).max())

    assert max(error(spec, weights, row) for row in (0, 1)) < 1e-4
    scaling = GPT_OSS.rope_scaling
    changes: list[dict[str, Any]] = [
        {"swiglu_limit": 7.0}, {"swiglu_alpha": 1.702}, {"experts_used": 3}, {"norm_eps": 1e-3},
        {"rope_scaling": dataclasses.replace(scaling, truncate=True)},
        {"rope_scaling": dataclasses.replace(scaling, beta_fast=8.0)},
    ]  # fmt: skip
    specs = [spec.replace(config=dataclasses.replace(GPT_OSS, **change)) for change in changes]
    specs += [spec.replace(window=tuple(w and Window(w.size + d) for w in spec.window)) for d in (-1, 1)]
    assert min(error(wrong, weights) for wrong in specs) > 1e-3
    for part in ("attn.sinks", "attn.o_bias", "mlp.router_bias", "mlp.experts.up_bias", "mlp.experts.down_bias"):
        assert error(spec, weights | {f"layers.1.{part}": 0 * weights[f"layers.1.{part}"]}) > 1e-3, part
    assert error(spec, weights | {"layers.1.attn.sinks": weights["layers.1.attn.sinks"][::-1]}) > 1e-3


def test_family_without_reference_is_refused_and_can_join() -> None:
    spec = spec_of("llama").replace(family="mine")
    with pytest.raises(NotImplementedError, match="REFERENCES"):
        reference(spec, {}, [1])
    REFERENCES["mine"] = lambda spec, weights, tokens: np.zeros((len(tokens), spec.config.vocab))
    try:
        assert reference(spec, {}, [1, 2]).shape == (2, 173)
    finally:
        del REFERENCES["mine"]


def toy(window: Window | None, kv: Format | None = None) -> tuple[Spec, dict[str, np.ndarray]]:
    """One layer, one head of one pair of values, whose logits are what attention gives and nothing else.

    The embedding's columns are key, value and a constant: every query is (2, 0), and the MLP is nothing.
    """
    config = LlamaConfig(
        vocab=6,
        dim=6,
        layers=1,
        heads=1,
        kv_heads=1,
        head_dim=2,
        context=64,
        mlp=1,
        norm_eps=0.0,
        rope_theta=10000.0,
        tied=False,
    )
    rng = np.random.default_rng(0)
    embed = rng.standard_normal((6, 6))
    embed[:, 4:] = [1, 0]
    embed /= np.sqrt(np.mean(embed**2, -1, keepdims=True))  # the norm then leaves it as it is
    pick = np.eye(6)
    weights = {
        "embed": embed,
        "final_norm": np.ones(6),
        "head": pick,
        "layers.0.attn_norm": np.ones(6),
        "layers.0.attn.q": np.stack([2 * pick[4], 0 * pick[4]]),
        "layers.0.attn.k": 2 * pick[0:2],
        "layers.0.attn.v": pick[2:4],
        "layers.0.attn.o": pick[:, 2:4],
        "layers.0.mlp_norm": np.ones(6),
        "layers.0.mlp.gate": np.zeros((1, 6)),
        "layers.0.mlp.up": np.zeros((1, 6)),
        "layers.0.mlp.down": np.zeros((6, 1)),
    }
    return Spec(family="llama", config=config, window=(window,), kv=kv), weights


def by_hand(weights: dict[str, np.ndarray], tokens: list[int], window: Window | None) -> np.ndarray:
    """The toy's logits, one score at a time: a rotation by n positions is a product with exp(i n)."""
    embed, logits = weights["embed"], []
    for q, token in enumerate(tokens):
        total, value = 0.0, np.zeros(2)
        for p, other in enumerate(tokens[: q + 1]):
            sink = window is not None and p < window.sinks
            if window is not None and p <= q - window.size and not sink:
                continue
            distance = (min(q, window.size - 1) if sink else q) - p
            query, key = complex(2 * embed[token, 4], 0), complex(*(2 * embed[other, 0:2]))
            score = (query * complex(math.cos(distance), math.sin(distance)) * key.conjugate()).real / math.sqrt(2)
            total, value = total + math.exp(score), value + math.exp(score) * embed[other, 2:4]
        x = embed[token].copy()
        x[2:4] += value / total
        logits.append(x / math.sqrt(np.mean(x**2)))
    return np.array(logits)


@pytest.mark.parametrize("window", [None, Window(1), Window(4), Window(4, 1), Window(4, 3), Window(30, 2)], ids=str)
def test_window_and_sinks_by_hand(window: Window | None) -> None:
    spec, weights = toy(window)
    tokens = [3, 1, 4, 1, 5, 0, 2, 4, 3, 5, 1, 0]
    np.testing.assert_allclose(reference(spec, weights, tokens), by_hand(weights, tokens, window), atol=1e-12)


def seen_from_last(window: Window | None) -> list[int]:
    """Positions of ten whose token changes the last logits."""
    spec, weights = toy(window)
    tokens, seen = [3, 1, 4, 1, 5, 0, 2, 4, 3, 5], []
    base = reference(spec, weights, tokens)[-1]
    for p in range(10):
        other = tokens[:p] + [(tokens[p] + 1) % 6] + tokens[p + 1 :]
        if np.abs(reference(spec, weights, other)[-1] - base).max() > 1e-9:
            seen.append(p)
    return seen


def test_window_counts_the_query_itself() -> None:
    assert seen_from_last(None) == list(range(10))
    assert seen_from_last(Window(1)) == [9]
    assert seen_from_last(Window(3)) == [7, 8, 9]
    assert seen_from_last(Window(10)) == list(range(10))


def test_sinks_stay_visible() -> None:
    assert seen_from_last(Window(3, 2)) == [0, 1, 7, 8, 9]


def test_logits_do_not_see_the_future() -> None:
    spec, weights = toy(Window(4, 1))
    short, long = reference(spec, weights, [1, 2, 3]), reference(spec, weights, [1, 2, 3, 5, 5])
    np.testing.assert_array_equal(short, long[:3])


def test_rotary_pairs_are_half_a_head_apart() -> None:
    """Width 4, theta 100: frequencies 1 and 1/10; element 0 turns with 2, and 1 with 3."""
    x = np.array([[[1.0, 0, 0, 0]], [[0, 0, 0, 1.0]]])
    turned = rotary(100.0, 4)(x, np.array([3, 5]))
    np.testing.assert_allclose(turned[0, 0], [math.cos(3), 0, math.sin(3), 0], atol=1e-15)
    np.testing.assert_allclose(turned[1, 0], [0, -math.sin(0.5), 0, math.cos(0.5)], atol=1e-15)


def test_linear_factor_divides_positions() -> None:
    x = np.array([[[1.0, 0]]])
    np.testing.assert_allclose(
        rotary(100.0, 2, LinearRope(factor=4.0))(x, np.array([8]))[0, 0], [math.cos(2), math.sin(2)]
    )


def packed(codes: list[list[int]], scale: Any, minimum: Any, format: Format, width: int) -> Any:
    """A stand-in with a QTensor's fields."""
    dtype = np.int8 if format.name == "int8" else np.uint8
    return types.SimpleNamespace(
        codes=np.array(codes, dtype),
        scale=np.array(scale, format.scale),
        format=format,
        shape=(len(codes), width),
        minimum=None if minimum is None else np.array(minimum, format.scale),
    )


def test_dequantize_int8_by_hand() -> None:
    q = packed([[-127, 0, 5, 1], [2, 4, -8, 16]], [[0.5, 2], [0.25, 1]], None, Format("int8", 2), 4)
    np.testing.assert_array_equal(dequantize(q), [[-63.5, 0, 10, 2], [0.5, 1, -8, 16]])
    whole = packed([[-127, 0, 5, 1]], [[0.5]], None, Format("int8"), 4)
    np.testing.assert_array_equal(dequantize(whole), [[-63.5, 0, 2.5, 0.5]])


def test_dequantize_int4_by_hand() -> None:
    """Byte j of a group of four: element j in the low nibble, element j + 2 in the high one; code 8 means 0."""
    q = packed([[0x9F, 0x08, 0xA1, 0x70]], [[1.0, -0.5]], None, Format("int4", 4), 8)
    np.testing.assert_array_equal(dequantize(q), [[7, 0, 1, -8, 3.5, 4, -1, 0.5]])


def test_dequantize_int4_whole_axis_by_hand() -> None:
    q = packed([[0x9F, 0x08, 0xA1, 0x70]], [[2.0]], None, Format("int4"), 8)
    np.testing.assert_array_equal(dequantize(q), [[14, 0, -14, -16, 2, -16, 4, -2]])


def test_dequantize_int4_min_by_hand() -> None:
    q = packed([[0x9F, 0x08, 0xA1, 0x70]], [[1.0, 0.5]], [[-3.0, 10.0]], Format("int4_min", 4, "float16"), 8)
    np.testing.assert_array_equal(dequantize(q), [[12, 5, 6, -3, 10.5, 10, 15, 13.5]])


def test_dequantize_keeps_leading_axes() -> None:
    q = packed([[1, 2], [3, 4]], [[1.0], [10.0]], None, Format("int8"), 2)
    q.codes, q.scale, q.shape = q.codes[None], q.scale[None], (2, 2)
    np.testing.assert_array_equal(dequantize(q), [[[1, 2], [30, 40]]])


def test_dense_weights_pass() -> None:
    assert dequantize(np.float32([[0.5]])).dtype == np.float64


def test_round_kv_by_hand() -> None:
    """Each head of each token has its own scale; ties go to the even code; a head of zeros stays zero."""
    x = np.array([[[127.0, 0.5, 1.5, -2.5], [0, 0, 0, 0]], [[-254.0, 1.2, 3.0, 5.0], [1.27, -0.004, 0.006, 0.0]]])
    want = [[[127, 0, 2, -2], [0, 0, 0, 0]], [[-254, 2, 4, 4], [1.27, 0, 0.01, 0]]]
    np.testing.assert_allclose(round_kv(x, Format("int8")), want, atol=1e-6)
    assert round_kv(x, None) is x


def test_codec_rounds_rotated_keys_and_values() -> None:
    """Rounding keys before the rotation would be another number."""
    spec, weights = toy(None, kv=Codec(Format("int8")))
    tokens = [3, 1, 4]
    exact, rounded = reference(spec.replace(kv=None), weights, tokens), reference(spec, weights, tokens)
    assert 1e-6 < np.abs(exact - rounded).max() < 0.1
    embed = weights["embed"]
    turns = np.exp(1j * np.arange(3))
    keys = (2 * (embed[tokens, 0] + 1j * embed[tokens, 1]) * turns).view(float).reshape(3, 1, 2)
    keys = round_kv(keys, Format("int8"))[:, 0] @ np.array([1, 1j])
    values = round_kv(embed[tokens, 2:4].reshape(3, 1, 2), Format("int8"))[:, 0]
    scores = (2 * embed[4, 4] * turns[2] * keys.conjugate()).real / math.sqrt(2)
    x = embed[4].copy()
    x[2:4] += np.exp(scores) @ values / np.exp(scores).sum()
    np.testing.assert_allclose(rounded[-1], x / math.sqrt(np.mean(x**2)), atol=1e-12)


def test_fixtures_say_how_they_were_made() -> None:
    for name in CONFIGS:
        assert str(np.load(FIXTURES / name / "golden.npz")["made"]).startswith("transformers ")
    assert json.loads((FIXTURES / "smollm2_greedy.json").read_text())["text"].startswith(" the Romans built")
