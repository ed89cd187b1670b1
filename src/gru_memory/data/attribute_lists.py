"""The rows attributes are made of: owners, things, called nouns and verbs."""

from .words import word_list

OWNERS = word_list(
    """sister, brother, mother, father, wife, husband, partner, daughter, son, aunt, uncle,
grandmother, grandfather, niece, nephew, cousin, stepmother, stepfather, stepbrother,
half-sister, twin sister, mother-in-law, father-in-law, brother-in-law, best friend, oldest
friend, flatmate, neighbour, neighbour upstairs, boss, manager, colleague, assistant,
business partner, team leader, dentist, doctor, lawyer, hairdresser, landlord, tutor, piano
teacher, yoga teacher, maths teacher, driving instructor, football coach, personal trainer,
classmate, pen pal, girlfriend, boyfriend, fiancee, ex-wife, ex-husband, godmother, godson,
babysitter, cleaner, accountant, younger sister, older brother, childhood friend, gardener"""
)

NAMES = ("first_name", "nickname", "made_up")
THINGS = {
    ("colour",): word_list(
        """favourite colour, lucky colour, bedroom colour, eye colour, hair colour, car colour, front
door colour, bicycle colour, umbrella colour, suitcase colour, team colour, scarf colour,
kitchen colour, least favourite colour"""
    ),
    ("date",): word_list(
        """birthday, wedding anniversary, moving date, final exam date, graduation date, name day,
driving test date, job interview date, holiday start date, surgery date, retirement date,
passport expiry date, first day of work"""
    ),
    ("time",): word_list(
        """alarm time, bedtime, shift start, lunch break, yoga class time, piano lesson time, dinner
reservation time, check-in time, jogging time, tea time, doctor's appointment time, meeting
time, school pick-up time"""
    ),
    ("integer",): word_list(
        """lottery number, house number, apartment number, hotel room number, jersey number, PIN, bus
number, lucky number, employee number, exam score, chess rating, daily step goal, race
number, office number, shoe box number, high score, queue number"""
    ),
    ("code",): word_list(
        """locker code, gate code, door code, booking code, alarm code, voucher code, ticket number,
order number, licence plate, flight number, safe combination, library card number, gift card
code, seat number, desk label, badge ID, parking space, tracking number, customer number,
membership number"""
    ),
    ("noun", "adjective_noun", "made_up", "code", "phrase"): word_list(
        """password, wifi password, safe word, secret word, passphrase, computer password, bank
password, club password"""
    ),
    NAMES: word_list(
        """nickname, stage name, pen name, middle name, old nickname, name in the game, codename, baby
name idea"""
    ),
    ("made_up", "adjective_noun", "code"): word_list("username, gamertag, radio call sign, account name"),
    ("first_name", "full_name", "made_up"): word_list("!name"),
    ("surname",): word_list("surname, maiden name, family name before the wedding"),
    ("full_name",): word_list(
        """favourite author, favourite singer, favourite actor, favourite painter, favourite composer,
favourite footballer, childhood hero, emergency contact, doubles partner, lab partner, first
love, favourite comedian, thesis advisor, role model, interviewer, biggest rival"""
    ),
    ("place",): word_list(
        """home town, dream destination, next holiday destination, favourite city, honeymoon
destination, university town, place of work, last stop, favourite village, weekend
destination, retirement place"""
    ),
    ("country",): word_list(
        """favourite country, country of birth, dream country, next country to visit, second home
country"""
    ),
    ("job",): word_list(
        """dream job, first job, previous job, side job, childhood dream job, backup career, summer
job, next job"""
    ),
    ("food",): word_list(
        """favourite food, favourite dish, favourite breakfast, comfort food, usual lunch, signature
dish, least favourite food, favourite snack, pizza topping, secret ingredient, birthday
meal, standing order, favourite soup"""
    ),
    ("animal",): word_list(
        """favourite animal, spirit animal, least favourite animal, team mascot, first pet, dream pet,
animal tattoo"""
    ),
    ("instrument",): word_list(
        """favourite instrument, first instrument, main instrument, least favourite instrument"""
    ),
    ("language",): word_list(
        """native language, second language, favourite language, worst language, language at work"""
    ),
    ("hobby",): word_list(
        """favourite hobby, favourite sport, newest hobby, secret talent, Sunday activity, childhood
hobby, way to relax, evening class, greatest skill"""
    ),
    ("subject",): word_list(
        """major, minor, favourite school subject, worst subject, thesis subject, research field"""
    ),
    ("price",): word_list(
        """monthly rent, phone bill, weekly budget, hourly wage, gym fee, train fare, grocery budget,
electricity bill, parking fine, pocket money, entry fee, insurance premium"""
    ),
    ("phone",): word_list("phone number, work number, emergency number, old phone number"),
    ("address",): word_list(
        """address, work address, old address, meeting point, delivery address, gym address, email
provider's address"""
    ),
    ("title",): word_list(
        """favourite book, favourite film, favourite song, favourite poem, favourite series, favourite
game, thesis title, first novel, current read, favourite album, favourite painting,
ringtone, favourite play, next talk"""
    ),
    ("phrase",): word_list(
        """idea of a perfect Sunday, best memory, happy place, greatest wish, idea of luxury, favourite
treat, plan for tonight, weekend plan, reward after work, birthday wish"""
    ),
    ("noun",): word_list(
        """favourite word, favourite object, lucky charm, least favourite word, favourite gift,
costume, design theme"""
    ),
    ("company", "brand"): word_list(
        """bank, phone provider, internet provider, favourite shop, favourite airline, dream employer,
insurance company, first employer, favourite brand, letting agency, energy supplier, tailor
of choice"""
    ),
    ("car",): word_list("first car, dream car, rental car, favourite car, next car, company car"),
    ("brand",): word_list(
        """phone brand, laptop brand, favourite perfume, toothpaste brand, coffee brand, running shoe
brand, beer brand"""
    ),
    ("street",): word_list("bus stop, street, childhood street, favourite street, tram stop"),
    ("weekday",): word_list("day off, laundry day, gym day, cleaning day, rubbish day, favourite weekday"),
    ("month",): word_list("favourite month, holiday month, busiest month"),
    ("zodiac",): word_list("star sign"),
    ("age",): word_list("age, real age"),
    ("year",): word_list("graduation year, year of birth"),
}

