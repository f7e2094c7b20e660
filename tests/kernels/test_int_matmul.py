"""One contract for every implementation of the integer product, against its definition in plain numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infopt as ip
from infopt.formats import FORMATS, Format
from infopt.kernels.int_matmul import IMPLEMENTATIONS, available, int_matmul, pallas_tpu, xla
from infopt.kernels.int_matmul.api import MOST
from infopt.kernels.int_matmul.call import rounded
from infopt.qtensor import dequantize_array, quantize_array
from infopt.reference import LEVELS, unpack

RUNS = {name: {"interpret": True} if name.startswith("pallas") else {} for name in IMPLEMENTATIONS}
ULP = 2.0**-23
WHOLE = [name for name, row in FORMATS.items() if row.whole]
FEW = ("int8", "int4", "int4_absmax", "q8_0", "q4_0")
"""What the kernel for TPUs multiplies by."""


def codes_of(x):
    """The definition: int64 codes and float32 scales."""
    x = np.asarray(x).astype(np.float32)
    codes, scales = np.zeros(x.shape, np.int64), np.zeros((len(x), 1), np.float32)
    for row, out, scale in zip(x, codes, scales, strict=True):
        most = np.abs(row).max()
        if not np.isfinite(most):
            scale[:] = np.nan
        elif most >= 2.0**-119:
            out[:] = np.clip(np.rint(row * (np.float32(127) / most)), -127, 127)
            scale[:] = most * np.float32(1 / 127)
    return codes, scales


def levels_of(q):
    """Whole levels `[O, G, K]`, int64."""
    bits, level = LEVELS[q.format.name]
    codes = unpack(np.asarray(q.codes), bits, q.format.group_of(q.shape[-1]))
    levels = level(codes).astype(np.int64)
    return levels if q.zero is None else levels - np.asarray(q.zero).astype(np.int64)[..., None]


def sums_of(x, q):
    """In each group, int64 sums of codes times levels `[G, M, O]`, and of codes alone `[G, M]`."""
    codes, _ = codes_of(x)
    levels = levels_of(q)
    codes = np.pad(codes, ((0, 0), (0, levels.shape[1] * levels.shape[2] - codes.shape[1])))
    codes = codes.reshape(len(codes), *levels.shape[1:])
    return np.einsum("mgk,ogk->gmo", codes, levels), codes.sum(-1).T


def defined(x, q):
    """The result in float32, group by group; and what it may be off by, in units of the last place of 1."""
    (dots, codes), scales, y = sums_of(x, q), codes_of(x)[1], np.float32(0)
    size = np.float32(0)
    for g, (dot, code) in enumerate(zip(dots, codes, strict=True)):
        scale = np.asarray(q.scale).astype(np.float32)[:, g]
        part = dot.astype(np.float32) * scale
        y, size = y + part, size + np.abs(part) + np.abs(y + part)
        if q.minimum is not None:
            part = code.astype(np.float32)[:, None] * np.asarray(q.minimum).astype(np.float32)[:, g]
            y, size = y + part, size + np.abs(part) + np.abs(y + part)
    return y * scales, size * np.abs(scales)


packed = jax.jit(lambda w, form: quantize_array(w, form, trailing=2), static_argnums=1)


def drawn(rows, inputs, outputs, form, lead=(), dtype=np.float32, seed=0):
    r = np.random.default_rng(seed)
    x = r.normal(size=(rows, inputs)) * 10.0 ** r.integers(-3, 3, (rows, 1))
    w = r.normal(size=(*lead, outputs, inputs)) + 0.3
    return jnp.asarray(x, dtype), packed(jnp.asarray(w, jnp.float32), form)


INT8, INT4 = Format("int8"), Format("int4", 32, "float16")


@dataclasses.dataclass(frozen=True)
class Shape:
    name: str
    rows: int = 5
    inputs: int = 64
    outputs: int = 24
    form: Format = INT8
    dtype: str = "float32"


CONTRACT = [
    Shape("one row", rows=1),
    Shape("one term, one column", inputs=1, outputs=1),
    Shape("ragged in all three", 37, 203, 131),
    Shape("several blocks of each", 70, 600, 270),
    Shape("bfloat16", 9, 96, 40, dtype="bfloat16"),
    Shape("float16", 9, 96, 40, dtype="float16"),
    *(Shape(name, form=Format(name, 32, "float16")) for name in WHOLE),
    Shape("groups", 9, 96, 40, INT4),
    Shape("groups, bfloat16", 9, 96, 40, INT4, "bfloat16"),
    Shape("4 bits, a scale a row", 9, 96, 40, Format("int4", None)),
    *(Shape(f"4 bits, groups of {g}", 37, 1024, 131, Format("int4", g, "float16")) for g in (16, 64, 128, 256, 512)),
    Shape("4 bits, padded", 9, 300, 40, Format("int4", 64, "float16", pad=True)),
    *(Shape(f"8 bits, groups of {g}", 37, 768, 131, Format("int8", g, "float16")) for g in (8, 32, 128, 256)),
    Shape("8 bits, groups of 256, padded", 9, 300, 40, Format("int8", 256, "float16", pad=True)),
    Shape("groups, the last block not full", 70, 640, 131, Format("int8", 128, "float16")),
    Shape("groups of 4 bits, the last block not full", 70, 704, 131, Format("int4", 32, "float16")),
    Shape("groups that divide no tile", 9, 96, 40, Format("int4", 24, "float16")),
    Shape("3 bits, padded", 9, 100, 40, Format("int3", 32, "float16", pad=True)),
    Shape("minima, padded", 9, 100, 40, Format("int4_min", 32, "float16", pad=True)),
]


def served(name, x, q):
    """Whether an implementation takes a call; the portable one takes all."""
    try:
        jax.eval_shape(lambda: int_matmul(x, q, implementation=name, **RUNS[name]))
    except ip.InfoptError as e:
        assert name != "xla" and "implementation='xla'" in e.fix
        return False
    return True


@pytest.fixture
def tiny_blocks(monkeypatch):
    for block, size in (("ROWS", 32), ("COLUMNS", 128), ("TERMS", 256)):
        monkeypatch.setattr(pallas_tpu, block, size)


@pytest.mark.parametrize("shape", CONTRACT, ids=lambda s: s.name)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_an_implementation_equals_the_definition(name, shape, tiny_blocks):
    x, q = drawn(shape.rows, shape.inputs, shape.outputs, shape.form, dtype=shape.dtype)
    if not served(name, x, q):
        assert shape.form.name not in FEW or shape.form.group == 24
        return
    got = jax.jit(lambda x, q: int_matmul(x, q, implementation=name, **RUNS[name]))(x, q)
    assert got.dtype == shape.dtype and got.shape == (shape.rows, shape.outputs)
    want, size = defined(x, q)
    if q.format.group is None and shape.dtype == "float32":
        np.testing.assert_array_equal(got, want)  # two products, each rounded once: to the bit
        return
    # a compiler may round a product and a sum at once: half a unit of the product and one of the sum, each time
    unit = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-10}[shape.dtype]
    off = np.abs(np.asarray(got, np.float64) - want)
    assert (off <= ULP * size + unit * np.abs(want) + (2.0**-24 if shape.dtype == "float16" else 0)).all()


@pytest.mark.parametrize("shape", CONTRACT, ids=lambda s: s.name)
def test_codes_and_sums_are_those_of_the_definition_exactly(shape):
    x, q = drawn(shape.rows, shape.inputs, shape.outputs, shape.form, dtype=shape.dtype)
    codes, scale = jax.jit(rounded)(x)
    want, want_scale = codes_of(x)
    assert codes.dtype == jnp.int8 and scale.dtype == jnp.float32
    np.testing.assert_array_equal(codes, want)
    np.testing.assert_array_equal(scale, want_scale)
    dots, of_codes = jax.jit(lambda codes, q: jax.lax.map(xla.sums, xla.in_groups(codes, q)))(codes, q)
    assert dots.dtype == of_codes.dtype == jnp.int32
    want_dots, want_codes = sums_of(x, q)
    np.testing.assert_array_equal(dots, want_dots)
    np.testing.assert_array_equal(of_codes, want_codes)


def test_sums_beyond_what_float32_holds_are_exact():
    """All codes and levels at their greatest: 4096 * 127 * 127 + 1 would be lost in float32."""
    x = jnp.ones((1, 4097)).at[0, -1].set(1 / 127)
    q = quantize_array(jnp.ones((1, 4097)).at[0, -1].set(1 / 127), INT8, trailing=2)
    dots, _ = xla.sums(jax.tree.map(lambda leaf: leaf[0], xla.in_groups(rounded(x)[0], q)))
    assert int(dots[0, 0]) == 4096 * 127 * 127 + 1 > 2**24
    x, q = jnp.ones((1, MOST)), quantize_array(jnp.ones((1, MOST)), Format("int8_zero", None), trailing=2)
    dots, _ = xla.sums(jax.tree.map(lambda leaf: leaf[0], xla.in_groups(rounded(x)[0], q)))
    assert int(dots[0, 0]) == MOST * 127 * 255 > 2**30


def test_ties_round_to_even_and_nothing_exceeds_127():
    x = jnp.asarray([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0]])
    codes, scale = rounded(x)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, -127]]
    assert scale.tolist() == [[1.0]]


def test_a_row_of_zeros_gives_zeros_and_tiny_ones_count_as_zeros():
    x, q = drawn(3, 16, 8, INT8)
    x = x.at[0].set(0.0).at[1].set(jnp.float32(1e-37))
    y = int_matmul(x, q)
    assert not np.asarray(y[:2]).any() and np.asarray(y[2]).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_with_nan_or_infinity_gives_nan_and_no_other_row_does(name, bad):
    x, q = drawn(3, 16, 8, INT8)
    q = dataclasses.replace(q, codes=q.codes.at[0].set(0))  # against zeros too
    y = np.asarray(int_matmul(x.at[1, 3].set(bad), q, implementation=name, **RUNS[name]))
    assert np.isnan(y[1]).all()
    np.testing.assert_array_equal(y[[0, 2]], np.asarray(int_matmul(x, q, implementation=name, **RUNS[name]))[[0, 2]])


@pytest.mark.parametrize("form", [INT8, INT4, Format("int4_min", 32, "float16")], ids=lambda f: f.name)
def test_a_rows_result_depends_on_no_other_row(form):
    """An outlier beside it changes nothing, and neither does the number of rows: to the bit."""
    x, q = drawn(33, 64, 24, form)
    call = jax.jit(int_matmul)
    together = np.asarray(call(x.at[0].multiply(1e6), q))
    for i in (1, 7, 32):
        np.testing.assert_array_equal(np.asarray(call(x[i : i + 1], q))[0], together[i])
    np.testing.assert_array_equal(np.asarray(call(x[3:8], q)), together[3:8])


def test_an_outlier_costs_its_own_row_alone():
    """The step is 1/127 of a row's greatest value: what an outlier of a thousand hides is lost."""
    x, q = drawn(2, 64, 24, INT8)
    x = (x / jnp.max(jnp.abs(x), -1, keepdims=True)).at[0, 5].set(1000.0)
    codes, _ = rounded(x)
    assert np.count_nonzero(codes[0]) == 1 < 50 < np.count_nonzero(codes[1])
    dense = dequantize_array(q)
    off = np.abs(np.asarray(int_matmul(x, q) - x @ dense.T)).max(-1)
    assert off[1] < 0.05 < off[0]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", [INT8, Format("int4", None), INT4], ids=str)
