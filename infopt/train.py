"""Training: a language-model loss, a teacher's distribution, AdamW, checkpoints that resume exactly.

    loss(params) = (1 - mix) * mean over tokens of -log softmax(logits)[next token]
                 + mix * mean over tokens of T^2 KL(softmax(teacher's logits / T) || softmax(logits / T)), in float32

What is trained is the stack's dense weights, through its functions without a cache. Packed weights stay as they are.
The batch of a step is a function of (seed, step) alone, so a run that was killed and goes on from its last checkpoint
ends with the very params of one that was not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from infopt.errors import InfoptError, PromptError
from infopt.model import Model, check_length, check_params, is_matrix, params_digest, trainable
from infopt.progress import bar
from infopt.spec import oracle
from infopt.typing import Array, Params


@dataclasses.dataclass(frozen=True)
class Training:
    """What a training run does. Its result depends on this, the model, the tokens and the params it begins with alone.

    Args:
      steps: updates.
      batch: texts an update.
      length: tokens a text, of which each but the first is predicted.
      accumulate: parts in which a batch is read, one after the other: memory for time.
      rate: the highest learning rate: reached by a straight line, left by a cosine.
      warmup: steps until then.
      final: the last learning rate, of the highest.
      decay: weight decay, of matrices.
      clip: the most that the gradients' global norm may be.
      seed: of the batches.
      mix: the share of the teacher's distribution in the loss, 0 to 1; the text's own tokens have the rest.
      temperature: T, which divides both models' logits where they are compared.
    """

    steps: int
    batch: int = 16
    length: int = 512
    accumulate: int = 1
    rate: float = 3e-3
    warmup: int = 100
    final: float = 0.05
    decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    mix: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("length", 2), ("accumulate", 1), ("warmup", 0), ("seed", 0)):
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int) or value < least:
                raise InfoptError(
                    f"{name}={value!r} is no plan for training.", why="it counts something.", fix=f"{name} >= {least}"
                )
        for name in ("rate", "final", "decay", "clip"):
            if not 0 <= (value := getattr(self, name)) < float("inf"):
                raise InfoptError(
                    f"{name}={value!r} is no plan for training.", why="it is a size.", fix=f"a number, {name} >= 0"
                )
        if not 0 <= self.mix <= 1:
            raise InfoptError(
                f"mix={self.mix!r} is no share.",
                why="the loss is part the teacher's distribution, part the text's tokens.",
                fix="0 <= mix <= 1",
            )
        if not 0 < self.temperature < float("inf"):
            raise InfoptError(
                f"temperature={self.temperature!r} divides no logits.", why="it scales them.", fix="temperature > 0"
            )
        if self.batch % self.accumulate:
            raise InfoptError(
                f"a batch of {self.batch} texts cannot be read in {self.accumulate} equal parts.",
                why="each part is one compiled step.",
                fix="accumulate that divides batch",
            )

    def schedule(self) -> optax.Schedule:
        warmup = min(self.warmup, self.steps - 1)
        return optax.warmup_cosine_decay_schedule(0.0, self.rate, warmup, self.steps, self.rate * self.final)


def fit(
    model: Model,
    params: Params,
    tokens: Any,
    plan: Training,
    *,
    teacher: tuple[Model, Params] | None = None,
    folder: str | Path | None = None,
    every: int = 200,
    until: int | None = None,
    progress: bool = True,
) -> tuple[Params, np.ndarray]:
    """Train a stack's dense weights on one long text.

    Packed weights stay as they are. A cache is left out while training, and with it the rounding of its keys and
    values, which has no slope; what comes back are params of the stack as it was given.

    Args:
      model: a stack without a draft.
      params: where to begin, what is dense of them float32; they are left as they are.
      tokens: `[N]`, the text; texts of `plan.length` tokens are cut out of it anywhere.
      plan: what to do.
      teacher: a stack of the same vocabulary and its params, whose logits `plan.mix` counts.
      folder: where checkpoints go. A run that finds its own there goes on from the latest.
      every: steps between checkpoints.
      until: the step to stop before, for now; by default the plan's last.
      progress: whether to show a bar, on a terminal.

    Returns:
      The trained params, and the loss of each step that was done (nats a token, before its update).

    Raises:
      InfoptError: the plan is none, the model cannot be trained, the loss is NaN, or the folder holds another run's
        checkpoints.
      PromptError: the tokens are too few, or not the model's.

    >>> import infopt as ip, jax, numpy as np
    >>> model = ip.models.llama(vocab=8, layers=1, dim=16)
    >>> start, text = model.init(jax.random.key(0)), np.arange(400) % 8
    >>> plan = ip.train.Training(steps=30, batch=4, length=16, rate=1e-2, warmup=5)
    >>> _, losses = ip.train.fit(model, start, text, plan, progress=False)
    >>> bool(losses[-1] < losses[0] / 2)
    True
    """
    if every < 1:
        raise InfoptError(f"every={every!r} saves nothing.", why="it is steps between checkpoints.", fix="every >= 1")
    text = _check(model, params, tokens, plan, teacher)
    last = plan.steps if until is None else min(until, plan.steps)
    dense, join = trainable(params)
    update, optimiser = _compile(model, plan, dense, teacher)
    step, losses = 0, np.zeros(plan.steps, np.float32)
    own = jax.tree.map(jnp.array, dense)  # updated in place
    state = own, optimiser.init(own)
    held = params, None if teacher is None or not plan.mix else teacher[1]
    with _checkpoints(folder, _fingerprint(model, params, text, plan, teacher)) as kept:
        if kept is not None and (latest := kept.latest()) is not None:
            step = latest
            state, before = kept.restore(latest, (state, losses))
            losses = np.array(before)
        with bar("loss", plan.steps, progress) as show:
            while step < last:
                state, loss = update(state, held, batch_of(text, plan, step))
                losses[step] = loss
                if not np.isfinite(losses[step]):
                    raise InfoptError(
                        f"the loss of step {step} is {losses[step]}.",
                        why="the params have left where gradients are of use.",
                        fix=f"a smaller rate than {plan.rate}, or a longer warmup than {plan.warmup}",
                    )
                step += 1
                show(step, f"loss {np.mean(losses[max(step - 50, 0) : step]):.3f}")
                if kept is not None and (step % every == 0 or step == last):
                    kept.save(step, (state, losses))
    return join(state[0]), losses[:step]


def uptrain(
    model: Model,
    params: Params,
    *,
    teacher: tuple[Model, Params],
    text: str | Sequence[str] | Sequence[int] | np.ndarray,
    steps: int,
    mix: float = 0.9,
    temperature: float = 1.0,
    rate: float = 1e-3,
    batch: int = 8,
    length: int = 256,
    accumulate: int = 1,
    seed: int = 0,
    folder: str | Path | None = None,
    every: int = 50,
    progress: bool = True,
) -> tuple[Params, np.ndarray]:
    """Win back what a conversion lost: train a stack to say what its teacher says, on a little text.

        loss = mix * T^2 KL(softmax(teacher / T) || softmax(student / T)) - (1 - mix) * log softmax(student)[next token]

    `fit` with a plan for this purpose: a tenth of the steps warm up, then the rate falls to a twentieth by a cosine;
    no weight decay. What is trained of a stack, and what a killed run does, `fit` says. `mix=0` is training alone, as
    in the paper on uptraining.

    Source: Ainslie et al. 2023, "GQA", section 2.1 (uptraining); Hinton et al. 2015, "Distilling the Knowledge in a
    Neural Network", section 2.

    Args:
      model, params: the stack, converted: the student.
      teacher: `(model, params)` of the same vocabulary; the model before its conversion, say.
      text: a text or documents for `model.tokenizer`, or token ids; the longer, the better.
      steps: updates.
      mix, temperature, rate, batch, length, accumulate, seed: as in `Training`; texts are cut to the models' contexts.
      folder, every, progress: as in `fit`.

    Returns:
      The trained params, and the loss of each step (nats a token, before its update).

    Raises:
      InfoptError: other vocabularies, a draft, or as `fit`.
      PromptError: the text is too short, or needs a tokenizer.

    >>> import infopt as ip, jax, numpy as np
    >>> model = ip.models.llama(vocab=8, layers=1, dim=16, kv_heads=2)
    >>> params, small = model.init(jax.random.key(0)), ip.gqa(1)(model)
    >>> text, start = np.arange(400) % 8, small.convert(params)
    >>> _, losses = ip.uptrain(small, start, teacher=(model, params), text=text, steps=30, length=16, progress=False)
    >>> bool(losses[-1] < losses[0])
    True
    """
    tokens = _encode(model, text)
    contexts = [m.spec.config.context for m in (model, teacher[0])]
    length = min(length, *contexts) if isinstance(length, int) else length
    warmup = max(steps // 10, 1) if isinstance(steps, int) else 0  # Training says what is wrong with others
    plan = Training(
        steps, batch, length, accumulate, rate, warmup, decay=0.0, seed=seed,
        mix=mix, temperature=temperature,
    )  # fmt: skip
    return fit(model, params, tokens, plan, teacher=teacher, folder=folder, every=every, progress=progress)


def batch_of(text: np.ndarray, plan: Training, step: int) -> np.ndarray:
    """The texts of a step, `[accumulate, batch / accumulate, length]`: cut out anywhere, by (seed, step) alone."""
    at = np.random.default_rng((plan.seed, step)).integers(0, len(text) - plan.length + 1, plan.batch)
    rows = text[at[:, None] + np.arange(plan.length)]
    return rows.reshape(plan.accumulate, -1, plan.length)


def loss_of(model: Model, params: Params, tokens: Array) -> Array:
    """The mean negative log-likelihood of `tokens` `[B, T]` after each row's first, in nats a token."""
    return _next_token_loss(_logits(model, params, tokens), tokens)