PEOPLE = ("first_name", "first_name", "full_name", "made_up")
PETS = ("first_name", "nickname", "made_up", "adjective_noun")
PROPER = ("adjective_noun", "made_up", "title", "nickname")
# How a noun gets its name: "owned" ones from their owner, "people" are only had, a "place" is neither.
CALLED = {
    "owned": {
        PETS: word_list(
            """dog, cat, horse, pony, parrot, hamster, rabbit, goldfish, tortoise, guinea pig, ferret,
donkey, goat, kitten, puppy, canary, budgie, snake, lizard, rat, pig, cow, sheep, llama,
rooster, hen, duck, turtle, spider, gecko"""
        ),
        PROPER: word_list(
            """boat, yacht, canoe, band, choir, quiz team, football team, chess club, blog, podcast,
newsletter, house, farm, cottage, garden, tree house, teddy bear, doll, robot, drone,
guitar, violin, bicycle, motorbike, car, van, caravan, tractor, laptop, computer, server,
video channel, comic, novel, play, short story, board game, video game, app, project,
recipe, cocktail, dance troupe, theatre group, racehorse, kite, houseplant, snowman, puppet,
spaceship model, secret island"""
        ),
        ("company", "adjective_noun", "made_up"): word_list(
            """company, startup, shop, bakery, restaurant, bar, studio, charity, gallery"""
        ),
    },
    "people": {
        PEOPLE: word_list(
            """sister, brother, son, daughter, cousin, uncle, aunt, niece, nephew, boss, doctor, dentist,
teacher, neighbour, landlord, lawyer, hairdresser, flatmate, colleague, best friend, tutor,
plumber, coach, therapist, accountant, gardener, babysitter, vet, pharmacist, optician,
professor, supervisor, secretary, business partner, godmother, piano teacher, cleaner,
tailor, postman, physiotherapist"""
        ),
    },
    "place": {
        ("street", "surname", "made_up"): word_list("first street, neighbourhood, housing estate"),
        PROPER: word_list(
            """school, kindergarten, high school, university, hospital, hotel, church, library, local pub,
favourite cafe, gym, cinema, swimming pool, office building, train station, ferry, favourite
park, holiday resort, sailing club, golf course"""
        ),
    },
}

