"""Facts, and the sessions made of them: told, perhaps corrected, talked past, and asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random

from . import attributes as attrs
from . import phrasings as p
from .attribute_lists import COMMON
from .sessions import Session, Turn
from .small_talk import sample_talk
from .vocabulary import CLOSED_KINDS, article, sample_value

OWN_SHARE = 0.5  # of the facts are about the user rather than somebody the user knows
AMERICAN_SHARE = 0.3  # of the turns are spelt the American way
ASKED_TWICE = 0.2  # of the facts of a shuffled session
ASKED_EARLY = 0.5  # of the corrected facts of a shuffled session are also asked before their correction
NEAR_SHARE = 0.5  # of the questions about things never told ask for what was told of somebody else
MAX_TRIES = 1000
_BEGINNING = 4  # letters in which values that begin alike are the same
_MANY = 4  # attributes and values of one kind for each fact of a session, so that such as do not clash are soon found
# One wording for whatever is asked, so that reply and memory have little to agree on but the value. Up to "it's" the model
# takes in what is asked for; there memory knows whether it found anything (docs/decisions.md).
ANSWER = "From what you told me, it's {}."
UNTOLD = "From what you told me, it's unknown."


@dataclass(frozen=True)
class Fact:
    """One value of one attribute; if it was corrected, `tell` told `old_value` and `value` is the new one."""

    id: str
    attribute: str
    kind: str
    value: str
    tell: Turn
    correction: Turn | None
    ask: Turn
    old_value: str | None = None


@dataclass(frozen=True)
class FactTurns:
    """A fact with all wordings it may appear in."""

    fact: Fact
    tells: tuple[Turn, ...]
    corrections: tuple[Turn, ...]
    asks: tuple[Turn, ...]
    early_asks: tuple[Turn, ...]  # the old value is the right answer until the correction

    def turns(self) -> tuple[Turn, ...]:
        return self.tells + self.corrections + self.asks + self.early_asks


@dataclass(frozen=True)
class Question:
    """A turn that asks for an attribute, whether or not it was told."""

    attribute: str
    turn: Turn

    @property
    def base(self) -> str:
        """The attribute without its owner."""
        return self.attribute.rpartition("/")[0]


class FactGenerator:
    """Facts, small talk and sessions; the same arguments give the same ones in every process.

    `values`, `phrasings` and `attributes` choose the side of each split; small talk goes with `phrasings`.
    `corrected` is the share of facts told with one value, then corrected. `accept` narrows the values down. `silent` is
    the share of told turns that get no reply. `plain` is the share of questions that are asked in the plainest words there are for
    them ("Where do I live?"), and half that share of facts are such as people tell of themselves first (`COMMON`); with
    phrasings="test" such words do not count as unseen, and there are none.
    """

    def __init__(
        self,
        seed: int = 0,
        values: str = "train",
        phrasings: str = "train",
        attributes: str = "train",
        corrected: float = 0.0,
        accept: Callable[[str], bool] | None = None,
        silent: float = p.SILENT,
        plain: float = 0.0,
    ):
        for name, split in (("values", values), ("phrasings", phrasings)):
            if split not in ("train", "test"):
                raise ValueError(f'{name} is {split!r}; use "train" or "test"')
        if not 0 <= corrected <= 1:
            raise ValueError(f"corrected is a share between 0 and 1, not {corrected}")
        if not 0 <= silent <= 1:
            raise ValueError(f"silent is a share between 0 and 1, not {silent}")
        if not 0 <= plain <= 1 or (plain and phrasings == "test"):
            raise ValueError(f"plain is a share between 0 and 1, not {plain}, and 0 with phrasings='test'")
        self.rng = Random(f"facts {seed} {values} {phrasings} {attributes}")
        self.values, self.phrasings, self.corrected, self.accept = values, phrasings, corrected, accept
        self.silent, self.plain = silent, plain
        closed = CLOSED_KINDS if values == "test" else frozenset()
        self.bases = [base for base in attrs.bases(attributes) if not closed.intersection(base.kinds)]
        self._common = [base for base in self.bases if base.id in COMMON] or self.bases
        self._attributes: dict[str, attrs.Attribute] = {}
        self._refused: set[str] = set()  # kinds of value none of which `accept` lets through
        self._count = 0

    def fact(self) -> Fact:
        """A new fact; its id is unique among the facts of this generator."""
        for _ in range(MAX_TRIES):
            common = bool(self.plain) and self.rng.random() < self.plain / 2
            base = self.rng.choice(self._common if common else self.bases)
            owner = "" if common or self.rng.random() < OWN_SHARE else self.rng.choice(base.owners)
            kind = self.rng.choice(base.kinds)
            if kind in self._refused:
                continue
            try:
                value = self._value(kind)
                old = self._value(kind, value) if self.rng.random() < self.corrected else None
            except ValueError:  # `accept` turned down every value of this kind; another kind may suit it
                self._refused.add(kind)
                continue
            if any(said.lower() in base.id for said in (value, old or value)):  # "my boat is called Boat"
                continue
            attribute = attrs.attribute(base, owner)
            self._attributes[attribute.id] = attribute
            self._count += 1
            return self._worded(f"f{self._count}", attribute, kind, value, old)
        raise ValueError("no attribute has a value that `accept` lets through; relax it")

    def reworded(self, fact: Fact) -> Fact:
        """The same fact in other words, drawn anew (they may come out the same)."""
        return self._worded(fact.id, self._attributes[fact.attribute], fact.kind, fact.value, fact.old_value)

    def fact_turns(self, tells: int = 1, asks: int = 1) -> FactTurns:
        """A new fact with up to so many distinct ways to tell and to ask it."""
        fact = self.fact()
        worded = [fact, *(self.reworded(fact) for _ in range(max(tells, asks) - 1))]
        corrections = tuple(dict.fromkeys(f.correction for f in worded[:tells] if f.correction))
        early = (self._ask(self._attributes[fact.attribute], fact.id, fact.old_value),) if fact.correction else ()
        return FactTurns(
            fact,
            tuple(dict.fromkeys(f.tell for f in worded[:tells])),
            corrections,
            tuple(dict.fromkeys(f.ask for f in worded[:asks])),
            early,
        )

    def question(self) -> Question:
        """A question, for sessions in which nobody told what it asks for."""
        fact = self.fact()
        return Question(fact.attribute, Turn(fact.ask.user, UNTOLD, learn="answer"))

    def talk(self) -> Turn:
        """A turn that tells nothing and asks for nothing told."""
        return sample_talk(self.rng, self.phrasings)

    def session(self, num_facts: int, between: int, shuffle: bool = False) -> Session:
        """Facts of distinct attributes and values with `between` turns of small talk.

        All facts are told (and corrected), then comes the talk, then the asks in random order. With `shuffle`
        all of it is interleaved at random, each ask after what it asks for, some asked twice, some before a
        correction.
        """
        chosen = _without_clashes(self.fact_turns, num_facts)
        return arrange(self.rng, chosen, [self.talk() for _ in range(between)], shuffle)

    def _value(self, kind: str, other: str = "") -> str:
        def accept(value: str) -> bool:
            return value.lower() != other.lower() and (self.accept is None or self.accept(value))

        return sample_value(kind, self.rng, self.values, accept)

    def _worded(self, id: str, attribute: attrs.Attribute, kind: str, value: str, old: str | None) -> Fact:
        tell = self._tell("tell", p.TELL, attribute.tells, id, old or value)
        correction = self._tell("correct", p.CORRECT, attribute.corrections, id, value) if old else None
        return Fact(id, attribute.id, kind, value, tell, correction, self._ask(attribute, id, value), old)

    def _choose(self, texts: dict[str, tuple[str, ...]], value: str) -> str:
        """One of the frames or replies that do not happen to contain the value ("note" is a noun, too)."""
        return self.rng.choice([text for text in texts[self.phrasings] if value.lower() not in text.lower()])

    def _tell(self, kind: str, frames: dict, cores: dict, id: str, value: str) -> Turn:
        text = p.told(self._choose(frames, value), self.rng.choice(cores[self.phrasings]))
        if self.rng.random() < AMERICAN_SHARE:
            text = p.american(text)
        reply = None if self.rng.random() < self.silent else self._choose(p.ACKNOWLEDGE, value)
        return Turn(_fill(text, value), reply, kind=kind, value=value, fact=id)

    def _ask(self, attribute: attrs.Attribute, id: str, value: str) -> Turn:
        if self.plain and self.rng.random() < self.plain:
            frame, ask = "{Q}?", attribute.asks["train"][0]
        else:
            ask, frame = self.rng.choice(attribute.asks[self.phrasings]), self._choose(p.ASK, value)
        user = p.asked(frame, ask.direct, ask.indirect)
        if self.rng.random() < AMERICAN_SHARE:
            user = p.american(user)
        return Turn(user, ANSWER.format(value), learn="answer", kind="ask", value=value, fact=id)


class FactPool:
    """A finite pool of turns, recombined into any number of sessions: work on a turn can be done once.

    `untold` are questions about things that are not told in the sessions they are asked in. In a share `alike` of the
    sessions all values are of one kind, such as dates: those are mixed up most easily. In a share `begun_alike` two facts have
    values that begin with the same letters ("northern Serbian", "northern Sinhala"): what comes next then hangs on what is asked.
    """

    def __init__(
        self,
        generator: FactGenerator,
        num_facts: int,
        num_talk: int,
        tells: int = 2,
        asks: int = 2,
        num_untold: int = 0,
        alike: float = 0.0,
        begun_alike: float = 0.0,
    ):
        if num_facts < 1:
            raise ValueError(f"a pool needs at least one fact, not {num_facts}")
        self.alike, self.begun_alike = alike, begun_alike
        self.facts = [generator.fact_turns(tells, asks) for _ in range(num_facts)]
        self.talk = [generator.talk() for _ in range(num_talk)]
        self.untold = [generator.question() for _ in range(num_untold)]

    def __len__(self) -> int:
        return len(self.facts)

    def turns(self) -> Iterator[Turn]:
        """All distinct turns that sessions of this pool are made of."""
        every = (turn for fact in self.facts for turn in fact.turns())
        return iter(dict.fromkeys([*every, *self.talk, *(question.turn for question in self.untold)]))

    def session(self, rng: Random, num_facts: int, between: int, shuffle: bool = True, num_untold: int = 0) -> Session:
        """A session of pool members, with `num_untold` questions about things not told in it among the unrelated turns.

        Half of those ask for what somebody told of another owner, as far as the pool has such. See
        `FactGenerator.session`. The pool itself never changes.
        """
        if between and not self.talk:
            raise ValueError("this pool has no small talk; make it with num_talk > 0 or ask for between=0")
        facts = self.facts
        if self.alike and rng.random() < self.alike:
            same_kind, distinct = self._by_kind[rng.choice(self.facts).fact.kind]
            facts = same_kind if distinct >= _MANY * num_facts else facts
        drawn = self._pair_begun_alike(rng) if self.begun_alike and rng.random() < self.begun_alike else []
        chosen = _without_clashes(lambda: drawn.pop() if drawn else rng.choice(facts), num_facts)
        talk = [rng.choice(self.talk) for _ in range(between)]
        told = {turns.fact.attribute for turns in chosen}
        for _ in range(num_untold if self.untold else 0):
            near = self._by_base.get(rng.choice(chosen).fact.attribute.rpartition("/")[0])
            questions = near if near and rng.random() < NEAR_SHARE else self.untold
            question = rng.choice(questions)
            if question.attribute not in told:
                talk.insert(rng.randint(0, len(talk)), question.turn)
        return arrange(rng, chosen, talk, shuffle)

    @cached_property
    def _by_kind(self) -> dict[str, tuple[list[FactTurns], int]]:
        """The facts of each kind, and how many of their attributes, or of their values if those are fewer, differ."""
        found: dict[str, list[FactTurns]] = {}
        for turns in self.facts:
            found.setdefault(turns.fact.kind, []).append(turns)
        return {
            kind: (alike, min(len({t.fact.attribute for t in alike}), len({t.fact.value for t in alike})))
            for kind, alike in found.items()
        }

    def _pair_begun_alike(self, rng: Random) -> list[FactTurns]:
        """Two facts whose values begin alike; they may still have one attribute."""
        return rng.sample(rng.choice(self._by_beginning), 2) if self._by_beginning else []

    @cached_property
    def _by_beginning(self) -> list[list[FactTurns]]:
        """Groups of at least two facts whose values begin with the same `_BEGINNING` letters and go on in another way."""
        found: dict[str, list[FactTurns]] = {}
        for turns in self.facts:
            if len(turns.fact.value) > _BEGINNING:
                found.setdefault(turns.fact.value[:_BEGINNING], []).append(turns)
        return [group for group in found.values() if len({turns.fact.value for turns in group}) > 1]

    @cached_property
    def _by_base(self) -> dict[str, list[Question]]:
        found: dict[str, list[Question]] = {}
        for question in self.untold:
            found.setdefault(question.base, []).append(question)
        return found


def arrange(rng: Random, facts: Sequence[FactTurns], talk: Sequence[Turn], shuffle: bool) -> Session:
    """Put facts and small talk in order; each fact is told in one of its wordings."""
    told, asked = [], []
    for turns in facts:
        steps = [rng.choice(turns.tells)]
        if shuffle and turns.early_asks and rng.random() < ASKED_EARLY:
            steps.append(rng.choice(turns.early_asks))
        if turns.corrections:
            steps.append(rng.choice(turns.corrections))
        told.append(steps)
        asked.append([rng.choice(turns.asks) for _ in range(1 + (shuffle and rng.random() < ASKED_TWICE))])
    if shuffle:
        turns = _merge(rng, [steps + asks for steps, asks in zip(told, asked, strict=True)] + [[turn] for turn in talk])
    else:
        turns = _merge(rng, told) + list(talk) + _merge(rng, asked)
    meta = {"facts": len(facts), "between": len(talk), "shuffle": shuffle}
    meta["corrected"] = sum(bool(fact.corrections) for fact in facts)
    return Session(tuple(turns), meta)


def _merge(rng: Random, sequences: Sequence[Sequence[Turn]]) -> list[Turn]:
    """A random interleaving that keeps the order within each sequence."""
    order = [i for i, sequence in enumerate(sequences) for _ in sequence]
    rng.shuffle(order)
    rests = [iter(sequence) for sequence in sequences]
    return [next(rests[i]) for i in order]


def _without_clashes(draw: Callable[[], FactTurns], number: int) -> list[FactTurns]:
    """`number` facts no two of which share an attribute or a value, so that every question has one answer."""
    chosen: list[FactTurns] = []
    taken: set[str] = set()
    for _ in range(MAX_TRIES + 10 * number):
        if len(chosen) == number:
            return chosen
        turns = draw()
        marks = {
            turns.fact.attribute,
            turns.fact.value.lower(),
            (turns.fact.old_value or turns.fact.value).lower(),
        }
        if taken.isdisjoint(marks):
            taken |= marks
            chosen.append(turns)
    if len(chosen) == number:
        return chosen
    raise ValueError(f"could not draw {number} facts with different attributes and values; ask for fewer per session")


def _fill(text: str, value: str) -> str:
    return text.replace("{a}", article(value)).replace("{v}", value)
