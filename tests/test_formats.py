"""Every row of the table against definitions written here in float64, and against others' own packages."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from infopt import reference
from infopt.errors import InfoptError
from infopt.formats import FORMATS, RULES, Format, Row
from infopt.qtensor import SHRINK, QTensor, dequantize_array, planes, quantize_array, split_planes, take

quantize = functools.partial(jax.jit, static_argnums=(1, 2, 3))(quantize_array)
dequantize = jax.jit(dequantize_array)

WIDTH = 128
ROUNDED = [name for name, row in FORMATS.items() if not row.kept]
"""What something is rounded to; those that are only kept have tests/io/test_kquants.py."""
GGML = {"q8_0": "Q8_0", "q4_0": "Q4_0", "q4_1": "Q4_1"}
NF4 = np.array([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
                -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
                0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
                1.0])  # fmt: skip
E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)


def formats() -> list[Format]:
    """Each row as `quantize` uses it, and some in other groups."""
    usual = [
        Format(n, r.group, "float32" if r.group is None and r.scale == "float16" else r.scale)
        for n in ROUNDED
        for r in (FORMATS[n],)
    ]
    others = [
        Format("int8", 64, "float16"),
        Format("fp8_e4m3", 32, "float32"),
        Format("int4", 128, "float16"),
        Format("int4_zero", 128, "float16"),
        Format("int8_zero", None, "bfloat16"),
        Format("int3", 16, "float16"),
        Format("int5", 16, "float16"),
        Format("int6", 16, "float16"),
        Format("int2", 8, "float16"),
        Format("nf4", 16, "float32"),
    ]
    return usual + others


CASES = formats()
OWN = [f for f in CASES if not f.row.ggml]


def sample(width: int = WIDTH) -> np.ndarray:
    """Rows of every kind that matters."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, width)).astype(np.float32)
    x[1] = 0
    x[2] = 0.375
    x[3] = -0.375
    x[4] = np.abs(x[4]) + 0.5
    x[5] = -np.abs(x[5]) - 0.5
    x[6, 17] = 50
    x[7] *= 1e-3
    x[8, : width // 2] = 0
    x[9] *= 1e-30
    x[10] *= 1e-39  # denormal
    x[11, ::2] *= 1e-39
    x[12] *= 3e4
    x[13] = np.round(x[13] * 4) / 4  # ties
    x[14] = -0.0
    x[15] = rng.integers(-8, 8, width)
    return x


def flush(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 2.0**-126, 0.0, x)


def single(x: np.ndarray) -> np.ndarray:
    """A float64 result as a float32 computation has it."""
    return flush(np.asarray(x).astype(np.float32).astype(np.float64))


def as_stored(x: np.ndarray, kind: str) -> np.ndarray:
    most = float(jnp.finfo(kind).max)
    return np.clip(x, -most, most).astype(np.float32).astype(kind).astype(np.float64)


def defined(x: np.ndarray, format: Format) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """What is stored beside the codes, the codes (levels of whole numbers and floats) and the values, by the book."""
    name, x = format.name, x.astype(np.float64)
    if name in ("fp16", "bf16"):
        kind = {"fp16": "float16", "bf16": "bfloat16"}[name]
        codes = as_stored(flush(x) if name == "bf16" else x, kind)
        return {}, codes, codes
    g = flush(x).reshape(*x.shape[:-1], -1, format.group or x.shape[-1])
    most = np.abs(g).max(-1)
    reciprocal = {str(n): single(1 / n) for n in (3, 6, 7, 15, 127, 255)}
    highest = {"int2_zero": 3, "int4_zero": 15, "int8_zero": 255}.get(name, 0)
    parts: dict[str, np.ndarray] = {}
    low, relative = np.zeros_like(most), np.float64(1)
    if name == "int8":
        scale = single(most * reciprocal["127"])
    elif name.startswith("fp8"):
        scale = single(most * single(1 / {"fp8_e4m3": 448.0, "fp8_e5m2": 57344.0}[name]))
    elif name == "int4_absmax":
        scale = single(most * reciprocal["7"])
    elif name in ("int6", "int5", "int4", "int3", "int2"):
        extreme = np.take_along_axis(g, np.abs(g).argmax(-1)[..., None], -1)[..., 0]
        scale = extreme / -(2 ** (int(name[-1]) - 1))
    elif name in ("int4_min", "int2_min"):
        parts["minimum"] = low = as_stored(g.min(-1), format.scale)
        scale = single(single(g.max(-1) - low) * reciprocal["15" if name == "int4_min" else "3"])
    elif highest:
        scale = single(single(np.maximum(g.max(-1), 0) - np.minimum(g.min(-1), 0)) * reciprocal[str(highest)])
    elif name == "nf4":
        scale = most
    elif name == "mxfp4":
        with np.errstate(divide="ignore"):
            scale = 2.0 ** np.clip(np.floor(np.log2(most)) - 2, -126, 127)
    else:
        assert name == "nvfp4"
        parts["outer"] = relative = single(np.abs(x).max() * single(1 / (6 * 448)))
        scale = single(single(most * reciprocal["6"]) / (relative if relative else 1))
    parts["scale"] = as_stored(flush(scale), format.scale)
    used = single(parts["scale"] * relative)[..., None]
    inverse = np.where(used == 0, 0, single(1 / np.where(used == 0, 1, used)))
    y = single(single(g - low[..., None]) * inverse)
    if name in ("mxfp4", "nvfp4", "nf4"):
        table = NF4 if name == "nf4" else E2M1
        away = np.abs(np.clip(y, -10, 10)[..., None] - table)  # further out, float64 sees no difference
        nearest = np.lexsort((np.arange(16) % 2 + 0 * away, away))  # ties to the even code
        codes = nearest[..., 0]
        level = table[codes]
    elif name.startswith("fp8"):
        kind = {"fp8_e4m3": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2}[name]
        codes = level = as_stored(y, np.dtype(kind).name)
    elif highest:
        zero = np.clip(np.rint(single(-np.minimum(g.min(-1), 0) * inverse[..., 0])), 0, highest)
        parts["zero"] = zero
        codes = np.clip(np.rint(y) + zero[..., None], 0, highest)
        level = codes - zero[..., None]
    else:
        least, greatest = {"int8": (-127, 127), "int4": (-8, 7), "int4_absmax": (-7, 7), "int4_min": (0, 15),
                           "int2_min": (0, 3), "int3": (-4, 3), "int2": (-2, 1), "int5": (-16, 15),
                           "int6": (-32, 31)}[name]  # fmt: skip
        codes = level = np.clip(np.rint(y), least, greatest)
    values = single(single(level * used) + low[..., None])
    return parts, codes.reshape(x.shape), values.reshape(x.shape)


def levels(q: QTensor) -> np.ndarray:
    """Codes as the definition has them, unpacked by the numpy reference."""
    name, bits = q.format.name, FORMATS[q.format.name].bits
    codes = reference.unpack(np.asarray(q.codes), bits, q.format.group or q.format.padded(q.shape[-1]))
    zero = {"int6": 32, "int5": 16, "int4": 8, "int4_absmax": 8, "int3": 4, "int2": 2}.get(name, 0)
    return codes.reshape(*codes.shape[:-2], -1) - zero


def check(x: np.ndarray, format: Format) -> None:
    q = quantize(jnp.asarray(x), format, 2, None)
    parts, codes, values = defined(x, format)
    for part in ("scale", "minimum", "zero", "outer"):
        got = getattr(q, part)
        assert (got is None) == (part not in parts), part
        if got is not None:
            want = np.broadcast_to(parts[part], got.shape)
            np.testing.assert_array_equal(np.asarray(got).astype(np.float64), want, err_msg=part)
    got = levels(q)
    if format.row.levels is not None:  # of codes for the same value either is right
        table = NF4 if format.name == "nf4" else E2M1
        np.testing.assert_array_equal(table[got.astype(int)], table[codes.astype(int)])
    else:
        np.testing.assert_array_equal(got, codes)
    np.testing.assert_array_equal(flush(np.asarray(dequantize(q)).astype(np.float64)), values)
    np.testing.assert_allclose(reference.dequantize(q), values, rtol=3e-7, atol=2.0**-125)


@pytest.mark.parametrize("format", OWN, ids=str)
def test_codes_scales_and_values_are_those_of_the_definition(format: Format) -> None:
    check(sample(), format)


@pytest.mark.parametrize("format", OWN, ids=str)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100, allow_nan=False), min_size=64, max_size=64),
    st.integers(-120, 100),
)
def test_whatever_the_numbers(format: Format, numbers: list[float], exponent: int) -> None:
    """Denormals, zeros of both signs, lone outliers, and rows of one magnitude."""
    x = np.array(numbers, np.float32)
    same = np.ldexp(np.where(x == 0, 1, np.frexp(x)[0]), exponent).astype(np.float32)
    check(np.pad(np.stack([x, same]), ((0, 0), (0, 64))), format)


