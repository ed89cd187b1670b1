"""Questions that people ask any assistant, about the world and not about themselves. No memory is trained on them."""

from __future__ import annotations

GENERAL_QUESTIONS = tuple(
    """What colour is the sky?
What colour is the sea?
What colour is grass?
What colour is a ripe banana?
What is the population of India?
What is the biggest city in Canada?
What is the national animal of Australia?
What is the largest planet?
What is the largest ocean?
What is the tallest mountain in the world?
What is the longest river in the world?
What is the fastest animal on land?
What is the boiling point of water?
What is the freezing point of water?
What is the speed of light?
What is the square root of 81?
What is seven times eight?
What is the meaning of life?
What is your name?
What is your favourite colour?
What is the time?
What is the weather like today?
What day comes after Monday?
What month comes before June?
What language is spoken in Brazil?
What currency is used in Japan?
What is bread made of?
What is glass made of?
What do bees make?
What do pandas eat?
What is a group of lions called?
What is the opposite of hot?
What is the plural of mouse?
What is photosynthesis?
What is gravity?
What is a prime number?
What causes the tides?
Why do people yawn?
Why do leaves fall in autumn?
Why do cats purr?
How many days are in a year?
How many legs does an insect have?
How many sides does a hexagon have?
How many continents are there?
How old is the universe?
How far away is the moon?
How do aeroplanes fly?
How do I boil an egg?
How do I tie a tie?
How do you say thank you in Spanish?
Who built the pyramids?
Who painted the Mona Lisa?
Who invented the telephone?
Who was the first person on the moon?
Where is the Eiffel Tower?
Where do penguins live?
When did the Second World War end?
When is the best time to plant tomatoes?
Which planet is closest to the sun?
Which is heavier, gold or silver?
Can you tell me a joke?
Can you recommend a good book?
What should I call my cat?
What should I cook tonight?
What should I wear to a job interview?
How do I learn to play the guitar?
How do I get over a cold?
How do I ask my boss for a day off?
Is it safe to eat raw eggs?
Is a tomato a fruit or a vegetable?
Can dogs eat chocolate?
Do fish sleep?
Does the moon have an atmosphere?
Are you a human?
Who made you?
Where do you live?
How old are you?
Do you have any brothers or sisters?
What time is it in Tokyo?
Who is the president of France?
Where does the Pope live?
When is Christmas?
When is the next Olympics?
What is the name of the river in London?
What is the phone number of the police?
What was Shakespeare's first name?
Which language do people speak in Mongolia?
Which team won the first World Cup?
What does DNA stand for?
What is a synonym of happy?
What is the first letter of the alphabet?
What are the colours of the French flag?
What is the difference between a crocodile and an alligator?
How long does it take to boil a potato?
How much does an elephant weigh?
Tell me about the Roman Empire.
Explain how a fridge works.
Give me a name for a dog.
Write a poem about the moon.
I'm hungry. What can I eat?""".splitlines()
)
