"""What is fitted without a step of training: addresses, strengths, values, trust, and how much is said in the end."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small_training import (
    cache_of_turns,  # noqa: F401 (a fixture)
    facts_and_talk,  # noqa: F401 (a fixture)
    make_memory,
    small_model,  # noqa: F401 (a fixture)
    tokenizer_of_letters,  # noqa: F401 (a fixture)
)
from torch.nn import functional as F

import gru_memory.training.alignment
import gru_memory.training.calibration
from gru_memory.data.facts import FactGenerator, FactPool
from gru_memory.data.sessions import Mark, Session, Turn
from gru_memory.memory import GRUMemoryWithDecay
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
from gru_memory.training.features import PREFIX
from gru_memory.training.objective import logits_of, read, recall
from gru_memory.training.rows import Batch, make_batch
from gru_memory.training.run import _alone

# Addresses, strengths and values


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


def test_blocks_wider_than_the_site_are_heard_one_by_one():
    """As where a model projects what goes to its head: the quiet one of three blocks of 32 numbers, beside a site of 20."""
    torch.manual_seed(0)
    memory, count = GRUMemoryWithDecay(20, cell="mingru", key_size=96, address_rank=8), 3000
    width, hidden = memory.key_rank.in_features, torch.randn(count, 8)
    told, asked = (torch.randn(count, width) for _ in range(2))
    for view in (told, asked):
        view[:, 52:84] = 0.01 * (hidden @ torch.randn(8, 32) + 0.3 * torch.randn(count, 32))
    flags = torch.zeros(count, dtype=torch.bool)
    views = Views(told, asked, flags, told, told, flags, flags, flags)
    assert fit_addresses(memory, views, refine_steps=0, layers=3).min() > 0.8


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


# Trust


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


# Calibration


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