@pytest.mark.parametrize("name", GGML)
def test_blocks_are_the_gguf_packages_own_bit_for_bit(name: str) -> None:
    rng = np.random.default_rng(3)
    x = np.concatenate(
        [sample()[[0, 1, 2, 3, 4, 5, 6, 7, 8, 13, 15]], rng.normal(size=(500, WIDTH)).astype(np.float32)]
    )
    q = quantize(jnp.asarray(x), Format(name, 32, "float16"), 2, None)
    blocks = quants.quantize(x, GGMLQuantizationType[GGML[name]]).reshape(len(x), WIDTH // 32, -1)
    parts = [q.scale] if q.minimum is None else [q.scale, q.minimum]
    for i, part in enumerate(parts):
        want = np.ascontiguousarray(blocks[..., 2 * i : 2 * i + 2]).view(np.uint16)[..., 0]
        np.testing.assert_array_equal(np.asarray(part).view(np.uint16), want)
    codes = np.asarray(q.codes).view(np.uint8).reshape(len(x), WIDTH // 32, -1)
    np.testing.assert_array_equal(codes, blocks[..., 2 * len(parts) :])
    np.testing.assert_array_equal(
        np.asarray(dequantize(q)), quants.dequantize(blocks.reshape(len(x), -1), GGMLQuantizationType[GGML[name]])
    )


def test_small_floats_are_those_of_ml_dtypes() -> None:
    x = np.linspace(-6, 6, 12 * 64 + 1, dtype=np.float32)[:-1].reshape(-1, 32)
    x[:, 0] = 6  # the scale is 1
    for name, kind in (("mxfp4", ml_dtypes.float4_e2m1fn),):
        got = dequantize(quantize(jnp.asarray(x), Format(name, 32, FORMATS[name].scale), 2, None))
        np.testing.assert_array_equal(np.asarray(got), x.astype(kind).astype(np.float32))
    for name, kind, most in (("fp8_e4m3", ml_dtypes.float8_e4m3fn, 448), ("fp8_e5m2", ml_dtypes.float8_e5m2, 57344)):
        y = x.copy()
        y[:, 0] = most
        got = np.asarray(quantize(jnp.asarray(y), Format(name), 2, None).codes)
        np.testing.assert_array_equal(got.view(np.uint8), y.astype(kind).view(np.uint8))


# ------------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("name", [n for n in ROUNDED if FORMATS[n].bits < 8])
@pytest.mark.parametrize("group", [8, 32, None])
def test_every_code_comes_back_from_its_place(name: str, group: int | None) -> None:
    format, row = Format(name, group), FORMATS[name]
    words = np.random.default_rng(1).integers(0, 256, (12, WIDTH * row.bits // 8), np.uint8)
    groups = WIDTH // (group or WIDTH)
    ones = jnp.ones((12, groups), jnp.float32)
    minimum = jnp.zeros_like(ones) if row.minimum else None
    zero = jnp.zeros(ones.shape, jnp.uint8) if row.rule == "zero" else None
    outer = jnp.ones((1, 1), jnp.float32) if row.tensor else None
    q = QTensor(jnp.asarray(words), ones, minimum, format, (12, WIDTH), zero, outer)
    np.testing.assert_array_equal(np.asarray(dequantize(q)), reference.dequantize(q))
    assert len(np.unique(reference.dequantize(q))) == len({*(row.levels or range(2**row.bits))})


def test_three_bits_are_eight_codes_in_three_bytes() -> None:
    x = np.array([[-4, -3, -2, -1, 0, 1, 2, 3]], np.float32)  # -4 is the extreme: the scale is 1, the codes 0..7
    q = quantize_array(jnp.asarray(x), Format("int3", 8))
    word = sum(code << 3 * place for place, code in enumerate(range(8)))
    assert np.asarray(q.codes)[0].tolist() == [word & 255, word >> 8 & 255, word >> 16]
    np.testing.assert_array_equal(np.asarray(dequantize(q)), x)


def test_two_bits_are_four_codes_in_a_byte() -> None:
    q = quantize_array(jnp.array([[-2.0, -1, 0, 1]]), Format("int2", 4))
    assert np.asarray(q.codes)[0].tolist() == [0b11100100]


@pytest.mark.parametrize("format", CASES, ids=str)
def test_planes_against_split_inputs_are_the_product(format: Format) -> None:
    x, q = np.random.default_rng(2).normal(size=(3, WIDTH)).astype(np.float32), quantize(sample()[:9], format, 2, None)
    got = sum(a @ b.T for a, b in zip(split_planes(jnp.asarray(x), q), planes(q), strict=True))
    want = x.astype(np.float64) @ reference.dequantize(q).T
    np.testing.assert_allclose(np.asarray(got), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", CASES, ids=str)
@pytest.mark.parametrize("shape", [(6, WIDTH), (2, 5, WIDTH)])
def test_live_buffers_take_the_bytes_that_the_format_says(format: Format, shape: tuple[int, ...]) -> None:
    q = quantize(jnp.ones(shape, jnp.float32), format, 2, None)
    assert q.nbytes == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(q)) == format.bytes(shape)
    without = 4 * (1 + format.row.tensor) * (2 if len(shape) == 3 else 1)  # what is stored once a matrix
    assert q.nbytes - without == format.bytes_per_value(WIDTH) * np.prod(shape)


def test_bytes_a_weight_are_those_of_the_literature() -> None:
    of = {f.name: f.bytes_per_value(4096) * 8 for f in CASES[: len(ROUNDED)]}
    assert of["fp16"] == of["bf16"] == 16
    assert of["mxfp4"] == 4.25
    assert of["nvfp4"] == 4.5
    assert of["int3"] == 3.5
    assert of["int2"] == 2.5
    assert of["nf4"] == 4.25
    assert of["q4_0"] == of["int4"] == of["int4_absmax"] == 4.5
    assert of["q4_1"] == of["int4_min"] == 5
    assert of["int2_min"] == 3
    assert (of["int2_zero"], of["int4_zero"], of["int8_zero"]) == (2.75, 4.75, 8.75)
    assert of["q8_0"] == 8.5


@pytest.mark.parametrize("format", CASES, ids=str)
@pytest.mark.parametrize("trailing", [1, 2])
def test_a_stack_its_slice_and_its_rows_are_one_type(format: Format, trailing: int) -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, WIDTH)).astype(np.float32))
    stack, one = quantize(x, format, trailing, None), quantize(x[1], format, trailing, None)
    assert jax.tree.structure(stack) == jax.tree.structure(stack[1]) == jax.tree.structure(one)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), stack[1], one)
    if trailing == 2:
        rows = jnp.array([[2, 0], [3, 3]])
        np.testing.assert_array_equal(np.asarray(dequantize(take(one, rows))), np.asarray(dequantize(one))[rows])


