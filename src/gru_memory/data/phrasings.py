"""Frames around the core sentences, and replies to what was told.

A frame places a core sentence, which has no capital and no stop of its own: `{s}` as it is, `{S}` with a
capital first letter; likewise `{q}`/`{Q}` for a direct question and `{i}` for an indirect one.
"""

from __future__ import annotations

TELL = {
    "train": (
        "{S}.",
        "{S}!",
        "{S}, by the way.",
        "{S}, in case that helps.",
        "{S}, just so you know.",
        "{S}, if you were wondering.",
        "{S}, and I wanted you to know.",
        "{S}. Keep that in mind.",
        "{S}. Please remember it.",
        "{S}. I may ask you about it later.",
        "{S}. That's all for now.",
        "{S}, believe it or not.",
        "{S}. How nice is that?",
        "By the way, {s}.",
        "Just so you know, {s}.",
        "Please remember that {s}.",
        "Remember this: {s}.",
        "Note: {s}.",
        "Hi! {S}.",
        "Hello, {s}.",
        "I should mention that {s}.",
        "For later: {s}.",
        "I don't think I told you, but {s}.",
        "Let me tell you something: {s}.",
        "You should know that {s}.",
        "Before I forget, {s}.",
        "One more thing: {s}.",
        "Something else: {s}.",
        "Can you remember that {s}?",
        "Did I tell you that {s}?",
        "Well, {s}.",
        "So, {s}.",
        "Oh, and {s}.",
        "Fun fact: {s}.",
        "It may be useful to know that {s}.",
        "{S}. That's worth knowing.",
        "{S}, as you might have guessed.",
        "{S}, in short.",
        "{S}, thank goodness.",
        "Guess what: {s}.",
        "Listen, {s}.",
        "To be clear, {s}.",
        "Between us, {s}.",
        "Here's something about me: {s}.",
        "Write this down: {s}.",
        "Okay, so {s}.",
        "First of all, {s}.",
        "Please make sure you know that {s}.",
        "I just realised that {s}.",
        "Quick note: {s}.",
        "Yes, {s}.",
        "I'm telling you now that {s}.",
        "Hey there! {S}.",
        "Let's start with this: {s}.",
        "Also, {s}.",
    ),
    "test": (
        "{S}, as it happens.",
        "{S}. Make a note of that.",
        "{S}, and I'm happy about it.",
        "I'd like you to keep in mind that {s}.",
        "For your information, {s}.",
        "Good morning! {S}.",
        "Don't forget: {s}.",
        "While we're talking, {s}.",
        "A small detail: {s}.",
        "As you may not know yet, {s}.",
        "I want to share something with you: {s}.",
        "Store this for me: {s}.",
    ),
}

ASK = {
    "train": (
        "{Q}?",
        "{Q}?",
        "{Q}? I forgot.",
        "{Q}? I told you earlier.",
        "{Q}, please?",
        "Do you remember {i}?",
        "Can you tell me {i}?",
        "Could you say {i}?",
        "I forgot: {q}?",
        "Quick question: {q}?",
        "Remind me, {q}?",
        "Tell me {i}.",
        "Please tell me {i}.",
        "Do you still know {i}?",
        "I can't remember {i}.",
        "So, {q}?",
        "By the way, {q}?",
        "Now tell me: {q}?",
        "Let's see if you remember: {q}?",
        "Someone just asked me: {q}?",
        "I told you before: {q}?",
        "Hey, {q}?",
        "I need to know {i}.",
        "Let me test you: {q}?",
        "Sorry, {q}?",
        "Okay, {q}?",
        "Going back to what I told you: {q}?",
        "Help me out, {q}?",
        "Could you remind me {i}?",
        "Any idea {i}?",
        "Do you know {i}?",
        "Just checking: {q}?",
        "Tell me once more {i}.",
        "And {q}?",
        "Now, {q}?",
        "You know {i}, right?",
        "{Q}? Think back.",
        "{Q}? A short answer will do.",
        "Let me ask you this: {q}?",
        "I was wondering {i}.",
        "Please say {i}.",
        "Would you tell me {i}?",
        "Hello again! {Q}?",
        "It slipped my mind: {q}?",
        "Let me hear {i}.",
        "{Q}, if you know?",
    ),
    "test": (
        "{Q}? I'd love to hear it from you.",
        "Would you happen to recall {i}?",
        "I wonder if you kept in mind {i}.",
        "From what I told you, {q}?",
        "One question: {q}?",
        "Can you recall {i}?",
        "My memory is bad: {q}?",
        "Say, {q}?",
        "Earlier I mentioned something, so {q}?",
        "State {i}, please.",
    ),
}

