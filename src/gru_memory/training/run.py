"""One training run from start to finish: sessions, features of the frozen model, training, the memory on disk."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import backbones
from ..config import MemoryConfig
from ..data.books import read_books, text_paths
from ..data.facts import FactGenerator, FactPool, FactTurns
from ..data.general_talk import general_questions
from ..data.sessions import Session, Turn, read_jsonl
from ..embedded import load_model
from ..models import add_memory
from ..placement import device_for
from ..rendering import TurnRenderer
from .alignment import collect, fit_addresses, fit_read_gates, fit_strengths, fit_trust, fit_values
from .calibration import calibrate
from .features import PREFIX, FeatureCache, build_feature_cache
from .passages import PASSAGES, PassagePool, PassageTrainer, held_out_passages
from .replies import own_replies
from .rows import Batch, make_batch, turn_text
from .trainer import MemoryTrainer, TrainingConfig, check_resumable

Progress = Callable[[str, int, int], None]  # (what is being done, done, in all)

BOOKS = "books"

_PLAIN = 0.25  # share of questions in the plainest words: what people ask most often
_ALIKE = 0.3  # share of sessions whose values are all of one kind
_BEGUN_ALIKE = 0.2  # share of sessions in which two values begin with the same letters
_SILENT = 0.7  # share of told turns without a reply: replies to them are all alike, facts are not
_ALIGNED_SESSIONS = 3600  # of three facts each: what addresses and strengths begin with
_ALIGNED_SHARE = 8  # sessions of a member of a small pool: more would say the same again
_TRUSTED_SESSIONS = 160  # what trust begins with
_VALIDATION_SESSIONS = 32
_VALIDATION_GENERAL = 30  # general questions beside the 60 unrelated turns
_GENERAL_TOKENS = 24  # of a reply to a general question: memory is tempted to speak where replies begin
_CALIBRATED_BATCHES = 3  # of so many sessions, for each kind of question
_CALIBRATED_BETWEEN = 12  # turns of talk: trust falls as they wear away what is stored
_VALIDATION = {
    "values": {"values": "test"},
    "phrasings": {"values": "test", "phrasings": "test"},
    "attributes": {"values": "test", "attributes": "test"},
    "corrections": {"values": "test", "corrected": 1.0},
}


@dataclass
class TrainRequest:
    """What to train, on what, and where to put it."""

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
        default=1200,
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
    pages: int = field(default=500, metadata={"help": "pages drawn from the books on which memory stays silent"})
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
        "persistent_floor": 0.1,
        "decay": 0.998,
        "decay_every": "turn",
        "cell": "mingru",
        # One early block tells the tokens of a value apart, the later ones know what it is the value of.
        "key_layers": tuple(dict.fromkeys((num_blocks // 6, 4 * num_blocks // 7, 7 * num_blocks // 9))),
        "kept_in": "int4",
    }
    return MemoryConfig(**{**best, **changes})


class FilePool:
    """Sessions of a JSONL file, drawn whole."""

    def __init__(self, path: str | Path) -> None:
        self.sessions = list(read_jsonl(path))
        if not any(turn.learn == "answer" for s in self.sessions for turn in s.turns):
            raise ValueError(f'{path} marks nothing to learn: give the replies to learn "learn": "answer"')
        if not any(map(_asks_for_what_it_tells, self.sessions)):
            raise ValueError(
                f'{path} does not say what is told and asked for: give "value" and "fact" to the messages of users that tell '
                "something and to those that ask for it"
            )

    def __len__(self) -> int:
        return len(self.sessions)

    def turns(self) -> Iterator[Turn]:
        return iter(dict.fromkeys(turn for session in self.sessions for turn in session.turns))

    def session(
        self, rng: random.Random, num_facts: int, between: int, shuffle: bool = True, num_untold: int = 0
    ) -> Session:
        return rng.choice(self.sessions)


def _asks_for_what_it_tells(session: Session) -> bool:
    learned = [turn for turn in session.turns if turn.learn == "answer"]
    told = {mark.fact for turn in session.turns if turn not in learned for mark in turn.marks}
    told |= {mark.fact for turn in learned for mark in turn.notes}
    return any(mark.fact in told for turn in learned for mark in turn.marks)


def train(
    request: TrainRequest, report: Callable[[dict], None] | None = None, progress: Progress | None = None
) -> Path:
    """Train a memory as `request` says and write it to `request.out` with `save_memory`. Interrupted runs are resumed.

    Args:
        request: see `TrainRequest`. The memory needs `sites=("top",)`: only there can hidden states be cached.
        report: receives a dict after every step and every validation (see `MemoryTrainer`).
        progress: told how far the preparations are.

    Returns:
        the folder of the memory.
    """
    _check(request)
    out = Path(request.out)
    device = device_for(request.device)
    base, tokenizer = load_model(request.model)
    train_loaded(base.to(device), tokenizer, request, report, progress).save_memory(out, dtype=torch.float16)
    return out


def train_loaded(
    base: Any,
    tokenizer: Any,
    request: TrainRequest,
    report: Callable[[dict], None] | None = None,
    progress: Progress | None = None,
) -> Any:
    """`train` for a model that is loaded, on its device: gives it the memory, in place, and returns it.

    What `request.model` and `request.device` say does not matter.

    With `request.bfloat16` the model's weights are rounded to bfloat16.
    """
    _check(request)
    out = Path(request.out)
    out.mkdir(parents=True, exist_ok=True)
    config = _memory_config(request, len(backbones.blocks_of(base)))
    hidden_size, width = base.config.get_text_config().hidden_size, base.get_output_embeddings().weight.shape[1]
    keys = len(config.key_layers) * hidden_size + 2 * width
    config.address_rank = min(config.address_rank, keys)  # a key of a small model has no more directions
    fingerprint = f"{weights_digest(base)} {'bfloat16' if request.bfloat16 else 'float32'}"
    head = base.get_output_embeddings().weight.detach().float().cpu().clone()
    torch.manual_seed(request.training.seed)
    model = add_memory(base, config)
    memory = model.memory_sites()["top"]
    home = memory.gate.device
    memory.float().cpu()  # it is small, and its sessions come from a cache in this machine's memory
    memory.match_embeddings(head)
    if config.gate_init == 0:
        torch.nn.init.constant_(memory.gate, _training_gate(head, memory.output.in_features))
    if request.bfloat16:
        model.to(torch.bfloat16)
    folder = Path(request.cache) if request.cache else out / "cache"
    frozen = _Frozen(model, TurnRenderer(tokenizer), folder, config.key_layers, fingerprint, progress)
    train_on = _train_on_books if request.data == BOOKS else _train_on_sessions
    train_on(request, memory, head, frozen, report)
    memory.to(home)
    return model


@dataclass
class _Frozen:
    """The frozen model, and where its hidden states are kept."""

    model: Any
    renderer: TurnRenderer
    folder: Path
    key_layers: tuple[int, ...]
    fingerprint: str
    progress: Progress | None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with self.model.disable_memory(), _no_denormals():
            yield

    def features(self, name: str, turns: Iterator[Turn]) -> FeatureCache:
        model = self.model
        texts = [PREFIX, *dict.fromkeys(turn_text(turn) for turn in turns)]
        return build_feature_cache(
            self.folder, model, backbones.before_head_of(model), backbones.blocks_of(model), self.renderer, texts,
            self.key_layers, self.fingerprint, self._tell(f"hidden states: {name}"),
        )  # fmt: skip

    def replies(self, name: str, users: Sequence[str], **settings: Any) -> list[str]:
        """The model's own; see `own_replies`."""
        settings |= {"fingerprint": self.fingerprint, "progress": self._tell(f"the model's own replies: {name}")}
        return own_replies(self.folder, self.model, self.renderer, users, **settings)

    def _tell(self, what: str) -> Callable[[int, int], None] | None:
        return None if self.progress is None else partial(self.progress, what)


