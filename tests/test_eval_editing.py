"""Edits do what they say to the state, and their evaluation asks the right memories the right questions."""

import pytest
import torch
from talking import talking_model, talking_tokenizer
from tiny import assert_close, assert_same_state, memory_model

from gru_memory.data import FactGenerator
from gru_memory.data.sessions import Turn
from gru_memory.editing import diff, forget, forget_slot, kept_share
from gru_memory.evaluation import editing
from gru_memory.evaluation.batched import BatchReader
from gru_memory.evaluation.editing import EDITS, EditingConfig, evaluate_editing, slots_of
from gru_memory.inspection import slot_words, trace, words_at
from gru_memory.state import MemoryState

TURN = ("My boat is called Marigold.", "Lovely.")
SMALL = {"facts": 2, "between": 1, "sessions": 3, "max_new_tokens": 2, "batch_size": 2}


@pytest.fixture(scope="module")
def model():
    return talking_model("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return talking_tokenizer("llama")


@pytest.fixture
def states(model, tokenizer):
    reader = BatchReader(model, tokenizer)
    return [reader.read(reader.start(1), [turn]) for turn in (TURN, ("I live in Porto.", None))]


def test_merging_with_itself_or_with_nothing_changes_nothing(model, states):
    one, other = states
    empty = model.initial_memory_state(1)
    assert_close(one.merge(one).sites["top"]["slots"], one.sites["top"]["slots"])
    assert_same_state(one.merge(empty), one)
    assert_close(one.merge(other).sites["top"]["slots"], other.merge(one).sites["top"]["slots"])
    assert (one.merge(other).sites["top"]["slots"] - one.sites["top"]["slots"]).abs().max() > 0.01


def test_a_merged_slot_holds_both_and_is_no_longer_than_the_longer(states):
    one, other = (state.sites["top"]["slots"] for state in states)
    merged = states[0].merge(states[1])
    slots = merged.sites["top"]["slots"]
    assert (slots.norm(dim=-1) <= torch.maximum(one.norm(dim=-1), other.norm(dim=-1)) + 1e-9).all()
    alike = torch.cosine_similarity(slots, one + other, dim=-1)
    assert_close(alike, torch.ones_like(alike), 1e-9)
    assert merged.tokens.item() == states[0].tokens.item() + states[1].tokens.item()
    assert_close(
        merged.sites["top"]["strength"], states[0].sites["top"]["strength"]
    )  # it goes on where the first stands


def test_states_that_do_not_belong_together_are_not_merged(states):
    with pytest.raises(ValueError, match="different models or memories"):
        states[0].merge(memory_model("llama").initial_memory_state(1))
    with pytest.raises(ValueError, match="1 and 2 conversations"):
        states[0].merge(MemoryState.cat(states))


def test_a_state_forgets_a_slot_or_a_text(model, tokenizer, states):
    assert_same_state(states[0].forget((1, 2)), forget_slot(states[0], 1, 2), 0)
    wanted = forget(model, tokenizer, states[0], *TURN)
    assert_same_state(states[0].forget(TURN[0], model, tokenizer, TURN[1]), wanted, 0)
    with pytest.raises(ValueError, match="no slot 9 of head 0"):
        states[0].forget((0, 9))
    for neither in (3, None, (1, 2, 3)):
        with pytest.raises(ValueError, match=r"the text of a turn, or \(head, slot\)"):
            states[0].forget(neither, model, tokenizer)
    with pytest.raises(ValueError, match="give the model and the tokenizer"):
        states[0].forget("My boat is called Marigold.")


def test_a_state_of_another_memory_is_not_looked_into(model, tokenizer, states):
    """It has the same sizes, so that nothing else would tell."""
    other = talking_model("llama")
    with torch.no_grad():
        other.memory_sites()["top"].key.weight.add_(0.01)
    address = trace(model, tokenizer, [TURN]).address
    for ask in (
        lambda state: state.forget(TURN[0], other, tokenizer),
        lambda state: kept_share(other, tokenizer, state, *TURN),
        lambda state: diff(other, tokenizer, other.initial_memory_state(1), state),
        lambda state: slot_words(other, tokenizer, state),
        lambda state: words_at(other, tokenizer, state, address),
    ):
        with pytest.raises(ValueError, match="made by another model or by a memory with other weights"):
            ask(states[0])
    with pytest.raises(ValueError, match="is a dict: pass a MemoryState"):
        slot_words(model, tokenizer, states[0].sites)


def test_what_was_not_said_is_not_forgotten(model, tokenizer, states):
    """An empty turn writes what every turn begins and ends with, and so would take it from all of them."""
    for text in ("", " \n", "Oh\ud800"):
        with pytest.raises(ValueError, match="give some text|no valid Unicode text"):
            states[0].forget(text, model, tokenizer)
        with pytest.raises(ValueError, match="give some text|no valid Unicode text"):
            kept_share(model, tokenizer, states[0], text)
    with model.disable_memory(), pytest.raises(RuntimeError, match="the memory is disabled here"):
        states[0].forget(TURN[0], model, tokenizer)
    assert not model.memory_sites()["top"]._forward_hooks


def test_what_is_asked_of_one_conversation_is_not_answered_for_the_first_of_several(model, tokenizer, states):
    both, address = MemoryState.cat(states), trace(model, tokenizer, [TURN]).address
    for ask in (
        lambda: kept_share(model, tokenizer, both, *TURN),
        lambda: words_at(model, tokenizer, both, address),
    ):
        with pytest.raises(ValueError, match="holds 2 conversations"):
            ask()


def test_a_model_remembers_in_every_conversation_it_has(model, tokenizer):
    reader = BatchReader(model, tokenizer)
    try:
        model.memory_state = None
        model.remember(TURN[0], tokenizer, TURN[1])
        assert_same_state(model.memory_state, reader.read(reader.start(1), [TURN]))
        model.reset(2)
        model.remember(TURN[0], tokenizer)
        model.remember("Oh.", tokenizer)
        alone = reader.read_all(reader.start(1), [[(TURN[0], None), ("Oh.", None)]])
        assert_same_state(model.memory_state, MemoryState.cat([alone, alone]))
    finally:
        model.memory_state = None


def test_what_would_never_be_read_is_not_remembered(model, tokenizer):
    model.memory_state = None
    with pytest.raises(ValueError, match="the turn is empty"):
        model.remember(" ", tokenizer)
    with model.disable_memory(), pytest.raises(RuntimeError, match="the memory is disabled here"):
        model.remember("Oh.", tokenizer)
    model.memory_config.mode = "ephemeral"
    try:
        with pytest.raises(RuntimeError, match="an ephemeral memory starts each"):
            model.remember("Oh.", tokenizer)
    finally:
        model.memory_config.mode = "persistent"
    assert model.memory_state is None


def test_a_difference_is_in_the_words_that_were_written(tokenizer):
    """Heads that can say every token, and one content in one slot a head: the difference names that token."""
    model = talking_model("llama", num_slots=6, slot_size=16)
    site = model.memory_sites()["top"]
    with torch.no_grad():
        torch.nn.init.orthogonal_(site.output.weight)  # (D, N d), D = N d: all heads together say anything
        empty = model.initial_memory_state(1)
        head = model.get_output_embeddings().weight
        for token in (40, 77, 150):
            content = (site.output.weight.T @ head[token]).view(2, 16)
            slots = empty.sites["top"]["slots"].clone()
            slots[0, 0, 3], slots[0, 1, 1] = content[0] / 9, content[1] / 9
            after = MemoryState(**{**vars(empty), "sites": {"top": {**empty.sites["top"], "slots": slots}}})
            found = diff(model, tokenizer, empty, after, top=3)
            assert found.gained[0][0] == tokenizer.decode([token])
            assert found.lost[0][1] <= found.gained[0][1]
            back = diff(model, tokenizer, after, empty, top=3)
            assert [word for word, _ in back.lost] == [word for word, _ in found.gained]
    assert len(diff(model, tokenizer, empty, after, top=10**6).gained) == len(head)  # there are no more
    with pytest.raises(ValueError, match="top is -1"):
        diff(model, tokenizer, empty, after, top=-1)
    with pytest.raises(ValueError, match="holds 2 conversations"):
        diff(model, tokenizer, MemoryState.cat([empty, empty]), empty)


def test_the_slots_of_a_turn_are_where_its_value_was_written(model, tokenizer):
    turn = FactGenerator(3, values="test").fact().tell
    seen = trace(model, tokenizer, [(turn.user, turn.assistant)])
    text = "".join(token for token, number in zip(seen.tokens, seen.turns) if number == 0)
    found = slots_of(model, tokenizer, turn, seen.state)
    assert turn.value.lower() in text.lower() and found
    first = seen.turns.index(0)
    written, length = set(), 0
    for i in range(first, len(seen.tokens)):
        start, length = length, length + len(seen.tokens[i])
        at = text.lower().find(turn.value.lower())
        if start < at + len(turn.value) and length > at:
            written |= {(head, int(seen.address[i, head].argmax())) for head in range(2)}
    assert set(found) == written


def test_the_slots_of_a_turn_are_found_again_where_later_ones_went_elsewhere(tokenizer):
    """Found by their content, slots are taken in the order of writing: after another turn, a value lies in others."""
    model = talking_model(
        "llama", addressing="content", num_heads=1, num_slots=160, slot_size=12, address_rank=8, signature_size=6, decay=0.99
    )  # fmt: skip
    first, second = (
        Turn("My boat is called Marigold.", "Noted.", value="Marigold"),
        Turn("By the way, I live in Porto.", "Good to know.", value="Porto"),
    )
    alone = trace(model, tokenizer, [(second.user, second.assistant)])
    both = trace(model, tokenizer, [(first.user, first.assistant), (second.user, second.assistant)])
    found = slots_of(model, tokenizer, second, both.state)
    before = slots_of(model, tokenizer, second, alone.state)
    assert len(before) / 2 < len(found) <= len(before) and set(found) != set(before)
    of_second = torch.tensor([number == 1 for number in both.turns])
    written = {int(slot) for slot in both.address[of_second][:, 0].argmax(dim=-1)}
    assert {slot for _, slot in found} <= written


def test_every_edit_is_asked_about_its_own_facts(model, tokenizer, monkeypatch):
    """A memory that repeats the turns it was read is right about what it holds: before, after, and the others."""
    held: dict[tuple, set[str]] = {}

    def key(state):
        return tuple(round(x, 4) for x in state.sites["top"]["slots"].half().flatten().tolist())

    read_all, read, forget_, merge = (
        BatchReader.read_all,
        BatchReader.read,
        editing.MemoryState.forget,
        MemoryState.merge,
    )

    def note(state, texts):
        held[key(state)] = set(texts)
        return state

    def spy_read_all(self, states, conversations):
        result = read_all(self, states, conversations)
        for row, turns in enumerate(conversations):
            known = held.get(key(states.select(row)), set())
            note(result.select(row), known | {user for user, _ in turns})
        return result

    def spy_read(self, states, turns):
        result = read(self, states, turns)
        for row, (user, _) in enumerate(turns):
            note(result.select(row), held.get(key(states.select(row)), set()) | {user})
        return result

    def spy_forget(self, what, *rest, **further):
        known = held.get(key(self), set())
        result = forget_(self, what, *rest, **further)
        return note(result, set() if isinstance(what, str) else known)

    def spy_merge(self, other):
        return note(merge(self, other), held[key(self)] | held[key(other)])

    monkeypatch.setattr(BatchReader, "read_all", spy_read_all)
    monkeypatch.setattr(BatchReader, "read", spy_read)
    monkeypatch.setattr(MemoryState, "forget", spy_forget)
    monkeypatch.setattr(MemoryState, "merge", spy_merge)
    monkeypatch.setattr(
        BatchReader,
        "ask",
        lambda self, states, questions, **_: (
            [" ".join(held.get(key(states.select(i)), ())) for i in range(len(questions))],
            states,
        ),
    )
    before = model.memory_state
    rows = {row["edit"]: row for row in evaluate_editing(model, tokenizer, EditingConfig(**SMALL)).rows}
    assert model.memory_state is before
    assert list(rows) == list(EDITS.values())
    figures = ("before", "after", "others_before", "others_after")
    wanted = {
        "forget text": (1, 0, 1, 0),  # and everything for a text
        "forget slots": (1, 1, 1, 1),  # this spy takes no word away for a slot
        "remember": (0, 1, 1, 1),
        "merge": (0, 1, 1, 1),
        "one conversation": (0, 1, 1, 1),
    }
    for name, shares in wanted.items():
        assert tuple(rows[EDITS[name]][figure] for figure in figures) == shares, name
