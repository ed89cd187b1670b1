"""Turns about nothing personal: questions, requests, opinions, and statements that only look like facts.

A topic makes one question and its reply. A hash of the user message decides the side of the split.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from random import Random

from . import words as w
from .sessions import Turn
from .vocabulary import article, sample_value, split_of

Pair = tuple[str, str]

SYMBOLS = dict(
    zip(
        w.word_list(
            """hydrogen, helium, lithium, carbon, nitrogen, oxygen, fluorine, neon, sodium, magnesium,
aluminium, silicon, phosphorus, sulphur, chlorine, argon, potassium, calcium, titanium,
iron, nickel, copper, zinc, silver, tin, gold, lead"""
        ),
        w.word_list(
            """H, He, Li, C, N, O, F, Ne, Na, Mg, Al, Si, P, S, Cl, Ar, K, Ca, Ti, Fe, Ni, Cu, Zn, Ag, Sn,
Au, Pb"""
        ),
        strict=True,
    )
)
OPPOSITES = [
    pair.split("=")
    for pair in w.word_list(
        """hot=cold, big=small, early=late, light=dark, fast=slow, high=low, old=young, wet=dry,
loud=quiet, hard=soft, deep=shallow, wide=narrow, rich=poor, full=empty, strong=weak,
sweet=bitter, near=far, rough=smooth, brave=timid, sharp=blunt, heavy=light, open=closed,
right=wrong, thick=thin, clean=dirty, cheap=expensive, simple=complicated, generous=stingy"""
    )
]
SPANISH_GERMAN = [
    row.split("/")
    for row in w.word_list(
        """house/casa/Haus, water/agua/Wasser, bread/pan/Brot, tree/arbol/Baum, dog/perro/Hund,
cat/gato/Katze, night/noche/Nacht, day/dia/Tag, book/libro/Buch, friend/amigo/Freund,
milk/leche/Milch, door/puerta/Tuer, sea/mar/Meer, sun/sol/Sonne, moon/luna/Mond,
apple/manzana/Apfel, window/ventana/Fenster, street/calle/Strasse, fire/fuego/Feuer,
snow/nieve/Schnee, hand/mano/Hand, bridge/puente/Bruecke, table/mesa/Tisch,
flower/flor/Blume, bird/pajaro/Vogel"""
    )
]
WORKS = [
    row.split("=")
    for row in w.word_list(
        """Hamlet=William Shakespeare, Don Quixote=Miguel de Cervantes, War and Peace=Leo Tolstoy,
Emma=Jane Austen, Moby-Dick=Herman Melville, Faust=Johann Wolfgang von Goethe, The
Trial=Franz Kafka, Ulysses=James Joyce, Dracula=Bram Stoker, Frankenstein=Mary Shelley, The
Odyssey=Homer, Les Miserables=Victor Hugo, Oliver Twist=Charles Dickens, Candide=Voltaire,
Crime and Punishment=Fyodor Dostoevsky, Jane Eyre=Charlotte Bronte, The Time Machine=H. G.
Wells, Treasure Island=Robert Louis Stevenson, The Divine Comedy=Dante Alighieri, Wuthering
Heights=Emily Bronte, Middlemarch=George Eliot"""
    )
]
WHYS = {
    "the sky blue": "Air scatters blue light more than red, so blue reaches us from all over.",
    "the sea salty": "Rivers bring dissolved minerals, and the salt stays when water evaporates.",
    "ice slippery": "A very thin, loosely bound layer of water on its surface lets things slide easily.",
    "grass green": "Grass contains chlorophyll, which absorbs red and blue light and reflects green.",
    "the Moon sometimes red": "In an eclipse only light bent by our air reaches it, mostly red.",
    "bread full of holes": "Yeast makes carbon dioxide in the dough, and the bubbles stay when it is baked.",
    "the desert cold at night": "Dry air and clear skies let the ground lose its heat quickly after sunset.",
    "sleep important": "The body repairs itself and the brain sorts what it learned during the day.",
    "glass transparent": "Its electrons cannot absorb visible light, so the light passes straight through.",
    "a rainbow curved": "Droplets send each colour back at a fixed angle, which makes a circle.",
}
COUNTRIES = {city: country for country, city in w.CAPITALS.items()}
PLANETS = w.word_list("Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus, Neptune")
ORDINALS = w.word_list("first, second, third, fourth, fifth, sixth, seventh, eighth")
GREETINGS = w.word_list(
    """Hi, Hello, Hey, Good morning, Good evening, Good afternoon, Greetings, Hello again, Hi there"""
)
TASKS = w.word_list(
    """learning a language, packing a suitcase, painting a room, growing tomatoes, baking bread,
