"""The planner: its bytes are the live buffers', its totals XLA's own, its searches end at the edge, its speeds are
the roofline worked out by hand; and a mistake costs one line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import infopt as ip
from infopt import cli, devices, planner
from infopt.devices import DEVICES, Device, device
from infopt.errors import InfoptError, PromptError
from infopt.io import open_checkpoint
from infopt.io.checkpoint import LazyWeights
from infopt.model import FAMILIES, assemble, build
from infopt.qtensor import is_qtensor
from infopt.sampling import Sampling

FIXTURES = Path(__file__).parent / "fixtures"
STACKS = [
    "",
    "cache_kv()",
    "quantize(bits=8) | cache_kv()",
    "quantize(bits=4, group=16) | cache_kv()",
    "quantize(bits=8, where='embed') | cache_kv()",
    "cache_kv(bits=8)",
    "sliding_window(6, sinks=2) | cache_kv()",
    "sliding_window(6, layers=[1]) | cache_kv(bits=8) | paged(4)",
    "sliding_window(6, layers=[1]) | cache_kv(bits=4, split=4, tail=3) | paged(8)",
    "gqa(1) | cache_kv() | paged(4)",
    "quantize(bits=8) | cache_kv() | speculative(draft=self_draft(quantize(bits=4, group=16)), k=2)",
]
SMALL = {
    "llama": ip.models.llama(layers=3, dim=32, vocab=61, context=64, tied=False),
    "gemma3": ip.models.gemma3(layers=5, dim=32, vocab=61, context=64, pattern=(True, False), window=7),
}
MACHINE = Device("test", "a test", 10**9, 1e9, 1e12, "made up")


def live(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def plan(model: ip.Model, **options: Any) -> ip.Plan:
    return ip.plan(model, **{"device": MACHINE, "context": 64} | options)


# -------------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("stack", STACKS)
def test_bytes_equal_the_live_buffers(family: str, stack: str) -> None:
    model = ip.parse_stack(stack)(SMALL[family])
    found = plan(model, context=40, batch=3, chunk=5)
    params, state = model.init(jax.random.key(0)), model.init_state(3, 40, chunk=5)
    assert sum(part.bytes for part in found.account.weights) == live(params)
    assert sum(part.bytes for part in found.account.cache) == live(state.kv)
    assert sum(part.bytes for part in found.account.cache) + found.account.state == live(state)
    same = jax.tree.map(lambda x: (x.shape, x.dtype), (params, state))
    abstract = planner.abstract_params(model.spec), planner.abstract_state(model.spec, 3, 40, 5)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == same


@pytest.mark.parametrize("stack", ["cache_kv()", "quantize(bits=8) | cache_kv(bits=8)"])
def test_bytes_of_16_bit_weights_equal_the_live_buffers(stack: str) -> None:
    base = SMALL["llama"]
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base.init(jax.random.key(0)))
    model = ip.parse_stack(stack)(base)
    found = plan(model, context=40, dtype="bfloat16", kv_dtype="bfloat16")
    assert sum(part.bytes for part in found.account.weights) == live(model.convert(narrow))
    assert sum(part.bytes for part in found.account.cache) == live(model.init_state(1, 40, 128, jnp.bfloat16).kv)


def test_the_cache_is_told_by_layout_codec_page_and_model() -> None:
    stack = "cache_kv(bits=8) | paged(4) | speculative(draft=self_draft(), k=2)"
    lines = [part.what for part in plan(ip.parse_stack(stack)(SMALL["gemma3"]), chunk=5).account.cache]
    assert lines == [
        f"{who}: {what}, pages of 4, int8"
        for who in ("target", "draft")
        for what in ("3 layers, ring, window 7, 11 slots a row", "2 layers, linear, 64 slots a row")
    ]


def test_groups_of_a_split_cache_and_its_latest_tokens_are_told() -> None:
    found = plan(ip.parse_stack("cache_kv(bits=4, split=8, tail=3) | paged(16)")(SMALL["llama"]), chunk=5).account.cache
    assert [part.what for part in found] == [
        "3 layers, linear, 8 groups of 8 and 14 latest tokens a row, pages of 2, "
        "int4_min, keys by channel over 8 tokens"
    ]


# Shapes of real models (SmolLM2-135M, Llama 3.1 8B) and of a Gemma 3 with half a period at its end: nothing of it is
# allocated.
LARGE = {
    "llama": ip.models.llama(layers=30, dim=576, heads=9, kv_heads=3, vocab=49152, context=8192, mlp=1536),
    "8B": planner.SIZES[2].model(),
    "gemma3": ip.models.gemma3(
        layers=5,
        dim=640,
        heads=4,
        kv_heads=1,
        head_dim=256,
        vocab=65536,
        context=8192,
        mlp=2048,
        window=512,
        pattern=(True, False),
    ),
}
COMPILED = [
    ("cache_kv()", 1),
    ("cache_kv()", 8),
    ("quantize(bits=8) | cache_kv()", 1),
    ("quantize(bits=4) | cache_kv()", 1),
    ("cache_kv(bits=8)", 8),
    ("sliding_window(256, sinks=4) | cache_kv()", 1),
    ("quantize(bits=8) | cache_kv(bits=8) | paged(64)", 4),
    ("cache_kv() | speculative(draft=self_draft(quantize(bits=4)), k=4)", 1),
    ("cache_kv(bits=4)", 4),
]


def compiled_bytes(spec: Any, batch: int, context: int, dtype: str) -> tuple[int, int]:
    """What XLA says that a prefill of 128 and a round of decoding take: the buffers given (prefill does not read the
    head, which is there nevertheless), made and kept between."""
    params = planner.abstract_params(spec, dtype)
    state = planner.abstract_state(spec, batch, context, 128, dtype)
    row = jax.ShapeDtypeStruct((batch,), jnp.int32)
    tokens = jax.ShapeDtypeStruct((batch, 128), jnp.int32)
    sampling = jax.eval_shape(lambda: Sampling.of(batch))
    f, found = build(spec), []
    for run, args in (
        (lambda p, t, s, n: f.hidden(p, t, s, n)[1], (params, tokens, state, row)),
        (f.decode, (params, row, state, sampling)),
    ):
        m = jax.jit(run, donate_argnums=2, keep_unused=True).lower(*args).compile().memory_analysis()
        whole = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
        found.append(whole)
    return found[0], found[1]


@pytest.mark.parametrize(
    ("family", "stack", "batch"),
    [("llama", *case) for case in COMPILED]
    + [("gemma3", *case) for case in COMPILED[1::2]]
    + [("8B", "quantize(bits=4) | cache_kv(bits=8)", 4)],
)
def test_totals_are_those_of_the_compiled_programs(family: str, stack: str, batch: int) -> None:
    spec = ip.parse_stack(stack)(LARGE[family]).spec
    a = planner.account(spec, batch, 2048, 128, "float32", "float32", cpu=True)
    prefill, decode = compiled_bytes(spec, batch, 2048, "float32")
    held = a.total - a.activations
    assert held + a.prefill == pytest.approx(prefill, rel=0.05)
    assert held + a.decode == pytest.approx(decode, rel=0.05)
    assert a.total == pytest.approx(max(prefill, decode), rel=0.05)


def test_16_bit_weights_on_a_cpu_count_the_float32_copies_that_xla_makes() -> None:
    spec = ip.cache_kv()(LARGE["llama"]).spec
    here, gpu = (planner.account(spec, 1, 2048, 128, "bfloat16", "bfloat16", cpu) for cpu in (True, False))
    assert here.total == pytest.approx(max(compiled_bytes(spec, 1, 2048, "bfloat16")), rel=0.15)
    assert here.activations > 2 * gpu.activations


# ----------------------------------------------------------------------------------------------------------- searches


@pytest.mark.parametrize(
    "stack", ["cache_kv()", "sliding_window(16, layers=[0]) | cache_kv(bits=8)", "cache_kv() | paged(4)"]
)
def test_the_largest_batch_and_context_are_the_last_that_fit(stack: str) -> None:
    model = ip.parse_stack(stack)(ip.models.llama(context=1 << 20))
    machine = dataclasses.replace(MACHINE, memory=20_000_000)
    found = plan(model, device=machine, context=100, batch=2)
    assert found.fits and 2 < found.largest_batch < planner.MOST_ROWS
    assert plan(model, device=machine, context=100, batch=found.largest_batch).fits
    assert not plan(model, device=machine, context=100, batch=found.largest_batch + 1).fits
    assert 100 < found.largest_context < planner.LONGEST
    assert plan(model, device=machine, context=found.largest_context, batch=2).fits
    assert not plan(model, device=machine, context=found.largest_context + 1, batch=2).fits


def test_a_window_in_every_layer_ends_the_search_at_its_own_bound() -> None:
    found = plan((ip.sliding_window(16) | ip.cache_kv())(SMALL["llama"]))
    assert found.largest_context == planner.LONGEST and f"{planner.LONGEST}+" in repr(found)


def test_what_does_not_fit_says_so() -> None:
    found = plan(ip.cache_kv()(SMALL["llama"]), device=dataclasses.replace(MACHINE, memory=100_000))
    assert (found.fits, found.largest_batch, found.largest_context) == (False, 0, 0)


def test_the_largest_context_ends_at_the_models_limit() -> None:
    assert plan(ip.cache_kv()(SMALL["llama"])).largest_context == 64


def test_the_edge_is_the_usable_share_of_memory() -> None:
    model = ip.cache_kv()(SMALL["llama"])
    total = plan(model).total
    enough, short = (int(total / planner.USABLE) + n for n in (2, -2))
    assert plan(model, device=dataclasses.replace(MACHINE, memory=enough)).fits
    assert not plan(model, device=dataclasses.replace(MACHINE, memory=short)).fits


# ----------------------------------------------------------------------------------------------------------- roofline


def test_decoding_reads_all_weights_and_the_cache_for_each_token() -> None:
    model = ip.cache_kv()(ip.models.llama(layers=2, dim=64, vocab=256))  # tied: the embedding is the head
    slow_memory = dataclasses.replace(MACHINE, bandwidth=1e6)
    read = live(model.init(jax.random.key(0))) - 64 * 4  # all but the last norm
    cache = 2 * 2 * 3 * 100 * 2 * 16 * 4  # keys and values, layers, rows, slots, heads, width, bytes
    found = plan(model, device=slow_memory, context=100, batch=3).decode
    assert found.bound == "memory"
    assert found.tokens_per_second == pytest.approx(3 / ((read + cache) / 1e6))


def test_prefill_costs_two_operations_a_weight_a_token_and_the_attention() -> None:
    model = ip.cache_kv()(ip.models.llama(layers=2, dim=64, vocab=256, mlp=192))
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 192 * 64)
    pairs = 2 * 100 * 101 // 2  # layers, and every position with those before it
    flops = 2 * weights * 100 + 4 * 4 * 16 * pairs
    found = plan(model, device=dataclasses.replace(MACHINE, flops=1e6), context=100, batch=3).prefill
    assert found.bound == "compute"
    assert found.tokens_per_second == pytest.approx(100 / (flops / 1e6))


def test_a_window_bounds_the_attentions_work() -> None:
    wide, narrow = (
        planner._pairs(m.spec, 0, 100) for m in (ip.models.llama(), ip.sliding_window(10)(ip.models.llama()))
    )
    assert wide == 2 * sum(range(1, 101))
    assert narrow == 2 * sum(min(n, 10) for n in range(1, 101))


def test_speculation_counts_k_plus_one_drafts_and_every_guess_right() -> None:
    machine = dataclasses.replace(MACHINE, bandwidth=1e6)
    plain = plan(ip.cache_kv()(SMALL["llama"]), device=machine).decode.tokens_per_second
    own_draft = (ip.cache_kv() | ip.speculative(ip.self_draft(), k=3))(SMALL["llama"])
    # a round is one call of the target and four of a draft that costs as much, for four tokens
    assert plan(own_draft, device=machine).decode.tokens_per_second == pytest.approx(plain * 4 / 5)


def test_without_a_cache_each_token_costs_the_whole_text() -> None:
    machine = dataclasses.replace(MACHINE, flops=1e6)
    bare, cached = (plan(m, device=machine).decode for m in (SMALL["llama"], ip.cache_kv()(SMALL["llama"])))
    assert cached.tokens_per_second > 20 * bare.tokens_per_second


# ------------------------------------------------------------------------------------------------------------ devices


def test_every_device_has_figures_and_their_source() -> None:
    for d in DEVICES.values():
        assert d.memory >= 16e9 and 60e9 < d.bandwidth < 4e12 and 2e12 < d.flops < 1e15 and d.source and d.title


def test_the_issues_devices_are_known() -> None:
    for name in (
        "h100",
        "a100",
        "a100-40",
        "rtx4090",
        "m1",
        "m2-ultra",
        "m3-max",
        "tpu-v5e",
        "tpu-v5p",
        "tpu-v6e",
        "cpu",
    ):
        assert device(name).name == name


def test_this_cpu_is_measured_once_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    devices._cpu.cache_clear()
    first = device("cpu")
    assert "measured" in first.source
    assert 1e8 < first.bandwidth < 1e13 and 1e8 < first.flops < 1e15 and first.memory > 1e8
    monkeypatch.setattr(devices, "_seconds", lambda run: pytest.fail("measured twice"))
    assert device("cpu") is first


def test_memory_after_a_colon_replaces_the_devices() -> None:
    assert device("m3-max:36") == dataclasses.replace(DEVICES["m3-max"], name="m3-max:36", memory=36 * 10**9)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rtx409", "did you mean 'rtx4090'"),
        ("", "known: "),
        ("m3:lots", "m3:24"),
        ("m3:-1", "m3:24"),
        ("m3:inf", "m3:24"),
        ("m3:nan", "m3:24"),
    ],
)
def test_an_unknown_device_is_refused_with_what_is_near(name: str, message: str) -> None:
    with pytest.raises(InfoptError, match=message):
        device(name)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(batch=0), InfoptError, "batch=0"),
        (dict(batch=1.5), InfoptError, "batch=1.5"),
        (dict(context=0), InfoptError, "context=0"),
        (dict(context=65), PromptError, "context of 64"),
        (dict(chunk=0), InfoptError, "chunk=0"),
        (dict(dtype="float8"), InfoptError, "float8"),
        (dict(kv_dtype="int8"), InfoptError, "int8"),
        (dict(device="tpu"), InfoptError, "tpu-v6e"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan(ip.cache_kv()(SMALL["llama"]), **options)


def test_what_is_not_a_model_is_refused() -> None:
    with pytest.raises(InfoptError, match="str"):
        ip.plan("smollm2-135m", device="h100", context=8)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------- the text


def test_repr_is_a_table_and_json_says_the_same() -> None:
    found = plan(ip.cache_kv()(SMALL["gemma3"]), chunk=5)
    lines = repr(found).splitlines()
    assert lines[0] == "gemma3 5 x 32 | cache_kv()"
    for word in ("weights", "cache", "state", "activations", "total", "ring, window 7", "<= ", "made up"):
        assert word in repr(found)
    assert max(map(len, lines)) <= 120
    record = json.loads(found.to_json())
    assert record["total"] == found.total
    assert record["decode"] == {"tokens_per_second": found.decode.tokens_per_second, "bound": found.decode.bound}
    assert record["largest_context"] == 64


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setattr(cli, "_prepare_jax", lambda: None)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["plan", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_command_reads_no_weights(name: str, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: LazyWeights, key: str) -> Any:
        raise AssertionError(f"{key} was read")

    monkeypatch.setattr(LazyWeights, "__getitem__", read)
    stack = "quantize(bits=8) | cache_kv(bits=8)"
    code, out, err = command(
        str(FIXTURES / name), "--stack", stack, "--context", "32", "--batch", "2", "--device", "h100,m3-max:36"
    )
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith(name) and "h100" in out and "m3-max:36" in out and "upper bounds" in out


def test_the_command_plans_what_load_would_load(command: Any) -> None:
    code, out, _ = command(
        str(FIXTURES / "llama"), "--context", "32", "--device", "h100,a100", "--dtype", "bfloat16", "--json"
    )
    model, params = ip.load(FIXTURES / "llama", dtype="bfloat16")
    records = json.loads(out)
    assert code == 0 and [r["device"]["name"] for r in records] == ["h100", "a100"]
    assert sum(part["bytes"] for part in records[0]["account"]["weights"]) == live(params)
    assert sum(part["bytes"] for part in records[0]["account"]["cache"]) == live(
        ip.cache_kv()(model).init_state(1, 32).kv
    )


@pytest.mark.parametrize("stack", ["quantize(bits=4, group=16) | cache_kv(bits=8)", "gqa(1)", *STACKS[-1:]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_plans_a_saved_stack_as_it_was_saved(
    stack: str, dtype: str, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ip.parse_stack(stack)(SMALL["llama"])
    params = model.init(jax.random.key(0))

    def narrowed(x: Any) -> Any:
        return x if is_qtensor(x) else x.astype(dtype)

    ip.save(tmp_path / "stack", model, jax.tree.map(narrowed, params, is_leaf=is_qtensor))
    monkeypatch.setattr(LazyWeights, "__getitem__", lambda self, key: pytest.fail(f"{key} was read"))
    code, out, err = command(str(tmp_path / "stack"), "--context", "32", "--device", "h100", "--json")
    assert (code, err) == (0, "")
    monkeypatch.undo()
    loaded, loaded_params = ip.load(tmp_path / "stack")
    loaded = loaded if loaded.spec.cache else ip.cache_kv()(loaded)
    (record,) = json.loads(out)
    assert record["stack"] == repr(loaded).splitlines()[0]
    assert sum(part["bytes"] for part in record["account"]["weights"]) == live(loaded_params)
    assert sum(part["bytes"] for part in record["account"]["cache"]) == live(loaded.init_state(1, 32).kv)
    code, _, err = command(str(tmp_path / "stack"), "--dtype", "float16")
    assert code == cli.USAGE and "keep the types in which they were saved" in err and err.count("\n") == 1


def test_without_a_model_the_command_says_which_common_sizes_fit(command: Any) -> None:
    code, out, _ = command("--device", "h100,rtx4090", "--context", "4096")
    rows = {tuple(line.split()[:2]): line for line in out.splitlines() if line.strip()[:1].isdigit()}
    assert code == 0 and len(rows) == len(planner.SIZES) * len(planner.FORMS)
    assert rows["70B", "fp16"].split()[-2:] == ["-", "-"]  # 141 GB
    assert rows["8B", "fp16"].count(" in ") == 2 and "16.1 GB" in rows["8B", "fp16"]
    assert rows["32B", "int4"].count(" in ") == 1  # on the H100 alone
    assert rows["1B", "int4"].count(" in ") == 2


def test_common_shapes_have_as_many_weights_as_published() -> None:
    # Llama 3.2 1B and 3B, Llama 3.1 8B and 70B, Qwen 2.5 14B and 32B, in billions
    published = {"1B": 1.24, "3B": 3.21, "8B": 8.03, "14B": 14.8, "32B": 32.8, "70B": 70.6}
    for size in planner.SIZES:
        values = planner.nbytes(planner.abstract_params(size.model().spec)) / 4
        assert values / 1e9 == pytest.approx(published[size.name], rel=0.005)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "h10"], "did you mean 'h100'"),
        (["--device", ","], "names none"),
        (["--batch", "0"], "batch=0"),
        (["--context", "200000"], "131072"),
        ([str(FIXTURES / "llama"), "--stack", "cache()"], "did you mean 'cache_kv'"),
        ([str(FIXTURES / "llama"), "--context", "99999"], "exceed the model's context"),
        ([str(FIXTURES / "nothing")], "no file or folder"),
    ],
)
def test_a_mistake_costs_one_line(arguments: list[str], message: str, command: Any) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (cli.USAGE, "") and message in err and err.count("\n") == 1


def test_the_planner_is_found_whatever_is_imported_first() -> None:
    from infopt.planner import plan as direct

    assert ip.plan is direct


def test_assemble_and_the_shapes_agree_on_a_loaded_checkpoint() -> None:
    checkpoint = open_checkpoint(str(FIXTURES / "gemma3"), "float16")
    model = ip.Model.of(FAMILIES[checkpoint.family], checkpoint.config)
    params = assemble(model.spec, checkpoint.weights)
    assert live(params) == planner.nbytes(planner.abstract_params(model.spec, jnp.float16))
