"""Training on cached hidden states: the cache says what the model says, and a run can be stopped anywhere."""

import copy
import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from families import CONFIGS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import gru_memory.training.alignment
import gru_memory.training.calibration
from gru_memory import MemoryConfig, add_memory, backbones
from gru_memory.data.facts import UNTOLD, FactGenerator, FactPool
from gru_memory.data.sessions import Mark, Session, Turn, write_jsonl
from gru_memory.memory import GRUMemoryWithDecay
from gru_memory.rendering import TurnRenderer
from gru_memory.scan import ScanInputs
from gru_memory.training.alignment import (
    Views,
    collect,
    fit_addresses,
    fit_read_gates,
    fit_strengths,
    fit_trust,
    fit_values,
)
from gru_memory.training.calibration import calibrate
from gru_memory.training.features import PREFIX, _in_range, build_feature_cache
from gru_memory.training.objective import (
    _ROUNDED,
    _rounded,
    address_loss,
    compute_loss,
    likeliest,
    logits_of,
    read,
    recall,
    speech_loss,
    write_loss,
)
from gru_memory.training.replies import own_replies
from gru_memory.training.rows import Batch, make_batch, turn_text
from gru_memory.training.run import FilePool, _alone, book_pages, conversation_memory
from gru_memory.training.trainer import MemoryTrainer, TrainingConfig

TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<s>system: be kind</s>\n{% endif %}"
    "<s>{{ m['role'] }}: {{ m['content'] }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
KEY_LAYERS = (1,)


@pytest.fixture(scope="module")
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    fast = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=TEMPLATE
    )


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def pool():
    short = FactGenerator(0, corrected=0.3, accept=lambda value: len(value) < 12)
    return FactPool(short, num_facts=12, num_talk=6, tells=1, asks=1)


@pytest.fixture(scope="module")
def build(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")

    def build(turns):
        texts = [PREFIX, *dict.fromkeys(turn_text(turn) for turn in turns)]
        norm, blocks = backbones.before_head_of(model), backbones.blocks_of(model)
        return build_feature_cache(folder, model, norm, blocks, TurnRenderer(tokenizer), texts, KEY_LAYERS, "tiny")

    return build


SHAPE = {"num_heads": 2, "num_slots": 4, "slot_size": 8, "decay": 0.9, "decay_every": "turn"}


def make_memory(gate=2.0, cell="mingru", **form):
    torch.manual_seed(1)
    return GRUMemoryWithDecay(32, **SHAPE, cell=cell, gate_init=gate, key_size=32 * len(KEY_LAYERS), **form)


@pytest.mark.parametrize("form", ({}, {"address_rank": 6, "persistent_slots": 2}))
@torch.no_grad()
def test_cached_training_row_equals_the_model_turn_by_turn(model, tokenizer, pool, build, form):
    """What training computes from the cache is what the model with that memory computes in a conversation."""
    session = pool.session(random.Random(0), 2, 2)
    batch = make_batch([session], build(pool.turns()))
    memory = make_memory(**form)
    trained, *_ = recall(memory, model.get_output_embeddings().weight, batch)
    trained = F.linear(trained, model.get_output_embeddings().weight)[0]

    import copy

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


def test_labels_are_the_reply_and_nothing_else(tokenizer, pool, build):
    session = pool.session(random.Random(1), 2, 1)
    batch = make_batch([session], build(pool.turns()))
    taught = batch.labels[batch.labels >= 0]
    replies = [turn.assistant for turn in session.turns if turn.learn == "answer"]
    assert tokenizer.decode(taught) == "</s>".join(replies) + "</s>"
    position = (batch.labels[0] >= 0).nonzero()[0].item()
    assert batch.labels[0, position] == batch.tokens[0, position + 1]


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


def run(memory, model, pool, cache, folder, steps, **settings):
    log = []
    config = TrainingConfig(
        steps=steps, rows=3, validate_every=4, warmup_steps=2, curriculum_steps=4, max_facts=3, **settings
    )
    batch = make_batch([pool.session(random.Random(9), 2, 0)], cache)
    head = model.get_output_embeddings().weight.detach()
    trainer = MemoryTrainer(memory, head, pool, cache, {"seen": [batch]}, config, folder, log.append)
    trainer.train()
    return [entry["answer_loss"] for entry in log if "step" in entry]


@pytest.mark.parametrize("older", [False, True])
def test_resumed_run_has_the_curve_of_an_uninterrupted_one(model, pool, build, tmp_path, monkeypatch, older):
    cache = build(pool.turns())
    straight = run(make_memory(), model, pool, cache, tmp_path / "a", 8)

    calls = []

    def stop(self):
        original(self)
        calls.append(self.step)
        raise KeyboardInterrupt

    original = MemoryTrainer._checkpoint
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MemoryTrainer, "_checkpoint", stop)
        run(make_memory(), model, pool, cache, tmp_path / "b", 8)
    assert calls == [4]
    if older:  # gates were numbers, shape ()
        with safe_open(tmp_path / "b" / "last.safetensors", "pt") as file:
            metadata = file.metadata()
        tensors = load_file(tmp_path / "b" / "last.safetensors")
        gate = [name for name, _ in make_memory().named_parameters()].index("gate")
        for name in ("memory.gate", f"optimizer.exp_avg.{gate}", f"optimizer.exp_avg_sq.{gate}"):
            tensors[name] = tensors[name].reshape(())
        save_file(tensors, tmp_path / "b" / "last.safetensors", metadata)
    resumed = run(make_memory(gate=7.0), model, pool, cache, tmp_path / "b", 8)  # its own weights are replaced
    assert len(straight) == 8
    assert resumed == pytest.approx(straight[4:], rel=1e-4)
    with pytest.raises(ValueError, match="rows"):
        trainer_config = TrainingConfig(steps=8, rows=99)
        MemoryTrainer(make_memory(), torch.zeros(1, 1), pool, cache, {}, trainer_config, tmp_path / "b").train()