def distillation_loss(student: Array, teacher: Array, temperature: float = 1.0) -> Array:
    """How far a student's distribution is from its teacher's, in nats a token.

        loss = T^2 * mean over tokens of KL(softmax(teacher / T) || softmax(student / T))

    T^2 keeps the gradients' size from falling as T grows. No gradient reaches the teacher.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.

    Args:
      student, teacher: logits, `[..., V]`.
      temperature: T.

    Returns:
      A float32 scalar, 0 where both say the same.

    >>> import jax.numpy as jnp
    >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
    >>> [round(float(distillation_loss(jnp.zeros((1, 3)), logits, t)), 4) for t in (1.0, 2.0)]
    [0.0589, 0.0569]
    """
    p, q = (jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in (jax.lax.stop_gradient(teacher), student))
    return temperature**2 * jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1))


def _next_token_loss(logits: Array, tokens: Array) -> Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))


def _logits(model: Model, params: Params, tokens: Array) -> Array:
    """Of each token but the last, which nothing follows: `[B, T - 1, V]`, float32."""
    return model.apply(params, tokens)[0][:, :-1].astype(jnp.float32)


def _uncached(model: Model, codec: bool) -> Model:
    """The same functions without a cache; with or without the rounding of its keys and values."""
    spec = oracle(model.spec).replace(attention=model.spec.attention)  # whose backward pass saves memory
    return Model(spec if codec else spec.replace(kv=None))