# ------------------------------------------------------------------------------------------------- padding and clipping


@pytest.mark.parametrize("name", [n for n in ROUNDED if n not in GGML])
def test_padding_fills_the_last_group_and_changes_no_other_value(name: str) -> None:
    scale = FORMATS[name].scale
    format, x = Format(name, 64, scale, pad=True), sample(80)
    q = quantize(jnp.asarray(x), format, 2, None)
    assert q.shape == (16, 80)
    assert q.nbytes == format.bytes((16, 80))
    if name not in ("fp16", "bf16"):
        assert q.scale.shape == (16, 2)
        assert q.nbytes == Format(name, 64, scale).bytes((16, 128))
    got = np.asarray(dequantize(q))
    assert got.shape == (16, 80)
    repeated = np.pad(x, ((0, 0), (0, 48)), mode="edge")
    whole = quantize(jnp.asarray(repeated), Format(name, 64, scale), 2, None)
    np.testing.assert_array_equal(got, np.asarray(dequantize(whole))[:, :80])
    np.testing.assert_allclose(reference.dequantize(q), got, rtol=1e-6, atol=1e-37)
    y = np.random.default_rng(0).normal(size=(2, 80)).astype(np.float32)
    product = sum(a @ b.T for a, b in zip(split_planes(jnp.asarray(y), q), planes(q), strict=True))
    np.testing.assert_allclose(np.asarray(product), y @ got.T, rtol=1e-4, atol=2e-1)


