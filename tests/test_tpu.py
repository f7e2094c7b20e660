"""Programs compile for TPUs where there is none, and take the memory that they should; the kernels' traffic is counted.

What is compiled here is executed nowhere. That kernels compute what they should is tested in Pallas' interpreter, by
`tests/kernels`.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infopt as ip
from infopt import tpu
from infopt.formats import Format
from infopt.kernels.flash_attention import flash_attention, pallas_tpu
from infopt.kernels.flash_attention.options import Options, Places
from infopt.spec import Window

TABLE = Path(__file__).parents[1] / "docs" / "tpu.json"

compiles = pytest.mark.skipif(bool(tpu.missing()), reason=tpu.missing() or "libtpu is here")
everywhere = pytest.mark.parametrize("generation", tpu.TOPOLOGIES)

KERNELS = [
    tpu.flash_case("flash", 1024, 8, 2, 128, window=512, sinks=4, softcap=30.0),
    tpu.decode_case("linear", 1, 2048, layers=2),
    tpu.decode_case("ring, 8 bits", 1, 8192, bits=8, window=Window(1024, 4), layers=2),
    tpu.decode_case("pages, 4 bits", 1, 2048, bits=4, page=16, layers=2),
]
FLASH = ip.transforms.flash_attention()
PRODUCTS = [
    tpu.product_case("one row", 1, 576, 1536, Format("int8"), implementation="pallas_tpu"),
    tpu.product_case("ragged", 300, 1000, 333, Format("int8"), implementation="pallas_tpu"),
    tpu.product_case("a prompt of Llama 8B", 256, 4096, 14336, Format("int8"), implementation="pallas_tpu"),
]
SMALL = (FLASH | ip.cache_kv())(tpu.smollm2())
STEPS = [tpu.step_case("decode", SMALL, 2048), tpu.step_case("prefill", SMALL, 2048, 128)]


def test_ci_has_the_compilers() -> None:
    here = sys.platform == "linux" and platform.machine() == "x86_64"
    if not (here and os.environ.get("CI")):
        pytest.skip("only CI is known to have installed the test extra, and libtpu is built for Linux on x86-64")
    assert tpu.missing() == ""


@compiles
@everywhere
@pytest.mark.parametrize("case", KERNELS + PRODUCTS, ids=lambda case: case.name)
def test_a_kernel_compiles_for_every_generation(case: tpu.Case, generation: str) -> None:
    found = tpu.row(case, generation)
    assert found["kernels"] >= 1 and found["fits"]


@compiles
@everywhere
@pytest.mark.parametrize("case", STEPS, ids=lambda case: case.name)
def test_a_whole_step_compiles_with_the_kernel_in_it_and_updates_its_cache_in_place(
    case: tpu.Case, generation: str
) -> None:
    found = tpu.row(case, generation)
    assert found["kernels"] >= 1 and found["fits"]
    assert found["alias_bytes"] >= 2 * 30 * 2048 * 192 * 2  # keys and values of all layers are not allocated twice


@compiles
def test_an_8b_step_fits_a_v5e_and_copies_no_cache() -> None:
    """1 GB of keys and values at 8k, of which a copy would be the largest temporary; rows are whole registers."""
    model = (ip.quantize(bits=8) | FLASH | ip.cache_kv())(tpu.llama_8b())
    found = tpu.row(tpu.step_case("", model, 8192), "v5e")
    assert found["fits"] and found["argument_bytes"] > 9e9
    assert found["temp_bytes"] < 50e6


@compiles
@everywhere
def test_8b_steps_compile_for_every_generation(generation: str) -> None:
    model = (ip.quantize(bits=8) | FLASH | ip.cache_kv())(tpu.llama_8b())
    for tokens in (None, 128):
        found = tpu.row(tpu.step_case("", model, 8192, tokens), generation)
        assert found["kernels"] >= 1 and found["fits"] and found["temp_bytes"] < 50e6


@compiles
@pytest.mark.parametrize("tokens", [None, 128])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_integer_product_is_the_default_and_copies_no_weights(bits: int, tokens: int | None) -> None:
    """A layer's up-projection alone is 59 MB in 8 bits, 33 in 4, and there are seven products in a layer."""
    model = (ip.quantize(bits=bits, activations=8) | FLASH | ip.cache_kv())(tpu.llama_8b())
    found = tpu.row(tpu.step_case("", model, 8192, tokens), "v5e")
    assert found["kernels"] >= 8 and found["fits"] and found["temp_bytes"] < 50e6


