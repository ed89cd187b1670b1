"""Train a top-site memory on cached features: progress, validation, checkpoints, resumable."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..data.facts import FactPool
from ..limits import at_least, shares
from ..memory import GRUMemoryWithDecay
from ..whole_files import replacing
from .features import FeatureCache
from .objective import LossReport, compute_loss, in_mode
from .rows import Batch, make_batch

BEST_NAME = "best.safetensors"
LAST_NAME = "last.safetensors"
LOG_NAME = "log.jsonl"
_FULL_RATE_INPUTS = 64
_ADDRESS_SHARE = 0.1
_LESS_DOUBT = (0.0, 2.0, 4.0, 6.0)  # shifts of the bias of trust that a validation tries


@dataclass
class TrainingConfig:
    """How long and on what; see `MemoryTrainer`. Raises ValueError for numbers that nothing can be trained with."""

    steps: int = field(default=1600, metadata={"help": "optimiser steps"})
    rows: int = field(default=16, metadata={"help": "sessions in a step of three facts; more facts, fewer sessions"})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak; linear warm-up, then a cosine to 2%"})
    warmup_steps: int = field(default=100, metadata={"help": "steps of warm-up"})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW"})
    clip_norm: float = field(default=1.0, metadata={"help": "gradient norm"})
    max_facts: int = field(default=12, metadata={"help": "facts in a session, drawn from 1 to this"})
    max_between: int = field(default=6, metadata={"help": "unrelated turns in a session, drawn from 0 to this"})
    max_untold: int = field(
        default=3, metadata={"help": "questions about things never told in a session, drawn from 0 to this"}
    )
    curriculum_steps: int = field(default=100, metadata={"help": "steps over which max_facts grows from 2"})
    keep: float = field(default=0.15, metadata={"help": "share of what is neither told nor answered that a row keeps"})
    key_dropout: float = field(
        default=0.2, metadata={"help": "share of the key layers' output dropped at every other position"}
    )
    base_weight: float = field(default=2.0, metadata={"help": "weight of staying close to the base model"})
    address_weight: float = field(default=1.0, metadata={"help": "weight of reading where the answer was written"})
    apart_weight: float = field(
        default=0.5, metadata={"help": "weight of finding an answer among what all other sessions of a step tell, too"}
    )
    write_weight: float = field(default=1.0, metadata={"help": "weight of writing what is told and nothing else"})
    speech_weight: float = field(
        default=0.3, metadata={"help": "weight of speaking at values asked for and nowhere else"}
    )
    margin: float = field(default=3.0, metadata={"help": "nats by which what memory has to say is ahead"})
    opening_weight: float = field(default=8.0, metadata={"help": "how often the first token of a reply counts"})
    floor_from: float = field(
        default=0.5,
        metadata={
            "help": "share of the steps after which learned slots that are hardly read (`persistent_floor`) are left out, as in use"
        },
    )
    validate_every: int = field(default=100, metadata={"help": "steps between validations and checkpoints"})
    seed: int = field(default=0, metadata={"help": "of sessions and sampling"})

    def __post_init__(self) -> None:
        at_least(self, 1, "rows", "max_facts", "validate_every")
        at_least(self, 0, "steps", "warmup_steps", "curriculum_steps", "max_between", "max_untold")
        at_least(self, 0, "learning_rate", "weight_decay", "clip_norm", "margin")
        at_least(
            self, 0, "base_weight", "address_weight", "apart_weight", "write_weight", "speech_weight", "opening_weight"
        )
        shares(self, "keep", "key_dropout", "floor_from")
        if self.key_dropout == 1:
            raise ValueError("key_dropout is 1: nothing would be left of the key layers' output, so take less")


class MemoryTrainer:
    """Trains `memory` on sessions recombined from a pool of facts.

    Every step draws fresh sessions, so no two are alike although each turn's hidden states are computed once.
    `validation` maps a name to fixed batches; the score is the mean share of right values, or of whole replies.

    Args:
        memory: the site to train.
        head: (V, D) output embeddings of the frozen model.
        pool, cache: sessions and the features of their turns.
        folder: receives checkpoints and `log.jsonl`; a run found there goes on where it stopped.
        report: called with a dict after every step and validation.
        about: what else a run has to have in common with the one it goes on with, in JSON.
        by_replies: score by whole replies, and end with the best checkpoint: sessions that come again may be learned by heart.
            Otherwise training ends with the last one; between validations at its end there is little but chance.
    """

    def __init__(
        self,
        memory: GRUMemoryWithDecay,
        head: Tensor,
        pool: FactPool,
        cache: FeatureCache,
        validation: dict[str, list[Batch]],
        config: TrainingConfig,
        folder: str | Path,
        report: Callable[[dict], None] | None = None,
        by_replies: bool = False,
        about: dict | None = None,
    ) -> None:
        self.memory, self.head, self.pool, self.cache, self.by_replies = memory, head, pool, cache, by_replies
        self.about = about or {}
        self.validation, self.config, self.folder = validation, config, Path(folder)
        self.report = report or (lambda values: None)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.optimizer = torch.optim.AdamW(
            [{"params": [p], "share": learning_rate_share(name, p)} for name, p in memory.named_parameters()],
            lr=config.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=config.weight_decay,
        )
        self.step, self.best, self.last, self.seconds = 0, -1.0, -1.0, 0.0

    def train(self) -> float:
        """Run to the end (or go on). Returns the validation score of the weights that are then in the memory."""
        self.resume()
        with in_mode(self.memory, training=True):
            self._run()
        if self.by_replies and (self.folder / BEST_NAME).exists():
            self.memory.load_state_dict(load_file(self.folder / BEST_NAME))
            return self.best
        return self.last

    def _run(self) -> None:
        config = self.config
        while self.step < config.steps:
            began = time.perf_counter()
            for group in self.optimizer.param_groups:
                group["lr"] = self._learning_rate() * group["share"]
            batch = self._batch()
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
            with in_mode(self.memory, training=self.step < config.floor_from * config.steps):
                outcome = self._loss(batch, generator)
            self.optimizer.zero_grad(set_to_none=True)
            outcome.loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.memory.parameters(), config.clip_norm)
            if not torch.isfinite(norm):
                raise FloatingPointError(
                    f"the gradient is not finite at step {self.step}; the checkpoint in {self.folder} is from before: "
                    "resume with a lower learning rate"
                )
            self.optimizer.step()
            self.step += 1
            self.seconds += time.perf_counter() - began
            self.report(
                {
                    "step": self.step,
                    "steps": config.steps,
                    **{part.name: getattr(outcome, part.name) for part in fields(outcome) if part.name != "loss"},
                    "tokens": batch.num_tokens,
                    "seconds": self.seconds,
                }
            )
            if self.step % config.validate_every == 0 or self.step == config.steps:
                self._checkpoint()

    def _loss(self, batch: Batch, generator: torch.Generator) -> LossReport:
        config = self.config
        return compute_loss(
            self.memory,
            self.head,
            batch,
            generator,
            config.base_weight,
            config.address_weight,
            config.write_weight,
            key_dropout=config.key_dropout,
            speech_weight=config.speech_weight,
            margin=config.margin,
            opening_weight=config.opening_weight,
            apart_weight=config.apart_weight,
        )

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """By validation set, the share of values with every token right, and of whole replies, under teacher forcing.

        A memory in training doubts more and less from one validation to the next, and is calibrated after it: what counts is the
        best of several shifts of the bias of trust.
        """
        with in_mode(self.memory, training=False):
            if not self.memory.signature_size:
                return self._scores()
            start, found = self.memory.trust[2].item(), []
            for shift in _LESS_DOUBT:
                self.memory.trust[2] = start + shift
                found.append(self._scores())
            self.memory.trust[2] = start
            return max(found, key=self._score)

    def _scores(self) -> dict[str, float]:
        scores = {}
        for name, batches in self.validation.items():
            generator = torch.Generator().manual_seed(0)
            outcomes = [
                compute_loss(self.memory, self.head, b, generator, negatives=len(self.head) * 4) for b in batches
            ]
            scores[name] = sum(o.right_values for o in outcomes) / len(outcomes)
            scores[f"{name}_replies"] = sum(o.right_answers for o in outcomes) / len(outcomes)
            scores[f"{name}_kl"] = sum(o.base_kl for o in outcomes) / len(outcomes)
        return scores

    def _score(self, scores: dict[str, float]) -> float:
        named = [f"{name}_replies" if self.by_replies else name for name in self.validation]
        return sum(map(scores.__getitem__, named)) / max(1, len(named))

    def _batch(self) -> Batch:
        config = self.config
        rng = random.Random(config.seed * 7_919 + self.step)
        grown = min(1.0, self.step / max(1, config.curriculum_steps))
        most = 2 + round((config.max_facts - 2) * grown)
        # Sessions of one step have the same make-up, so that little of the batch is padding.
        facts, between = rng.randint(1, most), rng.randint(0, config.max_between)
        untold = rng.randint(0, config.max_untold)
        rows = max(2, round(config.rows * 4 / (facts + 1 + between / 3)))
        sessions = [self.pool.session(rng, facts, between, rng.random() < 0.5, untold) for _ in range(rows)]
        return make_batch(sessions, self.cache, config.keep, rng)

    def _learning_rate(self) -> float:
        config = self.config
        if self.step < config.warmup_steps:
            return config.learning_rate * (self.step + 1) / config.warmup_steps
        done = (self.step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        return config.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))

    def _checkpoint(self) -> None:
        scores = self.validate()
        score = self.last = self._score(scores)
        weights = {k: v.detach().contiguous() for k, v in self.memory.state_dict().items()}
        if score > self.best:
            self.best = score
            if self.by_replies:
                _save(weights, self.folder / BEST_NAME, {})
        moments = {
            f"{kind}.{i}": values[kind]
            for i, values in self.optimizer.state_dict()["state"].items()
            for kind in ("exp_avg", "exp_avg_sq", "step")
        }
        progress = {"step": self.step, "best": self.best, "last": score, "seconds": self.seconds}
        progress |= {"config": asdict(self.config), "about": self.about}
        tensors = {f"memory.{k}": v for k, v in weights.items()} | {f"optimizer.{k}": v for k, v in moments.items()}
        _save(tensors, self.folder / LAST_NAME, {"progress": json.dumps(progress)})
        entry = {"step": self.step, "seconds": round(self.seconds, 1), "score": score, **scores}
        with (self.folder / LOG_NAME).open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")
        self.report({"validation": entry})

    def resume(self) -> bool:
        """Go on from the last checkpoint in the folder, if there is one. The config must be the same but for `steps`."""
        path = self.folder / LAST_NAME
        if not path.exists():
            return False
        progress = check_resumable(self.folder, self.config, self.about)
        tensors = load_file(path)
        self.memory.load_state_dict(
            {k.removeprefix("memory."): v for k, v in tensors.items() if k.startswith("memory.")}
        )
        state = self.optimizer.state_dict()
        state["state"] = {
            i: {
                # The gate's moments have its shape, which was () in earlier versions.
                **{kind: tensors[f"optimizer.{kind}.{i}"].reshape(p.shape) for kind in ("exp_avg", "exp_avg_sq")},
                "step": tensors[f"optimizer.step.{i}"],
            }
            for i, p in enumerate(self.memory.parameters())
        }
        self.optimizer.load_state_dict(state)
        self.step, self.best, self.seconds = progress["step"], progress["best"], progress["seconds"]
        self.last = progress.get("last", self.best)  # not there in checkpoints of earlier versions
        return True


def check_resumable(folder: str | Path, config: TrainingConfig, about: dict) -> dict | None:
    """What the last checkpoint of the run in `folder` says of itself, None if there is none.

    Raises:
        ValueError: it is a run with other settings than `config`, but for its steps, and `about`. What an earlier version did not
            keep decides nothing.
    """
    path = Path(folder) / LAST_NAME
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        progress = json.loads(file.metadata()["progress"])
    # Earlier versions kept little or nothing about it, left no learned slot out, and told keys apart within a session alone.
    theirs = {"floor_from": 1.0, "apart_weight": 0.0, **progress["config"], **about, **progress.get("about", {})}
    mine = {**asdict(config), **about}
    differ = {name for name in mine if mine[name] != theirs.get(name)} - {"steps"}
    if differ:
        raise ValueError(
            f"{folder} holds a run with other settings ({', '.join(sorted(differ))}): "
            "use those settings to resume it, or another folder for a new run"
        )
    return progress


def learning_rate_share(name: str, weight: Tensor) -> float:
    """What of the learning rate a parameter gets: less, the more inputs add up in one output.

    A step of Adam moves every weight alike, so what comes out moves by up to the number of inputs times as much; strengths,
    gates and values, which begin where `alignment` put them, would be blown away. As in Yang et al. 2022 (arXiv:2203.03466).
    Addresses are compared by direction alone and have the most to learn, so theirs move faster.
    """
    if name.startswith(("key", "query", "signature")):
        return _ADDRESS_SHARE if "rank" in name or name.startswith("signature") else 1.0
    return min(1.0, _FULL_RATE_INPUTS / weight.shape[-1]) if weight.dim() == 2 else 1.0


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    with replacing(path) as part:
        save_file(tensors, part, metadata)
