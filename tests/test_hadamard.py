"""Hadamard matrices of the widths that models have: orthogonal, all entries of one size."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from infopt import hadamard

WIDTHS = {"SmolLM2": 576, "its MLP": 1536, "Qwen2.5-0.5B": 896, "Gemma": 1152, "tiny": 48, "Llama": 2048}


@pytest.mark.parametrize("order", [order for order in range(4, 160, 4) if hadamard.paley(order) is not None])
def test_paleys_matrices_are_orthogonal_signs(order: int) -> None:
    h = hadamard.paley(order)
    assert h is not None and set(np.unique(h)) == {-1.0, 1.0}
    np.testing.assert_array_equal(h @ h.T, order * np.eye(order))


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_every_entry_has_one_size(width: int) -> None:
    matrices, left = hadamard.factors(width)
    whole = functools.reduce(np.kron, matrices).astype(np.float64)
    assert left == 1 and whole.shape == (width, width) and max(map(len, matrices)) <= hadamard.LARGEST
    assert np.abs(whole @ whole.T - np.eye(width)).max() < 1e-6
    assert np.abs(np.abs(whole) * width**0.5 - 1).max() < 1e-6


@pytest.mark.parametrize(("width", "left"), [(11008, 43), (61, 61), (6, 3), (1, 1), (2, 1)])
def test_what_has_no_matrix_is_left(width: int, left: int) -> None:
    matrices, found = hadamard.factors(width)
    assert found == left and np.prod([len(m) for m in matrices]) * left == width


@pytest.mark.parametrize("width", [576, 6, 48])
def test_it_multiplies_by_the_product_of_the_factors(width: int) -> None:
    matrices, left = hadamard.factors(width)
    x = np.random.default_rng(0).normal(size=(2, 3, width)).astype(np.float32)
    want = x.astype(np.float64) @ np.kron(np.eye(left), functools.reduce(np.kron, matrices).astype(np.float64))
    np.testing.assert_allclose(hadamard.turned(jnp.asarray(x)), want, atol=2e-6)


def test_the_type_stays() -> None:
    x = jnp.ones((1, 4), jnp.bfloat16)
    assert hadamard.turned(x).dtype == jnp.bfloat16