@compiles
@everywhere
@pytest.mark.parametrize("rows", [1, 256])
@pytest.mark.parametrize(
    "form",
    [Format(name, group, "float16") for name, group in (("int4", None), ("int4", 32), ("int4", 16), ("int8", 2048))],
    ids=lambda f: f"{f.name}, {f.group}",
)
def test_the_integer_product_of_groups_compiles(form: Format, rows: int, generation: str) -> None:
    """Fewest and most groups in a product; a copy of the matrix would be 14336 x 4096 / 2 bytes, 29 MB."""
    found = tpu.row(tpu.product_case("", rows, 4096, 14336, form), generation)
    assert found["kernels"] == 1 and found["temp_bytes"] < 20e6


@compiles
def test_minima_go_through_xla() -> None:
    found = tpu.row(tpu.product_case("", 64, 4096, 4096, Format("int4_min", 32, "float16")), "v5e")
    assert found["kernels"] == 0 and found["fits"]


@compiles
@pytest.mark.parametrize("kernel", ["flash", "decode"])
def test_float32_multiplied_in_full_compiles_too(kernel: str) -> None:
    x = jax.ShapeDtypeStruct((1, 256, 4, 128), jnp.float32)
    if kernel == "flash":
        found = tpu.facts(tpu.compiled(lambda q, k: flash_attention(q, k, k, window=64, sinks=2), (x, x), "v5e"))
    else:
        model = (FLASH | ip.cache_kv())(ip.models.llama(layers=2, dim=256, heads=2, kv_heads=1, head_dim=128))
        params = jax.eval_shape(model.init, jax.random.key(0))
        state = jax.eval_shape(lambda: model.init_state(1, 256))
        tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        found = tpu.facts(tpu.compiled(model.hidden, (params, tokens, state), "v5e", donate=2))
    assert found["kernels"] >= 1


@compiles
def test_the_kernels_memory_is_linear_and_the_unfused_forms_quadratic() -> None:
    length = 8192
    found = tpu.versus(length, "v5e")
    inputs_and_output = 2 * length * 128 * (4 + 1 + 1 + 4)
    assert found["kernel_temp_bytes"] <= 2 * inputs_and_output
    assert found["unfused_temp_bytes"] >= 4 * length**2 * 4  # one float32 score a head and pair
    assert found["unfused_bytes_over_kernel"] > 10
    table = json.loads(TABLE.read_text("utf-8"))["flash_against_unfused"][0]  # v5p's: the same traffic
    assert table["length"] == length and table["kernel_bytes"] == found["kernel_bytes"]
    assert table["unfused_bytes_over_kernel"] == pytest.approx(found["unfused_bytes_over_kernel"], rel=0.3)


@compiles
def test_a_small_leaf_beside_the_codes_is_read_a_layer_at_a_time() -> None:
    """Scales of all layers, laid out anew for one of them, took 269 MB here: they are 32 values wide."""
    found = tpu.row(tpu.decode_case("", 1, 32768, batch=4, bits=8), "v5e")
    assert found["temp_bytes"] < 5e6


def test_a_generation_that_is_not_known_is_refused() -> None:
    with pytest.raises(ip.InfoptError, match="v4"):
        tpu.chip("v4")


def walked(plan: pallas_tpu.Plan, order: np.ndarray, count: np.ndarray) -> int:
    """Bytes moved when every step of the grid is taken, and a block is moved when it is not the one before."""
    grid = (plan.batch, plan.heads, plan.blocks[0], max(1, int(count.max())))
    scalars = order.reshape(-1), count.reshape(-1)
    total = 0
    for specs, sizes in zip(plan.specs(), plan.block_bytes(), strict=True):
        last: list = [None] * len(specs)
        for step in np.ndindex(*grid):
            for i, (spec, size) in enumerate(zip(specs, sizes, strict=True)):
                at = tuple(int(x) for x in spec.index_map(*step, *scalars))
                total += size * (at != last[i])
                last[i] = at
    return total


