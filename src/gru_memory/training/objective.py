"""What a memory is trained for: the right next tokens in answers, and silence everywhere else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from ..addressing import SAME_KEY
from ..memory import GRUMemoryWithDecay, Prepared
from ..scan import ScanInputs
from .rows import Batch

_BLOCK = 32  # tokens of the vocabulary that are looked at together
# Sizes of products in bfloat16 are rounded up to these, for the kernel of a size that has not come up before is generated first.
_EVEN_TOKENS, _EVEN_STATES = 256, 64


@dataclass
class LossReport:
    """Loss to minimise and what it is made of; `correct`, `right_answers` and `right_values` are shares under teacher forcing."""

    loss: Tensor
    answer_loss: float
    base_kl: float
    address_loss: float
    write_loss: float
    correct: float
    right_answers: float
    right_values: float


@contextlib.contextmanager
def in_mode(memory: GRUMemoryWithDecay, training: bool) -> Iterator[None]:
    """Within it the memory is in training mode, or is as it will be used (`MemoryConfig.persistent_floor` tells them apart)."""
    before = memory.training
    memory.train(training)
    try:
        yield
    finally:
        memory.train(before)


def recall(
    memory: GRUMemoryWithDecay,
    head: Tensor,
    batch: Batch,
    key_dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Prepared, Tensor]:
    """Final hidden states with what the memory recalls added (R, T, D), what the batch asked of it, and what was read (R, T, N, d).

    With `key_dropout`, so much of the output of `key_layers` is dropped at every other position, drawn by `generator`: what is
    asked in new words agrees less with what was told than anything in training would.
    """
    own, embeds, extra = batch.inputs(memory, head)
    if key_dropout and extra is not None:
        there = torch.rand(*extra.shape[:2], 1, generator=generator) < 0.5
        kept = torch.rand(extra.shape, generator=generator) >= key_dropout
        extra = torch.where(there.to(extra.device), extra * kept.to(extra) / (1 - key_dropout), extra)
    with torch.autocast(own.device.type, torch.bfloat16):  # the projections; the recurrence stays in float32
        state = memory.initial_state(len(own))
        prepared = memory.prepare(own, embeds, state, batch.mask, batch.turn_starts, extra)
        reads, _ = memory.recur(prepared.inputs, state["slots"])
        recalled = memory.recalled(reads, prepared.read_gate, prepared.persistent, prepared.signature)
    return own + recalled.to(own.dtype), prepared, reads


def read(memory: GRUMemoryWithDecay, head: Tensor, batch: Batch) -> tuple[Prepared, Tensor]:
    """What a batch asks of an empty memory, and what its heads read at every position (R, T, N, d)."""
    own, embeds, extra = batch.inputs(memory, head)
    state = memory.initial_state(len(own))
    prepared = memory.prepare(own, embeds, state, batch.mask, batch.turn_starts, extra)
    return prepared, memory.recur(prepared.inputs, state["slots"])[0]


def address_loss(inputs: ScanInputs, batch: Batch) -> Tensor:
    """The memory's own objective: a question reads where its answer was written, and nowhere else.

    With w(t, u) = mean over heads of sum_s r_{t,s} z_{u,s}, what position t reads of the place where token u was
    written, the loss is -log of the share of w(t, .) that falls on the right token, over all tokens before t. Other
    values of the same fact do not count: a correction is meant to be written over what it corrects.
    """
    if not (batch.asked > 0).any():
        return inputs.query.new_zeros(())
    # Per row, the A positions that ask for something; rows with fewer repeat others, which do not count.
    asking = (batch.asked > 0).int()
    position = asking.argsort(dim=1, descending=True, stable=True)[:, : int(asking.sum(1).max())]  # (R, A)

    def there(what: Tensor) -> Tensor:
        return what.gather(1, position).unsqueeze(2)  # (R, A, 1)

    query = inputs.query.flatten(2)  # (R, T, N*S)
    query = query.gather(1, position.unsqueeze(2).expand(-1, -1, query.shape[2]))
    shared = query @ inputs.write.flatten(2).transpose(1, 2)  # (R, A, T)
    time = torch.arange(shared.shape[2], device=shared.device)
    asked, told = there(batch.asked), batch.told.unsqueeze(1)
    outdated = (told > 0) & (batch.fact.unsqueeze(1) == there(batch.asked_fact)) & (
        batch.value.unsqueeze(1) != there(batch.asked_value)
    )  # fmt: skip
    counted = (time < position.unsqueeze(2)) & ~outdated & batch.mask.unsqueeze(1)
    right = counted & (told == asked) & (asked > 0)
    share = (shared * right).sum(2) / (shared * counted).sum(2).clamp_min(1e-9)
    share = share[right.any(dim=2)]
    return -torch.log(share.clamp_min(1e-9)).mean() if len(share) else share.sum()


def apart_loss(memory: GRUMemoryWithDecay, prepared: Prepared, batch: Batch) -> Tensor:
    """A question finds the key of its own answer among those of everybody else's: -log of its share of a read that has the slots of
    all other rows to choose from as well.

    Rows tell a dozen facts, which is soon learned; a batch tells a hundred. Keys that would pass for a correction of the right one
    are left out: other rows tell other values of the same attribute.
    """
    told, asks = (batch.told > 0) & batch.mask, (batch.asked > 0) & batch.mask
    if memory.addressing != "content" or not asks.any():
        return prepared.inputs.values.new_zeros(())
    keys, asked = (
        prepared.inputs.values[..., memory.value_size :][told],
        prepared.signature[asks].to(memory.state_dtype),
    )
    (row, at), (asked_row, asked_at) = told.nonzero().unbind(1), asks.nonzero().unbind(1)
    own = asked_row[:, None] == row
    right = own & (batch.asked[asks][:, None] == batch.told[told]) & (at < asked_at[:, None])  # (A, M)
    logits = memory.sharpness * torch.einsum("anf,mnf->am", asked, keys)
    with torch.no_grad():
        flat = F.normalize(keys.flatten(1), dim=-1)
        which = right.int().argmax(dim=1)
        alike = (flat[which] @ flat.t()) > SAME_KEY[0]
    counted = right | (~own & ~alike)
    there = right.any(dim=1)
    every = logits.masked_fill(~counted, -torch.inf)[there].logsumexp(dim=1)
    mine = logits.masked_fill(~right, -torch.inf)[there].logsumexp(dim=1)
    return (every - mine).mean() if len(mine) else logits.sum() * 0


def write_loss(told: Tensor, batch: Batch) -> Tensor:
    """What was told is written, the rest is not: cross-entropy of `Prepared.told` over all tokens.

    Every token weighs the same, those of a row that were left out too, so they are honest probabilities: most tokens tell
    nothing, and every stray write wears away what its slots hold.
    """
    is_told = (batch.told > 0).unsqueeze(-1).to(told).expand_as(told)
    loss = F.binary_cross_entropy(told.clamp(1e-6, 1 - 1e-6), is_told, reduction="none").mean(dim=-1)
    return (loss * batch.stands_for)[batch.mask].mean()


def speech_loss(memory: GRUMemoryWithDecay, prepared: Prepared, reads: Tensor, batch: Batch) -> Tensor:
    """Memory speaks where a value that was told is asked for, and nowhere else: cross-entropy of how loud it is.

    How loud is the read gate (a sigmoid) times trust, the most of any head. Replies that say that nothing was told, and all that
    must stay as the base model has it, are silent places; each counts as much as a token of a value. Without it read gates close
    wherever the model guesses well ("$178.4" after "$178."), and open within any word that looks like the middle of a name. Gates
    and trust learn by it, keys do not: they would learn to be alike in all that was told, and tell facts apart less well.
    """
    loud = prepared.opened
    if prepared.signature is not None:
        loud = loud * memory.trust_in(reads.detach(), prepared.signature.detach())
    loud = loud.amax(dim=-1).float().clamp(1e-6, 1 - 1e-6)  # (R, T)
    speaks = (batch.asked > 0) & (batch.labels >= 0)
    silent = (batch.base | (batch.labels >= 0)) & ~speaks
    said = -torch.log(loud[speaks]).sum()
    unsaid = -(torch.log1p(-loud) * batch.stands_for)[silent].sum()
    return (said + unsaid) / speaks.sum().clamp_min(1)


def compute_loss(
    memory: GRUMemoryWithDecay,
    head: Tensor,
    batch: Batch,
    generator: torch.Generator,
    base_weight: float = 1.0,
    address_weight: float = 1.0,
    write_weight: float = 1.0,
    base_positions: int = 512,
    negatives: int = 4096,
    hard_negatives: int = 16,
    key_dropout: float = 0.0,
    speech_weight: float = 0.0,
    margin: float = 0.0,
    opening_weight: float = 1.0,
    apart_weight: float = 0.0,
) -> LossReport:
    """Cross-entropy on answers, plus `base_weight` times KL(base || memory) on turns that must stay as they were, plus
    `address_weight` times `address_loss`, `apart_weight` times `apart_loss`, `write_weight` times `write_loss` and `speech_weight`
    times `speech_loss`.

    The right token of a value asked for, of a reply that says that nothing was told, and the first of every reply has to be ahead
    by `margin` nats: what comes out just ahead in training falls behind where turns between have worn the trace away, or it was
    kept in four bits. The first token of a reply counts `opening_weight` times: what begins as the model itself would have begun
    goes on so, and nothing that was told comes up.
    The first two are taken over a sampled vocabulary: every token of the batch, `negatives` random others, fresh each
    step, and the `hard_negatives` likeliest of the whole vocabulary at every token of a value asked for. The full softmax
    would be most of the arithmetic.
    """
    states, prepared, reads = recall(memory, head, batch, key_dropout, generator)
    with torch.no_grad():
        asked = states[(batch.asked > 0) & (batch.labels >= 0)]
        hard = likeliest(rounded(head), asked, hard_negatives)
    vocabulary, labels = _sample_vocabulary(batch, hard, len(head), negatives, generator)
    weight = rounded(head).index_select(0, vocabulary)  # (C, D); a quarter of the time that indexing takes
    taught = batch.labels >= 0
    logits = logits_of(states[taught], weight)
    correct = logits.argmax(-1) == labels[taught]
    opens = taught & ~F.pad(taught[:, :-1], (1, 0))
    ahead = margin * ((batch.asked > 0) | batch.unknown | opens)[taught].to(logits).unsqueeze(1)
    logits = logits.scatter_add(1, labels[taught].unsqueeze(1), -ahead)
    counts = torch.where(opens[taught], opening_weight, 1.0)
    answer_loss = F.cross_entropy(logits, labels[taught], reduction="none") @ counts / counts.sum().clamp_min(1e-9)

    where = batch.base.nonzero()
    where = where[torch.randperm(len(where), generator=generator)[:base_positions]].unbind(1)
    base_kl = states.new_zeros(())
    if len(where[0]):
        base = F.log_softmax(logits_of(batch.features[..., : memory.hidden_size][where], weight), dim=-1)
        base_kl = F.kl_div(
            F.log_softmax(logits_of(states[where], weight), dim=-1), base, log_target=True, reduction="batchmean"
        )
    addressing, writing = address_loss(prepared.inputs, batch), write_loss(prepared.told, batch)
    return LossReport(
        answer_loss
        + base_weight * base_kl
        + address_weight * addressing
        + write_weight * writing
        + speech_weight * speech_loss(memory, prepared, reads, batch)
        + (apart_weight * apart_loss(memory, prepared, batch) if apart_weight else 0.0),
        answer_loss.item(),
        base_kl.item(),
        addressing.item(),
        writing.item(),
        correct.sum().item() / max(1, len(correct)),
        *shares_of_right(batch, taught, correct),
    )


def shares_of_right(batch: Batch, taught: Tensor, correct: Tensor) -> tuple[float, float]:
    """Shares of replies, and of values asked for, in which every token is right; a value counts with where it ends.

    Greedy decoding would write such a reply letter by letter, and such a value wherever the reply comes to it.
    """
    row, position = taught.nonzero().unbind(1)
    starts = torch.ones_like(row, dtype=torch.bool)
    starts[1:] = (row[1:] != row[:-1]) | (position[1:] != position[:-1] + 1)
    reply = starts.long().cumsum(0) - 1
    asked = batch.asked[taught] > 0
    return _share(reply, correct), _share(reply[asked], correct[asked])


def _share(group: Tensor, correct: Tensor) -> float:
    """Share of groups (numbered anyhow) all of whose members are correct."""
    names, member = group.unique(return_inverse=True)
    if not len(names):
        return 0.0
    wrong = torch.zeros(len(names), device=correct.device).index_add(0, member, (~correct).float())
    return (wrong == 0).float().mean().item()


def logits_of(states: Tensor, weight: Tensor) -> Tensor:
    """bfloat16 products (float32 sums) where the processor has them; the softmax stays in float32."""
    return (_evened(states.to(torch.bfloat16)) @ weight.to(torch.bfloat16).t())[: len(states)].float()


def _evened(states: Tensor) -> Tensor:
    """Rows of zeros at the end, for a number of rows that comes up again (see `_EVEN_STATES`)."""
    return F.pad(states, (0, 0, 0, -len(states) % _EVEN_STATES))


# Frozen output embeddings: what they are in bfloat16, and of which version of them.
_ROUNDED = WeakTensorKeyDictionary()


def rounded(head: Tensor) -> Tensor:
    """The whole vocabulary in bfloat16, once for all steps: rounding it takes longer than the product with it."""
    found = _ROUNDED.get(head)
    if found is None or found[1] != head._version:
        found = _ROUNDED[head] = head.detach().to(torch.bfloat16), head._version
    return found[0]


def likeliest(head: Tensor, states: Tensor, count: int) -> Tensor:
    """Tokens of the `count` largest logits of states (A, D) in the whole vocabulary: (A, count), the largest first.

    They are in the `count` blocks with the largest maxima, so nothing else is sorted. The vocabulary's side comes first: a product
    with its transpose takes a sixth longer.
    """
    logits = (head @ _evened(states.to(head.dtype)).t())[:, : len(states)]  # (V, A)
    blocks = len(logits) // _BLOCK
    if blocks < count:
        return logits.topk(count, dim=0).indices.t()
    even = blocks * _BLOCK
    best = logits[:even].unflatten(0, (blocks, _BLOCK)).amax(dim=1).topk(count, dim=0).indices  # (count, A)
    within = torch.arange(_BLOCK, device=best.device)[:, None]
    chosen = (best.unsqueeze(1) * _BLOCK + within).flatten(0, 1)  # (count * block, A)
    rest = torch.arange(even, len(logits), device=best.device)[:, None].expand(-1, len(states))
    chosen = torch.cat([chosen, rest])
    return chosen.gather(0, logits.gather(0, chosen).topk(count, dim=0).indices).t()


def _sample_vocabulary(
    batch: Batch, hard: Tensor, size: int, negatives: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Token ids (C,) and the batch's labels renumbered into them."""
    chosen = torch.zeros(size, dtype=torch.bool)
    chosen[batch.tokens[batch.mask]] = True
    chosen[batch.labels[batch.labels >= 0]] = True
    chosen[hard.flatten()] = True
    chosen[torch.randint(size, (negatives,), generator=generator)] = True
    rest = (~chosen).nonzero().squeeze(1)
    more = min(-int(chosen.sum()) % _EVEN_TOKENS, len(rest))
    chosen[rest[torch.randperm(len(rest), generator=generator)[:more]]] = True
    number = chosen.long().cumsum(0) - 1
    return chosen.nonzero().squeeze(1), torch.where(batch.labels >= 0, number[batch.labels.clamp_min(0)], -100)
