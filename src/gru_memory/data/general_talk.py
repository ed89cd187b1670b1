"""Questions and requests that any assistant hears, about the world and not about the user: memory has nothing to add.

Many are worded as people ask about themselves ("What is your star sign?", "When is Easter?"), so that a memory learns to tell
the two apart. `general_questions.py` is what evaluation asks: none of those is here, nor in one of these wordings what it is about.
"""

from __future__ import annotations

from functools import cache
from random import Random

from . import words as w
from .attribute_lists import OWNERS
from .attributes import Base, attribute, bases
from .phrasings import american, capital
from .small_talk import OPENINGS
from .vocabulary import MAX_TRIES, article, split_of

AMERICAN_SHARE = 0.3  # of the questions are spelt the American way
OPENED_SHARE = 0.2  # get one of small talk's openings ("Just curious: "), half of which are empty
YOURS_SHARE = 0.3  # ask of the assistant what others are asked of the user

# Wordings | what to put into them. Every wording takes everything of its row.
_TABLE = """
What colour is {}? / Which colour is {}? / What is the usual colour of {}? / Do you know what colour {} is? | a lemon, snow,
 blood, coal, a fire engine, an orange, milk, chocolate, a strawberry, a swan, a carrot, a stop sign, a polar bear, an
 emerald, sand, a lime, rust, the planet Mars, a blueberry, mustard, salt, a flamingo, chalk, an aubergine, copper, honey, a
 raven
What is {}? / What's {}? / Can you explain what {} is? / Tell me what {} is. / Explain {}. | osmosis, inflation, democracy, a
 noun, an atom, a fraction, evolution, a black hole, electricity, friction, yeast, jazz, a sonnet, a leap year, wifi, the
 internet, a glacier, plankton, the stock market, a verb, algebra, a molecule, an eclipse, a metaphor, insulin, a virus, the
 ozone layer
What is {} made of? / What's {} made from? | paper, cheese, steel, soap, chocolate, concrete, silk, pasta, ink, plastic,
 brass, ketchup, porcelain, beer, honey, tofu, leather, a tyre, a pencil, rubber
What is the {} in the world? / What's the {}? / Which is the {} on Earth? / Do you know the {}? | smallest planet, deepest
 lake, largest desert, largest country, oldest university, heaviest animal, tallest building, longest bridge, loudest animal,
 hardest stone, most spoken language, most popular sport, smallest bird, hottest place, coldest place, biggest island, busiest
 airport, highest waterfall, most expensive car, most common surname, oldest city, best-selling book, rarest metal
What do {} eat? / Where do {} live? / How long do {} live? / How fast are {}? / What is a group of {} called? / Tell me about
 {}. | koalas, wolves, owls, sharks, elephants, hedgehogs, ants, bats, crows, frogs, squirrels, camels, giraffes, rabbits,
 tigers
Why do {}? / Do you know why {}? / Why is it that {}? | dogs bark, birds sing, we dream, onions make us cry, people sneeze,
 stars twinkle, moths fly to lamps, fingers wrinkle in water, people blush, cows have four stomachs, we get hiccups, apples
 turn brown, ships float, children grow, bees dance, wolves howl, volcanoes erupt, people laugh
How many {}? / Do you know how many {}? / Tell me how many {}. | weeks are in a year, minutes are in a day, letters are in the
 alphabet, players are in a football team, strings does a violin have, legs does a spider have, teeth does an adult have,
 bones are in the body, keys does a piano have, sides does a triangle have, countries are in Europe, colours are in a rainbow,
 cards are in a deck, hours are in a week, players are in a chess game, stars are in the sky, calories are in an apple
How {}? | tall is Mount Kilimanjaro, tall is a giraffe, old is Rome, old is the Great Wall of China, far is Mars, far is Paris
 from Berlin, big is an ostrich egg, fast is a cheetah, deep is Lake Baikal, heavy is a blue whale, long is a marathon, long
 is the Nile's delta, high do eagles fly, cold is the South Pole, hot is the Sun, expensive is a trip to Iceland, wide is the
 Amazon
How do {}? / How exactly do {}? / Explain how {}. | magnets work, fish breathe, vaccines work, batteries work, boats stay
 upright, spiders make webs, plants drink, clouds form, lasers work, submarines dive, elevators work, bees make honey, locks
 work, engines run, rainbows form, birds find their way, computers remember things
How do I {}? / How can I {}? / What's the easiest way to {}? / Can you teach me to {}? / What do I need to {}? | make
 pancakes, remove a wine stain, whistle, fold a shirt, change a tyre, bake a cake, clean a keyboard, cook rice, reset a
 router, iron a shirt, draw a face, plant a tree, write a will, catch a fish, mend a sock, open a jar, remove a splinter, wrap
 a present, start a fire, juggle, stop hiccups, sharpen a pencil, fall asleep faster, get rid of ants, apply for a visa, ride
 a horse
How do you say "{}" in French? / How do you say "{}" in German? / What is "{}" in Italian? / What does "{}" mean? | good
 morning, please, goodbye, excuse me, I love you, good night, cheers, where is the station, happy birthday, see you tomorrow,
 well done
Who {}? / Do you know who {}? / Tell me who {}. | built the Great Wall of China, built the Taj Mahal, painted The Starry
 Night, painted Guernica, painted The Scream, invented the light bulb, invented the printing press, invented dynamite,
 invented the bicycle, invented paper, discovered radium, discovered oxygen, composed The Four Seasons, composed The Magic
 Flute, composed Swan Lake, was the first woman in space, was the first emperor of Rome, was the first king of England, first
 climbed Mount Everest, first reached the South Pole, founded Apple, won the last World Cup, runs the United Nations, is the
 queen of Denmark
Where is {}? / Where's {}? / In which country is {}? / How do I get to {}? | the Colosseum, Machu Picchu, the Grand Canyon,
 the Statue of Liberty, the Sahara, Mount Fuji, Lake Victoria, Stonehenge, the Louvre, Angkor Wat, the Dead Sea, Hollywood,
 Loch Ness, the Great Barrier Reef, the Golden Gate Bridge, Timbuktu, the Kremlin, Niagara Falls
Where {}? | does coffee come from, do bananas grow, do tulips come from, was football invented, did Columbus land, do
 lightning bolts strike most, was paper invented, do rivers begin, can I see the northern lights, does the wind come from, do
 eels breed, did the Vikings live, does gold come from
When {}? | is Easter, is Halloween, is New Year's Eve, is Thanksgiving, is Diwali, did the First World War begin, did Rome
 fall, did dinosaurs die out, was the camera invented, does spring begin, do the clocks change, is the next full moon, do
 swallows fly south, is the best time to visit Japan, is the best time to prune roses, should one sow carrots, does Ramadan
 start, was the Great Fire of London, do babies start to walk, do schools close
Which is {}? / What is {}? / Do you know which is {}? | bigger: the Sun or the Earth, heavier: iron or lead, faster: a horse
 or a dog, older: Rome or Athens, healthier: tea or coffee, better: a laptop or a tablet, colder: Mars or Venus, longer: a
 mile or a kilometre, cheaper: butter or margarine, larger: Spain or Italy, stronger: steel or glass, softer: wool or cotton
What day comes after {}? / Which day comes before {}? / What is the day after {}? | Wednesday, Friday, Saturday, Sunday,
 Thursday
Which month comes after {}? / Which month is before {}? / How many days has {}? | March, May, August, October, December,
 January
What's the weather like in {}? / What is the population of {}? / How big is {}? / What is {} famous for? / What should I see
 in {}? | Lisbon, Oslo, Cairo, Toronto, Berlin, Sydney, Moscow, Lima, Seoul, Mumbai, Dublin, Chicago, Vienna, Nairobi, Athens
{} | What day is it today?, What is today's date?, What year is it?, Which month is it?, Will it rain tomorrow?, Is it Monday
 today?, What's the news today?, Do I need an umbrella today?, What's on television tonight?, Which week of the year is it?
Can you recommend a good {}? / What is a good {}? / What's the best {}? / Suggest a {}. / I'm looking for a {}. | film,
 restaurant, song, recipe, podcast, board game, museum, wine, holiday in the mountains, gift for a child, present for a
 teacher, bicycle, phone, hotel in Rome, hobby, breakfast, password manager, course in drawing, name for a boat, name for a
 band, colour for a kitchen, newspaper
Tell me a {}. / Can you tell me a {}? / I'd like to hear a {}. | story, riddle, fun fact, fairy tale, tongue twister,
 limerick, ghost story, bedtime story, proverb, quotation, rhyme
Tell me about {}. / What do you know about {}? / Say something about {}. / Write a short text about {}. | the Vikings,
 volcanoes, the Olympic Games, chess, Ancient Egypt, the Silk Road, penguins, the Middle Ages, tea, comets, opera, the Amazon,
 robots, bridges, the Industrial Revolution, honey bees, football, the human heart, Antarctica, folk music
What is the square root of {}? / What is ten percent of {}? / What is half of {}? / Is {} a prime number? / Write {} in words.
 | 49, 64, 100, 144, 17, 90, 250, 36, 121, 1000, 48, 29, 400
What is the melting point of {}? / What is the price of {}? / What is {} used for? / Where is {} found? | iron, gold, silver,
 copper, aluminium, tin, lead, nickel, zinc, mercury, platinum
What is the plural of {}? / What rhymes with {}? / How do you spell {}? / Is {} a noun? / What does {} mean? | goose, child,
 knife, ox, tooth, wolf, leaf, foot, bus, cherry, radius, sheep
What is {}? | the speed of sound, the value of pi, the law of gravity, the distance to the Sun, the freezing point of alcohol,
 the golden ratio, the secret of happiness, the origin of the word 'robot', the formula for water, the point of art, the time
 in Beijing, the tallest tree, the number of the fire brigade, the address of the White House, the code for Germany, the date
 of the French Revolution, the name of the Greek god of war, the name of the largest moon of Saturn, the anthem of Spain, the
 job of a notary, the colour of the rainbow's inside, the language of Iran, the year of the first flight, the first book of
 the Bible
{} | Who are you?, Can you see me?, Are you alive?, Do you sleep?, Do you have feelings?, Can you cook?, What languages do you
 speak?, What are you doing?, Are you there?, What do you think about?, Do you have a family?, Can you keep a secret?, Do you
 like people?, What makes you happy?, Who do you work for?, Do you know everything?, Are you a woman or a man?, Where are you
 from?, How do you work?, Can you learn?, What do you want?, Do you have a body?, What can't you do?, When were you made?
Is {}? / Tell me: is {}? | a whale a fish, it healthy to run every day, the Earth round, a potato a root, coffee bad for the
 heart, Mars a star, glass a liquid, it safe to swim after lunch, a spider an insect, gold heavier than water, English hard to
 learn, a bat a bird, it legal to fly a drone, time travel possible
Can {}? | cats swim, parrots talk, people live on Mars, plants hear, horses sleep standing, you help me with homework, you
 write a letter, pigs fly, fish drown, one see the Great Wall from space, cows climb stairs, you count to ten
Give me {}. / I need {}. / Can you give me {}? | a name for a cat, a title for a talk, a synonym for big, an example of irony,
 a word that rhymes with light, three words with q, a list of fruits, the first ten numbers, an idea for dinner, a slogan for
 a shop, a reason to smile, a definition of love, a good password, a plan for a garden, a date in history, a random number
What should I {}? / What could I {}? / Any idea what I should {}? / What do you think I should {}? | eat for lunch, wear
 tomorrow, read on the train, bake this weekend, plant in spring, do on a rainy day, watch with the children, draw, write
 about, pack for the beach, say in a toast, buy with 50 euros, learn next, drink with fish, give up for Lent, put in a salad,
 bring to a party, visit first in Rome, ask in an interview, sing at a wedding, collect, study after school, wear in the rain,
 cook with beans, name a goldfish, do about spiders, paint on a wall, order in a Greek restaurant
What should I call my {}? / What is a good name for my {}? / Suggest a name for my {}. / How should I name my {}? | parrot,
 goldfish, band, blog, novel, hamster, horse, cafe, robot, houseplant, podcast, quiz team, rabbit, tractor, puppy, boat, new
 company, baby girl, song, garden
How do I {}? / How can I {}? / What's the best way to {}? / Can you help me to {}? | clean my shoes, train my dog, wash my car,
 water my plants, tune my guitar, fix my bike, get my cat to sleep, tidy my room, charge my phone faster, back up my laptop,
 find my keys, improve my handwriting, teach my son to swim, get my daughter to eat vegetables, thank my teacher, calm my
 baby, remember my password, choose my major, change my name, find out my star sign, check my phone number, look up my flight,
 plan my birthday, decorate my bedroom, shorten my commute, learn my lines, save my salary, insure my boat, sell my house,
 ask my neighbour for quiet, write my will, move my piano
I'm {}. What can I do? / I am {}. What should I do? / What helps when I'm {}? | bored, tired, cold, nervous, thirsty, ill, lost,
 late, angry, sleepy, lonely, new in town, in love, out of milk, stuck in traffic, afraid of flying
"""
_PEOPLE = w.word_list(
    """Napoleon, Mozart, Marie Curie, Isaac Newton, Cleopatra, Charles Darwin, Frida Kahlo, Julius Caesar, Queen Victoria,
Leonardo da Vinci, Albert Einstein, Abraham Lincoln, Marco Polo, Florence Nightingale, Galileo, Nelson Mandela, Picasso,
Charlie Chaplin, Joan of Arc, Ludwig van Beethoven, Amelia Earhart, Gandhi, Socrates, Walt Disney"""
)
_OF_PEOPLE = (
    *("When was {} born?", "Where was {} born?", "Where did {} live?", "What was the job of {}?", "Who was {}?"),
    *("What is {} known for?", "When is {}'s birthday?", "What was {}'s nickname?", "Who was {}'s teacher?"),
    *(
        "Which language did {} speak?",
        "What was {}'s first name?",
        "How old was {} at the end?",
        "Who was {} married to?",
    ),
    *("What was {}'s favourite food?", "What colour was {}'s hair?", "Did {} have a dog?", "What was {}'s address?"),
)
_OF_COUNTRIES = (
    *("Who is the president of {}?", "What is the largest city in {}?", "What currency is used in {}?"),
    *("Which language is spoken in {}?", "What is the national animal of {}?", "What is the national dish of {}?"),
    *("What are the colours of the flag of {}?", "What time is it in {}?", "What is the highest mountain in {}?"),
    *("How many people live in {}?", "Where is {}?", "What is the phone code of {}?", "What do people eat in {}?"),
)
# Evaluation asks of these.
_SPARED = w.word_list("India, Canada, Australia, Japan, Brazil, France, Switzerland, Mongolia")
_ABOUT_OWNERS = (
    *("What should I buy my {} for Christmas?", "How do I say sorry to my {}?", "What could I cook for my {}?"),
    *("What is a good present for my {}?", "How can I make my {} laugh?", "What do I do if my {} is angry with me?"),
    *("How do I write a thank-you card to my {}?", "Should I lend my {} money?", "What can I talk about with my {}?"),
)
_YOURS = ("What is your {}?", "What's your {}?", "Tell me your {}.", "Can you tell me your {}?", "Do you have {a} {}?")
_SPARED_YOURS = {"noun:name", "noun:favourite colour", "noun:age", "noun:real age", "verb:live in"}
_TURNED = {"my": "your", "I": "you", "am": "are", "was": "were", "me": "you"}


