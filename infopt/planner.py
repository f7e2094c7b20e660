"""The planner: what a stack will take of a device's memory, and how fast it could at most be. It needs no weights.

Weights and state are counted off the shapes that the program itself allocates, so they are exact. What a step needs
besides, its activations, is an estimate of what XLA's programs keep at once: its rules were read off what XLA's CPU
compiler does, and `tests/test_plan.py` holds the totals against `memory_analysis()`. Speeds are the roofline: an upper
bound from bandwidth and peak, not a promise.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infopt import ops
from infopt.cache import Layout, State
from infopt.devices import Device
from infopt.devices import device as find
from infopt.errors import InfoptError, human, nearest
from infopt.generation import BUCKETS
from infopt.io import open_model
from infopt.io.checkpoint import DTYPES
from infopt.kernels.flash_attention import blockwise, portable
from infopt.model import Model, build, check_length, context_limit, is_matrix, segments, shapes, window_groups
from infopt.models import llama
from infopt.qtensor import Format, blank, is_qtensor, quantize_array
from infopt.spec import Spec
from infopt.transforms import cache_kv, quantize, stack_option
from infopt.transforms.base import whole
from infopt.typing import Params

USABLE = 0.9
"""Of a device's memory: the rest is for the runtime, the programs and what fragmentation wastes."""
LONGEST, MOST_ROWS = 1 << 20, 1 << 16  # where the searches for the largest context and batch stop


# ------------------------------------------------------------------------------------------- what the program allocates


def abstract_params(spec: Spec, dtype: Any = jnp.float32) -> Params:
    """The params of a stack as shapes: what `convert` would return, without a weight.

    Args:
      spec: the stack's.
      dtype: of dense weights.

    >>> import infopt as ip
    >>> params = abstract_params(ip.quantize(bits=8)(ip.models.llama()).spec)
    >>> params["segments"][0][0]["mlp.up"].codes
    ShapeDtypeStruct(shape=(2, 192, 64), dtype=int8)
    """
    if spec.program is not None:
        return {
            "target": abstract_params(spec.replace(program=None), dtype),
            "draft": abstract_params(spec.program.draft, dtype),
        }
    expected, formats = shapes(spec), dict(spec.weights)

    def stack(name: str, *leading: int) -> Any:
        one = _abstract_weight(expected[name], formats.get(name), jnp.dtype(dtype))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*leading, *leaf.shape), leaf.dtype), one)

    params: Params = {name: stack(name) for name in expected if not name.startswith("layers.")}
    params["segments"] = tuple(
        tuple(
            {name: stack(f"layers.{seg.layer(0, phase)}.{name}", seg.repeats) for name in names}
            for phase, names in enumerate(seg.names)
        )
        for seg in segments(spec)
    )
    return params


@functools.cache
def _abstract_weight(shape: tuple[int, ...], fmt: Format | None, dtype: Any) -> Any:
    x = jax.ShapeDtypeStruct(shape, dtype)
    if fmt is None:
        return x
    return jax.eval_shape(lambda w: (blank if fmt.row.kept else quantize_array)(w, fmt, trailing=2), x)


def abstract_state(spec: Spec, batch: int, context: int, chunk: int, dtype: Any = jnp.float32) -> State:
    """What `init_state` would return, as shapes."""
    return jax.eval_shape(lambda: build(spec).init_state(batch, context, min(chunk, context), dtype))


