"""What each term of the loss counts, and what it leaves alone."""

import math
import random

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

from gru_memory.data.sessions import Session
from gru_memory.scan import ScanInputs
from gru_memory.training.objective import (
    _ROUNDED,
    address_loss,
    apart_loss,
    compute_loss,
    likeliest,
    logits_of,
    read,
    recall,
    rounded,
    speech_loss,
    write_loss,
)
from gru_memory.training.rows import make_batch

# Answers, and talk that stays as it was


def test_base_term_is_zero_for_a_silent_memory_and_positive_for_a_loud_one(model, pool, build):
    talk = [Session((turn,)) for turn in pool.talk[:3]]
    batch = make_batch([*talk, pool.session(random.Random(0), 1, 0)], build(pool.turns()))
    head = model.get_output_embeddings().weight.detach()
    silent = compute_loss(make_memory(gate=0.0), head, batch, torch.Generator().manual_seed(0))
    loud = compute_loss(make_memory(gate=50.0), head, batch, torch.Generator().manual_seed(0))
    assert silent.base_kl == pytest.approx(0.0, abs=1e-6)
    assert loud.base_kl > 1e-3


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
    assert opens.sum() >= 4
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
    first = rounded(head)
    assert first.dtype == torch.bfloat16 and rounded(head) is first
    with torch.no_grad():
        head.mul_(2)
    assert torch.equal(rounded(head), head.to(torch.bfloat16))
    number = len(_ROUNDED)
    del head
    assert len(_ROUNDED) == number - 1


# Where it is written and read


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


def test_keys_are_told_apart_across_the_rows_of_a_batch(model, pool, build):
    """By its definition, the slow way; keys that are as good as the right one do not count."""
    batch = make_batch([pool.session(random.Random(i), 2, 0) for i in range(4)], build(pool.turns()))
    memory = make_memory(address_rank=12, signature_size=3, addressing="content")
    prepared, _ = read(memory, model.get_output_embeddings().weight.detach(), batch)
    keys, asked = prepared.inputs.values[..., memory.value_size :], prepared.signature
    places = (batch.told > 0).nonzero().tolist()
    losses, spared = [], 0
    for r, t in (batch.asked > 0).nonzero().tolist():
        right, others = [], []
        found = [u for row, u in places if row == r and u < t and batch.told[r, u] == batch.asked[r, t]]
        for row, u in places:
            logit = float(memory.sharpness * (asked[r, t] * keys[row, u]).sum())
            if row == r and u in found:
                right.append(logit)
            elif row != r:
                alike = F.cosine_similarity(keys[r, found[0]].flatten(), keys[row, u].flatten(), dim=0) > 0.84
                spared += int(alike)
                others += [] if alike else [logit]
        losses.append(math.log(sum(map(math.exp, right + others)) / sum(map(math.exp, right))))
    assert 0 < spared < len(places) * len(losses)
    loss = apart_loss(memory, prepared, batch)
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-3)
    loss.backward()
    assert memory.key_rank.weight.grad.any() and memory.query_rank.weight.grad.any()
    learned = make_memory(address_rank=12, signature_size=3)
    assert apart_loss(learned, read(learned, model.get_output_embeddings().weight.detach(), batch)[0], batch) == 0


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


# When memory speaks


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