giving a speech, saving energy, running a marathon, writing a letter, cleaning windows,
choosing a bicycle, planning a party, taking photos, studying for a test, buying a used car,
moving house, keeping houseplants, sleeping better, cooking for a crowd, learning chess,
hiking in winter, reading more books, using less plastic, fixing a flat tyre, meeting new
people, staying focused, brewing coffee, sharpening knives, training a puppy, making a
budget, camping with children, speaking in public, starting a choir, sewing a button,
tidying a desk, swimming faster"""
)
TIPS = w.word_list(
    """Start small and be patient, Make a list before you begin, Give yourself enough time, Ask
somebody who has done it, Practise a little every day, Watch a short video first, Keep your
tools in good order, Do not try to be perfect, Take breaks, Write down what works, Begin
early, Find a friend to join you, Check the basics twice, Set one clear goal, Keep it
simple, Enjoy the process"""
)
THEMES = w.word_list(
    """the autumn wind, a lost umbrella, the first snow, an empty station, the old harbour, a
sleeping cat, morning coffee, a paper boat, the night train, summer rain, a forgotten
garden, the moon, a broken clock, the last bus, wild geese, a candle, fresh bread, the city
at dawn, a long bridge, fallen leaves, a quiet lake, the lighthouse, distant thunder, a red
kite, an open window, the sea"""
)
HAIKU_STARTS = w.word_list(
    """Softly it arrives, Nobody is here, Early in the day, Silence all around, Far from any road,
Over quiet roofs"""
)
HAIKU_MIDDLES = w.word_list(
    """the long evening holds its breath, one small light keeps burning on, shadows wander through
the grass"""
)
HAIKU_ENDS = w.word_list(
    """then the world goes on, time forgets its name, and we walk back home, spring will come