@pytest.mark.parametrize("by_replies", [False, True])
def test_training_ends_with_the_last_checkpoint_or_the_one_with_most_whole_replies(
    model, pool, build, tmp_path, monkeypatch, by_replies
):
    scores = iter([{"seen": 0.9, "seen_replies": 0.8}, {"seen": 0.5, "seen_replies": 0.1}])
    monkeypatch.setattr(MemoryTrainer, "validate", lambda self: next(scores))
    cache, config = build(pool.turns()), TrainingConfig(steps=2, rows=2, validate_every=1, warmup_steps=1, max_facts=2)
    batch = make_batch([pool.session(random.Random(9), 2, 0)], cache)
    head = model.get_output_embeddings().weight.detach()
    trainer = MemoryTrainer(make_memory(), head, pool, cache, {"seen": [batch]}, config, tmp_path, None, by_replies)
    (tmp_path / "best.safetensors").write_text("of another run, which counts for nothing")
    assert trainer.train() == (0.8 if by_replies else 0.5)
    last = {k.removeprefix("memory."): v for k, v in load_file(tmp_path / "last.safetensors").items()}
    same = all(torch.equal(v, last[k]) for k, v in trainer.memory.state_dict().items())
    assert same == (not by_replies)


@pytest.mark.parametrize("mode", (False, True))
def test_it_is_trained_in_training_mode_and_judged_as_it_will_be_used(model, pool, build, tmp_path, monkeypatch, mode):
    """What `persistent_floor` leaves out is heard while it learns, and in nothing that is decided about it."""
    memory = make_memory(address_rank=12, signature_size=3, persistent_slots=2, persistent_floor=0.4).train(mode)
    modes = []

    def spy(memory, *arguments, **settings):
        modes.append((torch.is_grad_enabled(), memory.training))
        return compute_loss(memory, *arguments, **settings)

    monkeypatch.setattr("gru_memory.training.trainer.compute_loss", spy)
    run(memory, model, pool, build(pool.turns()), tmp_path, 4)
    assert set(modes) == {(True, True), (False, False)}
    assert memory.training is mode
    batch = make_batch([pool.session(random.Random(0), 2, 1)], build(pool.turns()))
    modes.clear()
    monkeypatch.setattr(
        "gru_memory.training.calibration.read", lambda memory, *a: modes.append(memory.training) or read(memory, *a)
    )
    calibrate(memory, model.get_output_embeddings().weight.detach(), [batch])
    assert modes == [False] and memory.training is mode


@pytest.mark.parametrize(("cell", "steps"), [("mingru", 60), ("gru", 25)])
def test_training_learns(model, pool, build, tmp_path, cell, steps):
    memory = make_memory(gate=20.0, cell=cell)
    losses = run(
        memory,
        model,
        pool,
        build(pool.turns()),
        tmp_path,
        steps,
        learning_rate=3e-2,
        base_weight=0.0,
        speech_weight=0.0,
    )
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])


def test_base_term_is_zero_for_a_silent_memory_and_positive_for_a_loud_one(model, pool, build):
    talk = [Session((turn,)) for turn in pool.talk[:3]]
    batch = make_batch([*talk, pool.session(random.Random(0), 1, 0)], build(pool.turns()))
    head = model.get_output_embeddings().weight.detach()
    silent = compute_loss(make_memory(gate=0.0), head, batch, torch.Generator().manual_seed(0))
    loud = compute_loss(make_memory(gate=50.0), head, batch, torch.Generator().manual_seed(0))
    assert silent.base_kl == pytest.approx(0.0, abs=1e-6)
    assert loud.base_kl > 1e-3


def test_a_question_that_reads_where_its_answer_was_written_costs_nothing(pool, build):
    batch = make_batch([pool.session(random.Random(3), 2, 1)], build(pool.turns()))
    rows, length = batch.tokens.shape
    assert set(batch.asked[batch.asked > 0].tolist()) <= set(batch.told[batch.told > 0].tolist())
    slots = int(batch.told.max()) + 1  # a slot of its own for every told token; slot 0 for the rest
    write = F.one_hot(batch.told, slots).float().unsqueeze(2) * (batch.told > 0)[..., None, None]
    query = F.one_hot(batch.asked, slots).float().unsqueeze(2)
    right = ScanInputs(torch.zeros(rows, length, 1, 4), write, write, torch.ones_like(write), query)
    assert address_loss(right, batch).item() == pytest.approx(0.0, abs=1e-5)
    assert write_loss(write.sum(-1), batch).item() == pytest.approx(0.0, abs=1e-4)
    wrong = right._replace(query=query.roll(1, dims=-1))
    assert address_loss(wrong, batch).item() > 1


def test_strengths_are_judged_as_shares_of_the_greatest(model, pool, build):
    head = model.get_output_embeddings().weight.detach()
    batch = make_batch([pool.session(random.Random(3), 2, 1)], build(pool.turns()))
    whole, part = (
        compute_loss(make_memory(max_strength=most), head, batch, torch.Generator().manual_seed(0)).write_loss
        for most in (1.0, 0.5)
    )
    assert part == pytest.approx(whole, rel=1e-4)


