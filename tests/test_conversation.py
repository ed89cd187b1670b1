"""`Conversation`: what attention sees, what memory takes in once, and files."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from talking import FAMILIES, POSITIONS, talking_model, talking_tokenizer
from tiny import assert_differ, assert_same_state

from gru_memory import Conversation, MemoryConfig, MemoryState, add_memory
from gru_memory.rendering import TurnRenderer
from gru_memory.state import AS_KEPT

TURNS = [("My boat is called Marigold.", "Lovely."), ("I live in Porto.", None), ("What is two and two?", "Four.")]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return talking_model(family)


@pytest.fixture(scope="module")
def tokenizer(family):
    return talking_tokenizer(family)


@torch.no_grad()
def forward(model, state: MemoryState, seen: list[int], new: list[int]) -> MemoryState:
    """One plain forward pass in which memory takes in only `new`."""
    ids = torch.tensor([seen + new])
    mask = torch.tensor([[False] * len(seen) + [True] * len(new)])
    return model(input_ids=ids, memory_state=state, memory_mask=mask).memory_state


def read_all(conversation: Conversation, turns=TURNS) -> Conversation:
    for user, reply in turns:
        conversation.read(user, reply)
    return conversation


def test_reading_is_a_forward_pass_over_each_turn(model, tokenizer):
    conversation = read_all(Conversation(model, tokenizer))
    renderer = TurnRenderer(tokenizer)
    state = model.initial_memory_state(1)
    for number, turn in enumerate(TURNS):
        prefix, ids = renderer.prefix_ids, renderer.turn(*turn).ids
        state = forward(model, state, *((prefix, ids) if number else ([], prefix + ids)))
    assert_same_state(conversation.state, state)
    assert conversation.turns == len(TURNS) == conversation.state.turns.item()


def test_saying_takes_in_the_prompt_and_the_reply(model, tokenizer):
    conversation = read_all(Conversation(model, tokenizer, max_new_tokens=6))
    before = conversation.state
    reply = conversation.say("What is my boat called?")

    prefix, prompt = conversation.renderer.prefix_ids, conversation.renderer.prompt("What is my boat called?")
    with torch.no_grad():
        state, logits = before, None
        new: list[int] = []
        while len(new) < 6 and 1 not in new:  # 1 is the end of the sequence
            mask = torch.tensor([[False] * len(prefix) + [True] * (len(prompt) + len(new))])
            output = model(input_ids=torch.tensor([prefix + prompt + new]), memory_state=before, memory_mask=mask)
            logits = output.logits[0, -1]
            new.append(int(logits.argmax()))
        state = forward(model, before, prefix, prompt + new)
    assert reply == tokenizer.decode(new, skip_special_tokens=True).strip()
    assert_same_state(conversation.state, state)
    assert conversation.turns == len(TURNS) + 1


def test_turns_in_the_context_are_seen_again_but_taken_in_once(model, tokenizer):
    conversation = read_all(Conversation(model, tokenizer, context_turns=2))
    renderer = TurnRenderer(tokenizer)
    turns = [renderer.turn(*turn).ids for turn in TURNS]
    state = forward(model, model.initial_memory_state(1), [], renderer.prefix_ids + turns[0])
    between = renderer.separator_ids
    assert tokenizer.decode(between) == "\n"
    state = forward(model, state, renderer.prefix_ids + turns[0] + between, turns[1])
    state = forward(model, state, renderer.prefix_ids + turns[1] + between, turns[2])
    assert_same_state(conversation.state, state)
    assert conversation.state.tokens.item() == len(renderer.prefix_ids) + sum(map(len, turns))
    assert_differ(conversation.state, read_all(Conversation(model, tokenizer)).state)


def test_the_system_prompt_is_taken_in_once_and_seen_every_turn(model, tokenizer):
    conversation = Conversation(model, tokenizer, system="Be brief.")
    prefix = conversation.renderer.prefix_ids
    assert "Be brief." in tokenizer.decode(prefix)
    read_all(conversation)
    turns = [conversation.renderer.turn(*turn).ids for turn in TURNS]
    assert conversation.state.tokens.item() == len(prefix) + sum(map(len, turns))
    assert conversation._inputs(turns[0])["input_ids"][0].tolist() == prefix + turns[0]


def test_a_saved_conversation_gives_the_same_next_reply(model, tokenizer, tmp_path):
    first = read_all(Conversation(model, tokenizer, context_turns=2, max_new_tokens=6))
    first.save(tmp_path / "talk.safetensors")
    second = Conversation(model, tokenizer, context_turns=2, max_new_tokens=6)
    second.load(tmp_path / "talk.safetensors")
    assert_same_state(second.state, first.state, tolerance=0)
    assert second.turns == first.turns
    assert second.say("Where do I live?") == first.say("Where do I live?")
    assert_same_state(second.state, first.state, tolerance=0)


def test_bytes_are_as_good_as_a_file(model, tokenizer):
    first = read_all(Conversation(model, tokenizer, context_turns=2))
    second = Conversation(model, tokenizer, context_turns=2)
    second.load(first.to_bytes())
    assert_same_state(second.state, first.state, tolerance=0)
    assert second.inputs("And now?")["input_ids"].tolist() == first.inputs("And now?")["input_ids"].tolist()
    every_bit = first.to_bytes()
    first.kept_in = AS_KEPT  # as outside of these tests
    assert len(first.to_bytes()) < len(every_bit)
    second.load(first.to_bytes())
    for site, kept in first.state.sites.items():
        torch.testing.assert_close(second.state.sites[site]["slots"], kept["slots"], atol=2.5e-4, rtol=0)


@pytest.mark.parametrize(
    "wrong",
    [{"turns": "3"}, {"turns": -1}, {"system": 3}, {"context": [["a"]]}, {"context": [[1, "b"]]}, {"context": 3}],
)
def test_a_header_of_the_wrong_types_is_refused(model, tokenizer, wrong):
    about = {"turns": 1, "context": [], "system": None, "context_turns": 1, **wrong}
    data = model.initial_memory_state(1).to_bytes(metadata={"conversation": json.dumps(about)})
    conversation = Conversation(model, tokenizer)
    with pytest.raises(ValueError, match="not a conversation"):
        conversation.load(data)
    assert conversation.turns == 0


def test_a_state_of_another_shape_is_refused_at_once(model, tokenizer):
    state = model.initial_memory_state(1)
    cut = {"top": {**state.sites["top"], "slots": state.sites["top"]["slots"][:, :, :1]}}
    about = {"turns": 1, "context": [], "system": None, "context_turns": 1}
    data = replace(state, sites=cut).to_bytes(metadata={"conversation": json.dumps(about)})
    with pytest.raises(ValueError, match="slots"):
        Conversation(model, tokenizer).load(data)


def test_how_a_loaded_state_fades_and_is_kept_is_the_model_s_to_say(model, tokenizer):
    """Whatever the file says."""
    conversation = read_all(Conversation(model, tokenizer))
    own = conversation.state
    rates = {site: torch.zeros_like(rate) for site, rate in own.decay_rates.items()}
    conversation.state = replace(own, decay_rates=rates, kept_in="int4", addressing="content")
    data = conversation.to_bytes()
    conversation.load(data)
    assert_same_state(conversation.state.decay(1), own.decay(1), tolerance=0)
    assert (conversation.state.kept_in, conversation.state.addressing) == (own.kept_in, own.addressing)
    assert conversation.state.decay_rates.keys() == own.decay_rates.keys() != set()
    for site, rate in own.decay_rates.items():
        assert torch.equal(conversation.state.decay_rates[site], rate)


def test_a_refused_file_leaves_the_conversation_as_it_was(family, model, tokenizer, tmp_path):
    other = talking_model(family, num_slots=5)
    read_all(Conversation(other, tokenizer)).save(tmp_path / "other.safetensors")
    model.initial_memory_state(1).save(tmp_path / "state.safetensors")
    conversation = read_all(Conversation(model, tokenizer))
    state, turns = conversation.state, conversation.turns
    with pytest.raises(ValueError, match="another model or memory"):
        conversation.load(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a conversation"):
        conversation.load(tmp_path / "state.safetensors")
    with pytest.raises(FileNotFoundError):
        conversation.load(tmp_path / "nothing.safetensors")
    assert conversation.state is state
    assert conversation.turns == turns


def test_a_conversation_refuses_a_disabled_memory(model, tokenizer):
    chat = Conversation(model, tokenizer, max_new_tokens=4)
    chat.read("red blue")
    before = chat.state
    with model.disable_memory():
        for turn in (chat.say, chat.read):
            with pytest.raises(RuntimeError, match="the memory is disabled here"):
                turn("blue")
    assert chat.state is before and chat.turns == 1
    chat.say("blue")


def test_reset_forgets_everything(model, tokenizer):
    conversation = read_all(Conversation(model, tokenizer, context_turns=3))
    conversation.reset()
    assert conversation.turns == 0
    assert_same_state(conversation.state, model.initial_memory_state(1), tolerance=0)
    read_all(conversation)
    assert_same_state(conversation.state, read_all(Conversation(model, tokenizer, context_turns=3)).state, tolerance=0)


@pytest.mark.parametrize("text", ["", " \n", None])
def test_an_empty_turn_is_refused(model, tokenizer, text):
    conversation = Conversation(model, tokenizer)
    for take in (conversation.read, conversation.say):
        with pytest.raises(ValueError, match="empty"):
            take(text)
    assert conversation.turns == 0


def test_a_turn_that_is_no_text_is_refused(model, tokenizer):
    conversation = Conversation(model, tokenizer)
    for call in (conversation.say, conversation.read):
        with pytest.raises(ValueError, match="no valid Unicode"):
            call("Caf\udce9.")
    assert conversation.turns == 0


def test_a_turn_that_does_not_fit_is_refused_before_it_is_taken_in(model, tokenizer):
    conversation = read_all(Conversation(model, tokenizer))
    state = conversation.state
    with pytest.raises(ValueError, match=f"the model has {POSITIONS}"):
        conversation.read("boat " * POSITIONS)
    with pytest.raises(ValueError, match="fewer new tokens"):
        conversation.say("Where?", max_new_tokens=POSITIONS)
    assert conversation.state is state


def test_what_cannot_converse_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="context_turns"):
        Conversation(model, tokenizer, context_turns=0)
    with pytest.raises(ValueError, match="no memory"):
        Conversation(torch.nn.Linear(1, 1), tokenizer)


def test_a_closed_memory_says_what_the_base_model_says(tokenizer, family):
    model = talking_model(family)
    with torch.no_grad():
        model.memory_sites()["top"].gate.zero_()
    told = read_all(Conversation(model, tokenizer, max_new_tokens=6))
    fresh = Conversation(model, tokenizer, max_new_tokens=6)
    assert told.say("Where do I live?") == fresh.say("Where do I live?")


def test_a_memory_made_for_the_model_converses_too(tokenizer, family):
    model = talking_model(family)
    add_memory(model, MemoryConfig(num_heads=1, num_slots=2, slot_size=4))
    assert isinstance(Conversation(model, tokenizer, max_new_tokens=3).say("Hello there."), str)


def test_options_of_generate_are_heard_over_the_usual_ones(model, tokenizer):
    def tokens_said(defaults=(), **options):
        conversation = read_all(Conversation(model, tokenizer, **dict(defaults)))
        before = int(conversation.state.tokens)
        conversation.say("What is my boat called?", eos_token_id=None, **options)
        return int(conversation.state.tokens) - before - len(conversation.renderer.prompt("What is my boat called?"))

    config = copy.deepcopy(model.generation_config)
    config.update(max_new_tokens=3, eos_token_id=None, pad_token_id=1)
    assert tokens_said(max_new_tokens=2) == 2
    assert tokens_said() == 64
    assert tokens_said(generation_config=config) == 3
    assert tokens_said({"generation_config": config}) == 3
    assert tokens_said({"max_new_tokens": 5}) == 5
    prompt = read_all(Conversation(model, tokenizer)).prompt("What is my boat called?")["input_ids"].shape[1]
    assert tokens_said(max_length=prompt + 4) == 4
