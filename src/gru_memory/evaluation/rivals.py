"""Other memories beside the same frozen model: a decayed average, titans' `NeuralMemory`, and RMT's memory tokens.

Sites have the library's signature, but start at the beginning of a session: they are trained and tested on whole ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..bench.peers import titans_memory, titans_size
from .mixers import TITANS_HEADS, TITANS_MISSING

State = dict[str, Tensor]
TITANS_CHUNK = 8


class _WholeSessions(nn.Module):
    """A site that needs nothing from before."""

    def initial_state(self, batch_size: int) -> State:
        return {"nothing": torch.zeros(batch_size, 1, device=next(self.parameters()).device)}

    def learned(self) -> list[nn.Parameter]:
        """What training changes."""
        return list(self.parameters())


class DecayedAverage(_WholeSessions):
    """a_t = decay a_{t-1} + (1 - decay) e_t, and y_t = x_t + W a_t, with e the output embeddings of the tokens."""

    def __init__(self, width: int, embed_width: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.output = nn.Linear(embed_width, width, bias=False)
        nn.init.zeros_(self.output.weight)

    def forward(self, hidden_states, token_embeds, state, mask, turn_starts) -> tuple[Tensor, State]:
        seen = mask.to(hidden_states)  # (B, T)
        age = seen.cumsum(dim=1)
        passed = (age.unsqueeze(2) - age.unsqueeze(1)).clamp_min(0)  # (B, T, T) tokens seen since
        weight = (1 - self.decay) * self.decay**passed * seen.unsqueeze(1)
        return hidden_states + self.output(weight.tril() @ token_embeds), state

    @property
    def state_floats(self) -> int:
        return self.output.in_features


class TitansSite(_WholeSessions):
    """titans-pytorch's `NeuralMemory`, given what our memory is given.

    It stores [x_{t-1}, e_t], so that a value can be kept under what came before it, and is read with x_t.
    """

    def __init__(self, width: int, embed_width: int, floats: int) -> None:
        super().__init__()
        memory = titans_memory(width, TITANS_CHUNK, TITANS_HEADS, titans_size(floats, TITANS_HEADS))
        if memory is None:
            raise ModuleNotFoundError(TITANS_MISSING)
        self.memory, self.stored = memory, nn.Linear(width + embed_width, width)
        self.asked = nn.Linear(width, width)
        self.output = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.output.weight)

    def forward(self, hidden_states, token_embeds, state, mask, turn_starts) -> tuple[Tensor, State]:
        x, e = (F.rms_norm(part, part.shape[-1:]) for part in (hidden_states, token_embeds))
        before = F.pad(x[:, :-1], (0, 0, 1, 0))
        stored = self.stored(torch.cat([before, e], dim=-1))
        # Its own mask stops a write, but how much is forgotten is a mean over the whole chunk.
        stored = stored * mask.unsqueeze(-1).to(stored)
        recalled, _ = self.memory(self.asked(x), store_seq=stored, store_mask=mask)
        return hidden_states + self.output(recalled), state

    def learned(self) -> list[nn.Parameter]:
        """Every head begins with weights of its own; those of the network that they were copied from are never used."""
        pattern = {id(parameter) for parameter in self.memory.memory_model.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in pattern]

    @property
    def state_floats(self) -> int:
        weights = sum(parameter.numel() for parameter in self.memory.memory_model.parameters())
        return 2 * TITANS_HEADS * weights  # their change, and its momentum


class MemoryTokens(nn.Module):
    """RMT (Bulatov et al. 2022, 2207.06881) around a frozen model: a turn is read as [memory, turn, memory].

    The model's last hidden states of the second memory, through a linear map, are the memory of the next turn. The model
    is frozen, as it is for all others here: what learns is the first memory and the map.
    """

    def __init__(self, model: Any, tokens: int) -> None:
        super().__init__()
        width = model.config.get_text_config().hidden_size
        scale = model.get_input_embeddings().weight.detach().float().std()
        self.memory = nn.Parameter(torch.randn(tokens, width) * scale)
        self.carried = nn.Linear(width, width)
        nn.init.eye_(self.carried.weight)
        self.carried.weight.data *= scale
        nn.init.zeros_(self.carried.bias)

    def logits(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """(B, T, V) for a batch of `SessionCollator`; zeros at padding. Attention sees one turn and the memory."""
        ids, starts = batch["input_ids"], batch["position_ids"] == 0
        lengths = [int(row.nonzero()[-1]) + 1 for row in batch["memory_mask"]]
        cuts = [[*row[:n].nonzero().flatten().tolist(), n] for row, n in zip(starts, lengths, strict=True)]
        memory = self.memory.expand(len(ids), -1, -1)  # (B, m, D)
        m, embed, head = self.memory.shape[0], model.get_input_embeddings(), model.get_output_embeddings()
        rows: list[list[Tensor]] = [[] for _ in cuts]
        for turn in range(max(len(row) - 1 for row in cuts)):
            active = [r for r, row in enumerate(cuts) if turn < len(row) - 1]
            spans = [(cuts[r][turn], cuts[r][turn + 1]) for r in active]
            longest = max(stop - start for start, stop in spans)
            some = torch.stack([F.pad(ids[r, a:b], (longest - b + a, 0)) for r, (a, b) in zip(active, spans)])
            seen = torch.stack([F.pad(torch.ones(b - a), (longest - b + a, 0)) for a, b in spans])
            around = torch.ones(len(active), m)
            whole = torch.cat([memory[active], embed(some), memory[active]], dim=1)
            mask = torch.cat([around, seen, around], dim=1)
            hidden = model.get_decoder()(
                inputs_embeds=whole,
                attention_mask=mask,
                position_ids=mask.long().cumsum(1) - 1,  # padding stands between the first memory and the turn
                use_cache=False,
            ).last_hidden_state
            logits = head(hidden[:, m : m + longest])
            for at, (r, (a, b)) in enumerate(zip(active, spans)):
                rows[r].append(logits[at, longest - b + a :])
            new = list(memory.unbind(0))
            for at, r in enumerate(active):
                new[r] = self.carried(hidden[at, -m:])
            memory = torch.stack(new)
        width = ids.shape[1]
        return torch.stack([F.pad(torch.cat(row), (0, 0, 0, width - sum(map(len, row)))) for row in rows])

    @property
    def state_floats(self) -> int:
        return self.memory.numel()
