"""Strict numerics and cheap compilations for every test."""

import os

import jax
from jaxtyping import install_import_hook

# The shapes in these modules' signatures are executed: a wrong axis is an error at the call, not a broadcast.
install_import_hook(
    ["infopt.cache", "infopt.masks", "infopt.ops", "infopt.qtensor", "infopt.sampling"], "beartype.beartype"
)

from infopt.testing import cheap_compilation  # noqa: E402 (after the hook that it goes through)

os.environ.setdefault("XLA_FLAGS", cheap_compilation())
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
