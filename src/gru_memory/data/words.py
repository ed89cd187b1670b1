"""Word lists of this library's own, which the value makers combine with those of Faker and wonderwords."""


def word_list(text: str) -> tuple[str, ...]:
    """Words between commas, wherever the lines break."""
    return tuple(" ".join(word.split()) for word in text.split(","))


COLOURS = word_list(
    """red, blue, green, yellow, orange, purple, pink, brown, black, white, grey, turquoise, teal, maroon,
navy, beige, ivory, crimson, scarlet, magenta, lavender, lilac, indigo, violet, olive, mustard,
amber, copper, bronze, silver, gold, coral, salmon, peach, apricot, mint, emerald, jade, cyan, aqua,
azure, cobalt, sapphire, ruby, burgundy, plum, mauve, fuchsia, charcoal, slate, cream, khaki, ochre,
rust, terracotta, sand, chestnut, lime"""
)
COLOUR_SHADES = word_list(
    """dark, light, pale, bright, deep, dusty, soft, neon, smoky, warm, cool, faded, electric, matte"""
)

ANIMALS = word_list(
    """dog, cat, horse, rabbit, hamster, parrot, tortoise, goldfish, donkey, goat, sheep, llama, alpaca,
otter, beaver, badger, fox, wolf, bear, lynx, tiger, lion, leopard, cheetah, jaguar, elephant,
giraffe, zebra, rhinoceros, hippopotamus, gorilla, orangutan, lemur, meerkat, mongoose, hyena,
jackal, gazelle, antelope, bison, moose, reindeer, elk, hedgehog, squirrel, chipmunk, porcupine,
armadillo, anteater, sloth, koala, kangaroo, wombat, platypus, penguin, puffin, albatross, pelican,
heron, stork, flamingo, swan, goose, falcon, eagle, owl, raven, magpie, woodpecker, kingfisher,
hummingbird, peacock, ostrich, crocodile, iguana, gecko, chameleon, python, cobra, salamander, newt,
frog, toad, shark, dolphin, whale, orca, seal, walrus, manatee, octopus, squid, jellyfish, lobster,
crab, seahorse, stingray, salmon, trout, pike, eel, bee, butterfly, dragonfly, beetle, ladybird,
spider, scorpion, snail, ferret, guinea pig"""
)
ANIMAL_ORIGINS = word_list(
    """Arctic, African, Siberian, mountain, desert, marsh, forest, river, giant, dwarf, spotted, striped,
golden, snowy, red, grey, black, white, Andean, coastal"""
)

DISHES = word_list(
    """lasagne, risotto, paella, ramen, sushi, falafel, hummus, couscous, pierogi, goulash, borscht,
moussaka, ratatouille, quiche, fondue, raclette, tacos, burritos, enchiladas, guacamole, ceviche,
empanadas, feijoada, biryani, dal, samosas, pad thai, pho, dim sum, dumplings, spring rolls, kimchi,
bibimbap, teriyaki, tempura, gnocchi, carbonara, pesto, minestrone, gazpacho, shakshuka, tabbouleh,
kebab, pancakes, waffles, porridge, muesli, omelette, croissants, bagels, scones, shepherd's pie,
fish and chips, meatballs, schnitzel, bratwurst, pretzels, coleslaw, potato salad, baklava,
tiramisu, cheesecake, apple crumble, brownies, macarons, rice pudding, sorbet, gingerbread,
marzipan, nougat, halva, churros, popcorn, pizza, chili, jambalaya, clam chowder, gumbo, poutine"""
)
INGREDIENTS = word_list(
    """salmon, tofu, chicken, aubergine, pumpkin, lentils, chickpeas, mushrooms, spinach, leeks, beetroot,
cauliflower, halloumi, prawns, mussels, trout, duck, lamb, tempeh, sweet potatoes, asparagus,
fennel, artichokes, figs, pears, apricots, plums, cherries, mangoes, pineapple, almonds, hazelnuts,
pistachios, peanuts, walnuts, sesame, celery, mustard, tomatoes, peppers, carrots, courgettes,
broccoli, peas, parsnips, radishes, barley, oats, quinoa, goat cheese"""
)
COOKING = word_list(
    """grilled, roasted, smoked, pickled, fried, baked, stewed, steamed, marinated, caramelised, spiced,
braised"""
)
FOOD_FORMS = word_list("""soup, curry, stew, salad, pie, tart, casserole, sandwich, pasta, stir-fry, gratin, dip""")

