"""What a method computed is not computed twice, and a run that was killed goes on where it was, to the same bytes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infopt as ip
from infopt.errors import InfoptError
from infopt.methods import autoround, gptq, kept, layers
from infopt.methods.autoround import AutoRound
from infopt.methods.awq import AWQ
from infopt.methods.distilled import _Distillation
from infopt.methods.gptq import GPTQ
from infopt.methods.smoothquant import SmoothQuant

IDS = np.random.default_rng(0).integers(0, 61, 4096)
HOW: dict[str, Any] = dict(text=IDS, tokens=256, length=32)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INFOPT_CACHE", str(tmp_path))
    monkeypatch.delenv("INFOPT_METHOD_CACHE")
    return tmp_path / "methods"


@pytest.fixture(scope="module")
def llama() -> tuple[ip.Model, Any]:
    model = ip.models.llama(layers=3, dim=32, heads=4, kv_heads=2, vocab=61, context=64)
    return model, model.init(jax.random.key(0))


METHODS: dict[str, tuple[Any, type, str]] = {
    "gptq": (gptq(**HOW), GPTQ, "_one"),
    "autoround": (autoround(**HOW, steps=4), AutoRound, "_learned"),
    "awq": (ip.awq(**HOW), AWQ, "change"),
    "smoothquant": (ip.smoothquant(**HOW), SmoothQuant, "change"),
    "distilled": (ip.distilled(**HOW, steps=12, rates=0.01), _Distillation, "_slopes"),
    "gptq, distilled": (ip.distilled(**HOW, start=gptq(**HOW), steps=12, rates=0.01), _Distillation, "_slopes"),
}


def same(one: Any, other: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.mark.parametrize(("method", "where", "work"), METHODS.values(), ids=METHODS)
def test_a_run_that_was_killed_goes_on_and_a_whole_one_is_read(
    method: Any, where: type, work: str, folder: Path, llama: tuple[ip.Model, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, params = llama
    inputs = {"bits": 8, "activations": 8} if isinstance(method, SmoothQuant) else {"bits": 4}
    stack = ip.quantize(**inputs, group=16, method=method)(model)
    monkeypatch.setenv("INFOPT_METHOD_CACHE", "0")
    want = stack.convert(params)
    assert not folder.exists()
    monkeypatch.delenv("INFOPT_METHOD_CACHE")
    own, calls = getattr(where, work), list[int]()

    def counted(*args: Any) -> Any:
        calls.append(0)
        if len(calls) == limit:
            raise KeyboardInterrupt
        return own(*args)

    monkeypatch.setattr(where, work, counted)
    limit = 10**9
    stack.convert(params)
    all_calls = len(calls)
    for f in [*folder.iterdir()]:
        for step in f.iterdir():
            step.unlink()
    calls.clear()
    limit = all_calls * 2 // 3 + 1
    with pytest.raises(KeyboardInterrupt):
        stack.convert(params)
    done, limit = len(calls) - 1, 10**9
    calls.clear()
    assert same(stack.convert(params), want)
    assert all_calls - done <= len(calls) < all_calls  # of a step that was under way, nothing was kept
    calls.clear()
    assert same(stack.convert(params), want) and not calls


def test_other_weights_texts_formats_and_numbers_are_other_results(folder: Path, llama: tuple[ip.Model, Any]) -> None:
    model, params = llama

    def convert(params: Any = params, first: Any = None, **how: Any) -> int:
        method = gptq(**(HOW | {k: v for k, v in how.items() if k in ("damp", "text", "tokens")}))
        last = ip.quantize(bits=how.get("bits", 4), group=how.get("group", 16), clip=how.get("clip"), method=method)
        (last if first is None else first | last)(model).convert(params)
        return len([*folder.iterdir()])

    assert convert() == 1 == convert()
    changed = {**params, "embed": params["embed"].at[3, 4].add(1e-3)}
    others: list[dict[str, Any]] = [
        dict(params=changed), dict(damp=0.02), dict(text=IDS[1:]), dict(tokens=128), dict(bits=3), dict(group=32),
        dict(clip="mse"), dict(first=ip.sliding_window(8)), dict(first=ip.gqa(1)),
    ]  # fmt: skip
    assert [convert(**other) for other in others] == list(range(2, 2 + len(others)))


def test_a_damaged_step_is_computed_anew(folder: Path, llama: tuple[ip.Model, Any]) -> None:
    model, params = llama
    stack = ip.quantize(bits=4, group=16, method=gptq(**HOW))(model)
    want = stack.convert(params)
    (own,) = folder.iterdir()
    step = own / "layers.1"
    for bad in (step.read_bytes()[:-40], b"", bytes([step.read_bytes()[0] ^ 1]) + step.read_bytes()[1:]):
        step.write_bytes(bad)
        assert same(stack.convert(params), want)


def test_the_oldest_results_make_room(folder: Path, llama: tuple[ip.Model, Any], monkeypatch: Any) -> None:
    model, params = llama
    folder.mkdir(parents=True)
    (folder / "not a folder").touch()

    def made(damp: float) -> set[Path]:
        before = {each for each in folder.iterdir() if each.is_dir()}
        ip.quantize(bits=4, group=16, method=gptq(**HOW, damp=damp))(model).convert(params)
        return {each for each in folder.iterdir() if each.is_dir()} - before

    (first,), (second,) = made(0.01), made(0.02)
    size = sum(each.stat().st_size for each in first.iterdir())
    os.utime(first, (1e9, 1e9))
    os.utime(second, (2e9, 2e9))
    monkeypatch.setattr(kept, "MOST", 2 * size - 1)
    (third,) = made(0.03)
    assert not first.exists() and second.exists() and third.exists()
    os.utime(second, (1e9, 1e9))
    assert not made(0.02)  # a result that is used again is no old one
    (fourth,) = made(0.04)
    assert second.exists() and fourth.exists() and not third.exists()


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: tuple[ip.Model, Any]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("INFOPT_CACHE", str(tmp_path / "file"))
    monkeypatch.delenv("INFOPT_METHOD_CACHE")
    model, params = llama
    with pytest.raises(InfoptError, match="cannot hold what was computed") as e:
        ip.quantize(bits=4, group=16, method=gptq(**HOW))(model).convert(params)
    assert "INFOPT_METHOD_CACHE=0" in e.value.fix


def test_small_scales_survive_the_disk(tmp_path: Path) -> None:
    x = {"a": jnp.ones(3, jnp.float8_e4m3fn), "b": jnp.zeros((0, 2), jnp.bfloat16), "c": jnp.float32(2)}
    store = kept.Kept(tmp_path)
    store.put("step", x)
    assert same(store.get("step", x), x) and store.get("other", x) is None
    assert store.get("step", x | {"c": jnp.zeros(2)}) is None


def test_what_a_start_reads_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text is CPython's own by default, which another Python has otherwise."""
    stack = ip.quantize(bits=4, group=16, method=ip.distilled(IDS, start=gptq()))
    before = stack.digest()
    draft = ip.speculative(draft=ip.self_draft(stack | ip.cache_kv()))
    assert draft.digest() and not ip.speculative(draft=ip.self_draft(ip.quantize(bits=4))).digest()
    drafted = draft.digest()
    monkeypatch.setattr("infopt.texts.topics", lambda split: "another text")
    assert stack.digest() != before and draft.digest() != drafted