def test_odd_rows_pad_to_whole_bytes() -> None:
    q = quantize_array(jnp.arange(7, dtype=jnp.float32)[None], Format("int4", pad=True))
    assert q.codes.shape == (1, 4)
    assert dequantize(q).shape == (1, 7)


@pytest.mark.parametrize("format", [f for f in OWN if f.row.rule != "none"], ids=str)
def test_a_clip_search_takes_the_share_of_least_error_of_each_group(format: Format) -> None:
    x = np.random.default_rng(4).standard_t(3, size=(6, WIDTH)).astype(np.float32)
    group = format.group or WIDTH
    groups = x.reshape(6, -1, group)

    def error(q: QTensor) -> np.ndarray:
        return ((np.asarray(dequantize(q)).reshape(groups.shape).astype(np.float64) - groups) ** 2).sum(-1)

    plain, searched = (error(quantize(jnp.asarray(x), format, 2, clip)) for clip in (None, "mse"))
    assert (searched <= plain * (1 + 1e-5)).all()
    if format.row.bits < 6 and group > 8:
        assert searched.sum() < 0.97 * plain.sum()
    if format.name == "int4_absmax":  # by the book, group by group
        book = []
        for share in SHRINK:
            scale = (np.abs(groups).max(-1) * share / 7).astype(np.float16).astype(np.float64)[..., None]
            book.append(((np.clip(np.rint(groups / scale), -7, 7) * scale - groups) ** 2).sum(-1))
        np.testing.assert_allclose(searched, np.min(book, 0), rtol=1e-3)


