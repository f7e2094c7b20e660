"""speculative: a draft guesses, the model checks, the text stays the model's."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, final

from infopt import texts
from infopt.errors import InfoptError
from infopt.model import Model, Weights, check_params
from infopt.spec import Spec, Speculation
from infopt.transforms.base import Transform, densify, order_error, whole


@final
@dataclasses.dataclass(frozen=True, repr=False)
class SelfDraft:
    """A draft made from the target itself."""

    transform: Transform | None = None

    def edit(self, spec: Spec) -> Spec:
        if self.transform is None:
            return spec
        spec = spec.replace(weights=())
        self.transform.check(spec)
        return self.transform.edit(spec)

    def params(self, weights: Weights, target: Model) -> Weights:
        if self.transform is None:
            return weights
        weights = densify(target.spec, weights)
        model = Model(target.spec.replace(weights=()), tokenizer=target.tokenizer)
        for step in self.transform.steps:
            after = step(model)
            weights, model = step.params(weights, model, after.spec), after
        return weights

    def reads(self, target: Model) -> list[Any]:
        """What its steps read, each on what those before it make of the target."""
        found, model = [], Model(target.spec.replace(weights=()), tokenizer=target.tokenizer)
        for step in () if self.transform is None else self.transform.steps:
            found += step.reads(model)
            model = step(model)
        return found

    def digest(self) -> str:
        """A hash of what its steps hold; "" where they hold nothing."""
        held = [] if self.transform is None else [step.digest() for step in self.transform.steps]
        return texts.digest(" ".join(held)) if any(held) else ""

    def __repr__(self) -> str:
        return f"self_draft({'' if self.transform is None else repr(self.transform)})"


@final
@dataclasses.dataclass(frozen=True, repr=False)
class Speculative(Transform):
    name: ClassVar[str] = "speculative"
    draft: SelfDraft | Model
    k: int

    @property
    def exact(self) -> bool:
        return True

    @property
    def extras(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("draft",) if isinstance(self.draft, Model) else ()

    def draft_spec(self, spec: Spec) -> Spec:
        return self.draft.spec if isinstance(self.draft, Model) else self.draft.edit(spec)

    def check(self, spec: Spec) -> None:
        if not spec.cache:
            raise order_error(
                self,
                "needs a cache, and there is none yet",
                "a round keeps what both models have read, and takes back what was guessed wrong.",
                f"cache_kv() | {self!r}",
            )
        draft = self.draft_spec(spec)
        if draft.program is not None:
            raise InfoptError(
                f"{self!r}: the draft is speculative itself.",
                why="a draft is asked for one token at a time.",
                fix="a plain cached stack as the draft",
            )
        if not draft.cache:
            raise InfoptError(
                f"{self!r}: the draft has no cache.",
                why="it would read its whole text again for each guess.",
                fix="draft=cache_kv()(small_model)",
            )
        if draft.config.vocab != spec.config.vocab:
            raise InfoptError(
                f"{self!r}: the draft knows {draft.config.vocab} words, the model {spec.config.vocab}.",
                why="a guess is a token id, and must mean the same to both.",
                fix="a draft with the same tokenizer",
            )

    def check_model(self, model: Model) -> None:
        mine, theirs = model.tokenizer, self.draft.tokenizer if isinstance(self.draft, Model) else None
        if mine is not None and theirs is not None and mine.digest != theirs.digest:
            raise InfoptError(
                f"{self!r}: the draft's tokenizer is another than the model's.",
                why="a guess is a token id, and must mean the same to both.",
                fix="a draft with the same tokenizer",
            )

    def edit(self, spec: Spec) -> Spec:
        return spec.replace(program=Speculation(self.draft_spec(spec), self.k))

    def params(self, weights: Weights, before: Model, after: Spec, **extra: Any) -> Weights:
        if isinstance(self.draft, Model):
            check_params(self.draft.spec, extra["draft"])
            return weights.join("draft.", Weights.of(self.draft.spec, extra["draft"]))
        return weights.join("draft.", self.draft.params(weights, before))

    def reads(self, model: Model) -> list[Any]:
        return [] if isinstance(self.draft, Model) else self.draft.reads(model)

    def digest(self) -> str:
        return "" if isinstance(self.draft, Model) else self.draft.digest()

    def __repr__(self) -> str:
        draft = (
            f"<{self.draft.spec.family}: {self.draft.recipe}>" if isinstance(self.draft, Model) else repr(self.draft)
        )
        return f"speculative(draft={draft}, k={self.k})"


def self_draft(transform: Transform | None = None) -> SelfDraft:
    """A draft made from the target itself, by a transform that makes it cheaper.

    The target's packed weights are first taken dense: a draft is only a guess. Without a transform the model is its
    own draft, and every guess is right.

    >>> import infopt as ip
    >>> self_draft(ip.quantize(bits=4))
    self_draft(quantize(bits=4))
    """
    if transform is not None and not isinstance(transform, Transform):
        raise InfoptError(
            f"self_draft was given {transform!r}, which is not a transform.",
            why="the draft is the model under a transform.",
            fix="self_draft(quantize(bits=4)), say",
        )
    return SelfDraft(transform)


def speculative(draft: SelfDraft | Model, k: int = 4) -> Speculative:
    """Let a draft guess `k` tokens a round and check them in one call of the model. Exact: the same tokens.

    Target and draft draw each position's token with the same noise, and a guess is accepted where the two agree; so
    the text is that of plain decoding, greedy or sampled, whatever the draft. Outermost: applied last.

    Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding"; the coupling is a
    Gumbel draw that both share.

    Args:
      draft: `self_draft(transform)`, or a cached model with the same vocabulary, whose params are then given to
        `convert(params, draft=draft_params)`.
      k: guesses a round.

    Raises:
      TransformOrderError: no cache yet.
      InfoptError: the draft has no cache, or another vocabulary.

    >>> import infopt as ip
    >>> model = (ip.cache_kv() | speculative(self_draft(ip.quantize(bits=8)), k=2))(ip.models.llama())
    >>> model.exact, model.spec.program.draft.weights[0]
    (True, ('layers.0.attn.k', Format(name='int8', group=None, scale='float32')))
    """
    if not isinstance(draft, SelfDraft | Model):
        raise InfoptError(
            f"speculative was given {draft!r} as its draft.",
            why="something must guess the next tokens.",
            fix="draft=self_draft(quantize(bits=4)), or a cached model",
        )
    return Speculative(draft, whole("k", k, 1))