def test_tokens_of_values_have_to_be_ahead_by_the_margin(model, pool, build):
    """The loss with a margin is that of logits from which it was taken where a value is asked for, a reply says that none was
    told, or begins, and nowhere else."""
    head = model.get_output_embeddings().weight.detach()
    batch = make_batch([pool.session(random.Random(3), 2, 1)], build(pool.turns()))
    batch.base[:] = False
    batch.unknown[0, ((batch.labels[0] >= 0) & (batch.asked[0] == 0)).nonzero()[:2]] = True
    memory, everything = make_memory(), 40 * len(head)
    plain, ahead = (
        compute_loss(memory, head, batch, torch.Generator().manual_seed(0), negatives=everything, margin=margin)
        for margin in (0.0, 2.0)
    )
    taught = batch.labels >= 0
    with torch.no_grad():
        logits = logits_of(recall(memory, head, batch)[0][taught], head)
    labels, value = batch.labels[taught], (batch.asked > 0) | batch.unknown
    opens = first_tokens(batch)
    assert batch.unknown[taught].sum() == 2 and not (value | opens)[taught].all() and (opens & ~value).any()
    value = (value | opens)[taught]
    assert plain.answer_loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-3)
    logits[value, labels[value]] -= 2.0
    assert ahead.answer_loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-3)
    assert ahead.correct == plain.correct


def first_tokens(batch):
    """(R, T) where the first token of each reply is to come."""
    opens = torch.zeros_like(batch.mask)
    for row, labels in enumerate((batch.labels >= 0).tolist()):
        for place, here in enumerate(labels):
            opens[row, place] = here and not (place and labels[place - 1])
    return opens


def test_the_first_token_of_a_reply_counts_as_often_as_said(model, pool, build):
    head = model.get_output_embeddings().weight.detach()
    batch = make_batch([pool.session(random.Random(3), 2, 1) for _ in range(2)], build(pool.turns()))
    memory, everything = make_memory(), 40 * len(head)
    one, five = (
        compute_loss(
            memory, head, batch, torch.Generator().manual_seed(0), negatives=everything, opening_weight=often
        ).answer_loss
        for often in (1.0, 5.0)
    )
    taught, opens = batch.labels >= 0, first_tokens(batch)
    assert opens.sum() == 4
    with torch.no_grad():
        logits = logits_of(recall(memory, head, batch)[0][taught], head)
    losses, opens = F.cross_entropy(logits, batch.labels[taught], reduction="none"), opens[taught]
    assert one == pytest.approx(losses.mean().item(), rel=1e-3)
    wanted = (losses.sum() + 4 * losses[opens].sum()) / (len(losses) + 4 * opens.sum())
    assert five == pytest.approx(wanted.item(), rel=1e-3)
    assert abs(five - one) > 1e-2


@pytest.mark.parametrize("size", (20, 16 * 32, 16 * 32 + 40, 3001))
def test_the_likeliest_tokens_are_those_of_the_largest_logits(size):
    head = torch.randn(size, 8).to(torch.bfloat16)
    states = torch.randn(5, 8)
    logits = head @ states.to(torch.bfloat16).t()
    found = likeliest(head, states, 16)
    assert found.shape == (5, 16) and all(len(row.unique()) == 16 for row in found)
    assert torch.equal(logits.t().gather(1, found), logits.t().topk(16, dim=1).values)  # equal logits in any order


def test_rounded_embeddings_follow_those_they_are_of():
    head = torch.randn(7, 4)
    first = _rounded(head)
    assert first.dtype == torch.bfloat16 and _rounded(head) is first
    with torch.no_grad():
        head.mul_(2)
    assert torch.equal(_rounded(head), head.to(torch.bfloat16))
    number = len(_ROUNDED)
    del head
    assert len(_ROUNDED) == number - 1


def test_memory_is_to_speak_at_values_asked_for_and_nowhere_else(model, pool, build):
    batch = make_batch([pool.session(random.Random(3), 2, 1)], build(pool.turns()))
    value = (batch.asked > 0) & (batch.labels >= 0)
    silent = (batch.base | (batch.labels >= 0)) & ~value
    assert (silent & batch.base).any() and (silent & ~batch.base).any()
    memory = make_memory(address_rank=12, signature_size=3)
    memory.gate.data.fill_(3.0)
    prepared, reads = read(memory, model.get_output_embeddings().weight.detach(), batch)

    def loss(gates, trust):
        """Of read gates (R, T) in the first head, closed in the second, where every head is trusted so much."""
        memory.trust.data.copy_(torch.tensor([0.0, 0.0, math.log(trust / (1 - trust))]))
        first = F.one_hot(torch.zeros_like(gates, dtype=torch.long), memory.num_heads) * gates.unsqueeze(-1)
        return speech_loss(memory, prepared._replace(opened=first), reads, batch).item()

    where = value.float()
    assert loss(where, 1 - 1e-7) == pytest.approx(0.0, abs=1e-3)
    assert loss(where, 0.5) == pytest.approx(math.log(2), rel=1e-3)  # asked for, and half trusted
    babbling = loss(where + 0.5 * silent, 1 - 1e-7)
    assert babbling == pytest.approx(math.log(2) * (silent.sum() / value.sum()).item(), rel=1e-3)
    other = ~value & ~silent & batch.mask
    assert other.any() and loss(where + 0.5 * other, 0.5) == pytest.approx(math.log(2), rel=1e-3)
    batch.stands_for[silent] = 3.0
    assert loss(where + 0.5 * silent, 1 - 1e-7) == pytest.approx(3 * babbling, rel=1e-3)


