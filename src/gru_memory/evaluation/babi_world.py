"""A world of people, places and things, and stories of it that ask for one, two or three of its facts.

It has the rules of tasks 1 to 5 of bAbI (Weston et al. 2015, 1502.05698); the simulator and its sentences are our own. A turn of
a story is one sentence. To what moves a person or a thing the model replies with what follows from it: where the person came from,
who has the thing, where it was left. Such a note is said from memory, and remembered: what a memory at the top does not know when
it writes, the model says, and then it is there to be asked for. Answers end with what was asked for; where several facts are needed
an answer says one after the other, in the words of the notes. After a fact the same token follows wherever it is told or asked for,
since what comes next is remembered with it; notes begin with the person, as the model by itself would.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from ..data.facts import ANSWER
from ..data.sessions import Mark, Session, Turn

PEOPLE = ("Mary", "John", "Sandra", "Daniel")
PLACES = ("kitchen", "garden", "bathroom", "bedroom", "office", "hallway")
THINGS = ("football", "apple", "milk")
SIDES = ("north", "south", "east", "west")
_OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
WORDS = (*PEOPLE, *PLACES, *THINGS)  # what an answer may be

_MOVES = ("went to", "walked to", "moved to", "travelled to")
_TAKES = ("picked up", "took", "grabbed")
_DROPS = ("dropped", "put down", "left")
_GIVES = ("gave", "handed", "passed")

TASKS = {
    1: "one supporting fact",
    2: "two supporting facts",
    3: "three supporting facts",
    4: "two-argument relations",
    5: "three-argument relations",
}


@dataclass
class _World:
    """Where everybody and everything is, and what a memory of the last of each would say about it."""

    place: dict[str, str] = field(default_factory=dict)  # of people
    origin: dict[tuple[str, str], str] = field(default_factory=dict)  # (person, place) -> from where, the last time
    carrier: dict[str, str] = field(default_factory=dict)  # of things that are carried
    leaver: dict[str, str] = field(default_factory=dict)  # who put a thing down last
    trail: dict[str, list[str]] = field(default_factory=dict)  # places that a thing was in, the last one now


def story(task: int, rng: Random) -> list[Turn]:
    """Turns of one story: statements, and the question with its answer last.

    Raises:
        ValueError: a number that is no task.
    """
    if task not in _STORIES:
        raise ValueError(f"{task} is no task: choose of {', '.join(map(str, TASKS))}")
    while True:
        turns = _STORIES[task](rng)
        if turns is not None:  # now and then nothing has happened that can be asked for
            return turns


def spread(turns: list[Turn], noise: list[Turn], rng: Random) -> Session:
    """A session of a story with turns of noise between its own, anywhere but before the first and after the last."""
    gaps = [rng.randrange(1, len(turns)) for _ in noise]
    mixed: list[Turn] = []
    for number, turn in enumerate(turns):
        mixed += [one for one, gap in zip(noise, gaps, strict=True) if gap == number]
        mixed.append(turn)
    return Session(tuple(mixed), {"noise": len(noise)})


def answer_in(reply: str) -> str | None:
    """What a reply says in the end: its last word that can be an answer."""
    words = "".join(letter if letter.isalpha() else " " for letter in reply).split()
    return next((word for word in reversed(words) if word in WORDS), None)


def _statement(text: str, *marks: Mark) -> Turn:
    return Turn(text, kind="tell", more=marks)


def _noted(text: str, note: str, asks: tuple[Mark, ...], tells: tuple[Mark, ...]) -> Turn:
    """A statement to which the model replies with a note, which asks for some facts and tells others."""
    return Turn(text, note, learn="answer", kind="tell", more=asks, notes=tells)


def _question(text: str, answer: str, value: str, *marks: Mark) -> Turn:
    """`value` is what is asked for; `marks` are the facts that the answer says, one after the other."""
    return Turn(text, answer, learn="answer", kind="ask", value=value, more=marks)


def _move(world: _World, person: str, rng: Random) -> Turn:
    before = world.place.get(person)
    place = rng.choice([place for place in PLACES if place != before])
    world.place[person] = place
    if before:
        world.origin[person, place] = before
    for thing, carrier in world.carrier.items():
        if carrier == person:
            world.trail.setdefault(thing, []).append(place)
    known = (Mark(f"place of {person}", before),) if before else ()
    way = (Mark(f"from where {person} came to the {place}", before),) if before else ()
    return _noted(
        f"{person} {rng.choice(_MOVES)} the {place}.",
        f"{person} came to the {place} from the {before or 'unknown'}, and is now in the {place}, as told.",
        known,
        (*way, Mark(f"place of {person}", place)),
    )


def _take(world: _World, person: str, thing: str, rng: Random) -> Turn:
    world.carrier[thing] = person
    if not world.trail.get(thing):
        world.trail[thing] = [world.place[person]]
    return _noted(
        f"{person} {rng.choice(_TAKES)} the {thing}.",
        f"{person} took it, so the {thing} is with {person}, who took it.",
        (),
        (Mark(f"carrier of {thing}", person),),
    )


def _drop(world: _World, thing: str, rng: Random) -> Turn:
    person = world.carrier.pop(thing)
    world.leaver[thing] = person
    place = world.place[person]
    return _noted(
        f"{person} {rng.choice(_DROPS)} the {thing}.",
        f"{person} left it, so the {thing} is with nobody, since it was left by {person}, and lies in the {place}, as told.",
        (Mark(f"place of {person}", place),),
        (
            Mark(f"carrier of {thing}", "nobody"),
            Mark(f"leaver of {thing}", person),
            Mark(f"place of {thing}", place),
        ),
    )


def _one_fact(rng: Random) -> list[Turn]:
    world = _World()
    turns = [_move(world, rng.choice(PEOPLE), rng) for _ in range(rng.randint(2, 8))]
    person = rng.choice(list(world.place))
    place = world.place[person]
    answer = f"{person} is now in the {place}, as told."
    return [*turns, _question(f"Where is {person}?", answer, place, Mark(f"place of {person}", place))]


def _happenings(rng: Random, length: int) -> tuple[_World, list[Turn]]:
    """People move, take things that are where they are, and drop them."""
    world = _World()
    turns: list[Turn] = []
    while len(turns) < length:
        person = rng.choice(PEOPLE)
        here = [thing for thing in THINGS if thing not in world.carrier and _within_reach(world, person, thing)]
        carried = [thing for thing, carrier in world.carrier.items() if carrier == person]
        if person in world.place and here and rng.random() < 0.5:
            turns.append(_take(world, person, rng.choice(here), rng))
        elif carried and rng.random() < 0.5:
            turns.append(_drop(world, rng.choice(carried), rng))
        else:
            turns.append(_move(world, person, rng))
    return world, turns


def _within_reach(world: _World, person: str, thing: str) -> bool:
    """Nobody has said yet where it is, or it lies where this person is."""
    return not world.trail.get(thing) or world.trail[thing][-1] == world.place.get(person)


def _two_facts(rng: Random) -> list[Turn] | None:
    world, turns = _happenings(rng, rng.randint(4, 10))
    things = [thing for thing in THINGS if world.trail.get(thing)]
    if not things:
        return None
    thing = rng.choice(things)
    place = world.trail[thing][-1]
    carrier = world.carrier.get(thing)
    if carrier is None:
        answer = f"The {thing} is with nobody, and lies in the {place}, as told."
        marks = (Mark(f"carrier of {thing}", "nobody"), Mark(f"place of {thing}", place))
    else:
        answer = f"The {thing} is with {carrier}, who is now in the {place}, as told."
        marks = (Mark(f"carrier of {thing}", carrier), Mark(f"place of {carrier}", place))
    return [*turns, _question(f"Where is the {thing}?", answer, place, *marks)]


def _three_facts(rng: Random) -> list[Turn] | None:
    world, turns = _happenings(rng, rng.randint(8, 14))
    asked = [
        (thing, trail[i - 1], trail[i]) for thing, trail in world.trail.items() for i in range(1, len(trail))
        if trail.count(trail[i]) == 1
    ]  # fmt: skip
    if not asked:
        return None
    thing, before, place = rng.choice(asked)
    # Who had it last is taken for the one who brought it there, which is wrong in one story of a hundred.
    carrier = world.carrier.get(thing)
    person = carrier or world.leaver[thing]
    marks = [Mark(f"carrier of {thing}", carrier or "nobody")]
    if carrier is None:
        marks.append(Mark(f"leaver of {thing}", person))
    if world.origin.get((person, place)) == before:
        marks.append(Mark(f"from where {person} came to the {place}", before))
    left = "" if carrier else "nobody, since it was left by "
    answer = f"The {thing} is with {left}{person}, who came to the {place} from the {before}, as told."
    return [*turns, _question(f"Where was the {thing} before the {place}?", answer, before, *marks)]


def _two_arguments(rng: Random) -> list[Turn]:
    """Two of three places in a row, the middle one in both; either of the others is asked for."""
    first, middle, last = rng.sample(PLACES, 3)
    side, other = rng.sample(SIDES, 2) if rng.random() < 0.5 else [rng.choice(SIDES)] * 2
    turns = [_relation(first, side, middle), _relation(middle, other, last)]
    rng.shuffle(turns)
    if rng.random() < 0.5:
        fact, text = f"{side} of {middle}", f"What is {side} of the {middle}?"
        return [*turns, _question(text, ANSWER.format(f"the {first}"), first, Mark(fact, first))]
    fact, text = f"{middle} is {other} of", f"What is the {middle} {other} of?"
    return [*turns, _question(text, ANSWER.format(f"the {last}"), last, Mark(fact, last))]


def _relation(first: str, side: str, second: str) -> Turn:
    return _statement(
        f"The {first} is {side} of the {second}.",
        Mark(f"{first} is {side} of", second),
        Mark(f"{side} of {second}", first, "."),
    )


def _three_arguments(rng: Random) -> list[Turn]:
    """Things change hands; who gave what to whom?"""
    world = _World()
    turns: list[Turn] = []
    given: dict[str, tuple[str, str]] = {}
    for _ in range(rng.randint(1, 4)):
        if rng.random() < 0.4:
            turns.append(_move(world, rng.choice(PEOPLE), rng))
        thing = rng.choice(THINGS)
        giver = given[thing][1] if thing in given else rng.choice(PEOPLE)
        taker = rng.choice([person for person in PEOPLE if person != giver])
        given[thing] = giver, taker
        turns.append(
            _statement(
                f"{giver} {rng.choice(_GIVES)} the {thing} to {taker}.",
                Mark(f"taker of {thing}", taker),
                Mark(f"given by {giver}", thing),
                Mark(f"giver of {thing}", giver, "."),
            )
        )
    ask: Callable[..., Turn] = rng.choice((_ask_giver, _ask_taker, _ask_thing))
    # The last one, so that nobody has to know which of several is meant.
    return [*turns, ask(thing, giver, taker)]


def _ask_giver(thing: str, giver: str, taker: str) -> Turn:
    mark = Mark(f"giver of {thing}", giver)
    return _question(f"Who gave the {thing} to {taker}?", ANSWER.format(giver), giver, mark)


def _ask_taker(thing: str, giver: str, taker: str) -> Turn:
    mark = Mark(f"taker of {thing}", taker)
    return _question(f"Who did {giver} give the {thing} to?", ANSWER.format(taker), taker, mark)


def _ask_thing(thing: str, giver: str, taker: str) -> Turn:
    mark = Mark(f"given by {giver}", thing)
    return _question(f"What did {giver} give to {taker}?", ANSWER.format(f"the {thing}"), thing, mark)


_STORIES: dict[int, Callable[[Random], list[Turn] | None]] = {
    1: _one_fact,
    2: _two_facts,
    3: _three_facts,
    4: _two_arguments,
    5: _three_arguments,
}
