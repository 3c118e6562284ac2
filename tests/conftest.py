"""What every test may ask for: a seeded generator, poisoned memory, a backend that is put back afterwards."""

from __future__ import annotations

import sys

import pytest
import torch

from askew_kernels import runtime


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords hold the names of folders too
            item.add_marker(skip)


@pytest.fixture(scope="session")
def ranks():
    """Four processes for what is distributed, started once for all tests."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch is built without gloo")
    if sys.platform == "win32":
        pytest.skip("needs gloo's files and signals")
    from experiments.ranks import Ranks

    with Ranks() as ranks:
        yield ranks


@pytest.fixture
def generator():
    """The same numbers in every run, whatever other tests drew."""
    return torch.Generator().manual_seed(20260101)


@pytest.fixture
def poisoned():
    """``poisoned(shape, dtype)``: memory full of NaN, so that an element nobody wrote shows."""

    def make(shape, dtype=torch.float32):
        return torch.full(tuple(shape), float("nan"), dtype=dtype)

    return make


@pytest.fixture(params=["cpp", "reference"])
def backend(request):
    """Every CPU implementation in turn (Triton's are in test_triton.py)."""
    if request.param == "cpp" and runtime._C is None:
        pytest.skip(f"nothing is compiled: {runtime.why_not_compiled()}")
    with runtime.use_backend(request.param):
        yield request.param