# ------------------------------------------------------------------------------------------------------ rows and errors


def test_a_row_of_your_own_is_a_few_lines() -> None:
    FORMATS["ternary"] = Row(bits=2, low=-1, high=1, zero=1)
    reference.LEVELS["ternary"] = (2, lambda code: code - 1)
    try:
        q = quantize_array(jnp.asarray(sample()), Format("ternary", 64))
        assert q.codes.shape == (16, WIDTH // 4)
        assert set(np.unique(reference.dequantize(q)[15])) <= {-8.0, 0.0, 8.0, -7.0, 7.0}
        np.testing.assert_allclose(np.asarray(dequantize(q)), reference.dequantize(q), rtol=1e-6)
    finally:
        del FORMATS["ternary"], reference.LEVELS["ternary"]
    with pytest.raises(InfoptError, match="the format 'ternary' was another row before") as e:
        FORMATS["ternary"] = Row(bits=2, low=-2, high=1, zero=2)
    assert "another name" in e.value.fix


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (dict(bits=7, low=0, high=127), "7 bits"),
        (dict(bits=16, low=0, high=31), "16 bits"),
        (dict(bits=4, low=0, high=15, rule="minimax"), "'minmax'"),
        (dict(bits=4, low=-1, high=1, levels=(0.0, 1.0)), "2 levels"),
        (dict(bits=2, low=-1, high=1, levels=(0.0, 1.0, -1.0, float("nan"))), "finite"),
        (dict(bits=4, low=0, high=15, group=64, sub=32), "kept=True"),
        (dict(bits=4, low=0, high=15, group=96, sub=32, kept=True), "a multiple of 64"),
        (dict(bits=4, low=0, high=15, sub=32, kept=True), "a multiple of 64"),
        (dict(bits=4, low=0, high=15, group=64, sub=32, sub_bits=7, kept=True), "sub_bits=6 or 8"),
    ],
)
def test_a_row_that_cannot_be_is_refused(row: dict, says: str) -> None:
    with pytest.raises(InfoptError) as e:
        Row(**row)
    assert says in str(e.value)
    assert e.value.fix


def test_every_rule_is_used_and_every_format_is_in_the_reference() -> None:
    assert {r.rule for r in FORMATS.values()} == set(RULES)
    assert set(reference.LEVELS) == set(FORMATS)


def test_an_unknown_format_gets_a_suggestion() -> None:
    with pytest.raises(InfoptError, match="unknown weight format 'mxfp8'") as e:
        Format("mxfp8")
    assert "'mxfp4'" in e.value.fix


@pytest.mark.parametrize(("name", "group", "fix"), [("int3", 12, "a multiple of 8"), ("int2", 6, "a multiple of 4")])
def test_a_group_that_fills_no_bytes_is_refused(name: str, group: int, fix: str) -> None:
    with pytest.raises(InfoptError, match="whole bytes") as e:
        Format(name, group)
    assert e.value.fix == fix


def test_a_group_that_does_not_divide_offers_padding() -> None:
    with pytest.raises(InfoptError, match="does not divide") as e:
        Format("int3", 32).check_width(80, "head")
    assert "a group that divides 80: 8, 16, 40, 80; or pad=True" in e.value.fix


def test_the_json_of_a_format_without_padding_is_as_it_was() -> None:
    from infopt.spec import _plain

    assert json.dumps(_plain(Format("int8"))) == '{"name": "int8", "group": null, "scale": "float32"}'
    padded = Format("int8", 64, pad=True)
    assert Format(**_plain(padded)) == padded == Format(**dataclasses.asdict(padded))
    assert repr(Format("int8")) == "Format(name='int8', group=None, scale='float32')"