def test_a_shut_gate_and_a_batch_with_nothing_to_learn_have_finite_losses(model, pool, build):
    batch, cache = make_batch([pool.session(random.Random(3), 2, 1)], build(pool.turns())), build(pool.turns())
    talk = make_batch([Session((pool.talk[0],))], cache)
    assert (batch.labels >= 0).any() and not (talk.labels >= 0).any()
    head, generator = model.get_output_embeddings().weight.detach(), torch.Generator().manual_seed(0)
    losses = []
    for gate in (0.0, 2.0):
        memory = make_memory(gate=gate, address_rank=12, signature_size=3)
        prepared, reads = read(memory, head, batch)
        losses.append(speech_loss(memory, prepared, reads, batch).item())
        for given in (batch, talk):
            outcome = compute_loss(memory, head, given, generator, speech_weight=1.0)
            outcome.loss.backward()
            assert outcome.loss.isfinite() and math.isfinite(outcome.correct)
            assert all(weight.grad.isfinite().all() for weight in memory.parameters() if weight.grad is not None)
        assert (outcome.answer_loss, outcome.correct, outcome.right_answers, outcome.right_values) == (0, 0, 0, 0)
    assert losses[0] == pytest.approx(losses[1])


def test_gates_and_trust_learn_when_to_speak_and_keys_do_not(model, pool, build):
    batch = make_batch([pool.session(random.Random(3), 2, 1)], build(pool.turns()))
    memory = make_memory(address_rank=12, signature_size=3)
    prepared, reads = read(memory, model.get_output_embeddings().weight.detach(), batch)
    speech_loss(memory, prepared, reads, batch).backward()
    taught = {name for name, weight in memory.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert taught == {"trust", "read_gate.weight", "read_gate.bias"}


def test_what_is_told_of_a_value_ends_with_the_token_after_it(tokenizer, pool, build):
    turns = pool.facts[0]
    batch = make_batch([Session((turns.tells[0], turns.asks[0]))], build(pool.turns()))
    value = turns.fact.old_value or turns.fact.value
    told = batch.tokens[batch.told > 0]
    assert tokenizer.decode(told[:-1]) == f" {value}"
    if not turns.fact.old_value:  # then the same value is asked for, and the reply goes on with a full stop
        asked = batch.labels[batch.asked > 0]
        assert tokenizer.decode(asked) == f" {value}."
        assert batch.asked[batch.asked > 0].tolist() == batch.told[batch.told > 0].tolist()


def test_a_space_of_its_own_before_a_value_is_told_and_asked_for(tokenizer, build):
    """Tokenizers that take digits one by one begin " 46" with it, and a value in quotes has none."""
    after, quoted = (
        Turn(text, "Noted.", kind="tell", value="46", fact="f1") for text in ("My number is 46.", 'My number is "46".')
    )
    ask = Turn("What is my number?", "It's 46.", learn="answer", kind="ask", value="46", fact="f1")
    cache = build([after, quoted, ask])
    for tell, wanted in ((after, " 46"), (quoted, "46")):
        batch = make_batch([Session((tell, ask))], cache)
        told, asked = (numbers[numbers > 0].tolist() for numbers in (batch.told, batch.asked))
        assert tokenizer.decode(batch.tokens[batch.told > 0][:-1]) == wanted
        assert tokenizer.decode(batch.labels[batch.asked > 0]) == " 46."
        assert asked[-3:] == told[-3:]  # 4, 6 and what ends it are the same tokens, space or not
        assert (asked[0] == told[0]) == (tell is after)


def test_thinned_rows_keep_what_is_told_and_answered(pool, build):
    sessions = [pool.session(random.Random(i), 2, 3, shuffle=False) for i in range(3)]
    cache = build(pool.turns())
    whole, thin = make_batch(sessions, cache), make_batch(sessions, cache, keep=0.1, rng=random.Random(0))
    assert thin.num_tokens < 0.8 * whole.num_tokens
    for row in range(3):
        for name in ("told", "asked"):
            for column in ("tokens", "labels", "fact", "value", "asked_fact", "asked_value", name):
                before, after = (getattr(b, column)[row][getattr(b, name)[row] > 0] for b in (whole, thin))
                assert torch.equal(before, after)
        assert int(whole.turn_starts[row].sum()) == int(thin.turn_starts[row].sum())
        # A key comes from the position before: that one has to be there as well.
        position = (thin.told[row] > 0).nonzero().flatten()
        there = (whole.told[row] > 0).nonzero().flatten()
        assert torch.equal(thin.features[row, position - 1], whole.features[row, there - 1])
    assert make_batch(sessions, cache, keep=1.0).num_tokens == whole.num_tokens


def test_address_loss_is_its_definition(pool, build):
    batch = make_batch([pool.session(random.Random(i), 3, 1) for i in range(3)], build(pool.turns()))
    generator = torch.Generator().manual_seed(0)
    shape = (*batch.tokens.shape, 2, 5)
    address, query = (torch.randn(shape, generator=generator).softmax(-1) for _ in range(2))
    write = address * torch.rand(*shape[:3], 1, generator=generator) * batch.mask[..., None, None]
    losses = []
    for r, t in (batch.asked > 0).nonzero().tolist():
        right = whole = 0.0
        for u in range(t):
            outdated = (
                batch.told[r, u] > 0
                and batch.fact[r, u] == batch.asked_fact[r, t]
                and batch.value[r, u] != batch.asked_value[r, t]
            )
            share = float((query[r, t] * write[r, u]).sum())
            whole += 0.0 if outdated else share
            right += share if batch.told[r, u] == batch.asked[r, t] else 0.0
        if any(batch.told[r, u] == batch.asked[r, t] for u in range(t)):
            losses.append(-math.log(right / whole))
    inputs = ScanInputs(torch.zeros(*shape[:3], 4), address, write, torch.ones(shape), query)
    assert address_loss(inputs, batch).item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_alignment_finds_what_was_told_without_a_step_of_training(model, pool, build):
    """Keys of two views that agree but for noise and a rotation: after the fit most reads fall on the right token."""
    torch.manual_seed(0)
    memory = make_memory(address_rank=12)
    width, count = memory.key_rank.in_features, 4000
    hidden = torch.randn(count, 12)
    told = hidden @ torch.randn(12, width) + 0.3 * torch.randn(count, width) + 3
    asked = hidden @ torch.randn(12, width) + 0.3 * torch.randn(count, width) - 1
    telling, asking = torch.rand(count) < 0.2, torch.rand(count) < 0.1
    own, before = torch.randn(count, width), torch.randn(count, width)
    own[:, 0] += 6 * telling
    own[:, 1] += 6 * asking
    views = Views(told, asked, torch.zeros(count, dtype=torch.bool), before, own, telling, ~telling, asking)

    def read_where_written():
        key, query = F.rms_norm(memory.key_rank(told), (12,)), F.rms_norm(memory.query_rank(asked), (12,))
        address, read = (x.unflatten(-1, (2, 4)).softmax(-1) for x in (memory.key(key), memory.key(query)))
        return (address * read).sum(-1).mean().item()

    assert read_where_written() < 0.4
    correlations = fit_addresses(memory, views)
    assert correlations.shape == (12,) and (correlations[:-1] >= correlations[1:]).all()
    assert read_where_written() > 0.75
    assert fit_strengths(memory, torch.empty(0), views) < 0.1 and fit_read_gates(memory, views) < 0.1
    strength = memory.strength_key(before) + memory.strength_embed(own)
    assert ((strength > 0) == telling[:, None]).float().mean() > 0.98
    assert ((memory.read_gate(own) > 0) == asking[:, None]).float().mean() > 0.98

    sessions = [pool.session(random.Random(i), 2, 1) for i in range(4)]
    batch = make_batch(sessions, build(pool.turns()))
    views = collect(memory, model.get_output_embeddings().weight.detach(), [batch])
    assert len(views.told) == len(views.asked) == len(views.first) == int((batch.asked > 0).sum())
    assert (views.written == views.wanted).float().mean() > 0.9  # facts are written at their own tokens
    asking = sum(turn.learn == "answer" for session in sessions for turn in session.turns)
    assert int(views.first.sum()) == 2 * asking  # the space before a value, and what comes after it
    assert int(views.telling.sum()) == int((batch.told > 0).sum())
    assert len(views.own) == len(views.before) == batch.num_tokens and not views.before[0].any()  # the first one, too
    with pytest.raises(ValueError, match="nothing to align"):
        talk = make_batch([Session((pool.talk[0],))], build(pool.turns()))
        collect(memory, model.get_output_embeddings().weight.detach(), [talk])
    with pytest.raises(ValueError, match="address_rank"):
        fit_addresses(make_memory(), views)


def test_a_value_written_elsewhere_is_read_off_the_hidden_state(model):
    """At token 7 one of four words is wanted, which the hidden state knows; at the words themselves nothing is added."""
    torch.manual_seed(0)
    head, memory = model.get_output_embeddings().weight.detach().float(), make_memory(address_rank=12)
    wanted = torch.randint(20, 24, (600,))
    elsewhere = torch.rand(600) < 0.5
    hidden = F.rms_norm(torch.randn(8, 32)[wanted - 20 + 4 * elsewhere], (32,))
    nothing = torch.zeros(0)
    views = Views(*(nothing,) * 10, hidden, torch.where(elsewhere, 7, wanted), wanted)
    normed = F.rms_norm(head, head.shape[-1:])

    def error() -> torch.Tensor:
        value = memory.value_embed(normed[views.written]) + memory.value_hidden(hidden)
        return (value - memory.value_embed(normed[wanted])).pow(2).sum(-1).sqrt()

    before = error()
    assert before[elsewhere].min() > 0.1 and before[~elsewhere].max() < 1e-5
    fit_values(memory, views, head)
    assert error().max() < 0.1 * before[elsewhere].mean()


def test_a_reply_may_ask_and_tell(build, tokenizer):
    """What is asked for is found where the reply says it first, what is told where the turn says it last."""
    asks, tells = (Mark("old", "Rex"),), (Mark("new", "Max"), Mark("way", "Rex"))
    turn = Turn("Rex, not Max!", "Rex left, Max came for Rex.", learn="answer", kind="tell", more=asks, notes=tells)
    session = Session((turn,))
    assert Session.from_json(json.loads(json.dumps(session.to_json()))) == session
    batch = make_batch([session], build([turn]))
    text = tokenizer.decode(batch.tokens[0])  # a token a letter, but for <s> and </s>
    letters = list(text.replace("<s>", "[").replace("</s>", "]"))

    def marked(column):
        return "".join(letters[i] for i in column[0].nonzero().flatten().tolist())

    assert marked(batch.told) == " Max  Rex." and marked(batch.asked) == " Rex"  # asked: the positions before "Rex "
    reply = "".join(letters).index("Rex left")
    assert batch.asked[0].nonzero()[0].item() == reply - 1
    assert batch.fact[0].unique().numel() == 3 and batch.asked_fact[0].unique().numel() == 2
    assert not batch.unknown.any()


def test_outdated_values_do_not_count(build, pool):
    corrected = next(turns for turns in pool.facts if turns.corrections)
    session = Session((corrected.tells[0], corrected.corrections[0], corrected.asks[0]))
    batch = make_batch([session], build(pool.turns()))
    everywhere = torch.ones(1, batch.tokens.shape[1], 1, 1)
    told = (batch.told > 0).float()[..., None, None]
    inputs = ScanInputs(everywhere, everywhere, told, everywhere, everywhere)
    value = batch.asked_value[batch.asked > 0][0]
    tokens = int(((batch.value == value) & (batch.told > 0)).sum())
    # Every told token of the new value is read alike, none of the old one's: one in `tokens` is right.
    assert address_loss(inputs, batch).item() == pytest.approx(math.log(tokens), rel=1e-4)


def test_sessions_of_a_file(tmp_path):
    path = tmp_path / "sessions.jsonl"
    ask = Turn("What is it?", "It is red.", learn="answer", kind="ask", value="red", fact="it")
    sessions = [
        Session(
            (
                Turn("It is red.", kind="tell", value="red", fact="it"),
                Turn(None, "A page of a book.", learn="base"),
                ask,
            )
        )
    ]
    write_jsonl(path, sessions)
    assert json.loads(path.read_text())["messages"][1]["role"] == "text"
    assert FilePool(path).session(random.Random(0), 1, 0) == sessions[0]
    write_jsonl(path, [Session((Turn("Hello."),))])
    with pytest.raises(ValueError, match="nothing to learn"):
        FilePool(path)
    write_jsonl(path, [Session((Turn("A.", kind="tell"), Turn("B?", "C.", learn="answer")))])
    with pytest.raises(ValueError, match='give "value" and "fact"'):
        FilePool(path)


def test_the_session_in_the_documents_can_be_trained_on(repository, tmp_path):
    text = (repository / "docs" / "training.md").read_text()
    example = json.loads(text[text.index("```json") + 7 :].partition("```")[0])
    (tmp_path / "one.jsonl").write_text(json.dumps(example))
    (session,) = FilePool(tmp_path / "one.jsonl").sessions
    assert [turn.learn for turn in session.turns] == [None, "base", "answer"]


def test_pages_come_from_the_books(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 5000)
    pages = book_pages(tmp_path, 5, random.Random(0))
    assert len(pages) == 5 and all(100 < len(page) <= 1500 for page in pages)
    with pytest.raises(FileNotFoundError, match=r"\.txt"):
        book_pages(tmp_path / "nothing", 1, random.Random(0))


def test_trust_begins_where_signatures_tell_what_was_found_from_what_was_not(build):
    """Two things told under keys of their own; one is asked for by its key, then something nobody told."""
    torch.manual_seed(0)
    memory = GRUMemoryWithDecay(
        32,
        num_heads=8,
        num_slots=32,
        slot_size=8,
        cell="mingru",
        decay=1.0,
        gate_init=1.0,
        address_rank=12,
        signature_size=4,
    )
    rows, length = 24, 6
    features = torch.randn(rows, length, 32)  # told: 1 under the key of 0, 3 under that of 2
    features[:, 4] = features[:, 0]  # asked for the first; position 5 asks for what nobody told
    batch = Batch(
        **{name: torch.zeros(rows, length, dtype=torch.bool) for name in ("turn_starts", "base", "begins", "unknown")},
        **{
            name: torch.zeros(rows, length, dtype=torch.long)
            for name in ("tokens", "told", "asked", "fact", "value", "asked_fact", "asked_value")
        },
        labels=torch.full((rows, length), -100),
        features=features,
        mask=torch.ones(rows, length, dtype=torch.bool),
        stands_for=torch.ones(rows, length),
    )
    batch.told[:, 1], batch.told[:, 3], batch.asked[:, 4], batch.unknown[:, 5] = 1, 2, 1, True
    head = torch.randn(4, 32)
    assert 0 < fit_trust(memory, head, [batch]) < 0.4  # a coin is worth 0.69 nats
    assert memory.trust[0] > 0 and torch.isfinite(memory.trust).all()
    batch.asked[:], batch.unknown[:] = 0, False
    with pytest.raises(ValueError, match="nothing to fit trust"):
        fit_trust(memory, head, [batch])


def test_a_memory_that_is_never_asked_for_something_untold_has_nothing_to_doubt(build, model):
    pool = FactPool(FactGenerator(0), 12, 4, 1, 1, num_untold=6)
    cache, head = build(pool.turns()), model.get_output_embeddings().weight.detach()
    memory = make_memory(address_rank=12, signature_size=3, addressing="content")
    batches = [
        make_batch([pool.session(random.Random(i), 2, 1, num_untold=untold) for i in range(4)], cache)
        for untold in (0, 2)
    ]
    assert [bool(batch.unknown.any()) for batch in batches] == [False, True]
    fit_trust(memory, head, batches[:1])
    assert memory.trust.tolist() == [0.0, 0.0, 4.0]
    fit_trust(memory, head, batches)
    assert memory.trust[0] != 0

    # Where its read gate is closed nothing is read, so nothing there calls for doubt.
    def trusted():
        fit_trust(memory, head, batches)
        return memory.trust[2] + memory.trust[0] + memory.trust[1]  # of what agrees in full

    doubting = trusted()
    memory.read_gate.bias.data.fill_(-20.0)
    assert trusted() > doubting + 0.25


def test_calibration_makes_answers_right_and_leaves_talk_alone(build, model):
    """Nothing is made worse; answers count for more than replies that say that nothing was told, and so does silence."""
    pool = FactPool(FactGenerator(0), 12, 4, 1, 1, num_untold=6)
    cache, head = build(pool.turns()), model.get_output_embeddings().weight.detach()
    batch = make_batch([pool.session(random.Random(0), 2, 1, num_untold=1) for _ in range(4)], cache)
    batch.base[2:] = False  # all of it is looked at
    memory = make_memory(address_rank=12, signature_size=3)

    @torch.no_grad()
    def right():
        states = recall(memory, head, batch)[0]
        wrong = states @ head.t()
        now, base = (logits_of(s[batch.base], head).log_softmax(-1) for s in (states, batch.features[..., :32]))
        silence = F.kl_div(now, base, log_target=True, reduction="batchmean").item()
        replies = {True: [], False: []}
        for row in range(4):
            taught = batch.labels[row] >= 0
            starts = (taught & ~F.pad(taught[:-1], (1, 0))).long().cumsum(0)
            for reply in range(1, int(starts.max()) + 1):
                where = taught & (starts == reply)
                whole = bool((wrong[row, where].argmax(-1) == batch.labels[row, where]).all())
                replies[bool(batch.unknown[row, where].any())].append(whole)
        told, untold = (sum(replies[kind]) / len(replies[kind]) for kind in (False, True))
        return told + 0.05 * untold - 0.5 * silence

    assert 0 < batch.base.sum() <= 256
    before, gates = right(), memory.read_gate.bias.clone()
    assert calibrate(memory, head, [batch]) == pytest.approx(right(), abs=1e-3) and right() >= before
    assert memory.trust[2].item() == pytest.approx(-4.0)  # no answer to win: the less it says, the better
    assert torch.equal(memory.read_gate.bias, gates)
    with pytest.raises(ValueError, match="nothing to calibrate"):
        calibrate(memory, head, [])


@pytest.mark.parametrize("blocks", (1, 2, 3, 12, 30, 48))
def test_conversations_have_a_memory_for_models_of_any_depth(blocks):
    config = conversation_memory(blocks)
    assert config.key_layers and max(config.key_layers) < blocks


def test_calibration_takes_the_best_of_its_shifts(build, model, monkeypatch):
    """Answers would have trust 2 higher, replies about things never told as it is: those count for a tenth."""
    memory = make_memory(address_rank=12, signature_size=3)
    start = memory.trust[2].item()
    pool = FactPool(FactGenerator(0), 12, 4, 1, 1, num_untold=6)
    cache = build(pool.turns())
    batches = [make_batch([pool.session(random.Random(i), 2, 0, num_untold=3)], cache) for i in range(2)]
    assert all(batch.unknown.any() for batch in batches)
    for batch in batches:
        batch.base[:] = False  # no talk
    shares = dict(zip(map(id, batches), (0.8, 1.0), strict=True))

    def right(batch, taught, correct):
        assert len(correct) == int(taught.sum())
        untold = bool(batch.unknown[taught].any())
        assert untold == bool(batch.unknown[taught].all())
        distance = memory.trust[2].item() - start - (0 if untold else 2)
        return shares[id(batch)] - abs(distance) / 2, 0.0

    monkeypatch.setattr(gru_memory.training.calibration, "shares_of_right", right)
    head = model.get_output_embeddings().weight.detach()
    assert calibrate(memory, head, batches) == pytest.approx(0.9 + 0.1 * (0.9 - 1), abs=1e-6)  # means of both
    assert memory.trust[2].item() == pytest.approx(start + 2)


def test_strengths_learn_from_texts_that_only_look_as_if_they_told_something(build, model, monkeypatch):
    """The views lack the texts in which the same words tell nothing; a feature of the hidden state sets those apart."""
    torch.manual_seed(0)
    memory, head = make_memory(address_rank=12), model.get_output_embeddings().weight.detach()
    pool = FactPool(FactGenerator(0, silent=1.0), 60, 0, 1, 1)
    cache = build(pool.turns())
    views = collect(memory, head, [make_batch([pool.session(random.Random(i), 2, 0) for i in range(40)], cache)])
    told = make_batch([Session(fact.tells[:1]) for fact in pool.facts], cache)
    features = told.features.clone()
    features[..., 0] += 20
    story = replace(told, features=features, told=torch.zeros_like(told.told))

    def written(batch):
        with torch.no_grad():
            return read(memory, head, batch)[0].inputs.write.sum(-1).mean(-1)

    fit_strengths(memory, head, views)
    before = written(story).sum().item()
    fit_strengths(memory, head, views, [story, told])
    assert written(story).sum().item() < before / 5
    assert written(story)[told.told > 0].mean() < written(told)[told.told > 0].mean() / 5
    # A few positions stand for all the easy ones: over everything that was fitted, probabilities are honest.
    monkeypatch.setattr(gru_memory.training.alignment, "_HARD", 0)
    fit_strengths(memory, head, views, [story, told])
    with torch.no_grad():
        strength = memory.strength_key(views.before.float()) + memory.strength_embed(views.own.float())
    whole = torch.sigmoid(strength).mean(-1).sum().item() + sum(
        written(batch)[batch.mask & ~batch.turn_starts].sum().item() for batch in (story, told)
    )
    assert whole == pytest.approx(int(views.telling.sum() + (told.told > 0).sum()), rel=0.15)


def test_quiet_blocks_are_heard_when_addresses_are_fitted():
    """What was told and the question for it agree in one block of the keys alone, whose output is a hundredth of the others'."""
    torch.manual_seed(0)
    memory, count = make_memory(address_rank=8), 3000
    width, hidden = memory.key_rank.in_features, torch.randn(count, 8)
    told, asked = (torch.randn(count, width) for _ in range(2))
    for view in (told, asked):
        view[:, 32:64] = 0.01 * (hidden @ torch.randn(8, 32) + 0.3 * torch.randn(count, 32))
    flags = torch.zeros(count, dtype=torch.bool)
    correlations = fit_addresses(memory, Views(told, asked, flags, told, told, flags, flags, flags), refine_steps=0)
    assert correlations.min() > 0.8
    key, query = (F.normalize(way(view), dim=-1) for way, view in ((memory.key_rank, told), (memory.query_rank, asked)))
    assert (key * query).sum(-1).mean() > 0.8


def test_strengths_are_fitted_to_all_that_a_pool_tells_notes_included(build):
    facts = FactPool(FactGenerator(0, silent=1.0), 6, 2, 1, 1)
    noted = Turn("Rex left.", "Rex is out.", learn="answer", notes=(Mark("place", "out"),))
    turns = [*facts.turns(), noted]
    pool = SimpleNamespace(turns=lambda: iter(turns))
    cache = build(turns)
    batches = list(_alone(pool, cache, random.Random(0), None))
    told = [*(turn.value for fact in facts.facts for turn in (*fact.tells, *fact.corrections)), "out"]
    assert sum(len(batch.told.unique()) - 1 for batch in batches) >= len(max(told, key=len))
    assert sum(int((batch.told > 0).any(1).sum()) for batch in batches) == len(told)
    assert sum(batch.num_tokens for batch in batches) < sum(len(cache.tokens(i)) for i in range(1, len(cache)))
    assert all(batch.mask.any(1).all() for batch in batches)
    prefix = cache.tokens(cache.find(PREFIX)).tolist()
    assert len(prefix) and all(row[: len(prefix)].tolist() != prefix for batch in batches for row in batch.tokens)


def test_a_reply_that_says_a_value_again_is_not_where_it_is_told(build):
    turn = Turn("My boat is called Ara.", "Ara is a lovely name.", kind="tell", value="Ara", fact="f1")
    answer = Turn("Is it Ara?", "Yes, it is Ara.", learn="answer", kind="ask", value="Ara", fact="f1")
    said = Turn("Do you know more?", "Ara is a boat.", kind="tell", value="Ara", fact="f2")
    cache = build([turn, answer, said])
    starts = {t: cache.reply_start(cache.find((t.user, t.assistant))) for t in (turn, answer, said)}
    batch = make_batch([Session((t,)) for t in (turn, answer, said)], cache)
    prefix = len(cache.tokens(cache.find(PREFIX)))
    assert (batch.told[0] > 0).nonzero().max() < prefix + starts[turn]
    assert (batch.asked[1] > 0).nonzero().min() >= prefix + starts[answer] - 1
    assert (batch.told[2] > 0).nonzero().min() >= prefix + starts[said] - 1  # with the space before


def test_positions_that_were_left_out_count_all_the_same(pool, build):
    """What a thinned row keeps of the rest stands for all of it."""
    cache = build(pool.turns())
    for facts, talk, keep in ((3, 4, 0.3), (3, 4, 0.9), (4, 0, 0.2), (1, 6, 0.1), (4, 0, 0.001)):
        session = pool.session(random.Random(1), facts, talk)
        whole, thinned = make_batch([session], cache), make_batch([session], cache, keep=keep, rng=random.Random(2))
        assert thinned.num_tokens < whole.num_tokens and (whole.stands_for == 1).all()
        assert (thinned.stands_for[(thinned.told > 0) | (thinned.labels >= 0)] == 1).all()
        assert len(thinned.stands_for[thinned.mask].unique()) == 2
        assert thinned.stands_for[thinned.mask].sum().item() == pytest.approx(whole.num_tokens)


def test_questions_about_things_never_told_ask_for_nothing_that_was(build):
    pool = FactPool(FactGenerator(0), 30, 4, 1, 1, num_untold=40)
    rng, met = random.Random(0), 0
    for _ in range(60):
        session = pool.session(rng, 4, 1, num_untold=3)
        asked = {turn.user for turn in session.turns if turn.assistant == UNTOLD}
        told = {fact.fact.attribute for fact in pool.facts for turn in session.turns if turn in fact.tells}
        assert not told & {question.attribute for question in pool.untold if question.turn.user in asked}
        met += len(asked)
    assert met > 100


def test_key_dropout_reaches_keys_and_nothing_else(build, pool, model):
    """What the model itself would say stays; where is read and written changes at some positions."""
    batch = make_batch([pool.session(random.Random(3), 3, 1)], build(pool.turns()))
    memory, head = make_memory(gate=0.0, address_rank=6), model.get_output_embeddings().weight.detach()
    with torch.no_grad():
        states, plain, _ = recall(memory, head, batch)
        torch.manual_seed(0)
        noisy_states, noisy, _ = recall(memory, head, batch, key_dropout=0.5)
    assert torch.equal(states, noisy_states)  # the gate is shut: only the hidden states are left
    changed = (plain.inputs.query != noisy.inputs.query).flatten(2).any(-1)[batch.mask].float().mean()
    assert 0.25 < changed < 0.75