# kinds | subject | auxiliary | question word | verb | inflected | tail asked | tail told | own correction
VERBS = """
place | | do | where | live | lives | | in | I moved to {v}
job | | do | what | work | works | as | as {a} | I have changed jobs and now work as {a} {v}
company | | do | who | work | works | for | for | I changed employer and now work for {v}
car | | do | what car | drive | drives | | {a} | I sold the car I had and now drive {a} {v}
instrument | | do | which instrument | play | plays | | the | I gave that up and now play the {v}
language | | do | which language | want to learn | wants to learn | | |
language | | do | which language | speak | speaks | | |
subject | | do | what | study | studies | | | I changed course and now study {v}
collection | | do | what | collect | collects | | |
hobby | | do | which hobby | practise | practises | | |
hobby | | do | what | teach | teaches | | |
animal | | do | which animal | dream of | dreams of | | the |
animal | | do | which animal | want to adopt | wants to adopt | | {a} |
food | | do | what | hate | hates | | |
food | | do | what | love to eat | loves to eat | | |
food | | do | what | sell | sells | | |
full_name first_name | | do | who | admire | admires | | |
full_name first_name | | do | who | trust | trusts | | |
full_name first_name | | do | who | share | shares | an office with | an office with |
full_name first_name | | do | who | report | reports | to | to |
title | | do | which book | recommend | recommends | | |
place | | do | where | want to retire | wants to retire | | in |
place | | do | where | spend the summer | spends the summer | | in |
place | | do | where | commute | commutes | from | from |
street | | do | which street | walk | walks | along | along |
company | | do | which company | own | owns | shares of | shares of |
company | | do | who | owe | owes | money to | money to |
price | | do | how much | earn | earns | | |
price | | do | how much | charge | charges | | |
time | | do | when | get up | gets up | | at |
time | | do | when | go to bed | goes to bed | | at |
time | | do | when | finish work | finishes work | | at |
time | flight | do | when | leave | leaves | | at | my flight was moved and now leaves at {v}
time | train | do | when | depart | departs | | at | my train is late and now departs at {v}
time | bus | do | when | arrive | arrives | | at |
time | shop | do | when | open | opens | | at |
time | class | do | when | start | starts | | at |
date | lease | do | when | end | ends | | on |
date | passport | do | when | expire | expires | | on |
date | holiday | do | when | begin | begins | | on |
date | visa | do | when | run out | runs out | | on |
price | rent | do | how much | come | comes | to | to |
price | bike | do | how much | cost | costs | | |
place | cruise | do | where | stop | stops | first | first, in |
place | parcel | do | where | come | comes | from | from |
place | | did | where | grow up | grew up | | in |
place | | did | where | move here | moved here | from | from |
place | | did | where | go to school | went to school | | in |
place | | did | where | learn to swim | learned to swim | | in |
place | | did | where | get married | got married | | in |
place | | did | where | lose the keys | lost the keys | | in |
place country | | did | where | spend the last holiday | spent the last holiday | | in |
date | | did | when | quit smoking | quit smoking | | on |
date | | did | when | move in | moved in | | on |
year | | did | when | graduate | graduated | | in |
colour | | did | what colour | paint the kitchen | painted the kitchen | | |
food | | did | what | order | ordered | | |
food | | did | what | cook | cooked | | |
animal | | did | which animal | adopt | adopted | | {a} |
animal | | did | which animal | draw | drew | | {a} |
full_name | | did | who | vote for | voted for | | |
full_name first_name | | did | who | invite | invited | | |
full_name first_name | | did | who | lend the ladder | lent the ladder | to | to |
company | | did | which company | invest in | invested in | | |
price | | did | how much | win | won | | |
title | | did | which film | watch | watched | | the film |
noun | | did | what | lose | lost | | the |
phrase | | did | what | wish for | wished for | | |
street | | did | which street | park in | parked in | | | I parked again, in {v}
food | | be | what | allergic to | | | |
food | | be | what | hungry for | | | |
full_name | | be | who | married to | | | |
full_name first_name | | be | who | engaged to | | | |
full_name first_name | | be | who | sitting next to | | | | I changed seats and am sitting next to {v}
full_name first_name | | be | who | waiting for | | | |
full_name first_name | | be | who | in love with | | | |
animal | | be | which animal | afraid of | | | the |
place | | be | where | from | | | |
place | | be | where | flying to | | | | I changed my booking and am flying to {v}
adjective_noun made_up | | be | which hotel | staying at | | | the |
title | | be | which book | reading | | | |
title | | be | which play | rehearsing | | | |
car | | be | which car | saving up for | | | {a} |
subject | | be | which subject | interested in | | | |
hobby | | be | what | good at | | | |
hobby | | be | what | bad at | | | |
event | | be | which event | training for | | | the |
code | | be | which space | parked in | | | space |
code | | be | which seat | sitting in | | | seat |
integer | | be | which room | staying in | | | room | I changed rooms and am staying in room {v}
place | | was | where | born | | | in |
date | | was | when | born | | | on |
place | | was | where | stationed | | | in |
full_name first_name | | was | who | taught by | | | |
full_name first_name | | was | who | named after | | | |
""".strip().split("\n")

# What people tell of themselves first; what of it is held out stays so.
COMMON = word_list(
    """verb:live in, verb:work as a, verb:work for, verb:speak, verb:drive a, verb:play the,
verb:study, verb:born in, verb:born on, verb:from, verb:married to, verb:allergic to, verb:love
to eat, verb:park in, noun:name, noun:nickname, noun:surname, noun:birthday, noun:age,
noun:address, noun:phone number, noun:favourite food, noun:favourite book, noun:favourite film,
noun:favourite song, noun:favourite animal, noun:favourite colour, noun:favourite city,
noun:home town, noun:password, noun:PIN, noun:locker code, called:dog, called:cat, called:boat,
called:car, called:company, called:house"""
)
