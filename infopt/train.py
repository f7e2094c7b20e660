"""Training: a language-model loss, AdamW, checkpoints that resume exactly.

    loss(params) = mean over tokens of -log softmax(logits)[next token], in float32

The batch of a step is a function of (seed, step) alone, so a run that was killed and goes on from its last checkpoint
ends with the very params of one that was not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from infopt.errors import InfoptError, PromptError
from infopt.model import Model, check_params, is_matrix
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
    folder: str | Path | None = None,
    every: int = 200,
    until: int | None = None,
    progress: bool = True,
) -> tuple[Params, np.ndarray]:
    """Train dense params on one long text.

    Args:
      model: a stack without packed weights, cache or draft.
      params: where to begin, float32; they are left as they are.
      tokens: `[N]`, the text; texts of `plan.length` tokens are cut out of it anywhere.
      plan: what to do.
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
    text = _check(model, params, tokens, plan)
    last = plan.steps if until is None else min(until, plan.steps)
    update, optimiser = _compile(model, plan, params)
    step, losses = 0, np.zeros(plan.steps, np.float32)
    own = jax.tree.map(jnp.array, params)  # updated in place
    state = own, optimiser.init(own)
    with _checkpoints(folder, _fingerprint(model, params, text, plan)) as kept:
        if kept is not None and (latest := kept.latest()) is not None:
            step = latest
            state, before = kept.restore(latest, (state, losses))
            losses = np.array(before)
        with _bar(plan.steps, progress) as show:
            while step < last:
                state, loss = update(state, batch_of(text, plan, step))
                losses[step] = loss
                if not np.isfinite(losses[step]):
                    raise InfoptError(
                        f"the loss of step {step} is {losses[step]}.",
                        why="the params have left where gradients are of use.",
                        fix=f"a smaller rate than {plan.rate}, or a longer warmup than {plan.warmup}",
                    )
                step += 1
                show(step, losses[:step])
                if kept is not None and (step % every == 0 or step == last):
                    kept.save(step, (state, losses))
    return state[0], losses[:step]


def batch_of(text: np.ndarray, plan: Training, step: int) -> np.ndarray:
    """The texts of a step, `[accumulate, batch / accumulate, length]`: cut out anywhere, by (seed, step) alone."""
    at = np.random.default_rng((plan.seed, step)).integers(0, len(text) - plan.length + 1, plan.batch)
    rows = text[at[:, None] + np.arange(plan.length)]
    return rows.reshape(plan.accumulate, -1, plan.length)


def loss_of(model: Model, params: Params, tokens: Array) -> Array:
    """The mean negative log-likelihood of `tokens` `[B, T]` after each row's first, in nats a token."""
    logits = model.apply(params, tokens)[0][:, :-1].astype(jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))


def _compile(model: Model, plan: Training, params: Params) -> tuple[Any, optax.GradientTransformation]:
    # Stacked over layers, a norm has two axes, as a matrix has outside them.
    decayed = jax.tree_util.tree_map_with_path(
        lambda path, x: is_matrix(path[-1].key, x.shape[path[0].key == "segments" :]), params
    )
    optimiser = optax.chain(
        optax.clip_by_global_norm(plan.clip),
        optax.adamw(plan.schedule(), b2=0.95, weight_decay=plan.decay, mask=decayed),
    )

    def update(state: tuple[Params, Any], rows: Array) -> tuple[tuple[Params, Any], Array]:
        params, moments = state

        def part(total: tuple[Array, Params], tokens: Array) -> tuple[tuple[Array, Params], None]:
            found = jax.value_and_grad(lambda p: loss_of(model, p, tokens))(params)
            return jax.tree.map(jnp.add, total, found), None

        none = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(part, none, rows)
        loss, grads = jax.tree.map(lambda x: x / plan.accumulate, total)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its counts with floats
            changes, moments = optimiser.update(grads, moments, params)
            new: Any = optax.apply_updates(params, changes)
        return (new, moments), loss

    return jax.jit(update, donate_argnums=0), optimiser


def _check(model: Model, params: Params, tokens: Any, plan: Training) -> np.ndarray:
    check_params(model.spec, params)
    if model.spec.weights or model.spec.cache or model.spec.program:
        raise InfoptError(
            f"{model!r:.80} cannot be trained.",
            why="gradients do not reach packed weights, nor what a cache has kept.",
            fix="train the stack without quantize, cache_kv and speculative, then apply them",
        )
    if any(x.dtype != jnp.float32 for x in jax.tree.leaves(params)):
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


def _fingerprint(model: Model, params: Params, text: np.ndarray, plan: Training) -> dict[str, Any]:
    start = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        start.update(np.ascontiguousarray(leaf).tobytes())
    return {
        "plan": dataclasses.asdict(plan),
        "spec": model.spec.to_json(),
        "params": start.hexdigest(),
        "text": hashlib.sha256(text.tobytes()).hexdigest(),
    }


@contextmanager
def _bar(steps: int, wanted: bool) -> Iterator[Any]:
    """A function of (step, losses so far) that shows both, where standard error is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (wanted and console.is_terminal)) as progress:
        task = progress.add_task("loss", total=steps)
        yield lambda step, losses: progress.update(
            task, completed=step, description=f"loss {np.mean(losses[-50:]):.3f}"
        )