def test_nothing_is_kept_of_a_family_of_ones_own(folder: Path, llama: tuple[ip.Model, Any]) -> None:
    from infopt.model import FAMILIES

    model, params = llama
    own = FAMILIES["llama"]

    def block(*args: Any) -> Any:
        assert own.block is not None
        return own.block(*args)

    assert own.embed is not None and own.final is not None
    mine = ip.define("mine", own.config, init=own.init, embed=own.embed, block=block, final=own.final)
    ip.quantize(bits=4, group=16, method=gptq(**HOW))(ip.Model.of(mine, model.spec.config)).convert(params)
    mine = ip.define(
        "mine", own.config, init=own.init, embed=lambda *a: own.embed(*a), block=own.block, final=own.final
    )
    ip.quantize(bits=4, group=16, method=gptq(**HOW))(ip.Model.of(mine, model.spec.config)).convert(params)
    assert not folder.exists()


def counted_layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each layer that is run from now on."""
    runs, own = list[int](), layers.programs

    def programs(*args: Any) -> Any:
        runs.append(0)
        return own(*args)

    monkeypatch.setattr(layers, "programs", programs)
    return runs


def test_where_all_layers_are_kept_none_is_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = ip.quantize(bits=4, group=16, where=["layers.*", "head"], method=gptq(**HOW))
    model = ip.models.llama(layers=2, dim=32, heads=4, kv_heads=2, vocab=61, context=64, tied=False)
    params = model.init(jax.random.key(0))
    want, runs = stack(model).convert(params), counted_layers(monkeypatch)
    assert same(stack(model).convert(params), want) and not runs
    (kept_in,) = folder.iterdir()
    (kept_in / "head").unlink()
    assert same(stack(model).convert(params), want) and len(runs) == 2


def test_static_scales_are_kept_beside_what_dynamic_ones_share(
    folder: Path, llama: tuple[ip.Model, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, params = llama
    how = dict(bits=8, activations=8, method=gptq(**HOW))
    static = ip.quantize(**how, static=True)(model)
    ip.quantize(**how)(model).convert(params)
    monkeypatch.setattr(GPTQ, "_one", None)  # GPTQ's own work is done
    want, runs = static.convert(params), counted_layers(monkeypatch)
    assert len([*folder.iterdir()]) == 1
    assert same(static.convert(params), want) and not runs