def _compile(
    model: Model, plan: Training, dense: Params, teacher: tuple[Model, Params] | None
) -> tuple[Any, optax.GradientTransformation]:
    student = _uncached(model, codec=False)
    master = None if teacher is None or not plan.mix else _uncached(teacher[0], codec=True)
    # Stacked over layers, a norm has two axes, as a matrix has outside them.
    decayed = jax.tree_util.tree_map_with_path(
        lambda path, x: is_matrix(path[-1].key, x.shape[path[0].key == "segments" :]), dense
    )
    optimiser = optax.chain(
        optax.clip_by_global_norm(plan.clip),
        optax.adamw(plan.schedule(), b2=0.95, weight_decay=plan.decay, mask=decayed),
    )

    def update(state: tuple[Params, Any], held: Any, rows: Array) -> tuple[tuple[Params, Any], Array]:
        own, moments = state
        _, join = trainable(held[0])  # packed weights are arguments, or the program would hold a copy of them

        def part(total: tuple[Array, Params], tokens: Array) -> tuple[tuple[Array, Params], None]:
            target = None if master is None else _logits(master, held[1], tokens)

            def loss(dense: Params) -> Array:
                logits = _logits(student, join(dense), tokens)
                own = _next_token_loss(logits, tokens)
                if target is None:
                    return own
                return (1 - plan.mix) * own + plan.mix * distillation_loss(logits, target, plan.temperature)

            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(own)), None

        none = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, own))
        total, _ = jax.lax.scan(part, none, rows)
        loss, grads = jax.tree.map(lambda x: x / plan.accumulate, total)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its counts with floats
            changes, moments = optimiser.update(grads, moments, own)
            new: Any = optax.apply_updates(own, changes)
        return (new, moments), loss

    return jax.jit(update, donate_argnums=0), optimiser


