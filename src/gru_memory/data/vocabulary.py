"""Makers of values (names, places, codes, ...) by kind, with a split into train and test that never changes.

The lists of Faker and wonderwords are read directly rather than through their own random state, so that one
`random.Random` decides everything. A newer release of either may add words and so change what a seed gives;
which side of the split a value is on depends on the value alone.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import unicodedata
from collections.abc import Callable, Iterable
from functools import cache
from importlib import resources
from random import Random

from . import words as w
from .words import word_list

CLOSED_KINDS = frozenset({"weekday", "month", "zodiac", "age", "year"})  # too few values to hold any out
MAX_TRIES = 2000
TEST_PERCENT = 15
LOCALES = word_list(
    """en_US, en_GB, en_IE, en_IN, en_KE, en_NG, en_NZ, de_DE, de_AT, de_CH, fr_FR, fr_CH, es_ES, es_CO,
es_MX, es_CL, it_IT, pt_BR, pt_PT, nl_NL, nl_BE, sv_SE, no_NO, da_DK, fi_FI, pl_PL, cs_CZ, sk_SK,
sl_SI, hu_HU, hr_HR, ro_RO, tr_TR, id_ID, vi_VN, az_AZ, lt_LT, lv_LV, et_EE, yo_NG, zu_ZA, sw,
ha_NG, ig_NG, fil_PH, is_IS, ga_IE"""
)


def split_of(text: str) -> str:
    """The split a value, attribute or message belongs to for ever: a hash of its lower-cased text."""
    digest = hashlib.sha256(text.lower().encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % 100 < TEST_PERCENT else "train"


def sample_value(kind: str, rng: Random, split: str = "train", accept: Callable[[str], bool] | None = None) -> str:
    """A value of `kind` on its side of the split (closed kinds have no sides) for which `accept` holds."""
    if kind not in MAKERS:
        raise ValueError(f"unknown kind of value {kind!r}; use one of {sorted(MAKERS)}")
    if split == "test" and kind in CLOSED_KINDS:
        raise ValueError(f"kind {kind!r} has no held-out values; choose a kind outside CLOSED_KINDS")
    make = MAKERS[kind]
    for _ in range(MAX_TRIES):
        value = make(rng)
        on_side = kind in CLOSED_KINDS or split_of(value) == split
        if on_side and (accept is None or accept(value)):
            return value
    raise ValueError(f"no {split} value of kind {kind!r} was accepted in {MAX_TRIES} tries; relax `accept`")


def article(value: str) -> str:
    """The indefinite article `value` takes, by its first letter."""
    return "an" if value[0].lower() in "aeio" else "a"


def _latin(text: str) -> str | None:
    """`text` without diacritics, or None where letters of another script, brackets or stops remain."""
    plain = unicodedata.normalize("NFKD", text.translate(str.maketrans("łŁøØðıß", "lLoOdis")))
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    return plain if re.fullmatch(r"[A-Za-z]+(?:[ '-][A-Za-z]+){0,2}", plain) and 2 < len(plain) < 24 else None


def _faker(provider: str, names: Iterable[str]) -> tuple[str, ...]:
    found: set[str] = set()
    for locale in LOCALES:
        try:
            module = importlib.import_module(f"faker.providers.{provider}.{locale}")
        except ModuleNotFoundError:
            continue
        for name in names:
            listed = getattr(module.Provider, name, ())
            if isinstance(listed, (tuple, list, dict)):  # some locales compute theirs in a property
                found.update(plain for plain in map(_latin, listed) if plain and not plain.isupper())
    # Some of Faker's own lists are made from sets, whose order differs from one process to the next.
    return tuple(sorted(plain for plain in found if plain[0].isupper()))


def _wonderwords(name: str) -> tuple[str, ...]:
    assets = resources.files("wonderwords") / "assets"
    rude = set((assets / "profanitylist.txt").read_text("utf-8").split())
    lines = (assets / name).read_text("utf-8").split("\n")
    return tuple(x for x in map(str.strip, lines) if re.fullmatch(r"[a-z]{3,12}", x) and x not in rude)


@cache
def source(name: str) -> tuple[str, ...]:
    """A word list read once; these need the packages of the `train` extra."""
    try:
        return _SOURCES[name]()
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{error}; the data generators need: pip install "gru-memory[train]"') from error


def _jobs() -> tuple[str, ...]:
    """Faker's index-style titles ("Surveyor, mining") the way they are said ("mining surveyor"), and ours."""
    listed = importlib.import_module("faker.providers.job.en_US").Provider.jobs
    said = [" ".join(reversed(job.lower().split(", "))) for job in listed]
    return tuple(dict.fromkeys([*w.JOBS, *(job for job in said if re.fullmatch(r"[a-z]+( [a-z]+){0,2}", job))]))


_SOURCES: dict[str, Callable[[], tuple[str, ...]]] = {
    "first": lambda: _faker("person", ("first_names", "first_names_male", "first_names_female")),
    "last": lambda: _faker("person", ("last_names", "last_names_male", "last_names_female")),
    "city": lambda: tuple(dict.fromkeys(w.CITIES + _faker("address", ("cities", "city_names")))),
    "country": lambda: tuple(
        c for c in map(_latin, importlib.import_module("faker.providers.address.en").Provider.countries) if c
    ),
    "noun": lambda: _wonderwords("nounlist.txt"),
    "adjective": lambda: _wonderwords("adjectivelist.txt"),
    "job": _jobs,
}


def _cap(text: str) -> str:
    return text[0].upper() + text[1:]


def _maybe(rng: Random, share: float, modifiers: tuple[str, ...], base: str) -> str:
    """`base`, with a modifier before it in `share` of the draws."""
    return f"{rng.choice(modifiers)} {base}" if rng.random() < share else base


def _first(rng: Random) -> str:
    return rng.choice(source("first"))


def _surname(rng: Random) -> str:
    last = rng.choice(source("last"))
    return f"{last}-{rng.choice(source('last'))}" if rng.random() < 0.05 and " " not in last else last


def _full_name(rng: Random) -> str:
    middle = f" {_first(rng)}" if rng.random() < 0.15 else ""
    return f"{_first(rng)}{middle} {rng.choice(source('last'))}"


def _place(rng: Random) -> str:
    draw = rng.random()
    if draw < 0.25:
        return rng.choice(w.CITIES)
    if draw < 0.65:
        return rng.choice(source("city"))
    if draw < 0.9:
        return rng.choice(w.TOWN_STARTS) + rng.choice(w.TOWN_ENDS)
    return f"{rng.choice(w.TOWN_PREFIXES)} {rng.choice(source('last'))}"


def _noun(rng: Random) -> str:
    return rng.choice(source("noun"))


def _adjective_noun(rng: Random) -> str:
    return f"{_cap(rng.choice(source('adjective')))} {_cap(_noun(rng))}"


def _made_up(rng: Random) -> str:
    onsets = word_list("b,br,c,ch,d,dr,f,fl,g,gr,h,j,k,kl,l,m,n,p,pr,qu,r,s,sh,sk,st,t,th,tr,v,w,y,z,zh")
    nuclei = word_list("a,a,e,e,i,i,o,o,u,ai,ea,io,ou")
    codas = ["", "", "", "n", "r", "l", "s", "m", "x", "nd", "rk", "sk", "th"]
    parts = [rng.choice(onsets) + rng.choice(nuclei) + rng.choice(codas) for _ in range(rng.choice((2, 2, 3)))]
    return _cap("".join(parts))


def _phrase(rng: Random) -> str:
    if rng.random() < 0.5:
        return f"{rng.choice(w.PHRASE_THINGS)} {rng.choice(w.PHRASE_PLACES)}"
    adjective = rng.choice(source("adjective"))
    return f"{article(adjective)} {adjective} {_noun(rng)}" + rng.choice(("", f" {rng.choice(w.PHRASE_PLACES)}"))


def _food(rng: Random) -> str:
    draw = rng.random()
    if draw < 0.3:
        return rng.choice(w.DISHES)
    if draw < 0.65:
        return f"{rng.choice(w.COOKING)} {rng.choice(w.INGREDIENTS)}"
    return f"{rng.choice(w.FOOD_FORMS)} with {rng.choice(w.INGREDIENTS)}"


def _car(rng: Random) -> str:
    if rng.random() < 0.4:
        return rng.choice(w.CARS)
    return f"{_made_up(rng)} {rng.choice(w.CAR_FORMS)}"


def _brand(rng: Random) -> str:
    return rng.choice((_made_up, _surname, _nickname))(rng)


def _company(rng: Random) -> str:
    form = rng.randrange(5)
    if form == 0:
        return f"{_surname(rng)} & {rng.choice(('Sons', 'Daughters', 'Partners', rng.choice(source('last'))))}"
    if form == 1:
        return f"{_adjective_noun(rng)} {rng.choice(w.COMPANY_ENDS)}"
    return f"{rng.choice((_made_up, _surname, _nickname))(rng)} {rng.choice(w.COMPANY_ENDS)}"


def _nickname(rng: Random) -> str:
    return _cap(_noun(rng))


def _integer(rng: Random) -> str:
    digits = rng.randint(2, 6)
    return str(rng.randint(10 ** (digits - 1), 10**digits - 1))


def _code(rng: Random) -> str:
    letters = "ABCDEFGHJKLMNPRSTUVWXYZ"
    shape = rng.choice(("LD-DD", "LLDDD", "DDDD", "DDDDD", "LL-DDDD", "DDLD", "LLL-DD", "DDD-DDD", "LDDL"))
    picks = {"L": letters, "D": "0123456789", "-": "-"}
    return "".join(rng.choice(picks[c]) for c in shape)


def _date(rng: Random) -> str:
    day, month = rng.randint(1, 28), rng.choice(w.MONTHS)
    ending = "th" if 10 < day < 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    year = rng.randint(1950, 2035)
    return rng.choice((f"{month} {day}", f"{day} {month}", f"the {day}{ending} of {month}", f"{day} {month} {year}"))


def _time(rng: Random) -> str:
    hour, minute = rng.randint(1, 12), rng.randint(0, 59)
    return rng.choice((f"{hour}:{minute:02d} am", f"{hour}:{minute:02d} pm", f"{hour + 11:02d}:{minute:02d}"))


def _price(rng: Random) -> str:
    amount = rng.choice((f"{rng.randint(3, 1999)}", f"{rng.randint(2, 199)}.{rng.choice((25, 49, 50, 75, 90, 99))}"))
    return (
        rng.choice("$€£") + amount if rng.random() < 0.6 else f"{amount} {rng.choice(('euros', 'dollars', 'pounds'))}"
    )


def _phone(rng: Random) -> str:
    return f"{rng.randint(200, 999)}-{rng.randint(0, 9999):04d}"


def _street(rng: Random) -> str:
    return f"{rng.choice((_surname, _nickname, _nickname))(rng)} {rng.choice(w.STREET_ENDS)}"


def _title(rng: Random) -> str:
    noun, other = _nickname(rng), _nickname(rng)
    adjective = _cap(rng.choice(source("adjective")))
    forms = (
        f"The {adjective} {noun}",
        f"The {noun} of {rng.choice(source('city'))}",
        f"{noun} and {other}",
        f"The {noun} in the {other}",
        f"{_first(rng)} and the {adjective} {noun}",
        f"Goodbye {noun}",
    )
    return rng.choice(forms)


MAKERS: dict[str, Callable[[Random], str]] = {
    "first_name": _first,
    "surname": _surname,
    "full_name": _full_name,
    "place": _place,
    "country": lambda rng: rng.choice(source("country")),
    "noun": _noun,
    "nickname": _nickname,
    "adjective_noun": _adjective_noun,
    "made_up": _made_up,
    "phrase": _phrase,
    "colour": lambda rng: _maybe(rng, 0.5, w.COLOUR_SHADES, rng.choice(w.COLOURS)),
    "food": _food,
    "animal": lambda rng: _maybe(rng, 0.3, w.ANIMAL_ORIGINS, rng.choice(w.ANIMALS)),
    "job": lambda rng: _maybe(rng, 0.15, w.JOB_RANKS, rng.choice(source("job"))),
    "instrument": lambda rng: _maybe(rng, 0.3, w.INSTRUMENT_FORMS, rng.choice(w.INSTRUMENTS)),
    "language": lambda rng: _maybe(rng, 0.2, w.DIALECT_PLACES, rng.choice(w.LANGUAGES)),
    "hobby": lambda rng: _maybe(rng, 0.3, w.HOBBY_MODES, rng.choice(w.HOBBIES)),
    "subject": lambda rng: _maybe(rng, 0.4, w.SUBJECT_FIELDS, rng.choice(w.SUBJECTS)),
    "collection": lambda rng: _maybe(rng, 0.7, w.COLLECT_FORMS, rng.choice(w.COLLECTIBLES)),
    "car": _car,
    "brand": _brand,
    "company": _company,
    "event": lambda rng: f"{rng.choice((_place, _nickname))(rng)} {rng.choice(w.EVENTS)}",
    "integer": _integer,
    "code": _code,
    "date": _date,
    "time": _time,
    "price": _price,
    "phone": _phone,
    "street": _street,
    "address": lambda rng: f"{rng.randint(1, 180)} {_street(rng)}",
    "title": _title,
    "weekday": lambda rng: rng.choice(w.WEEKDAYS),
    "month": lambda rng: rng.choice(w.MONTHS),
    "zodiac": lambda rng: rng.choice(w.ZODIAC),
    "age": lambda rng: str(rng.randint(18, 97)),
    "year": lambda rng: str(rng.randint(1950, 2024)),
}
