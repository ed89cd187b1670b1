"""The cache of hidden states says what the model says."""

import copy
import math
import random

import pytest
import torch
from families import CONFIGS
from small_training import (
    KEY_LAYERS,
    SHAPE,
    cache_of_turns,  # noqa: F401 (a fixture)
    facts_and_talk,  # noqa: F401 (a fixture)
    make_memory,
    small_model,  # noqa: F401 (a fixture)
    tokenizer_of_letters,  # noqa: F401 (a fixture)
)
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from gru_memory import MemoryConfig, add_memory, backbones
from gru_memory.rendering import TurnRenderer
from gru_memory.training.features import PREFIX, _in_range, build_feature_cache
from gru_memory.training.objective import recall
from gru_memory.training.replies import own_replies
from gru_memory.training.rows import make_batch, turn_text


@pytest.mark.parametrize("form", ({}, {"address_rank": 6, "persistent_slots": 2}))
@torch.no_grad()
def test_cached_training_row_equals_the_model_turn_by_turn(model, tokenizer, pool, build, form):
    """What training computes from the cache is what the model with that memory computes in a conversation."""
    session = pool.session(random.Random(0), 2, 2)
    batch = make_batch([session], build(pool.turns()))
    memory = make_memory(**form)
    trained, *_ = recall(memory, model.get_output_embeddings().weight, batch)
    trained = F.linear(trained, model.get_output_embeddings().weight)[0]

    config = MemoryConfig(sites=("top",), cell="mingru", key_layers=KEY_LAYERS, **SHAPE, **form)
    whole = add_memory(copy.deepcopy(model), config)
    whole.memory_sites()["top"].load_state_dict(memory.state_dict())
    renderer = TurnRenderer(tokenizer)
    state, logits = whole.initial_memory_state(1), []
    for number, turn in enumerate(session.turns):
        ids = torch.tensor([renderer.prefix_ids + renderer.turn(turn.user, turn.assistant).ids])
        seen = torch.ones_like(ids, dtype=torch.bool)
        first = 0 if number == 0 else len(renderer.prefix_ids)
        seen[:, :first] = False
        out = whole(ids, memory_state=state, memory_mask=seen, use_cache=False)
        state = out.memory_state
        logits.append(out.logits[0, first:])
    logits = torch.cat(logits)
    assert logits.shape == trained.shape
    assert state.turns.item() == len(session.turns) == batch.turn_starts.sum()
    # The cache is in float16 and training multiplies in bfloat16.
    assert (trained - logits).abs().max() < 0.03 * logits.abs().max()


def test_padding_changes_no_row(model, pool, build):
    cache = build(pool.turns())
    sessions = [pool.session(random.Random(i), 1 + 2 * i, 0) for i in range(2)]
    memory, head = make_memory(), model.get_output_embeddings().weight.detach()
    together, alone = make_batch(sessions, cache), make_batch(sessions[:1], cache)
    length = alone.tokens.shape[1]
    torch.testing.assert_close(
        recall(memory, head, together)[0][0, :length], recall(memory, head, alone)[0][0], atol=2e-2, rtol=0
    )


def test_interrupted_cache_is_finished(model, tokenizer, pool, build, tmp_path, monkeypatch):
    from gru_memory.training import features

    monkeypatch.setattr(features, "_TURNS_PER_SHARD", 7)
    texts = [PREFIX, *dict.fromkeys(turn_text(turn) for turn in pool.turns())]
    arguments = (
        tmp_path,
        model,
        backbones.before_head_of(model),
        backbones.blocks_of(model),
        TurnRenderer(tokenizer),
        texts,
    )

    def stop_after_two(done, total):
        if done >= 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_feature_cache(*arguments, KEY_LAYERS, "tiny", stop_after_two)
    shards = []
    cache = build_feature_cache(*arguments, KEY_LAYERS, "tiny", lambda done, total: shards.append(done))
    reference = build(pool.turns())
    assert len(cache) == len(texts) and shards[-1] == len(texts)
    for i in range(len(texts)):
        assert (cache.tokens(i) == reference.tokens(i)).all()
        torch.testing.assert_close(
            torch.tensor(cache.features(i)), torch.tensor(reference.features(i)), atol=5e-3, rtol=1e-2
        )