INSTRUMENTS = word_list(
    """piano, violin, viola, cello, double bass, harp, guitar, ukulele, banjo, mandolin, lute, sitar,
zither, balalaika, flute, piccolo, recorder, oboe, clarinet, bassoon, saxophone, trumpet, cornet,
trombone, tuba, French horn, euphonium, bagpipes, accordion, concertina, harmonica, organ,
harpsichord, clavichord, drums, timpani, xylophone, marimba, vibraphone, glockenspiel, bongos,
djembe, tambourine, triangle, theremin, hurdy-gurdy, koto, shamisen, erhu, didgeridoo, kalimba,
steel drum, pan flute, ocarina, tin whistle, bouzouki, dulcimer, lyre, kora, oud, cajon, celesta"""
)
INSTRUMENT_FORMS = word_list("alto, tenor, bass, baroque, electric, soprano")

LANGUAGES = word_list(
    """English, German, French, Spanish, Italian, Portuguese, Dutch, Swedish, Norwegian, Danish, Finnish,
Icelandic, Estonian, Latvian, Lithuanian, Polish, Czech, Slovak, Slovenian, Croatian, Serbian,
Bosnian, Bulgarian, Macedonian, Romanian, Hungarian, Greek, Albanian, Turkish, Arabic, Hebrew,
Persian, Kurdish, Armenian, Georgian, Russian, Ukrainian, Belarusian, Kazakh, Uzbek, Mongolian,
Mandarin, Cantonese, Japanese, Korean, Vietnamese, Thai, Lao, Khmer, Burmese, Malay, Indonesian,
Tagalog, Hindi, Urdu, Bengali, Punjabi, Gujarati, Marathi, Tamil, Telugu, Kannada, Malayalam,
Sinhala, Nepali, Tibetan, Swahili, Zulu, Xhosa, Yoruba, Igbo, Hausa, Amharic, Somali, Afrikaans,
Maltese, Basque, Catalan, Galician, Welsh, Irish, Scots Gaelic, Breton, Luxembourgish, Frisian,
Yiddish, Latin, Esperanto, Quechua, Guarani, Nahuatl, Navajo, Hawaiian, Maori, Samoan, Tongan,
Fijian, Greenlandic, Corsican, Sardinian, Faroese, Sami"""
)
DIALECT_PLACES = word_list("northern, southern, eastern, western, old, rural, coastal, medieval")

HOBBIES = word_list(
    """gardening, pottery, knitting, crochet, embroidery, quilting, weaving, woodcarving, woodworking,
calligraphy, origami, painting, sketching, photography, birdwatching, stargazing, beekeeping,
baking, brewing, fishing, hiking, climbing, bouldering, caving, kayaking, canoeing, rowing, sailing,
surfing, windsurfing, swimming, diving, snorkelling, skiing, snowboarding, ice skating, curling,
cycling, running, orienteering, archery, fencing, judo, karate, boxing, wrestling, badminton,
tennis, squash, table tennis, volleyball, handball, basketball, cricket, rugby, football, hockey,
golf, bowling, darts, billiards, chess, bridge, poker, backgammon, juggling, magic tricks, puppetry,
improv theatre, stand-up comedy, choir singing, ballroom dancing, tango, salsa, ballet, tap dancing,
yoga, pilates, meditation, geocaching, metal detecting, stamp collecting, coin collecting, model
railways, kite flying, drone racing, blogging, creative writing, poetry, genealogy, lock picking,
soap making, candle making, glass blowing, leatherwork, bookbinding, jewellery making, mushroom
picking, horse riding, parkour, skateboarding, paragliding, gliding, trampolining"""
)
HOBBY_MODES = word_list(
    """competitive, amateur, outdoor, indoor, weekend, night-time, winter, summer, freestyle, solo"""
)

