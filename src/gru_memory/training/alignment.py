"""Where training begins: addresses and write strengths in closed form, from a few thousand facts told and asked.

What a frozen model says before a value is told and before the same value is asked for are two views of one thing.
Canonical correlation analysis (Hotelling, "Relations between two sets of variates", 1936) finds the directions in which
they agree; random projections of those into many small slots are a locality-sensitive hash (Charikar, "Similarity
estimation techniques from rounding algorithms", 2002), by which a question finds most of what it asks for before any step of
training. Logistic regression does the same for the strengths, which tokens tell something, and for the read gates, which ask.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..memory import GRUMemoryWithDecay
from .objective import read
from .rows import Batch

_REFINE_RATE, _REFINE_TEMPERATURE, _REFINE_PULL = 1e-3, 0.3, 5.0
_AGAIN = 128  # corrections in a step of refinement
_EASY, _HARD = 0.1, 50  # share of positions kept for the fit of strengths, and what a probability of 1 adds to it
_MOST = 250_000  # positions in that fit: gigabytes
_SIGNED = 0.4  # of a normed key in a signature: tanh leaves its direction as it is, and four bits a number tell it
_FOUND = 0.3  # of a token's weight that a head must meet to count as having found it
_DOUBT = 3e-4  # weight decay of the fit of trust
_TRUSTING = 1.5  # added to the bias of trust: who doubts a right head loses an answer, a wrong one is outvoted
_TRUSTING_ALL = 4.0  # the whole of the bias where nothing calls for doubt
_TRUSTING_ONE = 1.0  # the same where slots are found by content: most doubted tokens are right
_LOUDNESS = 0.2  # root mean square of rank projections, whose scale says nothing: so much Adam moves them a step


@dataclass
class Views:
    """Keys of F numbers from many sessions."""

    told: Tensor  # (M, F) of the position before a token that is told
    asked: Tensor  # (M, F) of the position before the same token in an answer
    first: Tensor  # (M,) bool, whether that token is one of the first two of its value
    before: Tensor  # (P, F) of the position before each of P tokens
    own: Tensor  # (P, F) of the token's own position
    telling: Tensor  # (P,) bool, whether the token is told
    going_on: Tensor  # (P,) bool, whether the one before it is
    asking: Tensor  # (P,) bool, whether the token after it is one of an answer that was told
    corrected: Tensor | None = None  # (C, F) of the position before the first token of a value that is corrected later
    correcting: Tensor | None = None  # (C, F) of the position before the first token of the value that corrects it
    writing: Tensor | None = None  # (M, D) norm of the hidden state of the token that is told
    written: Tensor | None = None  # (M,) that token
    wanted: Tensor | None = (
        None  # (M,) the token that the answer has there; another one where a value is told elsewhere
    )


def collect(
    memory: GRUMemoryWithDecay, head: Tensor, batches: Iterable[Batch], positions: int = 60_000, pairs: int = 80_000
) -> Views:
    """The views that `batches` of whole sessions give, at most about `pairs` of what is told and asked for, and about
    `positions` for the strengths."""
    told, asked, first, before, own, telling, going_on, asking, corrected, correcting, writing, written, wanted = (
        [] for _ in range(13)
    )
    for batch in batches:
        normed, _, keys = memory.keys_of(*batch.inputs(memory, head))
        keys = keys.detach()
        for row in range(len(keys)):
            row_keys, row_told, row_asked = keys[row], batch.told[row], batch.asked[row]
            where = {int(row_told[t]): t for t in (row_told > 0).nonzero().flatten().tolist() if t}
            found = [(where[int(row_asked[t])] - 1, t) for t in (row_asked > 0).nonzero().flatten().tolist()
                     if int(row_asked[t]) in where]  # fmt: skip
            if found and sum(map(len, told)) < pairs:
                tells, asks = zip(*found, strict=True)
                told.append(row_keys[list(tells)])
                asked.append(row_keys[list(asks)])
                value = batch.value[row]
                first.append(torch.tensor([bool(value[max(t - 1, 0)] != value[t + 1]) for t in tells]))
                there = torch.tensor(tells) + 1
                writing.append(normed[row][there].detach())
                written.append(batch.tokens[row][there])
                wanted.append(batch.labels[row][list(asks)])
            begins: dict[int, int] = {}  # where the last value of a fact begins
            for t in (row_told > 0).nonzero().flatten().tolist():
                fact = int(batch.fact[row, t])
                if t and batch.value[row, t] != batch.value[row, t - 1]:
                    if fact in begins and len(corrected) < pairs:
                        corrected.append(row_keys[begins[fact] - 1].clone())  # a view would keep all the others
                        correcting.append(row_keys[t - 1].clone())
                    begins[fact] = t
            if sum(map(len, own)) < positions:
                last = int(batch.mask[row].sum())
                before.append(F.pad(row_keys[: last - 1], (0, 0, 1, 0)).half())  # nothing comes before the first
                own.append(row_keys[:last].half())
                telling.append(row_told[:last] > 0)
                going_on.append(F.pad(row_told[: last - 1] > 0, (1, 0)))
                asking.append(row_asked[:last] > 0)
    if not told:
        raise ValueError("no session asks for what it tells: nothing to align addresses by")
    parts = [torch.cat(part) for part in (told, asked, first, before, own, telling, going_on, asking)]
    again = [torch.stack(part) if part else parts[0][:0] for part in (corrected, correcting)]
    return Views(*parts, *again, *(torch.cat(part) for part in (writing, written, wanted)))


@torch.no_grad()
def fit_addresses(
    memory: GRUMemoryWithDecay,
    views: Views,
    ridge: float = 0.05,
    sharpness: float = 24.0,
    first_weight: int = 4,
    refine_steps: int = 400,
    layers: int | None = None,
) -> Tensor:
    """Rank projections by canonical correlation, addresses by random projections. Returns the correlations (r,).

    Args:
        memory: one with `address_rank`.
        views: see `collect`.
        ridge: added to both covariances, as a share of their mean eigenvalue.
        sharpness: standard deviation of address logits.
        first_weight: how often the first two tokens of a value count. A later one is found by the tokens before it alone, a first
            one only by what the fact is about, and a second one as well where the first is a space or begins other values, too.
        refine_steps: of contrastive refinement after it, see `_refine`.
        layers: blocks whose outputs are in the keys; None takes each to be as wide as the site.
    """
    rank = memory.address_rank
    if not rank:
        raise ValueError("addresses are fitted through their rank: give the memory an address_rank")
    scale = _even(memory, views.told, layers)
    views = replace(views, told=views.told * scale, asked=views.asked * scale)
    weights = torch.where(views.first, float(first_weight), 1.0)
    weights /= weights.sum()
    centres = [weights @ view for view in (views.told, views.asked)]
    told, asked = (view - centre for view, centre in zip((views.told, views.asked), centres, strict=True))
    roots = [_inverse_root((view * weights[:, None]).t() @ view, ridge) for view in (told, asked)]
    both = (told * weights[:, None]).t() @ asked
    del told, asked  # gigabytes
    left, correlations, right = torch.linalg.svd(roots[0] @ both @ roots[1])
    directions = [correlations[:rank, None].clamp_max(1) * way for way in (left[:, :rank].t(), right[:rank])]
    if refine_steps:
        white = [
            (view - centre) @ root for view, centre, root in zip((views.told, views.asked), centres, roots, strict=True)
        ]
        again = None
        if memory.addressing == "content" and views.corrected is not None and len(views.corrected):
            again = [(view * scale - centres[0]) @ roots[0] for view in (views.corrected, views.correcting)]
        directions = _refine(directions, white, views.first, refine_steps, again)
    for linear, way, root, centre in zip((memory.key_rank, memory.query_rank), directions, roots, centres, strict=True):
        weight = way @ root
        weight *= _LOUDNESS / (weight * scale).pow(2).mean().sqrt()
        linear.weight.copy_(weight * scale)
        linear.bias.copy_(-weight @ centre)
    if memory.addressing == "content":
        memory.signature.weight.copy_(_SIGNED * nn.init.orthogonal_(torch.empty_like(memory.signature.weight)))
        memory.sharpen(float(torch.tanh(_SIGNED * torch.randn(10_000)).pow(2).mean()))
        return correlations[:rank]
    hashes = torch.randn(memory.num_heads * memory.num_slots, rank) * sharpness / rank**0.5
    memory.key.weight.copy_(hashes)
    if hasattr(memory, "query"):
        memory.query.weight.copy_(hashes)
    return correlations[:rank]


def _even(memory: GRUMemoryWithDecay, keys: Tensor, layers: int | None) -> Tensor:
    """What to multiply keys (M, F) by, (F,), so that every block's output in them is as loud as any other's.

    Hidden states grow from block to block, and a ridge would take the quiet ones for noise. Blocks may be wider than the site:
    some models project what goes to their head.
    """
    width = memory.key_size // layers if layers else memory.hidden_size
    others = [width] * (memory.key_size // width) + [memory.key_size % width]
    sizes = [size for size in (memory.hidden_size, *others, memory.embed_size) if size]
    loud = [part.pow(2).mean().sqrt().clamp_min(1e-6).expand(part.shape[1]) for part in keys.split(sizes, dim=1)]
    return 1 / torch.cat(loud)


def _refine(
    directions: list[Tensor], views: list[Tensor], first: Tensor, steps: int, again: list[Tensor] | None = None
) -> list[Tensor]:
    """Bring what was told and the question for it closer together, and other tokens further apart.

    Cross-entropy over the cosines within a batch, both ways (van den Oord et al. 2018, arXiv:1807.03748), at a temperature
    that keeps on pulling pairs together once they are told apart, plus their distance itself: whether two keys meet
    in one slot depends on the angle between them. Views are whitened; a tenth of their numbers is dropped at each step.
    `again` are two views, both told, of what is corrected and of what corrects it, which belong together in the same way.
    """
    tensors = [way.clone().requires_grad_() for way in directions]
    optimizer = torch.optim.Adam(tensors)
    groups = [(group, size) for group, size in ((first.nonzero().flatten(), 320), ((~first).nonzero().flatten(), 192))
              if len(group)]  # fmt: skip
    with torch.enable_grad():
        for step in range(steps):
            rate = min(1, step / 50) * (1 + math.cos(math.pi * step / steps)) / 2
            for settings in optimizer.param_groups:
                settings["lr"] = _REFINE_RATE * rate
            rows = torch.cat([group[torch.randint(len(group), (size,))] for group, size in groups])
            told, asked = (
                F.normalize(F.dropout(view[rows], 0.1) @ way.t(), dim=-1)
                for view, way in zip(views, tensors, strict=True)
            )
            loss = _apart(asked, told)
            if again:
                rows = torch.randint(len(again[0]), (_AGAIN,))
                loss = loss + _apart(*(F.normalize(F.dropout(v[rows], 0.1) @ tensors[0].t(), dim=-1) for v in again))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return [tensor.detach() for tensor in tensors]


def _apart(asked: Tensor, told: Tensor) -> Tensor:
    """Cross-entropy over the cosines of (M, r) with (M, r), both ways, where rows of the same number belong together."""
    cosines = asked @ told.t()
    same = torch.arange(len(told))
    logits = cosines / _REFINE_TEMPERATURE
    loss = (F.cross_entropy(logits, same) + F.cross_entropy(logits.t(), same)) / 2
    return loss + _REFINE_PULL * (1 - cosines.diagonal()).mean()


def fit_strengths(memory: GRUMemoryWithDecay, head: Tensor, views: Views, batches: Iterable[Batch] = ()) -> float:
    """Write strengths as the probability that a token is told, the same in all heads. Returns the loss in nats a token.

    A first fit, to the positions of `views`, says which others are hard: those are added of all in `batches`, as are all that
    are told or come right after, and of the easy ones a share that weighs the more (importance sampling). Few texts tell
    nothing and look as if they did, and a stray write wears away what its slots hold, so they have to be sought. Where slots
    are found by their content, tokens that come after one that is told are fitted apart from those with which it begins.
    """
    chain = memory.addressing == "content"
    features = torch.cat([views.before, views.own], dim=1)
    lines = _strength_lines(features, views.telling, views.going_on, chain)
    found = [(features, views.telling, views.going_on, torch.ones(len(features)))]
    thinned = 1.0
    for batch in batches:
        if sum(len(parts[1]) for parts in found) > _MOST:
            halves = [torch.rand(len(parts[1])) < 0.5 for parts in found]
            found = [tuple(part[half] for part in parts) for parts, half in zip(found, halves, strict=True)]
            thinned /= 2
        keys = memory.keys_of(*batch.inputs(memory, head))[2].detach()
        there = batch.mask[:, 1:] & ~batch.turn_starts[:, 1:]
        both = torch.cat([keys[:, :-1][there], keys[:, 1:][there]], dim=1)
        told, after = batch.told[:, 1:][there] > 0, batch.told[:, :-1][there] > 0
        share = (_EASY + _HARD * torch.sigmoid(both @ lines[0][0] + lines[0][1])).clamp_max(1)
        share[told | after] = 1
        kept = torch.rand(len(share)) < share * thinned
        found.append((both[kept].to(features), told[kept], after[kept], 1 / share[kept]))
    parts = [torch.cat(part) for part in zip(*found, strict=True)]
    del found  # gigabytes
    lines = _strength_lines(*parts[:3], chain, parts[3], decay=1e-4, steps=100)
    with torch.no_grad():
        for i, (weight, bias, _) in enumerate(lines):
            heads = slice(i * memory.num_heads, (i + 1) * memory.num_heads)
            width = views.own.shape[1]
            memory.strength_key.weight[heads] = weight[:width]
            memory.strength_embed.weight[heads] = weight[width:]
            memory.strength_key.bias[heads] = bias
    return lines[0][2]


def _strength_lines(
    features: Tensor, told: Tensor, after: Tensor, chain: bool, stands_for: Tensor | None = None, **settings
) -> list[tuple[Tensor, float, float]]:
    """What `_logistic` makes of all positions, or in a `chain` of those that do not come `after` something told, and of those
    that do."""
    if not chain:
        return [_logistic(features, told, stands_for, **settings)]
    parts = [None if stands_for is None else stands_for[where] for where in (~after, after)]
    return [
        _logistic(features[where], told[where], part, **settings)
        for where, part in zip((~after, after), parts, strict=True)
    ]


def fit_read_gates(memory: GRUMemoryWithDecay, views: Views) -> float:
    """Read gates as the probability that a told token is asked for, the same in all heads. Returns the loss in nats."""
    weight, bias, loss = _logistic(views.own, views.asking)
    with torch.no_grad():
        memory.read_gate.weight.copy_(weight.expand(memory.num_heads, -1))
        memory.read_gate.bias.fill_(bias)
    return loss


@torch.no_grad()
def fit_trust(memory: GRUMemoryWithDecay, head: Tensor, batches: Iterable[Batch]) -> float:
    """Trust as the probability that a head reads the token asked for, from how signatures agree. Returns the loss in nats.

    `batches` are whole sessions that also ask for things never told, where no head can be right; a position of such a reply
    counts as far as the read gate, fitted before, is open there. Where none does, a memory that is addressed by content has
    nothing to doubt: what it finds is the best there is.
    """
    features, target, counts, doubtful = [], [], [], False
    for batch in batches:
        doubtful |= bool(batch.unknown.any())
        prepared, reads = read(memory, head, batch)
        of_head, of_all = memory.agreements(reads[..., memory.value_size :], prepared.signature)
        both = torch.stack([of_head, of_all.expand_as(of_head)], dim=-1)  # (R, T, N, 2)
        inputs, opened = prepared.inputs, prepared.opened
        for row, t in ((batch.asked > 0) | batch.unknown).nonzero().tolist():
            there = (batch.told[row, :t] == batch.asked[row, t]) & (batch.told[row, :t] > 0)
            if batch.unknown[row, t]:
                right, count = torch.zeros(memory.num_heads), opened[row, t]
            elif there.any():
                where = int(there.nonzero()[-1])
                met = (inputs.query[row, t] * inputs.write[row, where]).sum(-1) / memory.max_strength
                right = (met > _FOUND).float()  # (N,)
                count = torch.ones(memory.num_heads)
            else:
                continue
            features.append(both[row, t])
            target.append(right)
            counts.append(count)
    if not features:
        raise ValueError("no session asks for anything: nothing to fit trust by")
    if memory.addressing == "content" and not doubtful:
        memory.trust.copy_(torch.tensor([0.0, 0.0, _TRUSTING_ALL]))
        right = torch.cat(target)
        return F.binary_cross_entropy_with_logits(torch.full_like(right, _TRUSTING_ALL), right).item()
    # Where agreement tells right from wrong without a fault, nothing else keeps the slope from growing without bound.
    weight, bias, loss = _logistic(torch.cat(features), torch.cat(target), torch.cat(counts), decay=_DOUBT)
    trusting = _TRUSTING_ONE if memory.addressing == "content" else _TRUSTING
    memory.trust.copy_(torch.tensor([*weight.tolist(), bias + trusting]))
    return loss


@torch.no_grad()
def fit_values(memory: GRUMemoryWithDecay, views: Views, head: Tensor, ridge: float = 0.003) -> None:
    """What the hidden state adds to a value: at a full stop, what turns it into the word that is to be kept there.

    With W_e the value projection of token embeddings, e^ the normed embedding of a token and x^ the normed hidden state, W_x
    is the least-squares map from x^ to W_e (e^ of the token wanted - e^ of the token written). That is zero for values told
    at their own tokens; for others (`Mark.written`) it reads off the hidden state what was said before.
    """
    normed = F.rms_norm(head.float(), head.shape[-1:], eps=1e-6)
    taught = views.wanted >= 0
    hidden = views.writing[taught]
    change = (normed[views.wanted[taught]] - normed[views.written[taught]]) @ memory.value_embed.weight.t()
    moment = hidden.t() @ hidden / len(hidden)
    moment.diagonal().add_(ridge * moment.diagonal().mean())
    memory.value_hidden.weight.copy_(torch.linalg.solve(moment, hidden.t() @ change / len(hidden)).t())


def _logistic(
    features: Tensor, target: Tensor, stands_for: Tensor | None = None, decay: float = 1e-3, steps: int = 60
) -> tuple[Tensor, float, float]:
    """Logistic regression of target (P,) on features (P, F) by L-BFGS: weight (F,), bias and loss.

    A position counts `stands_for` (P,) times.
    """
    features, target = features.to(torch.float32, copy=True), target.float()
    mean, spread = features.mean(0), features.std(0) + 1e-2
    features.sub_(mean).div_(spread)  # in place: there may be gigabytes of them
    if stands_for is not None:
        stands_for = stands_for / stands_for.mean()
    weight = torch.zeros(features.shape[1], requires_grad=True)
    bias = torch.tensor([-2.0], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        return F.binary_cross_entropy_with_logits(features @ weight + bias, target, stands_for)

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = loss() + decay * weight.pow(2).sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        raw = weight / spread
        return raw, float(bias - raw @ mean), float(loss())


def _inverse_root(moment: Tensor, ridge: float) -> Tensor:
    """(C + ridge * mean eigenvalue)^{-1/2} of a (F, F) covariance."""
    values, vectors = torch.linalg.eigh(moment)
    return vectors * (values.clamp_min(0) + ridge * values.mean()).rsqrt() @ vectors.t()