def cached(model, tokenizer, folder, key_layers=KEY_LAYERS):
    """The hidden states of one turn."""
    norm, blocks = backbones.before_head_of(model), backbones.blocks_of(model)
    texts = [PREFIX, ("My boat is called Ara.", "Noted.")]
    cache = build_feature_cache(folder, model, norm, blocks, TurnRenderer(tokenizer), texts, key_layers, "tiny")
    return torch.tensor(cache.features(1)).float()


def test_massive_activations_are_cached_as_a_memory_hears_them(model, tokenizer, tmp_path):
    loud = copy.deepcopy(model)
    kept = []
    loud.model.layers[1].register_forward_hook(lambda _m, _a, out: kept.append(out))
    loud.model.layers[1].mlp.down_proj.weight.data *= 1e9
    _, key = cached(loud, tokenizer, tmp_path / "loud").split(32, dim=1)
    wanted = kept[-1][0]
    assert wanted.abs().max() > 1e6 and key.isfinite().all()
    torch.testing.assert_close(*(F.rms_norm(x, (32,)) for x in (key, wanted)), atol=1e-3, rtol=1e-2)
    loud.model.norm.weight.data *= 1e7
    with pytest.raises(ValueError, match="final hidden states are beyond 65504"):
        cached(loud, tokenizer, tmp_path / "louder")


def test_a_layer_that_is_not_finite_is_named():
    assert _in_range(torch.ones(1, 0, 4), {3: torch.ones(1, 0, 4)}).shape == (1, 0, 8)
    with pytest.raises(ValueError, match="block 3 is not finite: choose other key_layers"):
        _in_range(torch.ones(1, 1, 4), {2: torch.ones(1, 1, 4), 3: torch.full((1, 1, 4), math.inf)})


@pytest.mark.parametrize("family", ("opt, projected", "opt, norms after", "gpt2"))
def test_hidden_states_are_those_that_enter_the_head(tokenizer, tmp_path, family):
    torch.manual_seed(0)
    config = CONFIGS[family]()
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 256
    base = AutoModelForCausalLM.from_config(config).eval()
    head, renderer = base.get_output_embeddings(), TurnRenderer(tokenizer)
    entered = []
    head.register_forward_pre_hook(lambda _m, given: entered.append(given[0]))
    states = cached(base, tokenizer, tmp_path)
    assert states.shape[1] == head.weight.shape[1] + base.config.hidden_size
    turn = renderer.turn("My boat is called Ara.", "Noted.")
    base(torch.tensor([renderer.prefix_ids + turn.ids]))
    wanted = entered[0][0, len(renderer.prefix_ids) :]
    torch.testing.assert_close(states[:, : wanted.shape[1]], wanted, atol=2e-2, rtol=1e-2)


def test_a_model_in_training_mode_is_asked_without_its_dropout(tokenizer, tmp_path):
    torch.manual_seed(0)
    config = CONFIGS["gpt2"]()
    config.vocab_size, config.n_positions, config.resid_pdrop = len(tokenizer), 256, 0.5
    base = AutoModelForCausalLM.from_config(config).train()
    base.transformer.h[0].eval()
    modes = [module.training for module in base.modules()]
    renderer, users = TurnRenderer(tokenizer), ["Where do you live?"]
    found, replies = [], []
    for _ in range(2):
        found.append(cached(base, tokenizer, tmp_path / str(len(found))))
        replies.append(own_replies(tmp_path / str(len(found)), base, renderer, users, max_new_tokens=8))
        assert [module.training for module in base.modules()] == modes
    assert torch.equal(*found) and replies[0] == replies[1]


def test_another_chat_template_has_hidden_states_and_replies_of_its_own(model, tokenizer, tmp_path):
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("m['role'] }}: ", "m['role'] }}> ")
    renderers = TurnRenderer(tokenizer), TurnRenderer(other)
    assert renderers[0].prefix_ids == renderers[1].prefix_ids != []
    norm, blocks = backbones.before_head_of(model), backbones.blocks_of(model)
    for renderer in renderers:
        texts = [PREFIX, ("My boat is called Ara.", "Noted.")]
        cache = build_feature_cache(tmp_path, model, norm, blocks, renderer, texts, KEY_LAYERS, "tiny")
        assert cache.tokens(1).tolist() == renderer.turn(*texts[1]).ids
        own_replies(tmp_path, model, renderer, ["Where do you live?"], max_new_tokens=4)
    assert len(list(tmp_path.glob("replies-*.json"))) == 2