TEXTS = {
    "causal": (3, 700, 700, {}, None),
    "window and sinks": (2, 2500, 2500, dict(window=300, sinks=4), None),
    "one block": (2, 100, 100, {}, None),
    "one head of keys": (2, 1500, 3000, dict(causal=False), None),
    "ragged, after a prefix": (3, 300, 4100, dict(window=700), (0, 1700, 3800)),
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("segments", [False, True])
def test_traffic_is_what_a_walk_over_the_grid_moves(text: str, segments: bool) -> None:
    batch, length, key_length, options, offsets = TEXTS[text]
    heads = 1 if text == "one head of keys" else 2
    q = np.zeros((batch, length, 3 * heads, 64), np.float32)
    k = np.zeros((batch, key_length, heads, 64), np.float32)
    query = np.arange(length)[None] + np.array(offsets or [0] * batch)[:, None]
    key = np.broadcast_to(np.arange(key_length)[None], (batch, key_length))
    ids = (np.zeros_like(query), np.zeros_like(key)) if segments else (None, None)
    places = Places(*(None if x is None else jnp.asarray(x, jnp.int32) for x in (query, key, *ids)))
    plan, *visited, _ = pallas_tpu.planned(q, k, k, places, Options(1.0, **options))
    order, count = (np.asarray(x) for x in visited)
    assert pallas_tpu.traffic(plan, order, count) == walked(plan, order, count)


def test_blocks_out_of_sight_are_not_fetched() -> None:
    q, at = np.zeros((1, 32768, 4, 128), jnp.bfloat16), jnp.arange(32768, dtype=jnp.int32)[None]

    def moved(**options: int) -> int:
        plan, order, count, _ = pallas_tpu.planned(q, q[:, :, :1], q[:, :, :1], Places(at, at), Options(1.0, **options))
        return pallas_tpu.traffic(plan, np.asarray(order), np.asarray(count))

    everything, causal, windowed = moved(causal=False), moved(), moved(window=2048)
    assert causal < 0.6 * everything and windowed < 0.2 * everything


def test_the_committed_table_holds_every_case_and_all_of_them_fit() -> None:
    """docs/tpu.json is what `infopt bench tpu --out docs/tpu.json` wrote last."""
    found = json.loads(TABLE.read_text("utf-8"))
    for part, cases in (("kernels", tpu.kernels()), ("steps", tpu.steps())):
        rows = {(row["name"], row["generation"]): row for row in found[part]}
        assert set(rows) == {(case.name, generation) for case in cases for generation in case.generations}
        assert all(row["fits"] and row["kernels"] for row in rows.values())
    assert [row["length"] for row in found["flash_against_unfused"]] == [8192, 32768, 32768]


@compiles
@pytest.mark.parametrize(
    "name",
    [
        "flash, 8k",
        "decode, 8k, 8 bits",
        "SmolLM2-135M, bfloat16, decode at 8k",
        "product of 1 x 4096 and 4096 x 14336, 4 bits in groups of 32",
    ],
)
def test_the_committed_table_is_that_of_these_sources(name: str) -> None:
    table = json.loads(TABLE.read_text("utf-8"))
    for package, version in table["versions"].items():
        if importlib.metadata.version(package) != version:
            pytest.skip(f"docs/tpu.json was written with {package} {version}, whose compilers these are not")
    (case,) = (case for cases in (tpu.kernels(), tpu.steps()) for case in cases if case.name == name)
    (said,) = (r for r in table["kernels"] + table["steps"] if (r["name"], r["generation"]) == (name, "v5e"))
    found = tpu.row(dataclasses.replace(case, choose=False), "v5e")
    assert {k: said[k] for k in found if k != "compile_seconds"} == {
        k: v for k, v in found.items() if k != "compile_seconds"
    }


@compiles
def test_a_compilation_prints_nothing_of_its_own() -> None:
    code = "from infopt import tpu; print(tpu.row(tpu.decode_case('', 1, 256, layers=1), 'v5e')['kernels'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
    assert not re.search(r"TPU|libtpu|metadata", done.stderr)
