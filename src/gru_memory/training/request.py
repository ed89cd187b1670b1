"""What a training run is asked for, and the shape of the memory that conversations are best served by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..config import MemoryConfig
from ..limits import at_least, shares
from .trainer import TrainingConfig

BOOKS = "books"
# What sessions of facts are drawn from.
POOLS = ("pool_facts", "pool_talk", "pool_untold", "pool_general", "corrected", "replied")


@dataclass
class TrainRequest:
    """What to train, on what, and where to put it. Raises ValueError for counts that nothing can be trained with."""

    out: str = field(metadata={"help": "folder for the memory, its checkpoints and its log; resumed if there is a run"})
    model: str = field(default="smollm2", metadata={"help": "'smollm2', a folder, a .gguf file or a hub name"})
    data: str = field(
        default="facts",
        metadata={"help": "'facts'; 'books', for a memory of the texts in --books; or a JSONL file of sessions"},
    )
    memory: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "fields of `MemoryConfig` that differ from `conversation_memory`"}
    )
    training: TrainingConfig = field(default_factory=TrainingConfig)
    pool_facts: int = field(default=8000, metadata={"help": "distinct facts"})
    pool_talk: int = field(default=4000, metadata={"help": "distinct unrelated turns"})
    corrected: float = field(default=0.15, metadata={"help": "share of facts that are corrected later"})
    pool_untold: int = field(default=1500, metadata={"help": "distinct questions about things that were not told"})
    replied: int = field(default=550, metadata={"help": "turns that get the model's own reply"})
    pool_general: int = field(
        default=1600,
        metadata={
            "help": "distinct questions about the world, with the model's own replies, on which memory stays silent"
        },
    )
    books: str | None = field(
        default=None,
        metadata={
            "help": "folder of .txt files: pages on which memory stays silent, or with --data books what it learns"
        },
    )
    pages: int = field(default=1200, metadata={"help": "pages drawn from the books on which memory stays silent"})
    passages: int = field(default=2000, metadata={"help": "with --data books: passages drawn from them"})
    cache: str | None = field(default=None, metadata={"help": "folder for hidden states; `out`/cache if not given"})
    device: str | None = field(
        default=None,
        metadata={
            "help": "where the frozen model runs: 'cuda', 'cpu' ...; a GPU that torch can use if there is one, if not given (the "
            "memory itself is trained on the CPU)"
        },
    )
    bfloat16: bool = field(
        default=True, metadata={"help": "run the frozen model in bfloat16: faster on recent processors"}
    )

    def __post_init__(self) -> None:
        at_least(self, 1, "pool_facts", "passages")
        at_least(self, 0, "pool_talk", "pool_untold", "pool_general", "replied", "pages")
        shares(self, "corrected")
        talk = self.pool_talk or self.pool_general or (self.books and self.pages)
        if self.data == "facts" and self.training.max_between and not talk:
            raise ValueError(
                "there is nothing to talk about between facts: take a pool_talk or pool_general of at least 1, books and pages, or "
                "a max_between of 0"
            )


def conversation_memory(num_blocks: int, **changes: Any) -> MemoryConfig:
    """The memory that conversations are best served by, for a model of `num_blocks` blocks (see docs/decisions.md).

    50,176 numbers in slots: 24.5 KiB in four bits each, which conversations are kept in.
    """
    best = {
        # Every told token gets a slot to itself, and is found by what it was written under.
        "addressing": "content",
        "num_heads": 1,
        "num_slots": 224,
        "slot_size": 224,
        "signature_size": 128,
        "address_rank": 128,
        "persistent_slots": 64,
        "persistent_floor": 0.2,
        "decay": 0.998,
        "decay_every": "turn",
        "cell": "mingru",
        # One early block tells the tokens of a value apart, the later ones know what it is the value of.
        "key_layers": tuple(dict.fromkeys((num_blocks // 6, 4 * num_blocks // 7, 7 * num_blocks // 9))),
        "kept_in": "int4",
    }
    return MemoryConfig(**{**best, **changes})