def nbytes(tree: Any) -> int:
    """Bytes of all leaves."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Part:
    """A line of the account: what, and its bytes."""

    what: str
    bytes: int


def _models(spec: Spec, params: Params, state: State) -> Iterator[tuple[str, Spec, Params, Any, tuple[Layout, ...]]]:
    """Each model of a stack, one or under speculation two: prefix, Spec, params, its cache and layouts."""
    if spec.program is None:
        yield "", spec, params, state.kv, state.layouts
        return
    for i, (name, one) in enumerate((("target", spec.replace(program=None)), ("draft", spec.program.draft))):
        yield f"{name}: ", one, params[name], state.kv[i], state.layouts[i]


def _weight_parts(spec: Spec, params: Params, state: State) -> tuple[Part, ...]:
    parts: dict[str, int] = {}
    for prefix, _, one, _, _ in _models(spec, params, state):
        for leaf in jax.tree.leaves(one, is_leaf=is_qtensor):
            what = prefix + (leaf.format.label if is_qtensor(leaf) else str(leaf.dtype))
            parts[what] = parts.get(what, 0) + nbytes(leaf)
    return tuple(Part(what, n) for what, n in parts.items())


def _cache_parts(spec: Spec, params: Params, state: State, dtype: str) -> tuple[Part, ...]:
    parts: list[Part] = []
    for prefix, one, _, cache, layouts in _models(spec, params, state):
        for window, layout in zip(window_groups(one), layouts):
            stacks = [
                (seg.repeats, stack)
                for seg, blocks in zip(segments(one), cache, strict=True)
                for w, stack in zip(seg.windows, blocks, strict=True)
                if w == window
            ]
            kind = "linear" if layout.lookahead is None else f"ring, window {window}"
            paged = f", pages of {layout.page}" * (layout.page is not None)
            slots = f"{layout.slots} slots a row"
            if layout.recent is not None:
                slots = f"{layout.slots} groups of {layout.group} and {layout.recent.slots} latest tokens a row"
            codec = dtype if one.kv is None else str(one.kv)
            layers = sum(repeats for repeats, _ in stacks)
            what = f"{prefix}{layers} layers, {kind}, {slots}{paged}, {codec}"
            parts.append(Part(what, nbytes([stack for _, stack in stacks])))
    return tuple(parts)


# ------------------------------------------------------------------------------------------------- what a step needs


def _layers(
    spec: Spec, params: Params, layouts: Any, batch: int, context: int, *, tokens: int, early: float, cpu: bool
) -> int:
    """Bytes that the layers keep at once while each row takes `tokens` tokens: an estimate.

    XLA copies, or unpacks, all matrices of a block before it uses the first (a block is one period of layers), and of a
    layer's own about half before its attention. Until that is done its scores and the slots that it reads lie there
    twice (by block, one block of scores, and the slots in blocks too); after it come the products of the feed-forward
    half. A segment of one block is no loop: of what it unpacks the share `early` lies there from the beginning.
    """
    c, formats = spec.config, dict(spec.weights)
    table = params.get("embed", _largest_table(params))
    own = 4 if is_qtensor(table) else table.dtype.itemsize  # bytes of an activation
    rows = batch * (tokens if spec.cache else context)  # without a cache all is computed again
    in_place = cpu and ops.LOOPS_IN_PLACE and rows == 1

    def copied(name: str, shape: tuple[int, ...], loop: bool) -> int:
        f = formats.get(name)
        read = f is None or (f.row.codes == 1 and f.activations is None)  # as it lies there
        stays = len(shape) < 2 or (f is None and not loop) or (in_place and read)
        return 0 if stays else math.prod(shape) * (4 if cpu else own)  # XLA's CPU code multiplies in float32

    expected, groups, most, always = shapes(spec), window_groups(spec), 0, 0
    for seg in segments(spec):
        later = 0  # copies for the layers of the block that are still to come
        for phase in reversed(range(seg.period)):
            names = [f"layers.{seg.layer(0, phase)}.{name}" for name in seg.names[phase]]
            copies = sum(copied(name, expected[name], seg.repeats > 1) for name in names)
            widest = max(max(expected[name]) for name in names)
            slots = layouts[groups.index(seg.windows[phase])].tokens if spec.cache else context
            each = tokens if spec.cache else context  # queries of a row
            at_once = spec.attention == "reference" and not spec.cache
            whole = at_once or (spec.attention != "blockwise" and portable.is_plain(each, slots))
            kept = each * slots if whole else min(each, blockwise.QUERIES) * min(slots, blockwise.KEYS)
            scores = 2 * batch * c.heads * kept * 4
            read = (2 if whole else 4) * batch * slots * c.kv_heads * c.head_dim * own
            attention = scores + read + rows * (2 * c.dim + 3 * c.heads * c.head_dim) * own
            feed_forward = copies + rows * (2 * c.dim + 2 * widest) * own
            most = max(most, later + max(attention + copies // 2, feed_forward))
            later += copies
        always += later if seg.repeats == 1 and len(segments(spec)) > 1 else 0
    return most + int(always * early)


def _largest_table(params: Params) -> Any:
    """What the head multiplies by; of a family that names its weights otherwise, its largest matrix outside layers."""
    if "head" in params or "embed" in params:
        return params.get("head", params.get("embed"))
    return max((x for name, x in params.items() if name != "segments"), key=nbytes)


def _head(spec: Spec, params: Params, rows: int, cpu: bool) -> int:
    """Bytes of the logits, twice, and of the table where it must be unpacked or widened."""
    c, table = spec.config, _largest_table(params)
    unpacked = is_qtensor(table) or (cpu and table.dtype.itemsize < 4)
    return (2 * rows + unpacked * c.dim) * c.vocab * 4


def _widened(params: Params, cache: Any) -> int:
    """Bytes of the float32 copies that XLA's CPU code before jaxlib 0.11 makes of 16-bit layers and caches, roughly."""
    if not ops.LOOPS_IN_PLACE:
        return 0
    leaves = jax.tree.leaves((params["segments"], cache), is_leaf=is_qtensor)
    return 2 * nbytes([x for x in leaves if not is_qtensor(x) and x.ndim > 2 and x.dtype.itemsize == 2])


