"""Settings of the whole suite: reproducible examples, one thread."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("geomreg", derandomize=True, deadline=None, max_examples=30)
settings.load_profile("geomreg")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """No compiled code from an earlier test."""
    torch._dynamo.reset()
