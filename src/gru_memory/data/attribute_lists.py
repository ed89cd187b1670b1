"""What attributes are made of: owners, things and called nouns; `attribute_verbs` has the verbs."""

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
        """favourite colour, lucky colour, bedroom colour, eye colour, hair colour, car colour, front door
colour, bicycle colour, umbrella colour, suitcase colour, team colour, scarf colour, kitchen
colour, least favourite colour, curtain colour, sofa colour, nail polish colour, school uniform
colour, tie colour, lipstick colour, toothbrush colour, wedding dress colour, raincoat colour,
tent colour, backpack colour, bathroom colour, phone case colour, belt colour, yoga mat colour,
winter coat colour, hat colour, wallet colour"""
    ),
    ("date",): word_list(
        """birthday, wedding anniversary, moving date, final exam date, graduation date, name day, driving
test date, job interview date, holiday start date, surgery date, retirement date, passport
expiry date, first day of work, due date, wedding date, concert date, court date, vaccination
date, thesis deadline, contract end date, house viewing date, visa appointment date, opening
night, school reunion date, tax deadline, delivery date, marathon date, flight date, first
date, last day of school, baptism date"""
    ),
    ("time",): word_list(
        """alarm time, bedtime, shift start, lunch break, yoga class time, piano lesson time, dinner
reservation time, check-in time, jogging time, tea time, doctor's appointment time, meeting
time, school pick-up time, train time, flight time, swimming lesson time, choir practice time,
closing time, usual dinner time, curfew, pick-up time, boarding time, breakfast time, gym time,
kick-off time, medication time, prayer time, arrival time, departure time, nap time, curtain
time"""
    ),
    ("integer",): word_list(
        """lottery number, house number, apartment number, hotel room number, jersey number, PIN, bus
number, lucky number, employee number, exam score, chess rating, daily step goal, race number,
office number, shoe box number, high score, queue number, student number, account number, table
number, platform number, extension number, subscriber number, case number, pension number,
target weight, record in push-ups, number of followers, page number, tax number, draft number,
typing speed, step count, mileage, bib number, room number, golf score, quiz score"""
    ),
    ("code",): word_list(
        """locker code, gate code, door code, booking code, alarm code, voucher code, ticket number, order
number, licence plate, flight number, safe combination, library card number, gift card code,
seat number, desk label, badge ID, parking space, tracking number, customer number, membership
number, booking reference, discount code, serial number, student ID, passport number, patient
number, gym locker, classroom, promo code, parcel number, meter number, loyalty card number,
invoice number, boarding gate, storage unit, project code, room key code, bike lock code, cabin
number, policy number, reservation number, garage code, visa number, lab bench, voter ID,
flight gate, server rack, account code, security code, model number"""
    ),
    ("noun", "adjective_noun", "made_up", "code", "phrase"): word_list(
        """password, wifi password, safe word, secret word, passphrase, computer password, bank password,
club password, email password, router password, master password, game password, laptop
password, secret phrase, magic word, door phrase, phone password, alarm word, screen lock word"""
    ),
    NAMES: word_list(
        """nickname, stage name, pen name, middle name, old nickname, name in the game, codename, baby
name idea, first name, screen name, family nickname, artist name, spy name, forum name, school
nickname, trail name, DJ name, name at work, second name, Roman name, elf name, superhero name"""
    ),
    ("made_up", "adjective_noun", "code"): word_list(
        """username, gamertag, radio call sign, account name, email handle, chat handle, forum login,
login, streaming name, player tag, developer handle, clan tag"""
    ),
    ("first_name", "full_name", "made_up"): word_list("!name"),
    ("surname",): word_list(
        """surname, maiden name, family name before the wedding, birth surname, married name, old surname,
stage surname"""
    ),
    ("full_name",): word_list(
        """favourite author, favourite singer, favourite actor, favourite painter, favourite composer,
favourite footballer, childhood hero, emergency contact, doubles partner, lab partner, first
love, favourite comedian, thesis advisor, role model, interviewer, biggest rival, favourite
teacher, favourite poet, favourite director, favourite philosopher, favourite tennis player,
favourite scientist, best man, maid of honour, dance partner, mentor, travel companion, tennis
partner, favourite architect, contact at the bank, favourite chef, favourite president, running
partner, estate agent, first boss, editor, favourite guitarist, favourite novelist, hero,
surgeon, favourite photographer, campaign manager, bridesmaid, sponsor, line manager, next of
kin, chess opponent, biggest fan, favourite dancer, favourite journalist, roommate in college,
witness, new neighbour, family doctor, deputy, successor, predecessor"""
    ),
    ("place",): word_list(
        """home town, dream destination, next holiday destination, favourite city, honeymoon destination,
university town, place of work, last stop, favourite village, weekend destination, retirement
place, favourite beach, place of birth, meeting place, favourite island, next stop, favourite
ski resort, favourite lake, former home, destination tonight, port of departure, favourite
mountain, office location, conference location, wedding location, training camp location,
favourite harbour, layover city, starting point, favourite capital, holiday home, constituency,
parents' village, safe haven, favourite market town, first posting"""
    ),
    ("country",): word_list(
        """favourite country, country of birth, dream country, next country to visit, second home country,
country of residence, favourite holiday country, country of origin, destination country,
ancestral country, host country, first country abroad"""
    ),
    ("job",): word_list(
        """dream job, first job, previous job, side job, childhood dream job, backup career, summer job,
next job, current job, weekend job, worst job, ideal job, student job, night job, trade,
profession, occupation, official title, future job, position, holiday job"""
    ),
    ("food",): word_list(
        """favourite food, favourite dish, favourite breakfast, comfort food, usual lunch, signature dish,
least favourite food, favourite snack, pizza topping, secret ingredient, birthday meal,
standing order, favourite soup, favourite dessert, favourite sandwich filling, favourite pizza,
Sunday roast, packed lunch, favourite salad, holiday meal, party dish, midnight snack,
favourite street food, favourite pie, speciality, dinner tonight, picnic food, favourite curry,
favourite takeaway, last meal, go-to recipe, first dish, canteen favourite, wedding menu,
allergy, breakfast tomorrow, cheat meal"""
    ),
    ("animal",): word_list(
        """favourite animal, spirit animal, least favourite animal, team mascot, first pet, dream pet,
animal tattoo, favourite zoo animal, totem animal, childhood pet, favourite wild animal, class
pet, most feared animal, favourite farm animal, soft toy, costume animal, logo animal, heraldic
animal, house pet, favourite sea animal, sports club mascot"""
    ),
    ("instrument",): word_list(
        """favourite instrument, first instrument, main instrument, least favourite instrument, childhood
instrument, school instrument, dream instrument, second instrument, next instrument, rented
instrument, exam instrument"""
    ),
    ("language",): word_list(
        """native language, second language, favourite language, worst language, language at work, first
language, third language, mother tongue, home language, school language, best language, exam
language, next language, working language"""
    ),
    ("hobby",): word_list(
        """favourite hobby, favourite sport, newest hobby, secret talent, Sunday activity, childhood
hobby, way to relax, evening class, greatest skill, favourite pastime, winter hobby, secret
hobby, summer hobby, first hobby, shared hobby, weekend activity, after-school activity, new
passion, old passion, daily exercise, biggest passion, strong point, favourite workout, stress
relief, next challenge"""
    ),
    ("subject",): word_list(
        """major, minor, favourite school subject, worst subject, thesis subject, research field, best
subject, degree, specialisation, evening course, strongest subject, first degree, exam subject,
lecture topic, PhD topic, elective, favourite lecture, field of work"""
    ),
    ("price",): word_list(
        """monthly rent, phone bill, weekly budget, hourly wage, gym fee, train fare, grocery budget,
electricity bill, parking fine, pocket money, entry fee, insurance premium, salary, bus fare,
dinner bill, monthly budget, savings goal, hotel rate, tuition fee, water bill, car insurance,
loan payment, ticket price, weekly allowance, biggest bet, rent deposit, tax refund, Christmas
bonus, heating bill, vet bill, starting salary, overdraft limit, shopping budget, daily rate,
repair bill, holiday budget, mortgage payment, speeding fine, asking price, membership fee"""
    ),
    ("phone",): word_list(
        """phone number, work number, emergency number, old phone number, mobile number, home number,
office phone number, fax number, landline number, new phone number, hotline number, pager
number"""
    ),
    ("address",): word_list(
        """address, work address, old address, meeting point, delivery address, gym address, email
provider's address, home address, office address, holiday address, new address, billing
address, mailing address, studio address, school address, hotel address, former address, clinic
address, garage address"""
    ),
    ("title",): word_list(
        """favourite book, favourite film, favourite song, favourite poem, favourite series, favourite
game, thesis title, first novel, current read, favourite album, favourite painting, ringtone,
favourite play, next talk, favourite musical, favourite opera, favourite TV show, favourite
comic, favourite documentary, favourite novel, favourite fairy tale, favourite cartoon, first
film, wedding song, favourite lullaby, next book, essay title, first album, favourite magazine,
favourite podcast, work in progress, screenplay, karaoke song, workout song, anthem, bedtime
story, exhibition title, debut novel, dissertation title, favourite ballet, favourite radio
show, alarm song, column title, audition piece"""
    ),
    ("phrase",): word_list(
        """idea of a perfect Sunday, best memory, happy place, greatest wish, idea of luxury, favourite
treat, plan for tonight, weekend plan, reward after work, birthday wish, favourite smell,
favourite view, dream gift, New Year's resolution, plan for Saturday, worst nightmare, greatest
fear, perfect evening, recurring dream, first memory, biggest regret, guilty pleasure, idea of
heaven, idea of fun, favourite sound, holiday plan, favourite hiding place, favourite souvenir,
secret wish, summer plan, idea of home, retirement plan, favourite season, proudest moment,
strangest dream"""
    ),
    ("noun",): word_list(
        """favourite word, favourite object, lucky charm, least favourite word, favourite gift, costume,
design theme, favourite toy, favourite tool, prop, hidden treasure, latest purchase, most
precious possession, first word, missing item, favourite accessory, desk decoration, team
emblem, favourite symbol, birthday present, good luck token, prize, keepsake, Secret Santa
gift, family heirloom, drawing topic, icebreaker word, oldest possession, crossword answer"""
    ),
    ("company", "brand"): word_list(
        """bank, phone provider, internet provider, favourite shop, favourite airline, dream employer,
insurance company, first employer, favourite brand, letting agency, energy supplier, tailor of
choice, broker, publisher, employer, car insurer, phone company, supplier, record label,
favourite supermarket, health insurer, moving company, streaming service, gas company, car
dealer, last employer, travel agency, security firm, dry cleaner, favourite bookshop, water
supplier, biggest client, favourite store, courier, pension fund, bank abroad, main customer,
biggest competitor"""
    ),
    ("car",): word_list(
        """first car, dream car, rental car, favourite car, next car, company car, old car, second car,
family car, getaway car, work car, favourite racing car, weekend car, wedding car, parents' car"""
    ),
    ("brand",): word_list(
        """phone brand, laptop brand, favourite perfume, toothpaste brand, coffee brand, running shoe
brand, beer brand, shampoo brand, watch brand, guitar brand, tea brand, camera brand, bicycle
brand, soap brand, jeans brand, cereal brand, tyre brand, headphone brand, cat food brand, TV
brand, fridge brand, mattress brand, favourite chocolate brand, ski brand, pen brand, whisky
brand, tennis racket brand, paint brand"""
    ),
    ("street",): word_list(
        """bus stop, street, childhood street, favourite street, tram stop, home street, old street,
jogging route, parking street, shopping street, office street, school street, favourite avenue,
delivery route, paper round street"""
    ),
    ("weekday",): word_list(
        """day off, laundry day, gym day, cleaning day, rubbish day, favourite weekday, pay day, piano
day, market day, rest day, date night, lucky day, shopping day, swimming day, chess night, home
office day, band practice day, training day, library day"""
    ),
    ("month",): word_list(
        """favourite month, holiday month, busiest month, birth month, exam month, moving month, wedding
month, least favourite month, rainiest month"""
    ),
    ("zodiac",): word_list("""star sign, zodiac sign, moon sign, rising sign"""),
    ("age",): word_list("""age, real age, retirement age, biological age"""),
    ("year",): word_list(
        """graduation year, year of birth, wedding year, retirement year, year of arrival, favourite year,
school leaving year"""
    ),
}

