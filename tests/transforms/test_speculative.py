"""speculative: drafts, their params, and what it refuses. (That tokens stay the same: tests/test_generation.py.)"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import infopt as ip
from infopt.errors import InfoptError, ParamsError, TransformOrderError
from infopt.model import Weights
from infopt.qtensor import is_qtensor

TINY = {"layers": 2, "dim": 16, "heads": 2, "kv_heads": 2, "head_dim": 8, "mlp": 16, "vocab": 29, "context": 48}
BARE = ip.models.llama(**TINY, tied=False)
CACHED = ip.cache_kv()(BARE)
PARAMS = BARE.init(jax.random.key(0))
INT8 = ip.quantize(bits=8)


@dataclasses.dataclass(frozen=True)
class Words:
    digest: str


def test_it_edits_the_program_only_and_is_exact() -> None:
    t = ip.speculative(ip.self_draft(INT8), k=3)
    spec = t(CACHED).spec
    assert spec.replace(program=None) == CACHED.spec
    assert spec.program.k == 3
    assert spec.program.draft == (INT8 | ip.cache_kv())(BARE).spec
    assert t.exact
    assert t(CACHED).exact


def test_without_a_transform_the_model_is_its_own_draft() -> None:
    model = ip.speculative(ip.self_draft())(CACHED)
    assert model.spec.program.draft == CACHED.spec
    assert model.spec.program.k == 4


def test_a_self_draft_is_made_from_the_targets_values_taken_dense() -> None:
    """The target is packed in 8 bits; its draft rounds those values to 4, as the two steps one after another do."""
    four = ip.quantize(bits=4, group=8)
    model = (INT8 | ip.cache_kv() | ip.speculative(ip.self_draft(four | ip.sliding_window(6)), k=2))(BARE)
    params = model.convert(PARAMS)
    alone = (INT8 | ip.dequantize() | four)(BARE)
    want, got = Weights.of(alone.spec, alone.convert(PARAMS)), Weights.of(model.spec.program.draft, params["draft"])
    assert set(got) == set(want)
    for name in want:
        jax.tree.map(np.testing.assert_array_equal, got[name], want[name])
    assert is_qtensor(params["target"]["segments"][0][0]["mlp.up"])
    assert model.spec.program.draft.window[0].size == 6
    assert model.spec.window == (None, None)


def test_another_model_is_a_draft_with_params_of_its_own() -> None:
    small = ip.cache_kv()(ip.models.llama(**TINY | {"layers": 1, "dim": 8, "heads": 1, "kv_heads": 1}))
    small_params = small.init(jax.random.key(1))
    model = ip.speculative(small, k=2)(CACHED)
    params = model.convert(PARAMS, draft=small_params)
    assert jax.tree.leaves(params["draft"])[0] is jax.tree.leaves(small_params)[0] or jax.tree.all(
        jax.tree.map(np.array_equal, params["draft"], small_params)
    )
    with pytest.raises(ParamsError):
        model.convert(PARAMS, draft=PARAMS)
    assert repr(ip.speculative(small, k=2)) == "speculative(draft=<llama: cache_kv()>, k=2)"


def test_a_gemma_draws_up_a_llamas_text() -> None:
    """A draft of another family needs the same words, and nothing else."""
    draft = ip.cache_kv(bits=8)(ip.models.gemma3(**TINY | {"layers": 1}))
    assert ip.speculative(draft)(CACHED).spec.program.draft.family == "gemma3"


def test_its_state_is_a_pair_that_shares_lengths_and_tokens() -> None:
    model = (ip.sliding_window(4) | ip.cache_kv() | ip.paged(2) | ip.speculative(ip.self_draft(), k=4))(BARE)
    state = model.init_state(2, 40, chunk=1)
    assert len(state.kv) == len(state.tables) == len(state.layouts) == 2
    assert state.lengths.shape == (2,)
    assert state.lookahead == 5, "a ring must hold a whole round of k + 1 tokens, whatever the chunk"


def test_without_a_cache_it_is_refused() -> None:
    with pytest.raises(TransformOrderError, match="needs a cache") as e:
        ip.speculative(ip.self_draft())(BARE)
    assert e.value.why
    assert e.value.fix.startswith("cache_kv() | speculative(")


@pytest.mark.parametrize(
    ("draft", "says"),
    [
        (BARE, "the draft has no cache"),
        (ip.cache_kv()(ip.models.llama(**TINY | {"vocab": 31})), "the draft knows 31 words, the model 29"),
        (ip.speculative(ip.self_draft())(CACHED), "the draft is speculative itself"),
        (ip.self_draft(ip.speculative(ip.self_draft())), "the draft is speculative itself"),
    ],
    ids=["uncached", "vocabulary", "speculative", "nested"],
)
def test_a_draft_that_cannot_serve_is_refused(draft: object, says: str) -> None:
    with pytest.raises(InfoptError, match=says) as e:
        ip.speculative(draft)(CACHED)  # type: ignore[arg-type]
    assert e.value.fix


def test_a_draft_with_another_tokenizer_is_refused() -> None:
    draft = dataclasses.replace(CACHED, tokenizer=Words("b"))
    model = dataclasses.replace(CACHED, tokenizer=Words("a"))
    with pytest.raises(InfoptError, match="the draft's tokenizer is another") as e:
        ip.speculative(draft)(model)
    assert e.value.why
    assert e.value.fix
    ip.speculative(dataclasses.replace(draft, tokenizer=Words("a")))(model)
    ip.speculative(CACHED)(model)
    ip.speculative(draft)(CACHED)


def test_what_a_self_draft_cannot_be_made_by_is_refused_with_the_transforms_own_reason() -> None:
    with pytest.raises(TransformOrderError, match="has a cache already"):
        ip.speculative(ip.self_draft(ip.cache_kv()))(CACHED)
    with pytest.raises(InfoptError, match="does not divide"):
        ip.speculative(ip.self_draft(ip.gqa(3)))(CACHED)


@pytest.mark.parametrize("draft", [None, INT8, ip.self_draft, "self_draft()"], ids=lambda d: type(d).__name__)
def test_what_is_no_draft_is_refused(draft: object) -> None:
    with pytest.raises(InfoptError, match="as its draft") as e:
        ip.speculative(draft)  # type: ignore[arg-type]
    assert "self_draft" in e.value.fix


@pytest.mark.parametrize("what", [3, ip.cache_kv, CACHED], ids=lambda d: type(d).__name__)
def test_a_self_draft_is_made_by_a_transform(what: object) -> None:
    with pytest.raises(InfoptError, match="not a transform"):
        ip.self_draft(what)  # type: ignore[arg-type]