def _encode(model: Model, text: Any) -> Any:
    """Token ids of a text, or of documents one after the other; ids as they are."""
    documents = [text] if isinstance(text, str) else text
    if not isinstance(documents, list | tuple) or not documents or not all(isinstance(x, str) for x in documents):
        return text
    if model.tokenizer is None:
        raise PromptError(
            "a text was given to a model without a tokenizer.",
            why="a text becomes token ids by the tokenizer that the model was trained with.",
            fix="token ids, or a model loaded with its tokenizer",
        )
    return np.concatenate([np.asarray(model.tokenizer.encode(each), np.int32) for each in documents])


def _check(
    model: Model, params: Params, tokens: Any, plan: Training, teacher: tuple[Model, Params] | None
) -> np.ndarray:
    if teacher is None and plan.mix:
        raise InfoptError(
            f"mix={plan.mix} has no teacher.",
            why="it is the share of a teacher's distribution in the loss.",
            fix="teacher=(model, params), or mix=0",
        )
    for what, one in (("student", model), *([("teacher", teacher[0])] if teacher else [])):
        if one.spec.program:
            raise InfoptError(
                f"the {what} is a speculative stack, which cannot be trained or taught from as a pair.",
                why="its draft and its target are two models; the text is the target's alone, whatever the draft.",
                fix="the stack without speculative, and its own params; apply speculative afterwards",
            )
    check_params(model.spec, params)
    if teacher is not None:
        check_params(teacher[0].spec, teacher[1])
        _check_teacher(model, teacher[0], plan)
    if any(x.dtype != jnp.float32 for x in jax.tree.leaves(trainable(params)[0])):
        raise InfoptError(
            "params of 16 bits cannot be trained.",
            why="a small step would vanish in their rounding.",
            fix='load them as dtype="float32"',
        )
    config, text = model.spec.config, np.asarray(tokens)
    if plan.length > config.context:
        raise InfoptError(
            f"texts of {plan.length} tokens exceed the model's context of {config.context}.",
            why="positions beyond it mean nothing to it.",
            fix=f"length <= {config.context}",
        )
    if text.ndim != 1 or not np.issubdtype(text.dtype, np.integer) or len(text) < plan.length:
        raise PromptError(
            f"a text of shape {text.shape} and type {text.dtype} cannot be trained on.",
            why=f"texts of {plan.length} tokens are cut out of one long one.",
            fix="token ids in one dimension, at least as many",
        )
    if text.min() < 0 or text.max() >= config.vocab:
        raise PromptError(
            f"the text has tokens from {text.min()} to {text.max()}.",
            why=f"the model knows 0 to {config.vocab - 1}.",
            fix="the model's own tokenizer: model.tokenizer.encode(text)",
        )
    return text.astype(np.int32)