PEOPLE = ("first_name", "first_name", "full_name", "made_up")
PETS = ("first_name", "nickname", "made_up", "adjective_noun")
PROPER = ("adjective_noun", "made_up", "title", "nickname")
# How a noun gets its name: "owned" ones from their owner, "people" are only had, a "place" is neither.
CALLED = {
    "owned": {
        PETS: word_list(
            """dog, cat, horse, pony, parrot, hamster, rabbit, goldfish, tortoise, guinea pig, ferret, donkey,
goat, kitten, puppy, canary, budgie, snake, lizard, rat, pig, cow, sheep, llama, rooster, hen,
duck, turtle, spider, gecko, bulldog, poodle, terrier, beagle, foal, mule, calf, lamb, peacock,
pigeon, cockatoo, falcon, owl, bearded dragon, chameleon, stick insect, hermit crab, catfish,
tarantula, python, iguana, gerbil, hedgehog, mouse, monkey, camel, bull, goose, turkey,
greyhound, spaniel, collie, dachshund, labrador, guide dog, rescue dog, barn cat, alpaca,
chinchilla, stray cat, sheepdog, Shetland pony, tabby cat, koi carp, swan, piglet"""
        ),
        PROPER: word_list(
            """boat, yacht, canoe, band, choir, quiz team, football team, chess club, blog, podcast,
newsletter, house, farm, cottage, garden, tree house, teddy bear, doll, robot, drone, guitar,
violin, bicycle, motorbike, car, van, caravan, tractor, laptop, computer, server, video
channel, comic, novel, play, short story, board game, video game, app, project, recipe,
cocktail, dance troupe, theatre group, racehorse, kite, houseplant, snowman, puppet, spaceship
model, secret island, sailboat, kayak, raft, ship, houseboat, orchestra, rock band, jazz trio,
book club, hockey team, basketball team, volleyball team, rowing team, cricket club, running
club, magazine, newspaper, radio show, column, webcomic, card game, website, software, phone,
tablet, printer, vacuum cleaner, camper, scooter, truck, tandem, sledge, surfboard, snowboard,
skateboard, saxophone, cello, piano, drum kit, ukulele, trumpet, vineyard, orchard, greenhouse,
cabin, villa, ranch, barn, summer house, beach hut, windmill, doll's house, sourdough starter,
cactus, bonsai, lemon tree, sculpture, painting, poem, song, album, symphony, musical, film,
documentary, thesis, invention, research project, perfume, beer, wine, sauce, cake, cheese, toy
train, rocket, robot vacuum, avatar, imaginary friend, stuffed rabbit, rag doll, rocking horse,
scarecrow, garden gnome, telescope, sword, fishing boat, beehive, aquarium, hot-air balloon,
glider, helicopter, chatbot, database, 3D printer, quiz show, sketch group, startup idea,
training plan, dance, colour scheme, knitting pattern, secret club, board, mountain bike,
hearse, rowing boat, harp, tent, hammock, snow fort, sandcastle"""
        ),
        ("company", "adjective_noun", "made_up"): word_list(
            """company, startup, shop, bakery, restaurant, bar, studio, charity, gallery, law firm, clinic,
dental practice, design agency, salon, barbershop, cafe, food truck, flower shop, bookshop,
butcher's shop, brewery, winery, garage, dance school, driving school, consultancy,
construction firm, web shop, foundation, music label, publishing house, theatre, pizzeria, ice
cream parlour, pottery workshop, taxi firm, boutique, riding stable, dairy, bike shop, toy
shop, tea room, fishing business, translation bureau"""
        ),
    },
    "people": {
        PEOPLE: word_list(
            """sister, brother, son, daughter, cousin, uncle, aunt, niece, nephew, boss, doctor, dentist,
teacher, neighbour, landlord, lawyer, hairdresser, flatmate, colleague, best friend, tutor,
plumber, coach, therapist, accountant, gardener, babysitter, vet, pharmacist, optician,
professor, supervisor, secretary, business partner, godmother, piano teacher, cleaner, tailor,
postman, physiotherapist, stepson, godfather, goddaughter, grandson, granddaughter,
grandmother, grandfather, great-aunt, twin brother, twin sister, half-brother, stepsister,
roommate, intern, apprentice, pupil, client, tenant, mechanic, electrician, barber, chef,
baker, butcher, nanny, nurse, midwife, surgeon, psychologist, banker, notary, estate agent,
editor, agent, publisher, drummer, singer, guitarist, photographer, dance partner, sparring
partner, swimming instructor, ski instructor, golf instructor, riding teacher, guide,
translator, priest, mayor, headmaster, librarian, caretaker, cook, dermatologist,
paediatrician, stylist, carpenter, painter, team mate, captain, fiance, ex-boyfriend, ex-
girlfriend, mentor, rival, youngest child, second son, violin teacher, driving examiner,
lodger, bodyguard, pilot, referee, speech therapist, travel agent, bank clerk, baby, newborn,
probation officer, godchild"""
        ),
    },
    "place": {
        ("street", "surname", "made_up"): word_list(
            """first street, neighbourhood, housing estate, district, suburb, old quarter, home village"""
        ),
        PROPER: word_list(
            """school, kindergarten, high school, university, hospital, hotel, church, library, local pub,
favourite cafe, gym, cinema, swimming pool, office building, train station, ferry, favourite
park, holiday resort, sailing club, golf course, primary school, college, nursery, care home,
favourite bar, favourite restaurant, local shop, campsite, hostel, health centre, sports hall,
stadium, museum, youth club, bowling alley, yoga studio, climbing hall, music school, marina,
airport, nightclub, mosque, synagogue, temple, zoo, hall of residence, ski lodge, dance hall,
tennis club, corner shop, dog park, rehab centre, art school, veterinary clinic, tower block,
bus terminal"""
        ),
    },
}

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
