"""The memory that ships, on the real model: it remembers, it is small, and it keeps quiet where it knows nothing."""

import pytest

from gru_memory import MemoryState
from gru_memory.demo import run_demo
from gru_memory.evaluation import HarmConfig, RecallConfig, evaluate_harm, evaluate_recall
from gru_memory.saving import WEIGHTS_NAME
from gru_memory.shipped import load_with_memory, shipped_memory

pytestmark = pytest.mark.needs_model


@pytest.fixture(scope="module")
def loaded():
    return load_with_memory()


def test_it_takes_at_most_five_megabytes():
    assert (shipped_memory() / WEIGHTS_NAME).stat().st_size <= 5_000_000


def test_it_recalls_what_the_base_model_cannot_know(loaded):
    """A small sample of `gru-memory eval recall`; the full figures are in docs/evaluation.md."""
    result = evaluate_recall(*loaded, RecallConfig(facts=3, between=6, sessions=10), full_history=False)
    assert result.floor.share <= 0.1
    assert result.memory.share >= 0.8
    assert result.state_bytes <= 32 * 1024


def test_it_keeps_quiet_where_nothing_was_told(loaded):
    for result in evaluate_harm(*loaded, HarmConfig(conversations=4, turns=6, facts=0, code_files=0)):
        assert result.kl_median < 0.01


def test_the_demo_answers(loaded, tmp_path):
    result = run_demo(*loaded)
    assert all(answer.right for answer in result.answers)
    assert all(answer.value not in answer.alone for answer in result.answers)


def test_its_states_are_its_own(loaded, tmp_path):
    model, _ = loaded
    model.initial_memory_state(1).save(tmp_path / "state.safetensors")
    assert MemoryState.load(tmp_path / "state.safetensors", model.memory_fingerprint()).batch_size == 1
    with pytest.raises(ValueError, match="another model or memory"):
        MemoryState.load(tmp_path / "state.safetensors", "somebody else's")