CORRECT = {
    "train": (
        "No, {s}.",
        "Actually, {s}.",
        "Sorry, I was wrong: {s}.",
        "Correction: {s}.",
        "That has changed: {s}.",
        "Forget what I said, {s}.",
        "It's different now: {s}.",
        "I made a mistake earlier, {s}.",
        "Wait, {s}.",
        "Hold on, {s}.",
        "I have to correct myself: {s}.",
        "News: {s}.",
        "Update: {s}.",
        "What I told you is out of date, {s}.",
        "I mixed something up: {s}.",
        "Oops, {s}.",
        "Not what I said before: {s}.",
        "{S}, not what I told you before.",
        "{S}. What I said earlier was wrong.",
        "Let me fix that: {s}.",
        "Change of plan: {s}.",
        "No wait, {s}.",
        "To correct what I told you: {s}.",
        "As of now, {s}.",
        "Things have changed: {s}.",
        "I have to take that back, {s}.",
        "{S} these days.",
        "Not any more: {s}.",
        "My mistake, {s}.",
    ),
    "test": (
        "I misspoke: {s}.",
        "Scratch that, {s}.",
        "There has been a change: {s}.",
        "Please update your notes: {s}.",
        "{S}. Forget the old one.",
        "On second thought, {s}.",
    ),
}

ACKNOWLEDGE = {
    "train": (
        "Got it.",
        "Thanks, I'll remember that.",
        "Okay!",
        "Noted.",
        "Good to know.",
        "Thank you for telling me.",
        "Alright, I'll keep that in mind.",
        "I see.",
        "Understood.",
        "That's nice to know.",
        "Sure, I'll remember.",
        "Thanks for sharing!",
        "Interesting, thank you.",
        "Great, noted.",
        "Okay, I've made a note of it.",
        "I'll keep it in mind.",
        "Thanks for letting me know.",
        "Very well.",
        "Sounds good.",
        "Lovely, thank you.",
        "Got it, thanks!",
        "All right.",
        "I'll remember that for later.",
        "Consider it noted.",
        "Thank you. Is there anything else you would like to tell me?",
        "Okay. How can I help you today?",
        "Great! What would you like to talk about?",
        "Thanks! Feel free to ask me about it later.",
        "That is good to know. Tell me more whenever you like.",
        "I appreciate you telling me.",
    ),
    "test": (
        "Wonderful, I've got that.",
        "Thanks, that's helpful.",
        "Duly noted.",
        "Perfect, I'll hold on to that.",
        "Right, thank you.",
        "Fine, I will not forget.",
        "Cool!",
        "Understood, thank you for the detail.",
        "Okay, I have it.",
        "I'll bear it in mind.",
    ),
}
SILENT = 0.2  # share of told turns that get no reply

_AMERICAN = (("avourite", "avorite"), ("olour", "olor"), ("eighbour", "eighbor"))


def capital(text: str) -> str:
    """`text` with its first letter in upper case."""
    return text[0].upper() + text[1:]


def told(frame: str, sentence: str) -> str:
    """A tell or correction frame filled with a core sentence."""
    return frame.replace("{S}", capital(sentence)).replace("{s}", sentence)


def asked(frame: str, direct: str, indirect: str) -> str:
    """An ask frame filled with a question."""
    return frame.replace("{Q}", capital(direct)).replace("{q}", direct).replace("{i}", indirect)


def american(text: str) -> str:
    """The American spelling of the words the attributes use; apply it before a value is filled in."""
    for british, us in _AMERICAN:
        text = text.replace(british, us)
    return text
