"""Inspection finds values where they were written, reads what is there, and is compared with what is answered."""

import pytest
import torch
from talking import talking_model, talking_tokenizer
from tiny import assert_close

from gru_memory.evaluation.batched import BatchReader
from gru_memory.evaluation.inspect import InspectConfig, _agreement, evaluate_inspect, ranking, slot_list
from gru_memory.inspection import _nearest, places_of, trace, words_at

TURNS = [("My boat is called Marigold.", "Lovely."), ("I live in Porto.", None)]
SMALL = {"facts": 2, "between": 1, "sessions": 2, "max_new_tokens": 2, "batch_size": 2}


@pytest.fixture(scope="module")
def loaded():
    return talking_model("llama"), talking_tokenizer("llama")


@pytest.mark.parametrize(
    ("value", "places"),
    [("Marigold", [2, 3]), ("marigold.", [2, 3, 4]), ("is", [1]), ("boat is Mari", [0, 1, 2]), ("gold leaf", [])],
)
def test_a_value_is_found_in_the_tokens_it_was_written_with(value, places):
    assert places_of(["boat", " is", " Mari", "gold", "."], value) == places


@torch.no_grad()
def test_a_read_at_an_address_says_what_the_slots_there_hold(loaded):
    model, tokenizer = loaded
    seen = trace(model, tokenizer, TURNS)
    site = model.memory_sites()["top"]
    content = torch.einsum("mns,nsd->mnd", seen.address[4:6].double(), seen.state.sites["top"]["slots"][0]).flatten(1)
    wanted = _nearest(model, tokenizer, site.gate * site.output(content), 3)
    got = words_at(model, tokenizer, seen.state, seen.address[4:6], 3)
    assert [[word for word, _ in row] for row in got] == [[word for word, _ in row] for row in wanted]
    assert got[0][0][1] == pytest.approx(wanted[0][0][1])


def test_the_list_of_slots_says_what_each_is_made_of_and_since_when(loaded):
    model, tokenizer = loaded
    seen = trace(model, tokenizer, TURNS)
    found = slot_list(model, tokenizer, seen)
    assert found
    for slot in found:
        weights = seen.left[:, slot["head"], slot["slot"]]
        assert slot["left"] == pytest.approx(float(weights.sum()), abs=1e-3)
        best = int(weights.argmax())
        assert slot["made_of"][0] == {
            "token": seen.tokens[best], "turn": seen.turns[best], "left": pytest.approx(float(weights[best]), abs=1e-3),
        }  # fmt: skip
    holding = (seen.left.amax(0) > 0.05).sum()
    assert len(found) == holding


def test_agreement_counts_facts_and_words():
    def fact(said, answered, strength, spoken=None):
        return {"said": said, "answered": answered, "strength": strength, "spoken": spoken}

    answered = [fact(True, True, 0.9, [("a", "a"), ("b", "x")]), fact(False, True, 0.5)]
    facts = [*answered, fact(True, False, 0.2), fact(False, False, 0.5)]
    assert _agreement(facts) == {
        "asked": 4, "agree": 0.5, "both": 0.25, "said_only": 0.25, "answered_only": 0.25, "neither": 0.25,
        "ranking": 0.875, "strength": pytest.approx(0.525), "spoken": 0.5,
    }  # fmt: skip
    assert ranking([1.0], []) is None


def test_a_memory_that_is_read_rightly_agrees_with_a_model_that_answers(loaded, monkeypatch):
    """The session's own facts, with replies that hold the value: what is read decides the agreement."""
    model, tokenizer = loaded
    seen_states = []

    def ask(self, states, questions, **generation):
        seen_states.append(states)
        return [f"It is {values[question]}." for question in questions], states

    from gru_memory.data import FactGenerator

    generator = FactGenerator(1234, values="test")
    values = {turn.user: turn.value for _ in range(2) for turn in generator.session(2, 1).turns if turn.kind == "ask"}
    monkeypatch.setattr(BatchReader, "ask", ask)
    result = evaluate_inspect(model, tokenizer, InspectConfig(**SMALL))
    (row,) = result.rows
    assert row["asked"] == len(result.details["facts"]) > 0
    assert row["neither"] == row["said_only"] == 0
    assert row["both"] + row["answered_only"] == 1
    for fact in result.details["facts"]:
        assert "".join(fact["tokens"]).strip().lower().find(fact["value"].lower()[:3]) >= 0
        assert fact["said"] == (fact["read"] == fact["tokens"])
        assert 0 <= fact["strength"] <= 1
        assert "".join(token for token, _ in fact["spoken"]).strip(" .").lower() == fact["value"].lower()
    alone = BatchReader(model, tokenizer)
    assert_close(seen_states[0].select(0).tokens, seen_states[0].tokens[:1])
    assert alone.start(1).tokens.item() == 0


def test_a_site_that_is_not_there_is_named(loaded):
    with pytest.raises(ValueError, match="no memory at site 'input'"):
        evaluate_inspect(*loaded, InspectConfig(**SMALL, site="input"))