def _train_on_sessions(request: TrainRequest, memory, head, frozen: _Frozen, report) -> None:
    with frozen.running():
        pool, validation_pools = _pools(request, frozen)
        cache = frozen.features("training", pool.turns())
        kept = {name: (p, frozen.features(name, p.turns())) for name, p in validation_pools.items()}
        validation = {name: [_validation_batch(*pair)] for name, pair in kept.items()}
    memory.float()
    with _no_denormals():
        # The generator's answers are one wording around one value; those of a file may be anything.
        by_replies = request.data != "facts"
        settings = request.training, request.out, report, by_replies, _about(request)
        trainer = MemoryTrainer(memory, head, pool, cache, validation, *settings)
        if memory.address_rank and not trainer.resume():
            _align(memory, head, pool, cache, len(frozen.key_layers), request.training.seed, frozen.progress)
        trainer.train()
        if memory.signature_size:
            calibrate(memory, head, _calibration_batches(kept.values()))


def _train_on_books(request: TrainRequest, memory, head, frozen: _Frozen, report) -> None:
    pool, held_out = _passages(request)
    with frozen.running():
        cache = frozen.features("training", pool.turns())
        kept = frozen.features("held-out passages", held_out.turns())
    memory.float()
    with _no_denormals():
        settings = request.training, request.out, report, False, _about(request)
        trainer = PassageTrainer(memory, head, pool, cache, {"held_out": (held_out, kept)}, *settings)
        if not trainer.resume():
            trainer.begin(len(frozen.key_layers), frozen.progress)
        trainer.train()