SUBJECTS = word_list(
    """biology, botany, zoology, genetics, ecology, chemistry, physics, astronomy, geology, meteorology,
oceanography, mathematics, statistics, logic, computer science, robotics, architecture, engineering,
medicine, nursing, dentistry, pharmacy, psychology, sociology, anthropology, archaeology, history,
geography, philosophy, theology, law, economics, accounting, marketing, journalism, linguistics,
literature, musicology, theatre, film, design, fashion, education, forestry, agriculture, nutrition,
logistics, politics, criminology, social work"""
)
SUBJECT_FIELDS = word_list(
    """marine, medieval, applied, comparative, theoretical, experimental, modern, ancient, clinical,
digital"""
)

JOBS = word_list(
    """nurse, baker, plumber, electrician, carpenter, teacher, librarian, gardener, florist, butcher,
tailor, watchmaker, blacksmith, locksmith, bricklayer, roofer, painter, sculptor, dancer, actor,
composer, violin maker, pilot, flight attendant, bus driver, train driver, sailor, fisherman,
lighthouse keeper, park ranger, vet, zookeeper, dentist, surgeon, midwife, paramedic, pharmacist,
optician, physiotherapist, psychologist, judge, lawyer, notary, detective, firefighter, soldier,
diplomat, translator, interpreter, journalist, editor, novelist, poet, photographer, cameraman,
sound engineer, set designer, hairdresser, barber, chef, waiter, bartender, sommelier, cheesemaker,
brewer, beekeeper, farmer, shepherd, forester, miner, welder, crane operator, astronomer, chemist,
botanist, geologist, archaeologist, historian, economist, accountant, auditor, banker, actuary,
estate agent, tour guide, hotel manager, puppeteer, clown"""
)
JOB_RANKS = word_list("senior, junior, freelance, trainee, assistant, part-time, retired, chief")

CARS = word_list(
    """Toyota Corolla, Toyota Yaris, Honda Civic, Honda Jazz, Ford Fiesta, Ford Focus, Fiat Panda, Fiat
Punto, Volkswagen Golf, Volkswagen Polo, Opel Corsa, Renault Clio, Renault Twingo, Peugeot 208,
Skoda Octavia, Skoda Fabia, Seat Ibiza, Kia Picanto, Hyundai Tucson, Mazda 3, Nissan Micra, Nissan
Leaf, Subaru Forester, Suzuki Swift, Volvo V60, Saab 900, Mini Cooper, Land Rover Defender, Jeep
Wrangler, Dacia Duster, Lada Niva, Tesla Model 3, Audi A4, Jaguar XJ, Alfa Romeo Giulia, Chevrolet
Impala, Dodge Charger, Buick Regal, Cadillac Seville, Mercedes Vito"""
)
CAR_FORMS = word_list("GT, Sport, Estate, Classic, XL, Hybrid, Coupe, 200, 350, 500, Turbo, Plus")

CITIES = word_list(
    """London, Paris, Berlin, Madrid, Rome, Vienna, Prague, Warsaw, Budapest, Athens, Lisbon, Dublin, Oslo,
Stockholm, Helsinki, Copenhagen, Brussels, Amsterdam, Zurich, Geneva, Munich, Hamburg, Cologne,
Lyon, Marseille, Naples, Milan, Turin, Venice, Seville, Valencia, Porto, Krakow, Gdansk, Riga,
Vilnius, Tallinn, Sofia, Belgrade, Zagreb, Sarajevo, Istanbul, Ankara, Cairo, Tunis, Casablanca,
Lagos, Accra, Nairobi, Kampala, Cape Town, Durban, Dakar, Addis Ababa, Tehran, Baghdad, Beirut,
Jerusalem, Dubai, Karachi, Lahore, Delhi, Mumbai, Chennai, Kolkata, Dhaka, Kathmandu, Bangkok,
Hanoi, Singapore, Jakarta, Manila, Taipei, Tokyo, Osaka, Kyoto, Seoul, Beijing, Shanghai, Sydney,
Melbourne, Perth, Auckland, Wellington, Honolulu, Vancouver, Toronto, Montreal, Seattle, Portland,
Denver, Chicago, Detroit, Boston, Baltimore, Atlanta, Miami, Houston, Dallas, Phoenix, Havana,
Bogota, Quito, Lima, La Paz, Santiago, Buenos Aires, Montevideo, Recife"""
)
TOWN_STARTS = word_list(
    """Ash, Black, Brook, Burn, Cold, Crow, Dun, East, Elder, Fair, Fern, Glen, Gold, Green, Hart, Hazel,
High, Kings, Lake, Lang, Lynd, Maple, Mill, North, Oak, Old, Raven, Red, Rook, Silver, Stone, Strat,
Thorn, West, White, Win"""
)
TOWN_ENDS = word_list(
    """bridge, brook, burgh, bury, by, dale, field, ford, gate, ham, haven, mere, mouth, port, stead, ton,
wick, wood"""
)
TOWN_PREFIXES = word_list("Port, New, Lake, Upper, Lower, Great, Little, Saint, Mount, Fort")

