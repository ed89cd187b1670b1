"""A prefix that was run once gives what running it with every turn gives, wherever it is used, and not where it would not."""

import copy

import pytest
import torch
from families import CONFIGS, VOCABULARY
from talking import FAMILIES, talking_model, talking_tokenizer
from tiny import assert_close, assert_same_state, memory_model, random_ids

from gru_memory import Conversation, MemoryState
from gru_memory.cache import keeps_every_token
from gru_memory.evaluation.batched import BatchReader
from gru_memory.prefix import _PER_MODEL, cache_of, is_plain, kept_prefix, turn_begun
from gru_memory.server.rows import prefill

PREFIX = random_ids(1, 7, seed=5)[0].tolist()
TURNS = [("My boat is called Marigold.", "Lovely."), ("I live in Porto.", None), ("What is two and two?", "Four.")]
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
    return {"input_ids": torch.tensor([prefix + ids]), "attention_mask": torch.ones_like(mask).long(), "memory_mask": mask}


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


def conversation_of(family, **settings):
    tokenizer = talking_tokenizer(family)
    return Conversation(
        talking_model(family, sites=("top",)), tokenizer, system="be kind", max_new_tokens=6, **settings
    )


def without_reuse(patch):
    for module in ("conversation", "evaluation.batched"):
        patch.setattr(f"gru_memory.{module}.kept_prefix", lambda model, ids: None)


@pytest.mark.parametrize("context_turns", (1, 2))
@pytest.mark.parametrize("options", ({}, {"do_sample": True, "top_k": 5, "repetition_penalty": 1.5}, {"num_beams": 2}))
def test_a_conversation_says_and_remembers_the_same_and_runs_the_prefix_once(
    family, context_turns, options, monkeypatch
):
    def talk(conversation):
        torch.manual_seed(0)
        with Fed(conversation.model) as fed:
            for turn in TURNS:
                conversation.read(*turn)
            said = [
                conversation.say(question, **options) for question in ("Where do I live?", "What is my boat called?")
            ]
        return said, fed.tokens

    reusing, feeding = (
        conversation_of(family, context_turns=context_turns),
        conversation_of(family, context_turns=context_turns),
    )
    said, fewer = talk(reusing)
    without_reuse(monkeypatch)
    wanted, all_tokens = talk(feeding)
    assert said == wanted
    assert_same_state(reusing.state, feeding.state)
    # Two turns of reading and two of saying spare it, the second run of it was in the first of them; beams feed it.
    times = 2 if options.get("num_beams") else 4
    assert all_tokens - fewer == (times - 1) * len(reusing.renderer.prefix_ids)


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


def test_a_conversation_with_another_system_prompt_sees_that_one(family):
    conversation = conversation_of(family)
    for turn in TURNS:
        conversation.read(*turn)
    other = Conversation(conversation.model, conversation.tokenizer, system="be rude, and short", max_new_tokens=6)
    other.load(conversation.to_bytes())
    other.state = conversation.state
    other.use_system("be rude, and short")
    inputs = other.prompt("Where do I live?", 6)
    output = other.model.generate(
        **inputs,
        memory_state=other.state,
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        pad_token_id=1,
    )
    other.say("Where do I live?")
    assert_same_state(other.state, output.memory_state)


def change_weight(model):
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)


def change_hooks(model):
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output + 1)


def change_precision(model):
    model.float()


@pytest.mark.parametrize("change", (change_weight, change_hooks, change_precision))
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


def test_few_prefixes_are_kept_and_the_last_used_stay():
    model = memory_model("llama", sites=("top",))
    first = kept_prefix(model, PREFIX)
    for token in range(3, 3 + _PER_MODEL - 1):
        kept_prefix(model, [token])
    assert kept_prefix(model, PREFIX) is first
    kept_prefix(model, [VOCABULARY - 1])
    assert kept_prefix(model, PREFIX) is first
    for token in range(3, 3 + _PER_MODEL):
        kept_prefix(model, [token])
    assert kept_prefix(model, PREFIX) is not first


def test_what_is_kept_is_not_written_into():
    model = memory_model("llama", sites=("top",))
    kept = kept_prefix(model, PREFIX)
    before = [(keys.clone(), values.clone()) for keys, values in kept.layers]
    cache, mask = cache_of(model, [kept])
    assert mask.tolist() == [[1] * len(PREFIX)]
    model(input_ids=random_ids(1, 4), past_key_values=cache, use_cache=True, memory_state=model.initial_memory_state(1))
    assert cache.get_seq_length() == len(PREFIX) + 4
    assert all(torch.equal(a, b) for one, two in zip(before, kept.layers) for a, b in zip(one, two))


@pytest.mark.parametrize(
    ("options", "plain"),
    (
        ({"max_new_tokens": 3, "do_sample": True, "top_p": 0.9, "num_beams": 1}, True),
        ({"num_beams": 2}, False),
        ({"use_cache": False}, False),
        ({"prompt_lookup_num_tokens": 3}, False),
        ({"cache_implementation": "static"}, False),
        ({"generation_config": object()}, False),
    ),
)
def test_options_that_decode_in_another_way_get_the_whole_prompt(options, plain):
    model = memory_model("llama", sites=("top",))
    assert is_plain(model.generation_config, options) == plain
    if plain:
        model.generation_config.cache_implementation = "static"
        assert not is_plain(model.generation_config, options)


def test_a_state_that_waits_for_its_turn_is_another_value():
    state = MemoryState.cat([memory_model("llama", sites=("top",)).initial_memory_state(1)] * 2)
    assert turn_begun(state).pending.tolist() == [True, True] and state.pending.tolist() == [False, False]