again, only stars remain"""
)


@cache
def _side(listed: tuple[str, ...], split: str) -> tuple[str, ...]:
    """The words of a list that may be used: one held out as a value is held out of small talk too."""
    return tuple(word for word in listed if split_of(word) == split)


def _pick(rng: Random, split: str, listed: tuple[str, ...]) -> str:
    return rng.choice(_side(listed, split))


def _thing(rng: Random, split: str) -> str:
    return sample_value("noun", rng, split)


def _capital(rng: Random, split: str) -> Pair:
    city = _pick(rng, split, tuple(COUNTRIES))
    country = COUNTRIES[city]
    return rng.choice(
        (
            (f"What is the capital of {country}?", f"The capital of {country} is {city}."),
            (f"Which country has {city} as its capital?", f"{city} is the capital of {country}."),
            (f"Is {city} in {country}?", f"Yes, {city} is the capital of {country}."),
            (
                f"The capital of {country} is {city}.",
                f"Yes, that's right. Would you like to know more about {country}?",
            ),
            (f"I read an article about {country} today.", "That sounds interesting. What was it about?"),
            (
                f"Recommend something to see in {city}.",
                "Start with the old centre, then visit a museum and a local market.",
            ),
        )
    )


def _arithmetic(rng: Random, split: str) -> Pair:
    a, b = rng.randint(2, 99), rng.randint(2, 30)
    sign, word, result = rng.choice((("+", "plus", a + b), ("-", "minus", a - b), ("x", "times", a * b)))
    ask = rng.choice((f"What is {a} {word} {b}?", f"Please calculate {a} {sign} {b}.", f"How much is {a} {word} {b}?"))
    return ask, rng.choice((f"{a} {word} {b} is {result}.", f"The result is {result}.", f"That makes {result}."))


def _chemistry(rng: Random, split: str) -> Pair:
    element, symbol = rng.choice(list(SYMBOLS.items()))
    return rng.choice(
        (
            (f"What is the chemical symbol of {element}?", f"The chemical symbol of {element} is {symbol}."),
            (f"Which element has the symbol {symbol}?", f"{symbol} stands for {element}."),
            (f"The symbol of {element} is {symbol}, right?", "Yes, that is correct."),
        )
    )


def _opposite(rng: Random, split: str) -> Pair:
    word, other = rng.choice(OPPOSITES)
    ask = rng.choice((f"What is the opposite of {word}?", f'Give me an antonym of the word "{word}".'))
    return ask, rng.choice((f'The opposite of "{word}" is "{other}".', f'You could say "{other}".'))


def _translate(rng: Random, split: str) -> Pair:
    english, spanish, german = rng.choice(SPANISH_GERMAN)
    language, word = rng.choice((("Spanish", spanish), ("German", german)))
    ask = rng.choice((f'Translate "{english}" into {language}.', f'How do you say "{english}" in {language}?'))
    return ask, rng.choice((f'"{english}" is "{word}" in {language}.', f'In {language} you say "{word}".'))


def _authors(rng: Random, split: str) -> Pair:
    work, author = rng.choice(WORKS)
    return rng.choice(
        (
            (f"Who wrote {work}?", f"{work} was written by {author}."),
            (
                f"Is {work} worth reading?",
                f"Yes, many readers love it. It is one of the best known works of {author}.",
            ),
            (
                f"I just learned that {work} was written by {author}.",
                "That's right, and it is still widely read today.",
            ),
        )
    )


def _why(rng: Random, split: str) -> Pair:
    subject, reason = rng.choice(list(WHYS.items()))
    return rng.choice((f"Why is {subject}?", f"Why is {subject}, in simple words?")), reason


def _planets(rng: Random, split: str) -> Pair:
    i = rng.randrange(len(PLANETS))
    return rng.choice(
        (
            (
                f"Which planet is the {ORDINALS[i]} from the Sun?",
                f"{PLANETS[i]} is the {ORDINALS[i]} planet from the Sun.",
            ),
            (
                f"How far out is {PLANETS[i]}?",
                f"{PLANETS[i]} is the {ORDINALS[i]} planet, counted from the Sun.",
            ),
        )
    )


def _haiku(rng: Random, split: str) -> Pair:
    theme = rng.choice(
        (
            rng.choice(THEMES),
            f"a {_pick(rng, split, w.ANIMALS)}" if rng.random() < 0.5 else f"the word {_thing(rng, split)}",
        )
    )
    ask = rng.choice((f"Write a haiku about {theme}.", f"Can you write a short poem about {theme}?"))
    return ask, f"{rng.choice(HAIKU_STARTS)},\n{rng.choice(HAIKU_MIDDLES)},\n{rng.choice(HAIKU_ENDS)}."


def _tips(rng: Random, split: str) -> Pair:
    task, number = rng.choice(TASKS), rng.choice(("two", "three"))
    tips = rng.sample(TIPS, 2 if number == "two" else 3)
    ask = rng.choice((f"Give me {number} tips for {task}.", f"Do you have {number} quick tips for {task}?"))
    return ask, " ".join(f"{i}. {tip}." for i, tip in enumerate(tips, start=1))


def _compare(rng: Random, split: str) -> Pair:
    one, two = rng.sample(_side(rng.choice((w.ANIMALS, w.INSTRUMENTS, w.HOBBIES, w.SUBJECTS, w.DISHES)), split), 2)
    ask = rng.choice(
        (
            f"What do {one} and {two} have in common?",
            f"Compare {one} and {two} for me.",
            f"Which is better, {one} or {two}?",
        )
    )
    replies = (
        "They are quite different, but each of them has its own charm.",
        f"It depends on what you are looking for; people who like {one} often like {two} too.",
        f"That is hard to say. I would start with {one} and then try {two}.",
    )
    return ask, rng.choice(replies)


def _define(rng: Random, split: str) -> Pair:
    word = _thing(rng, split)
    ask = rng.choice(
        (
            f'Use the word "{word}" in a sentence.',
            f'How many letters does "{word}" have?',
            f'Spell the word "{word}".',
        )
    )
    if ask.startswith("Use"):
        return ask, rng.choice((f"Yesterday we talked about the {word} for an hour.", f"Nobody expected the {word}."))
    if ask.startswith("How"):
        return ask, f'The word "{word}" has {len(word)} letters.'
    return ask, "-".join(word.upper()) + "."


def _recipe(rng: Random, split: str) -> Pair:
    dish = _pick(rng, split, w.DISHES)
    main = _pick(rng, split, w.INGREDIENTS)
    return rng.choice(
        (
            (
                f"How do people usually eat {dish}?",
                "Usually fresh and shared with others, often with a simple salad on the side.",
            ),
            (
                f"What can I cook with {main}?",
                f"A stew with {main} and herbs is easy, and so is a warm salad.",
            ),
            (
                f"Does {dish} go well with {main}?",
                "It can, if you season it carefully. Try a small portion first.",
            ),
            (f"Suggest a dinner with {main}.", f"How about oven-baked {main} with rice and a yoghurt sauce?"),
        )
    )


def _animals(rng: Random, split: str) -> Pair:
    one = _pick(rng, split, w.ANIMALS)
    return rng.choice(
        (
            (
                f"Tell me something about the {one}.",
                f"The {one} is well adapted to where it lives, and many stories are told about it.",
            ),
            (
                f"Would {article(one)} {one} make a good pet?",
                "Only for somebody with time, space and the right knowledge.",
            ),
            (f"What does the {one} eat?", "That depends on the season and on where it lives."),
            (
                f"There was a documentary about the {one} on television.",
                "Nature documentaries can be wonderful. Did it show anything new?",
            ),
        )
    )


def _chat(rng: Random, split: str) -> Pair:
    greeting = rng.choice(GREETINGS)
    ask, replies = rng.choice(
        (
            (
                "how are you today?",
                ("I'm doing well, thank you. How can I help?", "Very well, thanks for asking!"),
            ),
            (
                "are you a robot?",
                ("I am a language model, so not quite a robot.", "I'm a program that works with text."),
            ),
            (
                "can you tell me a joke?",
                (
                    "Why did the book go to the doctor? It had lost its spine.",
                    "I know one about paper, but it is tearable.",
                ),
            ),
            (
                "what can you do?",
                (
                    "I can answer questions, write short texts and help you think.",
                    "Ask me anything and I will try to help.",
                ),
            ),
            (
                "do you like music?",
                ("I can't hear it, but I enjoy talking about it.", "I like how people describe it."),
            ),
            (
                "it's raining again.",
                ("A good day for a book and a hot drink.", "Then an umbrella will be useful."),
            ),
            ("what a beautiful morning!", ("It does sound lovely. Enjoy it!", "I'm glad to hear that.")),
            (
                "do you ever get tired?",
                ("No, I can go on for as long as you like.", "I don't, but breaks are good for people."),
            ),
            (
                "I'm a little bored.",
                ("We could play a word game if you like.", "Shall I suggest something to read?"),
            ),
        )
    )
    return f"{greeting}, {ask}", rng.choice(replies)


def _opinion(rng: Random, split: str) -> Pair:
    topic = _pick(rng, split, rng.choice((w.HOBBIES, w.SUBJECTS, w.DISHES, w.INSTRUMENTS)))
    ask = rng.choice(
        (
            f"What do you think about {topic}?",
            f"Is {topic} overrated?",
            f"Why do so many people talk about {topic}?",
        )
    )
    replies = (
        "Opinions differ, but many people find a lot of joy in it.",
        f"I think {topic} deserves its good name.",
        "I have no taste of my own, but I understand why people care.",
        "It is a matter of habit, mostly. Try it with an open mind.",
    )
    return ask, rng.choice(replies)


def _history(rng: Random, split: str) -> Pair:
    events = {
        "the first Moon landing": "1969",
        "the fall of the Berlin Wall": "1989",
        "the French Revolution": "1789",
        "the end of the Second World War": "1945",
        "the sinking of the Titanic": "1912",
        "the first modern Olympic Games": "1896",
        "the discovery of penicillin": "1928",
        "the great fire of London": "1666",
    }
    event, year = rng.choice(list(events.items()))
    return rng.choice((f"When was {event}?", f"In which year was {event}?")), f"It was in {year}."


def _convert(rng: Random, split: str) -> Pair:
    n = rng.randint(2, 90)
    small, per, large = rng.choice(
        (
            ("minutes", 60, "hours"),
            ("days", 7, "weeks"),
            ("grams", 1000, "kilograms"),
            ("months", 12, "years"),
        )
    )
    return f"How many {small} are there in {n} {large}?", f"There are {n * per} {small} in {n} {large}."


def _sort(rng: Random, split: str) -> Pair:
    listed = rng.sample(
        _side(rng.choice((w.ANIMALS, w.COLOURS, w.INSTRUMENTS, w.JOBS, w.HOBBIES, w.LANGUAGES)), split), 3
    )
    ask = rng.choice(
        (
            f"Put these in alphabetical order: {', '.join(listed)}.",
            f"Sort these words from A to Z: {', '.join(listed)}.",
        )
    )
    return ask, f"In order: {', '.join(sorted(listed, key=str.lower))}."


def _story(rng: Random, split: str) -> Pair:
    """Statements that name things, but nothing of the user's."""
    name, place = sample_value("made_up", rng, split), sample_value("place", rng, split)
    person, title = sample_value("full_name", rng, split), sample_value("title", rng, split)
    hero = _pick(rng, split, w.JOBS)
    replies = (
        "That sounds like a story worth reading.",
        "What a good name for it.",
        "I like that detail.",
        "How does it end?",
        "Interesting, go on.",
    )
    said = (
        f"The ship in the story is called {name}.",
        f"In the film, the {hero} lives in {place}.",
        f"The {hero} in the novel is called {person}.",
        f"There is a new book out with the title {title}.",
        f"A {rng.choice(('planet', 'river', 'mountain', 'castle'))} in that game has the name {name}.",
        f"The newspaper says that {person} won the prize.",
        f"They are building a new bridge in {place}.",
        f"Did you read that {name} is the name of a new phone?",
        f"On the radio they said that {place} has a new mayor.",
        f"In the fairy tale the {_pick(rng, split, w.ANIMALS)} is called {name}.",
    )
    return rng.choice(said), rng.choice(replies)


