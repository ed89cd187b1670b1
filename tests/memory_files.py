"""What tests of memories as files share."""

import json
from contextlib import contextmanager

import pytest
import torch
from tiny import random_ids

FILES = {"memory_config.json", "memory_model.safetensors", "README.md"}  # of a memory


@pytest.fixture(params=("gpt2", "llama"), name="family")
def of_two_families(request):
    return request.param


@contextmanager
def unchanged(model):
    """Whatever happens inside, the model still computes what it did and knows what it knew."""
    ids = random_ids()
    before = model(ids).logits
    model.memory_state = state = model(random_ids(2, 5, seed=7)).memory_state.detach()
    memories, trainable = model.memories, [p.requires_grad for p in model.parameters()]
    yield
    assert torch.equal(model(ids).logits, before)
    assert model.memory_state is state
    assert model.memories == memories
    assert [p.requires_grad for p in model.parameters()] == trainable


def config_with(**changes):
    def damage(folder):
        path = folder / "memory_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage
