"""Attributes a user can tell of: what is said and what is asked.

In every sentence the value `{v}` comes after the words that name the attribute, because a memory that writes
while it reads can only file a value under words it has already seen. Cores carry neither a capital nor a
stop; those come from the frame around them (`phrasings.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

from . import attribute_lists as lists
from .attribute_verbs import VERBS
from .vocabulary import split_of

PAST = "did"  # auxiliaries of a verb row; "do" is its present form
BE = {"be": ("am", "is"), "was": ("was", "was")}  # I, my sister


@dataclass(frozen=True)
class Ask:
    """One way to ask: a direct question and its indirect form."""

    direct: str
    indirect: str


@dataclass(frozen=True)
class Attribute:
    """Something of somebody, with its wordings by split: "test" ones are never used in training."""

    id: str
    family: str  # "noun", "called" or "verb"
    kinds: tuple[str, ...]  # kinds of value, see vocabulary.py
    tells: dict[str, tuple[str, ...]] = field(hash=False)
    asks: dict[str, tuple[Ask, ...]] = field(hash=False)
    corrections: dict[str, tuple[str, ...]] = field(hash=False)


@dataclass(frozen=True)
class Base:
    """An attribute without its owner; all owners' versions share one side of the train/test split."""

    id: str
    family: str
    kinds: tuple[str, ...]
    owners: tuple[str, ...]  # "" is the user
    row: tuple[str, ...]

    @property
    def split(self) -> str:
        return split_of(self.id)


@cache
def bases(split: str = "all") -> tuple[Base, ...]:
    """Every base attribute on one side of the split, or on both."""
    found = [*_noun_bases(), *_called_bases(), *_verb_bases()]
    if split not in ("train", "test", "all"):
        raise ValueError(f'attributes are split into "train", "test" or "all", not {split!r}')
    return tuple(base for base in found if split in ("all", base.split))


@cache
def attribute(base: Base, owner: str = "") -> Attribute:
    """The attribute of one owner ("" for the user, else such as "sister")."""
    tells, asks, corrections = _WORDINGS[base.family](base, f"{owner}'s " if owner else "")
    return Attribute(f"{base.id}/{owner or 'me'}", base.family, base.kinds, tells, asks, corrections)


def _owners(thing: str) -> tuple[str, ...]:
    return ("", *(owner for owner in lists.OWNERS if owner.split()[-1] not in thing.split()))


def _noun_bases():
    for kinds, things in lists.THINGS.items():
        for thing in things:
            alone = thing.startswith("!")  # makes sense for the user only
            thing = thing.removeprefix("!")
            yield Base(f"noun:{thing}", "noun", kinds, ("",) if alone else _owners(thing), (thing,))


def _called_bases():
    for manner, groups in lists.CALLED.items():
        for kinds, nouns in groups.items():
            for noun in nouns:
                yield Base(f"called:{noun}", "called", kinds, _owners(noun), (noun, manner))


def _verb_bases():
    for line in VERBS:
        kinds, *row = (cell.strip() for cell in line.split("|"))
        subject, _, _, base, _, _, tail, _ = row
        name = " ".join(part for part in (subject, base, tail) if part).replace("{a}", "a")
        yield Base(f"verb:{name}", "verb", tuple(kinds.split()), ("", *lists.OWNERS), tuple(row))


def _noun_wordings(base: Base, owner: str):
    (thing,) = base.row
    x = owner + thing
    tells = [f"my {x} is {{v}}", f"my {x} happens to be {{v}}", f"I looked up my {x} and it is {{v}}"]
    tells += [f"if anyone asks about my {x}, it is {{v}}", f"what I have as my {x} is {{v}}"]
    tells += [f"as for my {x}, it's {{v}}", f"my {x} would be {{v}}", f"I'd say my {x} is {{v}}"]
    tells += [f"my {x} has always been {{v}}", f"my {x}, that's {{v}}", f"about my {x}: it's {{v}}"]
    tells += [f"the answer to what my {x} is would be {{v}}", f"I settled on my {x}, namely {{v}}"]
    asks = [
        Ask(f"what is my {x}", f"what my {x} is"),
        Ask(f"what's my {x}", f"what my {x} is"),
        Ask(f"do you know my {x}", f"my {x}"),
        Ask(f"what would my {x} be", f"what my {x} would be"),
        Ask(f"can you name my {x}", f"the thing that is my {x}"),
        Ask(f"what did I tell you about my {x}", f"what I told you about my {x}"),
        Ask(f"what have I told you my {x} is", f"what I have told you my {x} is"),
        Ask(f"what did I mention as my {x}", f"what I mentioned as my {x}"),
        Ask(f"what do you have noted for my {x}", f"what you have noted for my {x}"),
        Ask(f"how would you answer if somebody asked about my {x}", f"what you know of my {x}"),
        Ask(f"what is it that I have as my {x}", f"what it is that I have as my {x}"),
        Ask(f"which answer did I give you for my {x}", f"which answer I gave you for my {x}"),
    ]
    unseen_tells = [f"when it comes to my {x}, it is {{v}}", f"here is my {x}, it is {{v}}"]
    unseen_asks = [
        Ask(f"what did I say my {x} is", f"what I said my {x} is"),
        Ask(f"what was my {x} again", f"what my {x} was"),
    ]
    if owner:
        possessor = owner.removesuffix("'s ")
        tells.append(f"the {thing} of my {possessor} is {{v}}")
        asks.append(
            Ask(
                f"what is the {thing} of my {possessor}",
                f"what the {thing} of my {possessor} is",
            )
        )
    corrections = [f"my {x} is {{v}}", f"my {x} is now {{v}}", f"my {x} is really {{v}}"]
    corrections += [
        f"my {x} turned out to be {{v}}",
        f"as for my {x}, it's {{v}} now",
        f"I meant to say my {x} is {{v}}",
    ]
    unseen_corrections = [f"my {x} has changed to {{v}}", f"my {x} should be {{v}}"]
    return (
        _by_split(tells, unseen_tells),
        _by_split(asks, unseen_asks),
        _by_split(corrections, unseen_corrections),
    )


def _called_wordings(base: Base, owner: str):
    noun, manner = base.row
    x, possessor = owner + noun, owner.removesuffix("'s ")
    have = f"my {possessor} has" if owner else "I have"
    tells = [f"my {x} is called {{v}}", f"the name of my {x} is {{v}}", f"my {x}'s name is {{v}}"]
    tells += [f"my {x} is known as {{v}}", f"the name my {x} has been given is {{v}}", f"people know my {x} as {{v}}"]
    tells += [f"my {x} answers to {{v}}", f"we call my {x} {{v}}", f"if you meet my {x}, say hello to {{v}}"]
    tells += [f"my {x} bears the name {{v}}", f"my {x} was given the name of {{v}}", f"my {x} was named {{v}}"]
    tells += [f"you may call my {x} {{v}}", f"my friends call my {x} {{v}}", f"they gave my {x} the name {{v}}"]
    corrections = [f"my {x} is called {{v}}", f"the name of my {x} is {{v}}", f"my {x} is now called {{v}}"]
    corrections += [f"my {x}'s name is {{v}}", f"my {x}'s real name is {{v}}", f"these days my {x} is known as {{v}}"]
    unseen_tells = [f"my {x} goes by the name {{v}}", f"everyone calls my {x} {{v}}"]
    unseen_corrections = [f"my {x} got a new name, {{v}}"]
    asks = [
        Ask(f"what is my {x} called", f"what my {x} is called"),
        Ask(f"what is the name of my {x}", f"the name of my {x}"),
        Ask(f"what's my {x}'s name", f"what my {x}'s name is"),
        Ask(f"how is my {x} called", f"how my {x} is called"),
        Ask(f"do you remember my {x}'s name", f"my {x}'s name"),
        Ask(f"what did I tell you my {x} is called", f"what I told you my {x} is called"),
        Ask(f"what have I told you my {x} is called", f"what I have told you my {x} is called"),
        Ask(f"what do people call my {x}", f"what people call my {x}"),
        Ask(f"by which name is my {x} known", f"by which name my {x} is known"),
        Ask(f"which name belongs to my {x}", f"which name belongs to my {x}"),
        Ask(f"which name did I mention for my {x}", f"which name I mentioned for my {x}"),
        Ask(f"what would one call out to greet my {x} by name", f"what my {x} answers to"),
        Ask(f"what name goes with my {x}", f"what name goes with my {x}"),
        Ask(f"what do I call my {x}", f"what I call my {x}"),
    ]
    unseen_asks = [
        Ask(f"what name does my {x} have", f"what name my {x} has"),
        Ask(f"what did I say my {x} is called", f"what I said my {x} is called"),
    ]
    if manner != "place":
        tells += [f"{have} {_a(noun)} {noun} called {{v}}", f"{have} {_a(noun)} {noun} under the name of {{v}}"]
        tells.append(f"{have} {_a(noun)} {noun} named {{v}}")
        unseen_tells.append(f"{have} {_a(noun)} {noun} by the name of {{v}}")
    if manner == "owned":
        named = f"my {possessor} named the {noun}" if owner else f"I named my {noun}"
        tells += [f"{named} {{v}}", f"{named.replace(' named ', ' christened ')} {{v}}"]
        corrections.append(f"we renamed my {x}; it is called {{v}} now")
    return (
        _by_split(tells, unseen_tells),
        _by_split(asks, unseen_asks),
        _by_split(corrections, unseen_corrections),
    )


def _verb_wordings(base: Base, owner: str):
    subject, aux, wh, verb, inflected, asked_tail, tail, moved = base.row
    possessor = owner.removesuffix("'s ")
    third = bool(subject or owner)  # "my flight", "my sister" rather than "I"
    said = f"my {owner}{subject}".strip() if subject else f"my {possessor}" if owner else "I"
    if aux in BE:
        mine = BE[aux][third]
        main, question = f"{mine} {verb}", f"{mine} {said} {verb}"
    else:
        main = inflected if third or aux == PAST else verb
        question = f"{aux if aux == PAST else 'does' if third else 'do'} {said} {verb}"
    sentence, asked = _join(said, main, tail, "{v}"), _join(said, main, asked_tail)
    tells = [sentence, f"it is a fact that {sentence}", f"it might matter later that {sentence}"]
    tells += [f"it turns out that {sentence}", f"as of today {sentence}", f"most people know that {sentence}"]
    if main.startswith("am "):
        tells.append(sentence.replace("I am ", "I'm ", 1))
    asks = [
        Ask(_join(wh, question, asked_tail), f"{wh} {asked}"),
        Ask(f"{wh} did I tell you {asked}", f"{wh} I told you {asked}"),
        Ask(f"{wh} have I told you {asked}", f"{wh} I have told you {asked}"),
        Ask(f"{wh} did I mention that {asked}", f"{wh} I mentioned that {asked}"),
        Ask(f"{wh} do you think {asked}", f"{wh} you think {asked}"),
    ]
    unseen_asks = [Ask(f"{wh} did I say {asked}", f"{wh} I said {asked}")]
    corrections = [sentence]
    if moved and not owner:
        corrections.append(moved)
    unseen_tells, unseen_corrections = (
        [f"it so happens that {sentence}"],
        [f"what is true now is that {sentence}"],
    )
    return (
        _by_split(tells, unseen_tells),
        _by_split(asks, unseen_asks),
        _by_split(corrections, unseen_corrections),
    )


_WORDINGS = {"noun": _noun_wordings, "called": _called_wordings, "verb": _verb_wordings}


def _a(noun: str) -> str:
    return "an" if noun[0] in "aeiou" and not noun.startswith("uni") else "a"


def _join(*parts: str) -> str:
    return " ".join(part.strip() for part in parts if part.strip())


def _by_split(train: list, test: list) -> dict[str, tuple]:
    return {"train": tuple(train), "test": tuple(test)}
