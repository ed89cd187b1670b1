"""What is shown of a memory is what is in it."""

import pytest
import torch
from talking import talking_model, talking_tokenizer
from tiny import SumSite, assert_close, assert_same_state

from gru_memory import Conversation, MemoryConfig, add_memory
from gru_memory.inspection import recalled_words, said_tokens, slot_tokens, slot_words, stored_tokens, trace
from gru_memory.state import AS_KEPT

TURNS = [("My boat is called Marigold.", "Lovely."), ("I live in Porto.", None)]


@pytest.fixture(scope="module")
def model():
    return talking_model("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return talking_tokenizer("llama")


def test_a_trace_is_of_the_tokens_a_conversation_takes_in(model, tokenizer):
    conversation = Conversation(model, tokenizer)
    for user, reply in TURNS:
        conversation.read(user, reply)
    seen = trace(model, tokenizer, TURNS)
    assert_same_state(seen.state, conversation.state)
    renderer = conversation.renderer
    ids = [renderer.prefix_ids, *(renderer.turn(*turn).ids for turn in TURNS)]
    assert seen.tokens == [tokenizer.decode([token]) for part in ids for token in part]
    assert seen.turns == [number for number, part in enumerate(ids, start=-1) for _ in part]
    length, (heads, slots) = len(seen.tokens), (2, 4)
    assert seen.strength.shape == (length, heads)
    assert seen.address.shape == seen.read_address.shape == seen.left.shape == (length, heads, slots)
    assert_close(seen.address.sum(-1), torch.ones(length, heads), 1e-5)
    assert_close(seen.read_address.sum(-1), torch.ones(length, heads), 1e-5)
    assert not model.memory_sites()["top"]._forward_hooks


def test_slots_are_the_weighted_sum_of_what_was_written(model, tokenizer):
    """With the mingru cell, `left` says exactly what of each token is in each slot."""
    site, contents = model.memory_sites()["top"], []

    def keep(module, args, kwargs, output):
        inputs = module.prepare(args[0], **kwargs).inputs
        contents.append(inputs.values[0, kwargs["mask"][0]])

    hook = site.register_forward_hook(keep, with_kwargs=True)
    seen = trace(model, tokenizer, TURNS)
    hook.remove()
    slots = torch.einsum("tns,tnd->nsd", seen.left.double(), torch.cat(contents))
    assert_close(slots, seen.state.sites["top"]["slots"][0], 1e-5)


def test_a_trace_goes_on_from_a_state_and_leaves_it_alone(model, tokenizer):
    first = trace(model, tokenizer, TURNS[:1])
    before = first.state.clone()
    second = trace(model, tokenizer, TURNS[1:], first.state)
    assert_same_state(first.state, before, tolerance=0)
    whole = trace(model, tokenizer, TURNS)
    assert_same_state(second.state, whole.state)
    assert second.tokens == whole.tokens[len(first.tokens) :]
    assert_close(second.strength, whole.strength[len(first.tokens) :], 1e-5)
    assert set(second.turns) == {0}


@pytest.mark.parametrize("by", ["strength", "left"])
def test_the_tokens_that_are_kept_best_come_first(model, tokenizer, by):
    seen = trace(model, tokenizer, TURNS)
    scores = {"strength": seen.strength.mean(-1), "left": seen.left.sum((1, 2))}
    stored = stored_tokens(seen, top=5, by=by)
    assert [getattr(token, by) for token in stored] == pytest.approx(scores[by].topk(5).values.tolist())
    for token in stored:
        assert seen.tokens[token.position] == token.text
        assert seen.turns[token.position] == token.turn
        assert token.slots == seen.address[token.position].argmax(-1).tolist()
    with pytest.raises(ValueError, match="by is 'age'"):
        stored_tokens(seen, by="age")


def test_a_slot_is_made_of_tokens(model, tokenizer):
    seen = trace(model, tokenizer, TURNS)
    (text, weight), *_ = slot_tokens(seen, head=1, slot=2)
    assert weight == seen.left[:, 1, 2].max()
    assert text == seen.tokens[int(seen.left[:, 1, 2].argmax())]


@pytest.mark.parametrize("cell", ["mingru", "gru"])
@torch.no_grad()
def test_a_slot_names_the_token_it_was_written_with(tokenizer, cell):
    model = talking_model("llama", num_slots=1, cell=cell, address_rank=8, signature_size=2)
    site = model.memory_sites()["top"]
    site.value_hidden.weight.zero_()  # so that nothing but the token decides
    ids = torch.tensor([[tokenizer.convert_tokens_to_ids("M")]])
    state = model(input_ids=ids, memory_state=model.initial_memory_state(1)).memory_state
    found = slot_words(model, tokenizer, state, top=2)
    assert [(entry.head, entry.slot) for entry in found] == [(0, 0), (1, 0)]
    for entry in found:
        slot = state.sites["top"]["slots"][0, entry.head, 0]
        assert entry.norm == pytest.approx(slot.norm().item(), rel=1e-4) and entry.norm > 0
        (word, likeness), (_, second) = entry.words
        assert word == "M" and likeness == pytest.approx(1.0, abs=1e-5)
        assert second < likeness


@torch.no_grad()
def test_the_likest_of_all_words_and_of_some(model, tokenizer, monkeypatch):
    state = trace(model, tokenizer, TURNS).state
    found = slot_words(model, tokenizer, state, top=2)
    assert [(entry.head, entry.slot) for entry in found] == [(head, slot) for head in range(2) for slot in range(4)]
    content = model.memory_sites()["top"].content_of(model.get_output_embeddings().weight)[:, 1]  # (V, v)
    likeness = torch.cosine_similarity(content, state.sites["top"]["slots"][0, 1, 2][None])
    (word, score), (_, second) = found[1 * 4 + 2].words
    assert (word, score) == (tokenizer.decode([int(likeness.argmax())]), pytest.approx(likeness.max().item(), rel=1e-4))
    assert second == pytest.approx(likeness.topk(2).values[1].item(), rel=1e-4)
    monkeypatch.setattr("gru_memory.inspection._AT_ONCE", 7)  # the vocabulary in pieces
    assert _named(slot_words(model, tokenizer, state, top=2)) == _named(found)

    strongest = slot_words(model, tokenizer, state, top=2, strongest=3)
    assert _named(strongest) == _named(sorted(found, key=lambda entry: entry.norm, reverse=True)[:3])
    said = said_tokens(tokenizer, TURNS)
    likeliest = max(said, key=lambda token: likeness[token])
    assert slot_words(model, tokenizer, state, among=said)[1 * 4 + 2].words[0][0] == tokenizer.decode([likeliest])
    empty = slot_words(model, tokenizer, model.initial_memory_state(2), row=1)
    assert all((entry.norm, entry.words) == (0, []) for entry in empty)
    assert slot_words(model, tokenizer, model.initial_memory_state(1), strongest=3) == []


def _named(entries):
    return [(entry.head, entry.slot, [word for word, _ in entry.words]) for entry in entries]


def test_what_was_said_is_what_memory_took_in(model, tokenizer):
    seen = trace(model, tokenizer, TURNS)
    taken_in = {token for token, turn in zip(seen.tokens, seen.turns, strict=True) if turn >= 0}
    said = said_tokens(tokenizer, TURNS)
    assert {tokenizer.decode([token]) for token in said} == taken_in - set(tokenizer.all_special_tokens)
    assert said_tokens(tokenizer, [(None, None)]) == said_tokens(tokenizer, []) == []


@torch.no_grad()
def test_recalled_words_are_what_the_logits_gain(model, tokenizer):
    state = trace(model, tokenizer, TURNS[:1]).state
    asked = trace(model, tokenizer, TURNS[1:], state)
    renderer = Conversation(model, tokenizer).renderer
    ids = torch.tensor([renderer.prefix_ids + renderer.turn(*TURNS[1]).ids])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, : len(renderer.prefix_ids)] = False
    with_memory = model(input_ids=ids, memory_state=state, memory_mask=mask).logits[0, -1]
    with model.disable_memory():
        gain = with_memory - model(input_ids=ids).logits[0, -1]
    (word, score), *_ = recalled_words(model, tokenizer, asked, top=2)
    assert word == tokenizer.decode([int(gain.argmax())])
    assert score == pytest.approx((gain.max() - gain.mean()).item(), rel=1e-3)
    assert len(recalled_words(model, tokenizer, asked, top=10**6)) == len(gain)  # there are no more


