"""Strict numerics and cheap compilations for every test."""

import os

# The contract compiles some hundred small stacks; nothing here is timed, so the compiler's effort is wasted.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import jax
import pytest
from jaxtyping import install_import_hook

# The shapes in these modules' signatures are executed: a wrong axis is an error at the call, not a broadcast.
install_import_hook(
    ["infopt.cache", "infopt.masks", "infopt.ops", "infopt.qtensor", "infopt.sampling"], "beartype.beartype"
)

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def smollm2():
    """The real model, fetched once: `(model, params)` in float32."""
    import infopt as ip

    return ip.load("smollm2-135m")