@pytest.mark.parametrize(("lead", "layer"), [((3,), 2), ((2, 3), (1, 2)), ((3,), (None, 1))], ids=str)
def test_a_matrix_is_read_where_it_lies_in_the_stack(name, lead, layer, form):
    x, q = drawn(5, 64, 24, form, lead=lead)
    index = tuple(i for i in (layer if isinstance(layer, tuple) else (layer,)) if i is not None)
    got = jax.jit(lambda x, q: int_matmul(x, q, layer, implementation=name, **RUNS[name]))(x, q)
    want, size = defined(x, q[index])
    assert (np.abs(got - want) <= (0 if form.group is None else ULP * size)).all()


def test_more_axes_of_rows_are_rows():
    x, q = drawn(6, 40, 24, INT8)
    np.testing.assert_array_equal(int_matmul(x.reshape(2, 3, 40), q).reshape(6, 24), int_matmul(x, q))


def test_the_product_is_near_the_unrounded_one():
    x, q = drawn(20, 512, 64, INT8)
    want = np.asarray(x) @ np.asarray(dequantize_array(q)).T
    off = np.linalg.norm(np.asarray(int_matmul(x, q)) - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert 1e-4 < off.max() < 0.02


X, Q = drawn(5, 40, 24, INT8)
WRONG = {
    "width": (lambda: int_matmul(X[:, :39], Q), "x \\(5, 39\\)"),
    "layer": (lambda: int_matmul(X, Q, 0), "layer of 1 numbers"),
    "no layer": (lambda: int_matmul(X, jax.tree.map(lambda leaf: leaf[None], Q)), "layer of 0 numbers"),
    "whole numbers": (lambda: int_matmul(X.astype(jnp.int8), Q), "x is int8"),
    "nf4": (lambda: int_matmul(X, drawn(5, 40, 24, Format("nf4", 8, "float16"))[1]), "weights in nf4"),
    "name": (lambda: int_matmul(X, Q, implementation="xl"), "called 'xl'"),
    "interpret": (lambda: int_matmul(X, Q, interpret=True), "names no kernel"),
    "elsewhere": (lambda: int_matmul(X, Q, implementation="pallas_tpu"), "pallas_tpu was asked for on cpu"),
    "groups": (
        lambda: int_matmul(X, drawn(5, 40, 24, Format("int8", 20, "float16"))[1], implementation="pallas_tpu"),
        "groups of 20, 20 bytes; it takes 8 to 2048",
    ),
    "few groups": (
        lambda: int_matmul(X, drawn(5, 40, 24, Format("int4", 8, "float16"))[1], implementation="pallas_tpu"),
        "groups of 8, 4 bytes",
    ),
    "minima": (
        lambda: int_matmul(X, drawn(5, 40, 24, Format("int4_min", 8, "float16"))[1], implementation="pallas_tpu"),
        "weights in int4_min, which have minima",
    ),
    "3 bits": (
        lambda: int_matmul(X, drawn(5, 40, 24, Format("int3", 8, "float16"))[1], implementation="pallas_tpu"),
        "weights in int3",
    ),
    "rows": (lambda: int_matmul(X[:0], Q, implementation="pallas_tpu"), "nothing to multiply"),
    "terms": (
        lambda: jax.eval_shape(int_matmul, *jax.eval_shape(lambda: drawn_zeros(MOST + 1))),
        f"sums of {MOST + 1} terms",
    ),
}


def drawn_zeros(inputs):
    return jnp.zeros((1, inputs)), quantize_array(jnp.zeros((1, inputs)), INT8, trailing=2)


@pytest.mark.parametrize(("call", "said"), WRONG.values(), ids=WRONG)
def test_bad_input_is_refused_with_a_reason(call, said):
    with pytest.raises(ip.InfoptError, match=said) as e:
        call()
    assert e.value.why and e.value.fix


def test_no_rows_give_no_rows():
    assert int_matmul(X[:0], Q).shape == (0, 24)


def test_the_kernel_is_the_default_on_its_platform_alone():
    assert available("cpu") == available("gpu") == ["xla"]
    assert available("tpu") == ["xla", "pallas_tpu"]
