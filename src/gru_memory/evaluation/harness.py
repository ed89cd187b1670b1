"""Models with memory in EleutherAI's lm-evaluation-harness (extra `eval`), as the model `gru-memory`.

Every request starts with an empty memory. Its context may be fed in pieces: attention then sees the last one alone, so
that whatever the answer needs from the others has to come through the memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor

from ..config import CONFIG_NAME
from ..embedded import EMBEDDED_NAME
from ..models import CONFIG_KEY, AutoModelWithGRUMemory
from ..placement import device_for
from ..rendering import TurnRenderer
from ..shipped import load_with_memory
from ..state import MemoryState
from .batched import pad

NAME = "gru-memory"
# Of the model `hf`: how it loads a model, which it does not do here. It would report some of them as if it had.
_OF_LOADING = ("dtype", "revision", "subfolder", "peft", "delta", "autogptq", "gptqmodel", "gguf_file")


@dataclass(frozen=True)
class Piece:
    """Tokens that attention sees together, at positions that start at 0.

    Attributes:
        ids: the tokens.
        hidden: how many of them, at the start, memory does not take in.
        targets: what the last `len(targets)` positions should predict; empty where nothing is scored.
    """

    ids: list[int]
    hidden: int = 0
    targets: list[int] = field(default_factory=list)


class GRUMemoryLM(HFLM):
    """A causal LM with memory, for `lm_eval --model gru-memory --model_args name=value,...`.

    Args:
        pretrained: "smollm2", a folder, a `.gguf` file or a hub name; or a model with memory, then with `tokenizer`.
        memory: folder or hub name of a saved memory. None takes the one that the model was saved with, or that ships for it.
        segment_tokens: cut contexts into pieces of this many tokens, the last of which ends where the context ends.
        segment_separator: cut contexts after this text, such as the blank line between few-shot examples; `\\n` is a newline.
        as_turns: render every piece as a user's turn of the chat template, the last one with everything that makes the
            model reply. For memories that were trained on conversations; leave out `--apply_chat_template`.
        system: system prompt of such turns; None leaves the template's default.
        without_memory: switch the memory off, for comparison: the pieces before the last are then lost.
        batch_size: requests at once, a number.
        **kwargs: of `lm_eval.models.huggingface.HFLM`, but for those that say how it loads a model, such as dtype or peft.

    Without the three arguments that cut, requests go to the model whole, as for the model `hf`.

    Raises:
        ValueError: an argument out of range, or one that would have no effect.
    """

    def __init__(
        self,
        pretrained: Any = EMBEDDED_NAME,
        memory: str | None = None,
        segment_tokens: int | None = None,
        segment_separator: str | None = None,
        as_turns: bool = False,
        system: str | None = None,
        without_memory: bool = False,
        tokenizer: Any = None,
        batch_size: int | str = 1,
        device: str | None = None,
        **kwargs: Any,
    ) -> None:
        if segment_tokens is not None and (not isinstance(segment_tokens, int) or segment_tokens < 1):
            raise ValueError(f"segment_tokens is {segment_tokens!r}: a piece has at least 1 token")
        if segment_separator == "":
            raise ValueError("segment_separator is empty: give the text after which contexts are cut")
        if as_turns and segment_tokens is not None:
            raise ValueError("as_turns keeps turns whole: cut with segment_separator instead of segment_tokens")
        if not str(batch_size).isdigit():
            raise ValueError(f"batch_size is {batch_size!r}: give a number, it is not found out by itself")
        if ignored := [name for name in _OF_LOADING if kwargs.get(name) not in (None, False, "", "auto", "main")]:
            raise ValueError(
                f"{', '.join(ignored)} would have no effect: load the model as you want it, and pass it with its tokenizer, "
                f"{type(self).__name__}(model, tokenizer=tokenizer)"
            )
        if memory is not None and not isinstance(pretrained, str):
            raise ValueError("memory would have no effect on a model that has one: call model.load_memory(...) before")
        if isinstance(pretrained, str):
            pretrained, tokenizer = _load(pretrained, memory)
            pretrained = pretrained.to(_device(device))
        elif not hasattr(pretrained, "initial_memory_state"):
            raise ValueError(
                f"{type(pretrained).__name__} has no memory: give it one with gru_memory.add_memory, or use the model 'hf'"
            )
        super().__init__(pretrained, tokenizer=tokenizer, batch_size=batch_size, **kwargs)
        self.segment_tokens, self.as_turns, self.without_memory = segment_tokens, as_turns, without_memory
        self.segment_separator = segment_separator and segment_separator.replace("\\n", "\n")
        self.renderer = TurnRenderer(self.tokenizer, system) if as_turns else None

    @property
    def cuts(self) -> bool:
        return self.as_turns or self.segment_tokens is not None or self.segment_separator is not None

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        if not self.cuts:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        results = []
        for some in self._batches(requests):
            rows = [self._pieces(*request.args) for request in some]
            self._check_lengths(rows)
            for request, result in zip(some, self._feed(rows)[1]):
                self.cache_hook.add_partial("loglikelihood", request.args, result)
                results.append(result)
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        if self.as_turns:
            raise ValueError(
                "the likelihood of whole texts is not one of a conversation: leave out as_turns for this task"
            )
        if not self.cuts:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        results = []
        for some in self._batches(requests):
            rows = [self._windows(request.args[0]) for request in some]
            self._check_lengths(rows)
            for request, (result, _) in zip(some, self._feed(rows)[1]):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
                results.append(result)
        return results

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        if not self.cuts:
            return super().generate_until(requests, disable_tqdm=disable_tqdm)
        results: dict[int, str] = {}
        eos = self.tok_decode([self.eot_token_id], skip_special_tokens=False)
        groups: dict[str, list[int]] = {}  # generation settings -> requests
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        for numbers in (some for group in groups.values() for some in self._batches(group)):
            settings = normalize_gen_kwargs(requests[numbers[0]].args[1], self.max_gen_toks)
            until, room = handle_stop_sequences(settings.pop("until"), eos), settings.pop("max_gen_toks")
            rows = [self._pieces(requests[number].args[0]) for number in numbers]
            self._check_lengths(rows, room)
            states, _ = self._feed([row[:-1] for row in rows])
            inputs = self._inputs([row[-1] for row in rows], left=True)
            prompt = inputs.pop("input_ids")
            length = {"max_length": prompt.shape[1] + room, "memory_state": states}
            output = self._model_generate(context=prompt, stop=until, **{**settings, **inputs, **length})
            for number, ids in zip(numbers, output[:, prompt.shape[1] :].tolist()):
                text = postprocess_generated_text(self.tok_decode(ids), until, None)
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
                results[number] = text
        return [results[number] for number in range(len(requests))]

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        with self._switched():
            return super()._model_call(inps, attn_mask, labels)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        settings.setdefault("memory_state", self.model.initial_memory_state(len(context)))  # and none is kept
        if self.without_memory:
            settings = {k: v for k, v in settings.items() if k not in ("memory_state", "memory_mask")}
        with self._switched():
            return super()._model_generate(context, max_length, stop, **settings)

    def _switched(self) -> contextlib.AbstractContextManager:
        return self.model.disable_memory() if self.without_memory else contextlib.nullcontext()

    def _batches(self, items: Sequence[Any]) -> Iterator[Sequence[Any]]:
        return (items[i : i + self.batch_size] for i in range(0, len(items), self.batch_size))

    def _split(self, context: str) -> list[str]:
        """The context as texts that make it up; white space alone is none."""
        if self.segment_separator is None:
            return [context]
        *parts, last = context.split(self.segment_separator)
        return [part for part in [*(part + self.segment_separator for part in parts), last] if part.strip()] or [
            context
        ]

    def _pieces(self, context: str, continuation: str = "") -> list[Piece]:
        """What is fed for a context and, if it is to be scored, what follows it."""
        *texts, last = self._split(context)
        if self.renderer is not None:
            asked = self.renderer.prompt(last.strip())
            targets = self.tok_encode(continuation.lstrip(), add_special_tokens=False) if continuation else []
            turns = [*(self.renderer.turn(text.strip()).ids for text in texts), asked + targets[:-1]]
            prefix = self.renderer.prefix_ids
            rows = [Piece(prefix + ids, len(prefix) if i else 0) for i, ids in enumerate(turns)]
            return [*rows[:-1], Piece(rows[-1].ids, rows[-1].hidden, targets)]
        if not continuation:
            ids, targets = self.tok_encode(last) if last else [self.prefix_token_id], []
        elif last:
            ids, targets = self._encode_pair(last, continuation)
        else:
            ids, targets = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
        contexts = [*(self.tok_encode(text) for text in texts), ids]
        if size := self.segment_tokens:
            contexts = [piece for ids in contexts for piece in _cut(ids, size)]
        # Attention begins every text with the token that begins texts, if the tokenizer puts one there; memory sees it once.
        bos = self.tokenizer.bos_token_id
        hidden = [int(i > 0 and bos is not None and ids[:1] == [bos]) for i, ids in enumerate(contexts)]
        rows = [Piece(ids, leave) for ids, leave in zip(contexts, hidden)]
        return [*rows[:-1], Piece(rows[-1].ids + targets[:-1], rows[-1].hidden, targets)]

    def _windows(self, text: str) -> list[Piece]:
        """A text to be scored from its first token on. Each token is an input once, so memory takes in each once."""
        size = self.segment_tokens or self.max_length
        parts = [self.tok_encode(part, add_special_tokens=False) for part in self._split(text)]
        parts = [ids[i : i + size] for ids in parts for i in range(0, len(ids), size)]
        before = [self.prefix_token_id, *(ids[-1] for ids in parts)]
        return [Piece([first, *ids[:-1]], 0, ids) for first, ids in zip(before, parts)]

    def _check_lengths(self, rows: list[list[Piece]], room: int = 0) -> None:
        longest = max((len(piece.ids) for row in rows for piece in row), default=0) + room
        if longest > self.max_length:
            raise ValueError(
                f"a piece of a context needs {longest} positions, the model has {self.max_length}: cut finer, with segment_tokens "
                "or another segment_separator, or generate less"
            )

    @torch.no_grad()
    def _feed(self, rows: list[list[Piece]]) -> tuple[MemoryState | None, list[tuple[float, bool]]]:
        """Feed the pieces of each row one after the other, from an empty memory.

        Returns the states after the last pieces, and for each row the log-likelihood of all its targets, with whether
        each of them was the likeliest token.
        """
        states = None if self.without_memory else self.model.initial_memory_state(len(rows))
        results = [(0.0, True)] * len(rows)
        for step in range(max(map(len, rows), default=0)):
            active = [r for r, row in enumerate(rows) if step < len(row)]
            pieces = [rows[r][step] for r in active]
            scored = any(piece.targets for piece in pieces)
            if states is None and not scored:
                continue
            inputs = self._inputs(pieces, left=False)
            if states is not None:
                inputs["memory_state"] = states.select(active)
            with self._switched():
                output = self.model(**inputs, use_cache=False, **({} if scored else {"logits_to_keep": 1}))
            if states is not None:
                states = _replace(states, active, output.memory_state)
            for r, piece, logits in zip(active, pieces, output.logits):
                if piece.targets:
                    logp, greedy = _score(logits[: len(piece.ids)], piece.targets)
                    results[r] = (results[r][0] + logp, results[r][1] and greedy)
        return states, results

    def _inputs(self, pieces: list[Piece], left: bool) -> dict[str, Tensor]:
        ids, mask = pad([piece.ids for piece in pieces], self.tokenizer.pad_token_id, left, self.device)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if not self.without_memory:
            visible = mask.bool()
            for row, piece in enumerate(pieces):
                first = ids.shape[1] - len(piece.ids) if left else 0
                visible[row, first : first + piece.hidden] = False
            inputs["memory_mask"] = visible
        return inputs


def register() -> None:
    """Tell lm_eval of the model `gru-memory`. Versions after 0.4.13 find it by themselves, as an installed entry point."""
    import lm_eval.models  # noqa: F401 (registers its own, which it would not do once there is another)
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target="gru_memory.evaluation.harness:GRUMemoryLM")


def main() -> None:
    """`lm_eval`, knowing the model `gru-memory`."""
    from lm_eval.__main__ import cli_evaluate

    register()
    cli_evaluate()


def _load(name: str, memory: str | None) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    folder = Path(name).expanduser()
    if memory is None and (folder / "config.json").is_file():
        if getattr(AutoConfig.from_pretrained(folder), CONFIG_KEY, None) is None:
            raise ValueError(f"{name} was saved without a memory: say memory=<folder with a {CONFIG_NAME}>")
        return AutoModelWithGRUMemory.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return load_with_memory(name, memory)


def _device(wanted: str | None) -> torch.device:
    """lm_eval asks for "cuda" where the user asked for nothing, and takes a CPU where there is none."""
    asked = wanted and (torch.cuda.is_available() or not wanted.startswith("cuda"))
    return device_for(wanted if asked else None)


def _cut(ids: list[int], size: int) -> list[list[int]]:
    """Pieces of `size` tokens, the last of which is whole and the first of which may not be."""
    first = len(ids) % size
    return [*([ids[:first]] if first else []), *(ids[i : i + size] for i in range(first, len(ids), size))]


def _replace(states: MemoryState, rows: list[int], new: MemoryState) -> MemoryState:
    """`states` with those of `rows` replaced by `new`."""
    others = [row for row in range(states.batch_size) if row not in rows]
    if not others:
        return new
    order = [*rows, *others]
    return MemoryState.cat([new, states.select(others)]).select([order.index(row) for row in range(len(order))])


def _score(logits: Tensor, targets: list[int]) -> tuple[float, bool]:
    """Log-likelihood of `targets` at the last positions of `logits` (T, V), and whether greedy decoding would say them."""
    logp = logits[-len(targets) :].float().log_softmax(dim=-1)  # (n, V)
    wanted = torch.tensor(targets, device=logp.device)
    return logp.gather(1, wanted[:, None]).sum().item(), bool((logp.argmax(dim=-1) == wanted).all())


if __name__ == "__main__":
    main()