@cache
def _rows() -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
    """Wordings, and what to put into any of them."""
    rows = []
    for line in _TABLE.strip().replace("\n ", " ").splitlines():
        wordings, _, things = line.partition(" | ")
        rows.append((tuple(wordings.split(" / ")), w.word_list(things)))
    countries = tuple(sorted(set(w.CAPITALS) - set(_SPARED)))
    return (*rows, (_OF_PEOPLE, _PEOPLE), (_OF_COUNTRIES, countries), (_ABOUT_OWNERS, OWNERS))


@cache
def _yours() -> tuple[Base, ...]:
    return tuple(base for base in bases("train") if base.id not in _SPARED_YOURS)


def _asked_of_you(rng: Random) -> str:
    """What users ask about themselves, asked of the assistant."""
    base = rng.choice(_yours())
    if base.family == "noun":
        thing = base.row[0]
        return rng.choice(_YOURS).replace("{a}", article(thing)).format(thing)
    direct = rng.choice(attribute(base).asks["train"][: 3 if base.family == "called" else 1]).direct
    mine = "my" not in direct.split()  # "when was I born", but "when was my house built"
    words = [word if word == "was" and not mine else _TURNED.get(word, word) for word in direct.split()]
    return capital(" ".join(words)) + "?"


def general_questions(rng: Random, count: int, split: str = "train") -> list[str]:
    """So many distinct ones of one side of the split, which a hash of the question decides.

    Raises:
        ValueError: there are not so many.
    """
    found: dict[str, None] = {}
    since = 0  # questions drawn since there was a new one
    while len(found) < count:
        question = _question(rng)
        since += 1
        if split_of(question) == split and question not in found:
            found[question], since = None, 0
        if since > MAX_TRIES:
            raise ValueError(f"there are hardly more than {len(found)} general questions: ask for fewer than {count}")
    return list(found)


def _question(rng: Random) -> str:
    if rng.random() < YOURS_SHARE:
        question = _asked_of_you(rng)
    else:
        wordings, things = rng.choice(_rows())
        question = rng.choice(wordings).format(rng.choice(things))
    if rng.random() < AMERICAN_SHARE:
        question = american(question)
    return rng.choice(OPENINGS) + question if rng.random() < OPENED_SHARE else question