def _check_teacher(model: Model, teacher: Model, plan: Training) -> None:
    mine, theirs = model.tokenizer, teacher.tokenizer
    words = model.spec.config.vocab, teacher.spec.config.vocab
    if words[0] != words[1] or (mine is not None and theirs is not None and mine.digest != theirs.digest):
        counts = f"knows {words[1]} words, the student {words[0]}" if words[0] != words[1] else "has another tokenizer"
        raise InfoptError(
            f"the teacher {counts}.",
            why="logits are compared word by word.",
            fix="a teacher with the student's tokenizer: the model that it was converted from, say",
        )
    check_length(teacher.spec, plan.length, f"texts of {plan.length} tokens, which the teacher is to read,")


# ------------------------------------------------------------------------------------------------------- checkpoints


class _Kept:
    """The checkpoints of one run, in an orbax manager's folder."""

    def __init__(self, folder: Path, run: dict[str, Any]) -> None:
        import orbax.checkpoint as ocp

        self.args, self.run, self.folder = ocp.args, run, folder
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager(folder, options=options, item_names=("state", "run"))

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        leaves = {f"{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
        saved = self.args.Composite(state=self.args.StandardSave(leaves), run=self.args.JsonSave(self.run))
        self.manager.save(step, args=saved)

    def restore(self, step: int, state: Any) -> Any:
        leaves, structure = jax.tree.flatten(state)
        run = self.manager.restore(step, args=self.args.Composite(run=self.args.JsonRestore()))["run"]
        if differs := [key for key in self.run if self.run[key] != run.get(key)]:
            raise InfoptError(
                f"{self.folder} holds checkpoints of another run: {', '.join(differs)} differ.",
                why="a run that goes on must end as if it had not stopped.",
                fix="another folder, or the plan, params and text that it began with",
            )
        wanted = self.args.StandardRestore({f"{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)})
        found = self.manager.restore(step, args=self.args.Composite(state=wanted))["state"]
        return jax.tree.unflatten(structure, [jnp.asarray(found[f"{i}"]) for i in range(len(leaves))])


@contextmanager
def _checkpoints(folder: str | Path | None, run: dict[str, Any]) -> Iterator[_Kept | None]:
    if folder is None:
        yield None
        return
    remarks = logging.getLogger("absl")
    level = remarks.level
    remarks.setLevel(logging.ERROR)
    kept = None
    try:
        try:
            Path(folder).expanduser().mkdir(parents=True, exist_ok=True)
            kept = _Kept(Path(folder).expanduser().resolve(), run)
        except (OSError, ValueError) as error:
            raise InfoptError(
                f"{folder} cannot hold checkpoints.",
                why=str(error),
                fix="a folder that can be written, or is not there yet",
            ) from error
        yield kept
    finally:
        if kept is not None:
            kept.manager.close()
        remarks.setLevel(level)


def _fingerprint(
    model: Model, params: Params, text: np.ndarray, plan: Training, teacher: tuple[Model, Params] | None
) -> dict[str, Any]:
    run = {
        "plan": dataclasses.asdict(plan),
        "spec": model.spec.to_json(),
        "params": params_digest(params),
        "text": hashlib.sha256(text.tobytes()).hexdigest(),
    }
    if teacher and plan.mix:
        return run | {"teacher": [teacher[0].spec.to_json(), params_digest(teacher[1])]}
    del run["plan"]["mix"], run["plan"]["temperature"]  # as before there was any teacher
    return run