def test_what_cannot_be_inspected_is_said(model, tokenizer):
    with pytest.raises(ValueError, match="no memory at site 'middle'"):
        trace(model, tokenizer, TURNS, site="middle")
    with pytest.raises(ValueError, match="at least one turn"):
        trace(model, tokenizer, [])
    with pytest.raises(ValueError, match="2 conversations"):
        trace(model, tokenizer, TURNS, model.initial_memory_state(2))
    own = talking_model("llama")
    add_memory(own, MemoryConfig(), {"top": SumSite()})
    with pytest.raises(ValueError, match="SumSite"):
        slot_words(own, tokenizer, own.initial_memory_state(1))


def test_the_plots_are_drawn(model, tokenizer, tmp_path):
    pytest.importorskip("matplotlib")
    from gru_memory.evaluation import RecallConfig, evaluate_recall
    from gru_memory.plots import plot_recall, plot_writes

    seen = trace(model, tokenizer, TURNS)
    plot_writes(seen, tmp_path / "new" / "writes.png")
    plot_writes(seen, tmp_path / "turn.png", turns=[1])
    small = RecallConfig(facts=1, between=0, sessions=1, max_new_tokens=2)
    plot_recall([evaluate_recall(model, tokenizer, small, full_history=False)], tmp_path / "recall.png")
    for name in ("new/writes.png", "turn.png", "recall.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no token in turns"):
        plot_writes(seen, tmp_path / "none.png", turns=[7])


def test_the_demo_tells_talks_and_asks(model, tokenizer, tmp_path):
    pytest.importorskip("matplotlib")
    from gru_memory.demo import ASKED, TOLD, UNRELATED, run_demo, write_plot
    from gru_memory.evaluation import contains

    for user, _ in UNRELATED:
        assert not any(contains(user, value) for _, value in ASKED)
    result = run_demo(model, tokenizer, max_new_tokens=4)
    assert [(answer.question, answer.value) for answer in result.answers] == list(ASKED)
    conversation = Conversation(model, tokenizer, max_new_tokens=4)
    for user, reply in (*TOLD, *UNRELATED):
        conversation.read(user, reply)
    assert [answer.memory for answer in result.answers] == [conversation.say(question) for question, _ in ASKED]
    assert result.state_bytes == len(result.trace.state.to_bytes(AS_KEPT))
    assert write_plot(result, tmp_path).is_file()
