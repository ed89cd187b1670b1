"""Models that the tests of a file share, made once, and left as they were by each test."""

import pytest
from tiny import FAMILIES, KINDS, memory_model


@pytest.fixture(scope="module", params=KINDS, ids="-".join, name="model")
def one_of_each_kind(request):
    """One of each kind. Tests that change weights must not use it."""
    family, cell, clock = request.param
    return memory_model(family, cell=cell, decay_every=clock)


@pytest.fixture(scope="module", params=FAMILIES, name="family_model")
def one_a_family(request):
    """One a family."""
    return memory_model(request.param, cell="mingru", decay_every="turn")


@pytest.fixture(autouse=True, name="clean")
def no_state_stays(request):
    """None may leave a state behind."""
    yield
    for name in ("model", "family_model"):
        if name in request.fixturenames:
            request.getfixturevalue(name).memory_state = None