@dataclasses.dataclass(frozen=True)
class Account:
    """A stack's bytes at one batch and context.

    Args:
      weights, cache: exact, by format and by layout.
      state: exact: tokens, lengths and block tables.
      prefill, decode: what a call of either keeps besides, an estimate.
    """

    weights: tuple[Part, ...]
    cache: tuple[Part, ...]
    state: int
    prefill: int
    decode: int

    @property
    def activations(self) -> int:
        return max(self.prefill, self.decode)

    @property
    def total(self) -> int:
        return sum(part.bytes for part in (*self.weights, *self.cache)) + self.state + self.activations


@functools.lru_cache(maxsize=4096)
def account(spec: Spec, batch: int, context: int, chunk: int, dtype: str, kv_dtype: str, cpu: bool) -> Account:
    """The bytes of a stack; `cpu` says whose products it runs."""
    params, state = abstract_params(spec, dtype), abstract_state(spec, batch, context, chunk, kv_dtype)
    chunk, k = min(chunk, context), spec.program.k if spec.program else 0
    prefill = decode = 0
    for i, (_, one, weights, cache, layouts) in enumerate(_models(spec, params, state)):
        step = 1 if i else k + 1  # the target checks its draft's guesses in one call
        widened = _widened(weights, cache) if cpu else 0
        need = functools.partial(_layers, one, weights, layouts, batch, context, cpu=cpu)
        prefill = max(prefill, need(tokens=chunk, early=0.5) + widened)
        layers, head = need(tokens=step, early=1.0) + widened, _head(one, weights, batch * step, cpu)
        decode = max(decode, max(layers, head) if widened else layers + head)
    caches = _cache_parts(spec, params, state, kv_dtype)
    rest = nbytes(state) - sum(part.bytes for part in caches)
    return Account(_weight_parts(spec, params, state), caches, rest, prefill, decode)


# ---------------------------------------------------------------------------------------------------------- roofline


@dataclasses.dataclass(frozen=True)
class Speed:
    """An upper bound, and what sets it: `"compute"` or `"memory"`."""

    tokens_per_second: float
    bound: str

    def __str__(self) -> str:
        return f"<= {_rate(self.tokens_per_second)} ({self.bound})"


