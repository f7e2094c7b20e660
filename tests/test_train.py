"""Training: the loss it says, runs that go on as if they had not stopped, and what is refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infopt as ip
import infopt.train as training
from infopt import reference
from infopt.errors import InfoptError
from infopt.model import Weights
from infopt.qtensor import is_qtensor
from infopt.train import Training, batch_of, distillation_loss, fit, loss_of

MODEL = ip.models.llama(vocab=11, layers=2, dim=16, context=64)
START = MODEL.init(jax.random.key(0))
TEXT = np.random.default_rng(0).integers(0, 11, 500)
PLAN = Training(steps=7, batch=4, length=12, warmup=2)


def same(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


POOLED = ip.gqa(1)(MODEL)
SMALL = POOLED.convert(START)
TAUGHT = dataclasses.replace(PLAN, mix=0.5, temperature=2.0)
RUNS: dict[str, dict[str, Any]] = {
    "whole": dict(model=MODEL, params=START, tokens=TEXT, plan=PLAN, teacher=None),
    "taught": dict(model=POOLED, params=SMALL, tokens=TEXT, plan=TAUGHT, teacher=(MODEL, START)),
}


@pytest.fixture(scope="module")
def whole() -> tuple[Any, np.ndarray]:
    return fit(**RUNS["whole"])


@pytest.fixture(scope="module")
def taught() -> tuple[Any, np.ndarray]:
    return fit(**RUNS["taught"])


def test_the_loss_is_the_references() -> None:
    tokens = TEXT[:24].reshape(2, 12)
    want = []
    for row in tokens:
        logits = reference.reference(MODEL.spec, Weights.of(MODEL.spec, START), row)
        logits -= logits.max(-1, keepdims=True)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        want += [-logp[t, row[t + 1]] for t in range(len(row) - 1)]
    assert abs(float(loss_of(MODEL, START, jnp.asarray(tokens))) - np.mean(want)) < 1e-6


def test_a_run_lowers_the_loss_of_text_that_has_a_rule() -> None:
    plan = dataclasses.replace(PLAN, steps=40, rate=1e-2, warmup=5)
    params, losses = fit(MODEL, START, np.arange(500) % 11, plan)
    assert losses[0] > 2 and losses[-1] < losses[0] / 3
    assert float(loss_of(MODEL, params, jnp.arange(24)[None] % 11)) < 1


def test_the_params_given_are_left_as_they_are(whole: Any) -> None:
    assert same(START, MODEL.init(jax.random.key(0))) and not same(START, whole[0])


@pytest.mark.parametrize(("stop", "run"), [(1, "whole"), (3, "taught"), (5, "whole")])
def test_a_run_that_is_killed_goes_on_to_the_very_same_params(
    stop: int, run: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(text: np.ndarray, plan: Training, step: int) -> np.ndarray:
        if step == stop:
            raise Killed
        return batch_of(text, plan, step)

    want, given = request.getfixturevalue(run), RUNS[run]
    with monkeypatch.context() as patch:
        patch.setattr(training, "batch_of", kill)
        with pytest.raises(Killed):
            fit(**given, folder=tmp_path, every=2)
    if given["teacher"]:
        with pytest.raises(InfoptError, match="teacher differ"):
            other: dict[str, Any] = given | {"teacher": (MODEL, jax.tree.map(lambda x: 2 * x, START))}
            fit(**other, folder=tmp_path, every=2)
    seen = []
    monkeypatch.setattr(training, "batch_of", lambda *args: (seen.append(args[2]), batch_of(*args))[1])
    params, losses = fit(**given, folder=tmp_path, every=2)
    assert seen == list(range(stop // 2 * 2, 7)), "from the latest checkpoint on"
    assert same(params, want[0]) and np.array_equal(losses, want[1])


def test_a_run_that_is_done_is_not_done_again(whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, first = fit(MODEL, START, TEXT, PLAN, folder=tmp_path, until=4)
    assert np.array_equal(first, whole[1][:4])
    fit(MODEL, START, TEXT, PLAN, folder=tmp_path)
    monkeypatch.setattr(training, "batch_of", lambda *_: pytest.fail("a step was done again"))
    params, losses = fit(MODEL, START, TEXT, PLAN, folder=tmp_path)
    assert same(params, whole[0]) and np.array_equal(losses, whole[1])


def test_a_batch_in_parts_has_the_gradient_of_the_whole(whole: Any) -> None:
    params, losses = fit(MODEL, START, TEXT, dataclasses.replace(PLAN, accumulate=2))
    assert np.abs(losses - whole[1]).max() < 1e-4
    assert all(
        np.allclose(x, y, atol=1e-3) for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(whole[0]), strict=True)
    )


def test_only_matrices_decay() -> None:
    """With a learning rate and no gradient, AdamW would shrink what decays alone."""
    still = dataclasses.replace(PLAN, steps=3, warmup=0, decay=0.5, clip=0.0)
    params, _ = fit(MODEL, START, TEXT, still)
    before, after = Weights.of(MODEL.spec, START), Weights.of(MODEL.spec, params)
    for name in before:
        shrunk = float(jnp.linalg.norm(after[name])) < 0.999 * float(jnp.linalg.norm(before[name]))
        assert shrunk == (before[name].ndim > 1), name


def test_another_runs_checkpoints_are_refused(tmp_path: Path) -> None:
    fit(MODEL, START, TEXT, PLAN, folder=tmp_path, until=2)
    other = jax.tree.map(lambda x: x + 1, START)
    for changed, said in (
        (dict(plan=dataclasses.replace(PLAN, seed=1)), "plan differ"),
        (dict(params=other), "params differ"),
        (dict(tokens=TEXT[::-1]), "text differ"),
    ):
        given: dict[str, Any] = dict(params=START, tokens=TEXT, plan=PLAN) | changed
        with pytest.raises(InfoptError, match=said):
            fit(MODEL, given["params"], given["tokens"], given["plan"], folder=tmp_path)


def test_a_loss_that_is_no_number_ends_the_run_with_the_last_checkpoint_kept(tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, steps=20, rate=1e30, warmup=3, clip=1e30)
    with pytest.raises(InfoptError, match="the loss of step"):
        fit(MODEL, START, TEXT, plan, folder=tmp_path, every=1)
    assert [p for p in tmp_path.iterdir() if p.name.isdigit()]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(steps=0), "steps=0"),
        (dict(batch=True), "batch=True"),
        (dict(length=1), "length=1"),
        (dict(rate=float("nan")), "rate=nan"),
        (dict(decay=-1.0), "decay=-1"),
        (dict(batch=3, accumulate=2), "equal parts"),
        (dict(mix=1.5), "mix=1.5"),
        (dict(mix=float("nan")), "mix=nan"),
        (dict(temperature=0.0), "temperature=0"),
    ],
)
def test_a_plan_that_is_none_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InfoptError, match=said):
        dataclasses.replace(PLAN, **change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(tokens=TEXT[:5]), "cannot be trained on"),
        (dict(tokens=TEXT.astype(float)), "cannot be trained on"),
        (dict(tokens=TEXT + 5), "tokens from 5 to 15"),
        (dict(plan=dataclasses.replace(PLAN, length=65)), "context of 64"),
        (dict(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), START)), "16 bits"),
    ],
)
def test_what_cannot_be_trained_is_refused(change: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = dict(params=START, tokens=TEXT, plan=PLAN) | change
    with pytest.raises(InfoptError, match=said):
        fit(MODEL, given["params"], given["tokens"], given["plan"])


def packed(params: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(params, is_leaf=is_qtensor) if is_qtensor(x)]


def test_of_packed_weights_the_dense_part_is_trained() -> None:
    model = ip.quantize(bits=8)(MODEL)
    start = model.convert(START)
    params, losses = fit(model, start, np.arange(500) % 11, dataclasses.replace(PLAN, steps=30, rate=1e-2))
    assert losses[-1] < 0.6 * losses[0]
    assert packed(start) and same(packed(params), packed(start))
    dense, before = ip.trainable(params)[0], ip.trainable(start)[0]
    assert not any(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(dense), jax.tree.leaves(before), strict=True))


def test_a_cached_stack_is_trained_as_if_it_had_no_cache(whole: Any) -> None:
    """Also where its cache rounds, through which no gradient can be asked."""
    model = (ip.cache_kv(bits=8) | ip.paged(4))(MODEL)
    params, losses = fit(model, model.convert(START), TEXT, PLAN)
    assert same(params, whole[0]) and np.array_equal(losses, whole[1])


def test_a_speculative_stack_is_refused_as_student_and_as_teacher() -> None:
    pair = (ip.cache_kv() | ip.speculative(ip.self_draft()))(MODEL)
    params = pair.convert(START)
    with pytest.raises(InfoptError, match="the student is a speculative stack") as e:
        fit(pair, params, TEXT, PLAN)
    assert "without speculative" in e.value.fix
    with pytest.raises(InfoptError, match="the teacher is a speculative stack"):
        ip.uptrain(POOLED, SMALL, teacher=(pair, params), text=TEXT, steps=1)


# ------------------------------------------------------------------------------------------------------- with a teacher


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_the_distillation_loss_is_hintons(temperature: float) -> None:
    student, teacher = np.random.default_rng(1).normal(size=(2, 3, 4, 11))

    def softmax(x: np.ndarray) -> np.ndarray:
        x = np.exp(x / temperature)
        return x / x.sum(-1, keepdims=True)

    p, q = softmax(teacher), softmax(student)
    want = temperature**2 * np.mean(np.sum(p * np.log(p / q), -1))
    args = jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32)
    assert float(distillation_loss(*args, temperature)) == pytest.approx(want, rel=1e-5)
    mine, theirs = jax.grad(distillation_loss, (0, 1))(*args, temperature)
    np.testing.assert_allclose(mine, temperature * (q - p) / 12, atol=1e-6)  # what T^2 is for
    assert not np.asarray(theirs).any()


def test_a_taught_runs_loss_is_the_mix_that_it_says(taught: Any) -> None:
    rows = jnp.asarray(batch_of(TEXT, TAUGHT, 0)[0], jnp.int32)
    student, teacher = (m.apply(p, rows)[0][:, :-1] for m, p in ((POOLED, SMALL), (MODEL, START)))
    chosen = jnp.take_along_axis(jax.nn.log_softmax(student), rows[:, 1:, None], -1)
    want = -0.5 * jnp.mean(chosen) + 0.5 * distillation_loss(student, teacher, 2.0)
    assert float(taught[1][0]) == pytest.approx(float(want), rel=1e-5)


def test_uptraining_brings_a_pooled_model_back_to_its_teacher() -> None:
    def sharp(path: Any, x: Any) -> Any:
        return 4 * x if path[-1].key in ("attn.v", "attn.o") else x

    teacher = MODEL, jax.tree_util.tree_map_with_path(sharp, START)
    start, rows = POOLED.convert(teacher[1]), jnp.arange(48).reshape(4, 12) * 7 % 11

    def far(params: Any) -> float:
        return float(distillation_loss(POOLED.apply(params, rows)[0], MODEL.apply(teacher[1], rows)[0]))

    plan: dict[str, Any] = dict(steps=60, mix=1.0, batch=8, length=24, rate=1e-2, progress=False)
    params, losses = ip.uptrain(POOLED, start, teacher=teacher, text=TEXT, **plan)
    assert len(losses) == 60 and losses[-1] < losses[0] / 4
    assert far(params) < far(start) / 4


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        (ip.models.llama(vocab=12, layers=1, dim=16), "the teacher knows 12 words, the student 11"),
        (ip.models.llama(vocab=11, layers=1, dim=16, context=8), "which the teacher is to read"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused(teacher: ip.Model, said: str) -> None:
    with pytest.raises(InfoptError, match=said):
        fit(MODEL, START, TEXT, TAUGHT, teacher=(teacher, teacher.init(jax.random.key(0))))


def test_a_teacher_of_another_tokenizer_is_refused_and_text_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Words:
        def __init__(self, digest: str) -> None:
            self.digest = digest

        def encode(self, text: str) -> list[int]:
            return [ord(c) % 11 for c in text]

    one, other = (dataclasses.replace(MODEL, tokenizer=Words(d)) for d in "ab")
    with pytest.raises(InfoptError, match="another tokenizer"):
        fit(one, START, TEXT, TAUGHT, teacher=(other, START))
    with pytest.raises(InfoptError, match="without a tokenizer"):
        ip.uptrain(MODEL, START, teacher=(MODEL, START), text="some text", steps=1)
    monkeypatch.setattr(training, "fit", lambda model, params, tokens, *_, **__: tokens)
    ids = [ord(c) % 11 for c in "some text"]
    for text in ("some text", ["some", " text"], ids, np.array(ids)):
        assert list(ip.uptrain(one, START, teacher=(one, START), text=text, steps=1)) == ids  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("wrong", [dict(steps="10"), dict(steps=0), dict(steps=1, length="16"), dict(steps=1, batch=0)])
def test_uptraining_without_a_plan_is_refused(wrong: dict[str, Any]) -> None:
    ((name, value), *_) = reversed(wrong.items())
    with pytest.raises(InfoptError, match=f"{name}={value!r} is no plan for training"):
        ip.uptrain(POOLED, SMALL, teacher=(MODEL, START), text=TEXT, **wrong)


def test_a_share_without_a_teacher_is_refused() -> None:
    with pytest.raises(InfoptError, match="has no teacher"):
        fit(POOLED, SMALL, TEXT, TAUGHT)


def test_a_stack_of_windows_and_pooled_heads_is_trained() -> None:
    model = (ip.gqa(1) | ip.sliding_window(6, sinks=1))(MODEL)
    _, losses = fit(model, model.convert(START), np.arange(500) % 11, dataclasses.replace(PLAN, steps=30, rate=1e-2))
    assert losses[-1] < losses[0] / 2


def test_a_folder_that_is_a_file_is_refused_before_any_step(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InfoptError, match="checkpoints"):
        fit(MODEL, START, TEXT, PLAN, folder=tmp_path / "file")
    shutil.rmtree(tmp_path)
