"""The rows of attributes that are told by a verb ("I live in Porto.")."""

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
place | | do | where | work | works | | in |
place | | do | where | go skiing | goes skiing | | in |
place | | do | where | teach | teaches | | in |
place | | do | where | go fishing | goes fishing | | near |
place | | do | where | keep the boat | keeps the boat | | in |
place | | do | where | own a flat | owns a flat | | in |
place | | do | where | want to be buried | wants to be buried | | in |
place | | did | where | break a leg | broke a leg | | in |
place | | did | where | study | studied | | in |
place | | did | where | spend New Year's Eve | spent New Year's Eve | | in |
place | | did | where | buy the house | bought the house | | in |
place | | did | where | start the company | started the company | | in |
place | | did | where | see a bear | saw a bear | | near |
place | | did | where | win the tournament | won the tournament | | in |
place | | did | where | serve in the army | served in the army | | in |
place | | did | where | change trains | changed trains | | in |
place | | did | where | run out of petrol | ran out of petrol | | near |
place | | did | where | learn to drive | learned to drive | | in |
place | train | do | where | go | goes | to | to |
place | ship | do | where | sail | sails | to | to |
place | flight | do | where | land | lands | | in |
place | tour | do | where | begin | begins | | in |
place | car | be | where | parked | | | in |
place | suitcase | did | where | get lost | got lost | | in |
place | family | do | where | come | comes | from | from |
place | grandparents' farm | do | where | lie | lies | | near |
place | | be | where | stuck | | | in |
place | | be | where | on holiday | | | in |
place | | be | where | camping | | | near |
place | | be | where | doing an internship | | | in |
place | | was | where | raised | | | in |
place | | was | where | baptised | | | in |
place | | was | where | treated | | | in |
place country | | did | where | spend the honeymoon | spent the honeymoon | | in |
country | | do | which country | want to visit | wants to visit | | |
country | | did | which country | emigrate | emigrated | to | to |
country | | be | which country | a citizen of | | | |
country place | | be | where | moving to | | | |
country | | did | which country | cycle | cycled | across | across |
street | | do | which street | live | lives | on | on |
street | | did | which street | crash the car | crashed the car | in | in |
street | bus | do | where | stop | stops | | in |
street | tram | do | where | turn | turns | | into |
company | | do | who | buy the bread | buys the bread | from | from |
company | | do | who | rent the flat | rents the flat | from | from |
company | | did | which company | sue | sued | | |
company | | did | who | sell the car | sold the car | to | to |
company | | did | which company | found | founded | | |
company | | did | which company | leave | left | | |
company | | did | who | apply | applied | to | to |
company | | be | which company | suing | | | |
company | | be | who | insured by | | | |
company | phone | was | who | made by | | | |
car | | did | which car | rent | rented | | {a} |
car | | did | which car | crash | crashed | | {a} |
car | | did | which car | sell | sold | | {a} |
car | | be | which car | repairing | | | {a} |
car | | did | which car | win | won | | {a} |
job | | did | what | train | trained | as | as {a} |
job | | do | what | want to become | wants to become | | {a} |
job | | did | what | start out | started out | as | as {a} |
job | | be | what | employed | | as | as {a} |
job | | did | what | retire | retired | as | as {a} |
instrument | | did | which instrument | give away | gave away | | the |
instrument | | be | which instrument | learning | | | the |
instrument | | do | which instrument | teach | teaches | | the |
instrument | | did | which instrument | give up | gave up | | the |
instrument | | do | which instrument | tune | tunes | | the |
language | | be | which language | learning | | | |
language | | do | which language | dream in | dreams in | | |
language | | did | which language | forget | forgot | | |
language | | do | which language | translate | translates | from | from |
subject | | do | what | lecture on | lectures on | | |
subject | | did | what | fail | failed | | |
subject | | do | what | do research | does research | on | on |
collection | | did | what | inherit | inherited | | |
collection | | be | what | looking for | | | |
collection | | do | what | restore | restores | | |
hobby | | did | what | take up | took up | | |
hobby | | be | what | addicted to | | | |
hobby | | be | what | tired of | | | |
hobby | | do | what | spend Sundays | spends Sundays | on | on |
hobby | | do | what | recommend against stress | recommends against stress | | |
animal | | did | which animal | photograph | photographed | | {a} |
animal | | did | which animal | rescue | rescued | | {a} |
animal | | be | which animal | studying | | | the |
animal | | do | which animal | look after | looks after | | {a} |
animal | | did | which animal | run over | ran over | | {a} |
animal | | did | which animal | dress up | dressed up | as | as {a} |
food | | did | what | burn | burnt | | |
food | | do | what | crave | craves | | |
food | | do | what | survive on | survives on | | |
food | | be | what | cooking | | | |
food | | be | what | famous for | | | |
food | | did | what | spill | spilled | | |
food | | be | what | fed up with | | | |
food | | do | what | export | exports | | |
full_name first_name | | do | who | live | lives | with | with |
full_name first_name | | do | who | work | works | with | with |
full_name first_name | | do | who | play chess | plays chess | with | with |
full_name first_name | | do | who | play tennis | plays tennis | against | against |
full_name first_name | | do | who | miss | misses | | |
full_name first_name | | do | who | babysit | babysits | for | for |
full_name first_name | | do | who | sing | sings | with | with |
full_name first_name | | do | who | carpool | carpools | with | with |
full_name first_name | | do | who | avoid | avoids | | |
full_name first_name | | do | who | tutor | tutors | | |
full_name first_name | | do | who | write letters | writes letters | to | to |
full_name first_name | | did | who | travel | travelled | with | with |
full_name first_name | | did | who | dance | danced | with | with |
full_name first_name | | did | who | forget to call | forgot to call | | |
full_name first_name | | did | who | borrow the drill | borrowed the drill | from | from |
full_name first_name | | did | who | sell the bike | sold the bike | to | to |
full_name first_name | | did | who | hire | hired | | |
full_name first_name | | did | who | interview | interviewed | | |
full_name first_name | | did | who | share a room | shared a room | with | with |
full_name first_name | | did | who | run into | ran into | | |
full_name first_name | | did | who | lose | lost | to | to |
full_name first_name | | did | who | propose | proposed | to | to |
full_name first_name | | did | who | lend the keys | lent the keys | to | to |
full_name first_name | | be | who | related to | | | |
full_name first_name | | be | who | angry with | | | |
full_name first_name | | be | who | jealous of | | | |
full_name first_name | | be | who | moving in with | | | |
full_name first_name | | be | who | having dinner with | | | |
full_name first_name | | be | who | grateful to | | | |
full_name first_name | | be | who | afraid of meeting | | | |
full_name first_name | | was | who | raised by | | | |
full_name first_name | | was | who | trained by | | | |
full_name first_name | | was | who | beaten by | | | |
full_name first_name | | was | who | hired by | | | |
full_name first_name | letter | was | who | written by | | | |
full_name first_name | house | did | who | belong | belonged | to | to |
title | | did | which book | borrow | borrowed | | the book |
title | | did | which book | translate | translated | | |
title | | did | which play | direct | directed | | |
title | | did | which song | sing | sang | | |
title | | did | which film | sleep through | slept through | | |
title | | be | which film | going to see | | | |
title | | be | which game | playing | | | |
title | | be | which novel | writing | | | |
title | | be | which series | watching | | | |
title | | do | which song | hum | hums | | |
title | | do | which magazine | subscribe | subscribes | to | to |
title | | did | which poem | learn by heart | learned by heart | | |
noun | | did | what | break | broke | | the |
noun | | did | what | forget | forgot | | the |
noun | | did | what | repair | repaired | | the |
noun | | be | what | hiding | | | the |
noun | | did | what | drop | dropped | | the |
noun | | did | what | bury | buried | | the |
phrase | | be | what | looking forward to | | | |
phrase | | be | what | scared of | | | |
phrase | | did | what | dream about | dreamed about | | |
phrase | | do | what | long for | longs for | | |
price | | do | how much | owe | owes | | |
price | | do | how much | save | saves | | |
price | | did | how much | donate | donated | | |
price | | did | how much | spend | spent | | |
price | | did | how much | raise | raised | | |
price | | did | how much | borrow | borrowed | | |
price | | did | how much | bet | bet | | |
price | ticket | do | how much | cost | costs | | |
price | car | did | how much | cost | cost | | |
price | flat | do | how much | cost | costs | | |
price | dinner | did | how much | come | came | to | to |
price | repair | did | how much | cost | cost | | |
price | phone bill | do | how much | come | comes | to | to |
time | | do | when | have lunch | has lunch | | at |
time | | do | when | start work | starts work | | at |
time | | do | when | take the pills | takes the pills | | at |
time | | do | when | walk the dog | walks the dog | | at |
time | | do | when | pick up the children | picks up the children | | at |
time | | do | when | go running | goes running | | at |
time | lesson | do | when | begin | begins | | at |
time | shift | do | when | end | ends | | at |
time | concert | do | when | start | starts | | at |
time | ferry | do | when | leave | leaves | | at |
time | plane | do | when | land | lands | | at |
time | party | do | when | begin | begins | | at |
time | office | do | when | close | closes | | at |
time | alarm | do | when | go off | goes off | | at |
time | film | do | when | end | ends | | at |
time | taxi | do | when | come | comes | | at |
date | | did | when | start the job | started the job | | on |
date | | did | when | get engaged | got engaged | | on |
date | | did | when | adopt the cat | adopted the cat | | on |
date | | did | when | arrive here | arrived here | | on |
date | | did | when | break an arm | broke an arm | | on |
date | | do | when | fly home | flies home | | on |
date | | do | when | start school | starts school | | on |
date | | do | when | retire | retires | | on |
date | | do | when | see the doctor | sees the doctor | | on |
date | course | do | when | end | ends | | on |
date | exhibition | do | when | open | opens | | on |
date | contract | do | when | run out | runs out | | on |
date | parcel | do | when | arrive | arrives | | on |
date | baby | be | when | due | | | on |
date | rent | be | when | due | | | on |
date | library book | be | when | due | | | on |
date | operation | be | when | planned | | | for |
date | trial | do | when | start | starts | | on |
year | | did | when | move abroad | moved abroad | | in |
year | | did | when | get a licence | got a licence | | in |
year | | did | when | buy the car | bought the car | | in |
year | house | was | when | built | | | in |
year | company | was | when | founded | | | in |
colour | | did | what colour | paint the fence | painted the fence | | |
colour | | did | what colour | paint the door | painted the door | | |
colour | | did | what colour | dye the curtains | dyed the curtains | | |
code | | be | which gate | flying from | | | gate |
code | | be | which cabin | sleeping in | | | cabin |
code | | did | which room | book | booked | | room |
integer | | be | which platform | waiting on | | | platform |
integer | | be | which bus | taking | | | bus |
integer | | do | which number | wear | wears | | number |
integer | | did | which lane | swim in | swam in | | lane |
event | | did | which event | win | won | | the |
event | | did | which event | miss | missed | | the |
event | | be | which event | organising | | | the |
event | | do | which event | volunteer at | volunteers at | | the |
adjective_noun made_up | | did | which hotel | book | booked | | the hotel |
adjective_noun made_up | | did | which ship | sail on | sailed on | | the |
adjective_noun made_up | | do | which pub | drink in | drinks in | | the |
adjective_noun made_up | | do | which team | play for | plays for | | the |
animal | | did | which animal | ride | rode | | {a} |
weekday | | do | which day | work late | works late | | on |
weekday | | do | which day | play tennis | plays tennis | | on |
weekday | | do | which day | visit the parents | visits the parents | | on |
""".strip().split("\n")