@dataclasses.dataclass(frozen=True)
class Work:
    """Operations, and bytes that cross between memory and processor."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, n: float) -> Work:
        return Work(self.flops * n, self.bytes * n)

    def speed(self, tokens: int, device: Device) -> Speed:
        """Of `tokens` tokens for this work."""
        compute, memory = self.flops / device.flops, self.bytes / device.bandwidth
        return Speed(tokens / max(compute, memory), "compute" if compute > memory else "memory")


def _pairs(spec: Spec, first: int, last: int) -> int:
    """(query, key) pairs of the queries at positions first .. last - 1, over all layers."""

    def seen(n: int, width: int) -> int:  # the sum of min(position + 1, width) over the first n positions
        short = min(n, width)
        return short * (short + 1) // 2 + (n - short) * width

    widths = (last if w is None else w.size + w.sinks for w in spec.window)
    return sum(seen(last, width) - seen(first, width) for width in widths)


def _call(spec: Spec, params: Params, cache: int, batch: int, first: int, last: int, heads: int) -> Work:
    """One call of `hidden` on positions first .. last - 1 of each row, and of `head` on `heads` of them."""
    c = spec.config
    matrices = sum(math.prod(s) for n, s in shapes(spec).items() if n.startswith("layers.") and is_matrix(n, s))
    flops = 2 * matrices * (last - first) + 2 * c.vocab * c.dim * heads  # 2 a weight a token
    flops += 4 * c.heads * c.head_dim * _pairs(spec, first, last)  # scores, and values
    table = _largest_table(params)
    return Work(batch * flops, nbytes(params["segments"]) + cache + (nbytes(table) if heads else 0))


def _prefill_work(spec: Spec, params: Params, cache: int, batch: int, context: int, chunk: int) -> Work:
    """A prompt of `context` tokens in chunks: the weights are read for each, and half of the cache on average."""
    if not spec.cache:
        return _call(spec, params, 0, batch, 0, context, 0)
    calls, whole_prompt = math.ceil(context / chunk), _call(spec, params, 0, batch, 0, context, 0)
    return Work(whole_prompt.flops, (whole_prompt.bytes + cache / 2) * calls)


def _decode_work(spec: Spec, params: Params, cache: int, batch: int, context: int, tokens: int) -> Work:
    """The last `tokens` tokens of a full context, in one call."""
    return _call(spec, params, cache, batch, max(context - tokens, 0) if spec.cache else 0, context, tokens)


# -------------------------------------------------------------------------------------------------------------- plan


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a stack takes of a device, at one batch and context.

    Args:
      stack: the model and its transforms, as text.
      spec: what it computes.
      device: the device.
      batch, context, chunk: rows, positions a row, and tokens that one call of prefill takes.
      dtype, kv_dtype: of dense weights, and of keys and values without a codec.
    """

    stack: str
    spec: Spec
    device: Device
    batch: int
    context: int
    chunk: int
    dtype: str
    kv_dtype: str

    def _account(self, batch: int, context: int) -> Account:
        cpu = self.device.name.startswith("cpu")
        return account(self.spec, batch, context, self.chunk, self.dtype, self.kv_dtype, cpu)

    def _fits(self, batch: int, context: int) -> bool:
        return self._account(batch, context).total <= USABLE * self.device.memory

    @property
    def account(self) -> Account:
        """The bytes, line by line."""
        return self._account(self.batch, self.context)

    @property
    def total(self) -> int:
        """Bytes: weights, cache, state and activations."""
        return self.account.total

    @property
    def fits(self) -> bool:
        """Whether the total is within `USABLE` of the device's memory."""
        return self._fits(self.batch, self.context)

    @functools.cached_property
    def largest_batch(self) -> int:
        """The most rows that fit at this context, 0 if not even one does; the search stops at `MOST_ROWS`."""
        return _largest(lambda n: self._fits(n, self.context), MOST_ROWS)

    @functools.cached_property
    def largest_context(self) -> int:
        """The longest context that fits at this batch, 0 if none; up to the model's limit, without one `LONGEST`."""
        return _largest(lambda n: self._fits(self.batch, n), min(context_limit(self.spec) or LONGEST, LONGEST))

    @functools.cached_property
    def prefill(self) -> Speed:
        """The most prompt tokens a second, of all rows together, while prompts fill the context."""
        work = Work()
        for _, one, weights, cache, _ in self._parts():
            work += _prefill_work(one, weights, nbytes(cache), self.batch, self.context, min(self.chunk, self.context))
        return work.speed(self.batch * self.context, self.device)

    @functools.cached_property
    def decode(self) -> Speed:
        """The most tokens a second, of all rows together, at the context's end; under speculation every guess right."""
        k, work = self.spec.program.k if self.spec.program else 0, Work()
        for i, (_, one, weights, cache, _) in enumerate(self._parts()):
            tokens, times = (1, k + 1) if i else (k + 1, 1)  # the draft runs k + 1 times, the target once
            work += _decode_work(one, weights, nbytes(cache), self.batch, self.context, tokens).times(times)
        return work.speed(self.batch * (k + 1), self.device)

    def _parts(self) -> Iterator[tuple[str, Spec, Params, Any, tuple[Layout, ...]]]:
        state = abstract_state(self.spec, self.batch, self.context, self.chunk, self.kv_dtype)
        return _models(self.spec, abstract_params(self.spec, self.dtype), state)

    def to_json(self) -> str:
        """All that the tables show, as JSON."""
        fields = ("stack", "batch", "context", "chunk", "dtype", "kv_dtype", "total", "fits")
        found: dict[str, Any] = {name: getattr(self, name) for name in (*fields, "largest_batch", "largest_context")}
        found |= {name: dataclasses.asdict(getattr(self, name)) for name in ("device", "account", "prefill", "decode")}
        return json.dumps(found | {"spec": json.loads(self.spec.to_json())}, sort_keys=True)

    def __repr__(self) -> str:
        return _bytes_table(self) + "\n" + _device_table([self])