def _jobs(rng: Random, split: str) -> Pair:
    job = _pick(rng, split, w.JOBS)
    return rng.choice(
        (
            (
                f"What does {article(job)} {job} do all day?",
                "A mix of planned work, talking to people and solving small problems.",
            ),
            (
                f"Is it hard to become {article(job)} {job}?",
                "It takes training and patience, but most people can get there.",
            ),
            (f"Write a slogan for {article(job)} {job}.", "Done with care, every single day."),
        )
    )


def _rewrite(rng: Random, split: str) -> Pair:
    one, two = _thing(rng, split), _thing(rng, split)
    return rng.choice(
        (
            (f"Make a title for a text about {one} and {two}.", f"How about: Between {one} and {two}?"),
            (
                f"Write one sentence with {one} and {two} in it.",
                f"Where there is a {one}, a {two} is not far away.",
            ),
            (f'Put "the {one} is near the {two}" into the past tense.', f'"The {one} was near the {two}."'),
            (f'Turn "there is one {one}" into a question.', f'"Is there one {one}?"'),
        )
    )


def _languages(rng: Random, split: str) -> Pair:
    language = _pick(rng, split, w.LANGUAGES)
    return rng.choice(
        (
            (
                f"Is {language} difficult to learn?",
                "That depends on the languages you already know, and on how often you practise.",
            ),
            (
                f"How can one learn {language} quickly?",
                "Listen a lot, speak early and learn the most frequent words first.",
            ),
            (
                f"Are there good books in {language}?",
                "Certainly. A library or a bookshop can point you to some.",
            ),
        )
    )


TOPICS: tuple[Callable[[Random, str], Pair], ...] = (
    *(
        _capital,
        _arithmetic,
        _chemistry,
        _opposite,
        _translate,
        _authors,
        _why,
        _planets,
        _haiku,
        _tips,
        _compare,
        _define,
    ),
    *(
        _recipe,
        _animals,
        _chat,
        _opinion,
        _history,
        _convert,
        _sort,
        _story,
        _story,
        _jobs,
        _rewrite,
        _languages,
    ),
)
OPENINGS = (
    "",
    "",
    "",
    "",
    "",
    "Quick one: ",
    "Something else: ",
    "Next: ",
    "A different question: ",
    "Just curious: ",
    "Okay, next: ",
)


def sample_talk(rng: Random, split: str = "train") -> Turn:
    """An unrelated turn, to be answered as the base model would answer it."""
    if split not in ("train", "test"):
        raise ValueError(f'no small talk for split {split!r}; use "train" or "test"')
    while True:  # a share of the messages is on either side, so this ends
        user, reply = rng.choice(TOPICS)(rng, split)
        if not user.startswith(GREETINGS):
            user = rng.choice(OPENINGS) + user
        if split_of(user) == split:
            return Turn(user, reply, learn="base", kind="talk")
