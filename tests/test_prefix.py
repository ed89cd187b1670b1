"""A prefix that was run once gives what running it with every turn gives, wherever it is used, and not where it would not."""

import copy
import queue

import pytest
import torch
from families import CONFIGS, VOCABULARY
from talking import FAMILIES, talking_model, talking_tokenizer
from tiny import assert_close, assert_same_state, memory_model, random_ids

from gru_memory import Conversation, MemoryState
from gru_memory.cache import keeps_every_token
from gru_memory.evaluation.batched import BatchReader
from gru_memory.prefix import cache_of, kept_prefix, turn_begun
from gru_memory.server.engine import Done, Engine, EngineLimits, Failed, Job
from gru_memory.server.rows import prefill

PREFIX = random_ids(1, 7, seed=5)[0].tolist()
TURNS = [("My boat is called Marigold.", "Lovely."), ("I live in Porto.", None), ("What is two and two?", "Four.")]
QUESTIONS = ("Where do I live?", "What is my boat called?")
TOLERANCE = 1e-5  # some families compute positions in float32


class Fed:
    """Counts the tokens that blocks are fed."""

    def __init__(self, model):
        self.model, self.tokens = model, 0

    def __enter__(self):
        def count(module, args, output):
            self.tokens += output.numel() // output.shape[-1]

        self.hook = self.model.get_input_embeddings().register_forward_hook(count)
        return self

    def __exit__(self, *error):
        self.hook.remove()


def row_of(prefix, ids, seen):
    mask = torch.ones(1, len(prefix) + len(ids), dtype=torch.bool)
    mask[:, : len(prefix)] = not seen
    return {
        "input_ids": torch.tensor([prefix + ids]),
        "attention_mask": torch.ones_like(mask).long(),
        "memory_mask": mask,
    }


@pytest.mark.parametrize("family", CONFIGS)
def test_rows_with_another_prefix_or_none_go_on_as_if_they_had_been_fed_it(family):
    model = memory_model(family, sites=("top",), cell="mingru", decay_every="turn")
    if family == "mixtral":  # its experts' product takes no float64
        model.float()
    prefix, other = kept_prefix(model, PREFIX), kept_prefix(model, PREFIX[:3])
    if prefix is None:
        assert family == "gpt_neo" or not keeps_every_token(model)
        return
    state = model(input_ids=random_ids(1, 9, seed=1)).memory_state
    turns = [random_ids(1, length, seed=length)[0].tolist() for length in (5, 11, 8)]
    rows = [row_of(PREFIX, turns[0], True), row_of(PREFIX[:3], turns[1], True), row_of(PREFIX, turns[2], False)]
    states = [state, state, model.initial_memory_state(1)]
    wanted, logits = prefill(model, rows, states, 0)
    got, same = prefill(model, rows, states, 0, [prefix, other, None])
    assert_close(same, logits, TOLERANCE)
    assert_same_state(got.state, wanted.state, TOLERANCE)
    assert wanted.state.turns.tolist() == [2, 2, 1]
    for _ in range(2):  # and so do the tokens decoded after it
        tokens = [[int(row.argmax())] for row in logits]
        logits = wanted.step(model, tokens)[:, -1]
        assert_close(got.step(model, tokens)[:, -1], logits, TOLERANCE)
    assert_same_state(got.state, wanted.state, TOLERANCE)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def without_reuse(patch):
    patch.setattr("gru_memory.evaluation.batched.kept_prefix", lambda model, ids: None)


def test_a_batch_reads_and_answers_the_same(family, monkeypatch):
    tokenizer, model = talking_tokenizer(family), talking_model(family, sites=("top",))
    turns = [("My boat is called Marigold.", "Lovely."), ("I live in Porto.", None)]

    def run():
        reader = BatchReader(model, tokenizer, system="be kind")
        states = reader.read_all(reader.start(2), [[turns[0], turns[1]], [turns[1], turns[0]]])
        with Fed(model) as fed:
            said, states = reader.ask(states, ["What is my boat called?", "Where?"], max_new_tokens=5)
        return said, states, fed.tokens

    said, states, fewer = run()
    without_reuse(monkeypatch)
    wanted, same, all_tokens = run()
    assert said == wanted and fewer < all_tokens
    assert_same_state(states, same)