def plan(
    model: Model,
    *,
    device: str | Device = "cpu",
    context: int,
    batch: int = 1,
    dtype: str = "float32",
    kv_dtype: str = "float32",
    chunk: int = max(BUCKETS),
) -> Plan:
    """What a stack will take of a device's memory, whether it fits, and how fast it could at most be. Needs no weights.

    Args:
      model: a stack.
      device: a name of `infopt.devices.DEVICES`, `"cpu"` (this one, measured) or a `Device`.
      context: positions of a row, as `init_state(max_len=...)`.
      batch: rows.
      dtype: of dense weights, as for `load`; `"keep"` is float32 for those that are not packed.
      kv_dtype: of keys and values without a codec, as for `init_state`; `generate` keeps float32.
      chunk: tokens of a row that one call of prefill takes; `generate` takes 128.

    Raises:
      InfoptError: no such device or dtype, or a number below 1.
      PromptError: the context is beyond the model's limit.

    >>> import infopt as ip
    >>> found = ip.plan(ip.cache_kv()(ip.models.llama()), device="rtx4090", context=512, batch=2)
    >>> found.fits, found.account.cache[0]
    (True, Part(what='2 layers, linear, 512 slots a row, float32', bytes=524288))
    """
    if not isinstance(model, Model):
        raise InfoptError(
            f"plan was given a {type(model).__name__}.",
            why="the bytes follow from a stack.",
            fix="a model: model, params = ip.load(...)",
        )
    for name, value in (("dtype", dtype), ("kv_dtype", kv_dtype)):
        if value not in DTYPES:
            raise InfoptError(
                f"{name}={value!r} is not a type of weights.",
                why="those are the types that weights are read to.",
                fix=nearest(str(value), list(DTYPES)),
            )
    batch, context, chunk = whole("batch", batch, 1), whole("context", context, 1), whole("chunk", chunk, 1)
    spec, target = model.spec, device if isinstance(device, Device) else find(device)
    check_length(spec, context, f"a context of {context} tokens")
    names = (str(DTYPES[dtype]), str(DTYPES[kv_dtype]))
    return Plan(repr(model).splitlines()[0], spec, target, batch, context, chunk, *names)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The greatest n in 0 .. most for which it fits; more never fits where less does not."""
    if fits(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# ------------------------------------------------------------------------------------------------------- what it prints

_NOTE = (
    "Weights, cache and state are exact; activations are an estimate. It fits if the total is within "
    f"{USABLE:.0%} of the memory.\nSpeeds are upper bounds from bandwidth and peak (dense bfloat16 if there is one): "
    "a prompt that fills the context, a token at its end."
)


def _rate(n: float) -> str:
    return f"{n:,.0f}" if n >= 100 else f"{n:.3g}"


def _bytes_table(p: Plan) -> str:
    a = p.account
    both = f"dense weights {p.dtype}, prefill in chunks of {p.chunk}"
    lines = [p.stack, f"  batch {p.batch}, context {p.context}, {both}"]

    def line(title: str, size: int, what: str = "") -> None:
        lines.append(f"  {title:<12} {human(size):>10}  {what}".rstrip())

    for title, parts in (("weights", a.weights), ("cache", a.cache)):
        for part in parts:
            line(title, part.bytes, part.what)
            title = ""
    line("state", a.state, "tokens, lengths, block tables")
    line("activations", a.activations, "at most, in prefill" if a.prefill >= a.decode else "at most, in decoding")
    line("total", a.total)
    return "\n".join(lines)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    return "\n".join(
        "  " + "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in (head, *rows)
    )


def _device_table(plans: list[Plan]) -> str:
    head = ("device", "memory", "total", "fits", "largest batch", "largest context", "prefill tok/s", "decode tok/s")
    rows = [
        (
            p.device.name,
            human(p.device.memory),
            human(p.total),
            "yes" if p.fits else "no",
            f"{p.largest_batch}",
            f"{p.largest_context}" + "+" * (p.largest_context == LONGEST),
            str(p.prefill),
            str(p.decode),
        )
        for p in plans
    ]
    sources = [f"  {p.device.name}: {p.device.title}; {p.device.source}" for p in plans]
    return "\n".join([_table(head, rows), *sources])


# ---------------------------------------------------------------------------------------------- what can I run on this?


@dataclasses.dataclass(frozen=True)
class Size:
    """A common shape, by the published config of the model that is named."""

    name: str
    like: str
    layers: int
    dim: int
    heads: int
    head_dim: int
    mlp: int
    vocab: int
    tied: bool = False

    def model(self) -> Model:
        return llama(
            layers=self.layers,
            dim=self.dim,
            heads=self.heads,
            kv_heads=8,
            head_dim=self.head_dim,
            mlp=self.mlp,
            vocab=self.vocab,
            context=131072,
            tied=self.tied,
        )


SIZES = (
    Size("1B", "Llama 3.2 1B", 16, 2048, 32, 64, 8192, 128256, tied=True),
    Size("3B", "Llama 3.2 3B", 28, 3072, 24, 128, 8192, 128256, tied=True),
    Size("8B", "Llama 3.1 8B", 32, 4096, 32, 128, 14336, 128256),
    Size("14B", "Qwen 2.5 14B without biases", 48, 5120, 40, 128, 13824, 152064),
    Size("32B", "Qwen 2.5 32B without biases", 64, 5120, 40, 128, 27648, 152064),
    Size("70B", "Llama 3.1 70B", 80, 8192, 64, 128, 28672, 128256),
)
FORMS = {"fp16": None, "int8": quantize(bits=8), "int4": quantize(bits=4)}


def common(devices: list[Device], context: int, batch: int = 1) -> list[dict[str, Plan]]:
    """Plans of the common sizes in 16, 8 and 4 bits, for each device by name; keys and values in 16 bits."""
    return [
        {
            d.name: plan(model, device=d, context=context, batch=batch, dtype="float16", kv_dtype="float16")
            for d in devices
        }
        for size in SIZES
        for form in FORMS.values()
        for model in [(cache_kv() if form is None else form | cache_kv())(size.model())]
    ]


def _common_table(rows: list[dict[str, Plan]], context: int, batch: int) -> str:
    labels = [(size, form) for size in SIZES for form in FORMS]
    head = ("size", "weights", *rows[0])
    cells = []
    for (size, form), plans in zip(labels, rows, strict=True):
        weights = sum(part.bytes for part in next(iter(plans.values())).account.weights)
        fit = (f"{_rate(p.decode.tokens_per_second)} in {human(p.total)}" if p.fits else "-" for p in plans.values())
        cells.append((f"{size.name} {form}", human(weights), *fit))
    shapes_of = ", ".join(f"{size.name} {size.like}" for size in SIZES)
    return (
        f"batch {batch}, context {context}, keys and values in 16 bits; "
        "where it fits, decode tokens/s at most and the total\n"
        f"{_table(head, cells)}\n  shapes: {shapes_of}"
    )


def main(args: argparse.Namespace) -> int:
    """`infopt plan`."""
    names = [name for name in args.device.split(",") if name.strip()]
    if not names:
        raise InfoptError(f"--device {args.device!r} names none.", why="a plan is for a device.", fix="--device cpu")
    devices = [find(name) for name in names]
    if args.model is None:
        context = 8192 if args.context is None else args.context
        rows = common(devices, context, args.batch)
        if args.json:
            print(json.dumps([{name: json.loads(p.to_json()) for name, p in row.items()} for row in rows]))
            return 0
        print(_common_table(rows, context, args.batch))
        for d in devices:
            print(f"  {d.name}: {d.title}, {human(d.memory)}; {d.source}")
        print(_NOTE)
        return 0
    stack = stack_option(args.stack)
    base, dtype = open_model(args.model, args.dtype)
    model = stack(base)
    context = min(context_limit(model.spec) or 8192, 8192) if args.context is None else args.context
    plans = [
        plan(model, device=d, context=context, batch=args.batch, dtype=dtype, kv_dtype=args.kv_dtype) for d in devices
    ]
    if args.json:
        print(json.dumps([json.loads(p.to_json()) for p in plans]))
        return 0
    print(_bytes_table(max(plans, key=lambda p: p.total)))
    print(_device_table(plans))
    print(_NOTE)
    return 0