def _check(request: TrainRequest) -> None:
    """Refuse what cannot be trained before anything is loaded."""
    config = _memory_config(request, 1)
    if tuple(config.sites) != ("top",):
        raise ValueError(f"training on cached hidden states is for sites=('top',), not {config.sites}")
    if request.data == BOOKS:
        if request.books is None:
            raise ValueError("there is nothing to learn from: name a folder of plain-text books with --books")
        if config.addressing != "content":
            raise ValueError("a memory of books finds its slots by their content: leave out --addressing learned")
        if request.passages < PASSAGES:
            raise ValueError(f"passages is {request.passages}: {PASSAGES} make a stretch, so take at least as many")
        _passages(request)
    elif request.data != "facts":
        FilePool(request.data)
    check_resumable(request.out, request.training, _about(request))


def _passages(request: TrainRequest) -> tuple[PassagePool, PassagePool]:
    """To train on, and held out."""
    seed = request.training.seed
    pool = PassagePool(request.books, request.passages, random.Random(f"passages {seed}"))
    return pool, held_out_passages(request.books, random.Random(f"held-out passages {seed}"))


def _about(request: TrainRequest) -> dict[str, Any]:
    """What makes another run of it, besides how long it trains and how fast."""
    books = [path.name for path in text_paths(request.books)] if request.books else []
    about = {"data": request.data, "memory": request.memory, "books": books}
    if request.data == BOOKS:
        about["passages"] = request.passages
    return json.loads(json.dumps(about))  # tuples come back as lists


def _memory_config(request: TrainRequest, num_blocks: int) -> MemoryConfig:
    """What `conversation_memory` is, but with books nothing that is known by heart: passages have no wording in common."""
    by_heart = {"persistent_slots": 0} if request.data == BOOKS else {}
    return conversation_memory(num_blocks, **{**by_heart, **request.memory})


def _align(memory, head, pool, cache, layers: int, seed: int, progress: Progress | None) -> None:
    """Addresses, strengths and, where values are written elsewhere, values in closed form, from whole sessions of the pool."""
    rng, count = random.Random(f"align {seed}"), min(_ALIGNED_SESSIONS, _ALIGNED_SHARE * len(pool))

    def batches(count: int, untold: int = 0) -> Iterator[Batch]:
        for done in range(0, count, 16):
            if progress:
                progress("aligning addresses", done, count)
            yield make_batch([pool.session(rng, 3, 1, shuffle=False, num_untold=untold) for _ in range(16)], cache)

    views = collect(memory, head, batches(count))
    fit_addresses(memory, views, layers=layers)
    fit_strengths(memory, head, views, _alone(pool, cache, rng, progress))
    fit_read_gates(memory, views)
    if any(mark.written for turn in pool.turns() for mark in (*turn.marks, *turn.notes)):
        fit_values(memory, views, head)
    if memory.signature_size:
        fit_trust(memory, head, batches(min(_TRUSTED_SESSIONS, count), untold=2))


def _alone(pool, cache, rng: random.Random, progress: Progress | None) -> Iterator[Batch]:
    """Every turn of a pool on its own, but questions that tell nothing, of which a tenth does."""
    turns = [turn for turn in pool.turns() if turn.learn != "answer" or turn.notes or rng.random() < 0.1]
    turns.sort(key=lambda turn: len(turn.user or "") + len(turn.assistant or ""))  # little padding
    prefix = len(cache.tokens(cache.find(PREFIX)))
    for start in range(0, len(turns), 64):
        if progress:
            progress("fitting strengths", start, len(turns))
        batch = make_batch([Session((turn,)) for turn in turns[start : start + 64]], cache)
        yield Batch(*(getattr(batch, column.name)[:, prefix:] for column in fields(batch)))