def test_the_engine_answers_as_a_conversation_does_and_runs_the_prefix_once(family):
    tokenizer, model = talking_tokenizer(family), talking_model(family, sites=("top",))
    alone, served = (Conversation(model, tokenizer, system="be kind", max_new_tokens=6) for _ in range(2))
    for turn in TURNS[:2]:
        alone.read(*turn)
    with Fed(model) as fed:
        said = [alone.say(question) for question in QUESTIONS]
    told: queue.Queue = queue.Queue()
    engine = Engine(model, tokenizer, EngineLimits(guessed_tokens=0))
    try:
        with Fed(model) as fewer:
            for number, question in enumerate(QUESTIONS):
                read = [] if number else list(TURNS[:2])
                engine.submit(Job(served, question, told.put, read=read, max_new_tokens=6))
                while not isinstance(event := told.get(timeout=60), Done | Failed):
                    pass
                assert event.reply == said[number]
    finally:
        engine.close()
    assert_same_state(served.state, alone.state)
    spared = len(served.renderer.prefix_ids)
    read_too = sum(len(served.renderer.turn(*turn).ids) for turn in TURNS[:2]) + 2 * spared
    assert (
        fed.tokens + read_too - fewer.tokens == 2 * spared
    )  # of four turns the first takes it in, and another runs it


def change_weight(model):
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)


def change_by_a_fused_optimizer(model):
    weights = list(model.model.parameters())
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    torch.optim.AdamW(weights, lr=0.1, fused=True).step()


def change_hooks(model):
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output + 1)


def change_precision(model):
    model.float()


@pytest.mark.parametrize("change", (change_weight, change_by_a_fused_optimizer, change_hooks, change_precision))
def test_a_model_that_changed_runs_it_again(change):
    model = memory_model("llama", sites=("top",))
    kept = kept_prefix(model, PREFIX)
    assert kept_prefix(model, PREFIX) is kept
    change(model)
    anew = kept_prefix(model, PREFIX)
    assert anew is not kept and kept_prefix(model, PREFIX) is anew
    fresh = kept_prefix(copy.deepcopy(model), PREFIX)
    assert all(torch.equal(a, b) for one, two in zip(anew.layers, fresh.layers) for a, b in zip(one, two))
    assert not torch.equal(anew.layers[0][0].double(), kept.layers[0][0]) or change is change_precision


def test_an_adapter_that_is_switched_on_or_off_runs_it_again():
    peft = pytest.importorskip("peft")
    model = memory_model("llama", sites=("top",))
    plain = kept_prefix(model, PREFIX)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False)
    ).eval()
    adapted = kept_prefix(model, PREFIX)
    assert not torch.allclose(adapted.layers[0][0], plain.layers[0][0])
    with wrapped.disable_adapter():
        assert torch.allclose(kept_prefix(model, PREFIX).layers[0][0], plain.layers[0][0])
    assert torch.equal(kept_prefix(model, PREFIX).layers[0][0], adapted.layers[0][0])


def test_it_is_fed_where_it_cannot_be_kept():
    assert kept_prefix(memory_model("llama"), PREFIX) is None  # what lower sites recall there depends on the state
    assert kept_prefix(memory_model("mistral, sliding", sites=("top",)), PREFIX) is None
    model = memory_model("llama", sites=("top",))
    assert kept_prefix(model, []) is None
    assert kept_prefix(model.train(), PREFIX) is None


def test_so_many_tokens_are_kept_and_the_last_used_stay(monkeypatch):
    monkeypatch.setattr("gru_memory.prefix._MOST_TOKENS", len(PREFIX) + 2)
    model = memory_model("llama", sites=("top",))
    first = kept_prefix(model, PREFIX)
    second, third = kept_prefix(model, [3]), kept_prefix(model, [4])
    assert kept_prefix(model, PREFIX) is first and kept_prefix(model, [4]) is third  # there is room for just these
    kept_prefix(model, [VOCABULARY - 1])
    assert kept_prefix(model, PREFIX) is first
    assert kept_prefix(model, [3]) is not second, "the one used longest ago was let go"
    assert kept_prefix(model, [3] * (len(PREFIX) + 3)) is None
    assert kept_prefix(model, PREFIX) is first


def test_what_is_kept_is_not_written_into():
    model = memory_model("llama", sites=("top",))
    kept = kept_prefix(model, PREFIX)
    before = [(keys.clone(), values.clone()) for keys, values in kept.layers]
    cache, mask = cache_of(model, [kept])
    assert mask.tolist() == [[1] * len(PREFIX)]
    model(input_ids=random_ids(1, 4), past_key_values=cache, use_cache=True, memory_state=model.initial_memory_state(1))
    assert cache.get_seq_length() == len(PREFIX) + 4
    assert all(torch.equal(a, b) for one, two in zip(before, kept.layers) for a, b in zip(one, two))


def test_a_state_that_waits_for_its_turn_is_another_value():
    state = MemoryState.cat([memory_model("llama", sites=("top",)).initial_memory_state(1)] * 2)
    assert turn_begun(state).pending.tolist() == [True, True] and state.pending.tolist() == [False, False]
