"""`MemoryConfig` refuses what no memory could be made of, in words that say what to do."""

import copy
import json
import pickle
from dataclasses import fields, replace

import numpy as np
import pytest
from tiny import base_model, memory_model

from gru_memory import GRUMemoryWithDecay, MemoryConfig, add_memory
from gru_memory.training.request import conversation_memory


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sites": ()}, "name at least one"),
        ({"sites": "top"}, "give a tuple"),
        ({"sites": ("bottom",)}, "unknown site 'bottom'"),
        ({"sites": ("top", "top")}, "twice"),
        ({"num_slots": 0}, "num_slots is 0"),
        ({"num_heads": 2.0}, "num_heads is 2.0"),
        ({"cell": "lstm"}, "choose one of"),
        ({"decay_every": "day"}, "choose one of"),
        ({"mode": "eternal"}, "choose one of"),
        ({"decay": 0}, "not in"),
        ({"max_strength": 0}, "max_strength is 0"),
        ({"persistent_floor": 1}, "persistent_floor is 1"),
        ({"persistent_floor": -0.1}, "persistent_floor is -0.1"),
        ({"persistent_floor": True}, "persistent_floor is True"),
        ({"max_strength": 1.5}, "max_strength is 1.5"),
        ({"max_strength": True}, "max_strength is True"),
        ({"decay": 1.5}, "not in"),
        ({"decay": True}, "not in"),
        ({"decay": [0.9, 0.9, 0.9]}, "3 numbers"),
        ({"gate_init": float("nan")}, "finite"),
        ({"key_layers": ("1",)}, "number of a block"),
        ({"key_layers": (1, 1)}, "twice"),
        ({"key_layers": 3}, "key_layers of a memory is 3: give a tuple"),
        ({"sites": None}, "sites of a memory is None: give a tuple"),
        ({"sites": (None,)}, "unknown site None"),
        ({"decay": [[0.9] * 16, 0.9], "num_heads": 2}, "table must be 2 rows"),
        ({"decay": [0.9, [0.9, 0.9]]}, "table must be 4 rows"),
    ],
)
def test_bad_settings_name_the_remedy(settings, message):
    with pytest.raises(ValueError, match=message):
        MemoryConfig(**settings)


def test_configs_survive_a_round_trip():
    config = MemoryConfig(sites=("input", "layer:3"), decay=[0.9, 0.99, 0.97, 1.0], key_layers=(1, 2), cell="mingru")
    assert MemoryConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_numbers_of_numpy_are_numbers():
    config = MemoryConfig(num_heads=np.int64(2), decay=[np.float32(0.5), np.float64(0.25)], gate_init=np.float32(0.5))
    assert config == MemoryConfig(num_heads=2, decay=[0.5, 0.25], gate_init=0.5)
    assert MemoryConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert GRUMemoryWithDecay(8, decay=np.float32(0.5)).decay.tolist() == [[0.5]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "newer"),
        ({"format_version": "1"}, "whole number"),
        ({"colour": "red"}, "unknown fields"),
    ],
)
def test_configs_of_other_formats_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MemoryConfig.from_dict({**MemoryConfig().to_dict(), **change})


def test_the_table_of_settings_is_that_of_the_code(repository):
    text, conversations = (repository / "docs" / "memory.md").read_text(), conversation_memory(30)
    for field in fields(MemoryConfig):
        default, other = getattr(MemoryConfig(), field.name), getattr(conversations, field.name)
        differs = f"`{other!r}`" if other != default else ""
        assert f"| `{field.name}` | `{default!r}` | {differs} | {field.metadata['help']} |" in text


def test_what_a_memory_was_built_by_cannot_be_changed_in_place():
    config = MemoryConfig(decay=0.9)
    config.decay = 0.8  # nobody uses it yet
    model = memory_model("gpt2")
    used = model.memory_config
    for name, value in (("decay", 0.5), ("persistent_floor", 0.2), ("num_slots", 3), ("deacy", 0.5)):
        with pytest.raises(AttributeError, match=f"{name} of a memory that is in use cannot be changed in place"):
            setattr(used, name, value)
    with pytest.raises(ValueError, match="mode is 'Persistent'"):
        used.mode = "Persistent"
    used.mode = "ephemeral"
    assert model.memory_config.mode == "ephemeral" and replace(used, decay=0.5).decay == 0.5
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.memory_config == used
        with pytest.raises(AttributeError, match="cannot be changed in place"):
            twin.memory_config.decay = 0.5
    add_memory(base_model("gpt2"), config)
    config.decay = 0.7  # it is still its owner's
