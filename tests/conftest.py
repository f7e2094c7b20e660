"""Strict numerics and cheap compilations for every test."""

import ipaddress
import os
import socket

import jax
import pytest
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


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test may fetch by pip, in a process of its own, and else reaches nothing outside this machine."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not ipaddress.ip_address(address[0]).is_loopback:
            raise AssertionError(f"a test reached for {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