def _pools(request: TrainRequest, frozen: _Frozen) -> tuple[Any, dict[str, Any]]:
    seed = request.training.seed
    if request.data != "facts":
        pool = FilePool(request.data)
        return pool, {"sessions": pool}
    facts = FactGenerator(seed, corrected=request.corrected, silent=_SILENT, plain=_PLAIN)
    pool = FactPool(facts, request.pool_facts, request.pool_talk, 1, 1, request.pool_untold, _ALIKE, _BEGUN_ALIKE)
    rng = random.Random(f"run {seed}")
    if request.replied:
        _with_own_replies(pool, rng, request.replied, frozen)
    if request.pool_general:
        pool.talk += _general_talk(frozen, seed, request.pool_general, "train")
    if request.books:
        pool.talk += [Turn(None, page, learn="base") for page in book_pages(request.books, request.pages, rng)]
    pools = {name: FactPool(FactGenerator(seed + 1, **kind), 150, 60, 1, 1, 60) for name, kind in _VALIDATION.items()}
    if request.pool_general:
        held_out = _general_talk(frozen, seed, _VALIDATION_GENERAL, "test")
        for kept in pools.values():
            kept.talk += held_out
    return pool, pools


def _general_talk(frozen: _Frozen, seed: int, count: int, split: str) -> list[Turn]:
    """General questions of one side of the split, with what the model itself replies."""
    users = general_questions(random.Random(f"general {seed} {split}"), count, split)
    replies = frozen.replies("general questions", users, max_new_tokens=_GENERAL_TOKENS)
    return [Turn(user, reply, learn="base") for user, reply in zip(users, replies, strict=True)]


def _with_own_replies(pool, rng, count: int, frozen: _Frozen) -> None:
    """Give a share of the tells, corrections and unrelated turns the reply that the model itself would give."""
    tells = [turn for fact in pool.facts for turn in (*fact.tells, *fact.corrections)]
    chosen = rng.sample(tells, min(len(tells), count * 2 // 3))
    talk = rng.sample(range(len(pool.talk)), min(len(pool.talk), count // 3))
    users = [turn.user for turn in chosen] + [pool.talk[i].user for i in talk]
    replies = frozen.replies("told and talk", users)
    replied = {
        turn: replace(turn, assistant=reply, learn="base")
        for turn, reply in zip(chosen, replies[: len(chosen)], strict=True)
    }
    pool.facts = [
        FactTurns(
            turns.fact,
            tuple(replied.get(t, t) for t in turns.tells),
            tuple(replied.get(t, t) for t in turns.corrections),
            turns.asks,
            turns.early_asks,
        )
        for turns in pool.facts
    ]
    for i, reply in zip(talk, replies[len(chosen) :], strict=True):
        pool.talk[i] = replace(pool.talk[i], assistant=reply)


def book_pages(folder: str | Path, count: int, rng: random.Random) -> list[str]:
    """`count` passages of 200 to 1,500 characters from the .txt files of a folder."""
    books = read_books(folder)
    pages = []
    while len(pages) < count:
        book = rng.choice(books)
        start = rng.randrange(max(1, len(book) - 2000))
        page = " ".join(book[start : start + int(200 * 7.5 ** rng.random())].split())
        if len(page) > 100:
            pages.append(page)
    return pages


def _calibration_batches(kept: Iterable[tuple[Any, FeatureCache]]) -> Iterator[Batch]:
    for pair in kept:
        yield from (_validation_batch(*pair, _CALIBRATED_BETWEEN, seed) for seed in range(_CALIBRATED_BATCHES))


def _validation_batch(pool: Any, cache: FeatureCache, between: int = 3, seed: int = 5) -> Batch:
    rng = random.Random(seed)
    return make_batch(
        [pool.session(rng, 3, between, shuffle=False, num_untold=1) for _ in range(_VALIDATION_SESSIONS)], cache
    )


def _training_gate(head: torch.Tensor, width: int) -> float:
    """An initial gate at which a token that is read whole gains some 160 nats (tanh leaves 0.65 of a value's size).

    That much is needed: less than half of the heads find a token at first, the model's own likeliest one is some 10 nats
    ahead, and what the other heads find is heard as well.
    """
    return 160 / (0.65 * width * float(head.pow(2).mean().sqrt()))


def weights_digest(model: torch.nn.Module) -> str:
    """Names a set of weights by a few numbers of each tensor: cheap, and enough to tell caches apart."""
    memory = {id(p) for p in model.memory_parameters()} if hasattr(model, "memory_parameters") else set()
    own = (p for p in model.parameters() if id(p) not in memory)
    return str(round(sum(float(p.detach().double().abs().sum()) for p in own), 3))


@contextlib.contextmanager
def _no_denormals() -> Iterator[None]:
    """Sharp addresses and long decays make numbers so small that a processor computes them a hundred times slower."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
