"""Compilers for devices that are not here, which tests need that compile for them."""

import importlib.util

import pytest


def _installed(*modules: str) -> bool:
    return any(importlib.util.find_spec(module) for module in modules)


needs_libtpu = pytest.mark.skipif(
    not _installed("libtpu"), reason="the extra [preflight] is not installed"
)
needs_cuda = pytest.mark.skipif(
    not (
        _installed("jax_plugins") and _installed("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
    ),
    reason="the extra [cuda] is not installed",
)