COLLECTIBLES = word_list(
    """stamps, coins, postcards, clocks, teapots, maps, dolls, marbles, fossils, shells, keys, bottles,
masks, records, cameras, posters, comics, puppets, buttons, thimbles, medals, matchboxes, lamps,
radios, bells, toy cars, typewriters, fountain pens, snow globes, vases, hats, tin soldiers,
compasses, mugs, spoons, badges, board games"""
)
COLLECT_FORMS = word_list(
    """old, wooden, rare, foreign, painted, silver, tiny, antique, Japanese, French, broken, glass,
Victorian, blue"""
)

PHRASE_THINGS = word_list(
    """a walk, a picnic, a long nap, a swim, a cup of tea, a good book, an evening, a bike ride, breakfast,
a bonfire, a quiet hour, a concert, a dance, a slow dinner, a game of chess, a cold beer, a sunrise,
a nap, a chat, a boat trip"""
)
PHRASE_PLACES = word_list(
    """by the river, by the sea, in the garden, in the hills, under the stars, on the beach, in the old
town, at the lake, in the attic, on the balcony, with friends, in the snow, after the rain, near the
harbour, in the forest, by the fireplace, at the market, on the roof, with the family, in the
library, before dawn, without a phone, on a train"""
)

EVENTS = word_list(
    """Marathon, Half Marathon, Triathlon, Regatta, Cup, Open, Ultra, Relay, Fun Run, Challenge, Festival,
Championship"""
)
STREET_ENDS = word_list("""Street, Road, Lane, Avenue, Way, Close, Drive, Court, Terrace, Square, Hill, Crescent""")
COMPANY_ENDS = word_list(
    """Ltd, Group, Partners, Systems, Labs, Industries, Works, Logistics, Foods, Media, Studios, Bank,
Insurance, Energy"""
)
WEEKDAYS = word_list("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
MONTHS = word_list(
    """January, February, March, April, May, June, July, August, September, October, November, December"""
)
ZODIAC = word_list(
    """Aries, Taurus, Gemini, Cancer, Leo, Virgo, Libra, Scorpio, Sagittarius, Capricorn, Aquarius, Pisces"""
)

CAPITALS = dict(
    pair.split("=")
    for pair in word_list(
        """France=Paris, Germany=Berlin, Italy=Rome, Spain=Madrid, Portugal=Lisbon, Poland=Warsaw,
Austria=Vienna, Hungary=Budapest, Greece=Athens, Norway=Oslo, Sweden=Stockholm, Finland=Helsinki,
Denmark=Copenhagen, Ireland=Dublin, Belgium=Brussels, Bulgaria=Sofia, Romania=Bucharest,
Croatia=Zagreb, Serbia=Belgrade, Estonia=Tallinn, Latvia=Riga, Lithuania=Vilnius, Iceland=Reykjavik,
Turkey=Ankara, Egypt=Cairo, Kenya=Nairobi, Ghana=Accra, Ethiopia=Addis Ababa, Morocco=Rabat,
Senegal=Dakar, Japan=Tokyo, China=Beijing, Thailand=Bangkok, Vietnam=Hanoi, Indonesia=Jakarta,
Nepal=Kathmandu, Cuba=Havana, Peru=Lima, Chile=Santiago, Colombia=Bogota, Ecuador=Quito,
Uruguay=Montevideo, Canada=Ottawa, Australia=Canberra, Jordan=Amman, Iraq=Baghdad, Iran=Tehran,
Lebanon=Beirut, Tunisia=Tunis, Mongolia=Ulaanbaatar"""
    )
)
