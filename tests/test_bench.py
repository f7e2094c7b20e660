"""The benchmark measures what it says: its yardstick is the same model, written by hand."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infopt as ip
from infopt import bench, timing
from infopt.bench import attention, methods
from infopt.kernels.decode_attention.shapes import Shape as DecodeShape
from infopt.kernels.flash_attention.shapes import Shape as FlashShape
from infopt.methods.gptq import GPTQ


@pytest.mark.parametrize("product", ["x @ w.T", "einsum"])
def test_the_yardstick_writes_what_generate_writes(product: str) -> None:
    model = ip.models.llama(layers=2, dim=32, heads=4, kv_heads=2, vocab=61, context=160, tied=False)
    params = model.init(jax.random.key(2))
    prompt = np.random.default_rng(0).integers(0, 61, 9).astype(np.int32)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):  # as one writes by hand
        prefill, decode = bench.yardstick(model, params, len(prompt) + bench.NEW, product)
        cache, _ = prefill(params, jnp.asarray(prompt[:-1]))
        by_hand = decode(params, cache, jnp.asarray(prompt[-1]), jnp.int32(len(prompt) - 1))
    fast = ip.cache_kv()(model)
    out = ip.generate(fast, fast.convert(params), prompt.tolist(), max_new=bench.NEW)
    assert by_hand.tolist() == out.tokens


def test_other_models_have_no_yardstick() -> None:
    model = ip.models.gemma3()
    with pytest.raises(ip.InfoptError, match="bare llama"):
        bench.yardstick(model, model.init(jax.random.key(0)), 16)


def test_a_median_is_over_the_runs_after_the_first() -> None:
    seconds = iter([9.0, 1.0, 2.0, 6.0])
    assert timing.interleaved({"a": lambda: next(seconds)}, 3) == {"a": 2.0}


def test_attention_is_timed_with_each_implementation_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def turns(runs, repeats):
        for name, run in runs.items():
            assert run() > 0
            order.append(name)
        return {name: [3.0, 1.0, 2.0] for name in runs}

    monkeypatch.setattr(attention, "turns", turns)
    shapes = [FlashShape("a"), FlashShape("b", lengths=(20,), offsets=(3,))], [DecodeShape("c", lengths=(9,))]
    rows = attention.rows(*shapes, repeats=3)
    flashes = [f"flash/{shape}/{name}" for shape in "ab" for name in ("reference", "blockwise")]
    assert order == [*flashes, "decode/c/xla", "decode/c/blockwise"]
    assert [f"{row['kind']}/{row['shape']}/{row['implementation']}" for row in rows] == order
    assert all((row["fastest"], row["seconds"], row["slowest"]) == (1.0, 2.0, 3.0) for row in rows)


def test_the_report_says_rates_beside_what_the_machine_does_at_most(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = functools.partial(attention.rows, [FlashShape("a", queries=64)], [DecodeShape("c")])
    monkeypatch.setattr(attention, "rows", small)
    monkeypatch.setattr(attention, "limits", lambda repeats: {"flops": 1e12, "bytes": 1e10})
    monkeypatch.setattr(attention, "LENGTHS", (256,))
    monkeypatch.setattr(attention, "steps", lambda repeats: {"256": 0.010, "8192": 0.012})
    found = attention.attention(1)
    for row in found["rows"]:
        assert row["flops_per_second"] == pytest.approx(row["flops"] / row["seconds"])
        assert row["bytes_per_second"] == pytest.approx(row["bytes"] / row["seconds"])
    assert {r["implementation"] for r in found["memory"]} == {"reference", "blockwise"}
    assert json.loads(json.dumps(found)) == found
    assert attention.main(argparse.Namespace(repeats=1, json=False)) == 0
    out = capsys.readouterr().out
    assert "1000 GFLOP/s" in out and "flash a" in out and "decode c" in out and "(1.20x)" in out


def test_what_attention_must_compute_and_move_is_counted_by_hand() -> None:
    full = FlashShape("", queries=8, heads=4, kv_heads=2, width=16)
    assert full.flops == 36 * 4 * (2 * 16 + 2 * 16)  # 36 pairs at or below the diagonal
    assert full.moved == 4 * (2 * 8 * 4 * 16 + 2 * 8 * 2 * 16)  # queries and output, keys and values
    seen = FlashShape("", queries=8, heads=4, kv_heads=2, width=16, window=3, sinks=1)
    assert seen.flops == (1 + 2 + 3 + 4 * 5) * 4 * 64
    step = DecodeShape("", lengths=(40, 7), slots=64, heads=4, kv_heads=2, width=16)
    assert step.flops == 47 * 4 * 64 and step.moved == 47 * 2 * 2 * 16 * 4
    ring = DecodeShape("", lengths=(40, 7), heads=4, kv_heads=2, width=16, window=20, sinks=4, ring=True, codec="int8")
    assert ring.flops == 31 * 4 * 64 and ring.moved == 31 * 2 * 2 * (16 + 2)  # a byte a channel, a scale of 2 a group


def test_a_method_is_timed_beside_a_pass_over_what_it_reads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With nothing kept from before, and its own text only: not a start's too."""
    model = ip.models.llama(layers=2, dim=32, heads=4, kv_heads=2, vocab=61, context=64)
    model = dataclasses.replace(model, tokenizer=Letters())
    params, kept = model.init(jax.random.key(0)), list[str | None]()
    own = GPTQ.change

    def change(self, *args):
        kept.append(os.environ.get("INFOPT_METHOD_CACHE"))
        return own(self, *args)

    monkeypatch.setattr(GPTQ, "change", change)
    monkeypatch.delenv("INFOPT_METHOD_CACHE")
    how = "tokens=64, length=32"
    learned = f"distilled({how}, start=gptq({how}), steps=2)"
    stacks = [f"{before}quantize(bits=4, group=16, method={method})" for before, method in
              (("", f"gptq({how})"), ("cache_kv() | ", learned))]  # fmt: skip
    one, other = methods.methods(model, params, stacks, repeats=1)
    assert kept == ["0"] * 4 and "INFOPT_METHOD_CACHE" not in os.environ
    assert (one.tokens, one.steps, other.tokens, other.steps) == (64, None, 64, 2)
    assert one.result == ip.quantize(bits=4, group=16)(model).weight_bytes()
    assert one.ratio == one.seconds / one.forward > 0 and one.more is not None and one.more > 0
    assert capsys.readouterr().out.count("gptq") == 2
    with pytest.raises(ip.InfoptError, match="has no methods"):
        methods.methods(model, params, ["quantize(bits=4, group=16)"])


class Letters:
    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 61 for letter in text[:2000]]
