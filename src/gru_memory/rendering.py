"""Turns as tokens: one way for training, evaluation and conversations, so that memory always sees the same stream.

A turn is a user message and, maybe, a reply. Attention sees the *prefix* (a system prompt, where there is one) and the
turn. Memory sees the prefix once, at the start of a conversation, and then the turns one after the other.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]

# For tokenizers without a chat template, such as plain GPT-2's: a script of two speakers.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\n' }}"
    "{% elif m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\n' }}"
    "{% else %}{{ 'Assistant: ' + m['content'] + eos_token + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@dataclass(frozen=True)
class RenderedTurn:
    """Token ids of one turn; `reply_start` is where the reply's own text begins (the length if there is none)."""

    ids: list[int]
    reply_start: int


class TurnRenderer:
    """Renders turns with the tokenizer's chat template (or a plain one where it has none).

    Args:
        tokenizer: a Hugging Face tokenizer.
        system: system prompt; None leaves the template's own default.
    """

    def __init__(self, tokenizer: Any, system: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = None if getattr(tokenizer, "chat_template", None) else PLAIN_TEMPLATE
        head = [] if system is None else [{"role": "system", "content": system}]
        # What a second turn adds is a turn without the prefix; what precedes it in a first turn is the prefix.
        first, reply, probe = _user("Hello."), _assistant("Hi."), _user("Well?")
        turn = self._after_reply(self._text([*head, first, reply]), self._text([*head, first, reply, probe]), "Hi.")
        whole = self._text([*head, probe])
        self._head = head
        self.prefix_text = whole[: -len(turn)] if turn and whole.endswith(turn) else ""
        another = self._text([*head, _user("Is it so?")])
        if "Is it so?" not in another[len(self.prefix_text) :]:
            raise ValueError(
                "this tokenizer's chat template does not render a message that is a text: give it another chat_template"
            )
        if not another.startswith(self.prefix_text):
            self.prefix_text = ""
        self.prefix_ids: list[int] = self._ids(self.prefix_text)
        # What `turn` drops at its end belongs between two turns that attention sees together.
        self.separator_ids: list[int] = self._ids(turn[len(turn.rstrip("\n")) :])

    def turn(self, user: str, assistant: str | None = None) -> RenderedTurn:
        """A finished turn as memory takes it in. White space after the last message is dropped."""
        question = self._turn_text([_user(user)])
        if assistant is None:
            ids = self._ids(question.rstrip("\n"))
            return RenderedTurn(ids, len(ids))
        asked = self._turn_text([_user(user)], reply=True)
        answered = self._turn_text([_user(user), _assistant(assistant)])
        start = len(self._ids(asked))
        if not answered.startswith(asked):  # a template that trims differently: fall back to the whole text
            ids = self._ids(answered.rstrip("\n"))
            return RenderedTurn(ids, min(start, len(ids)))
        # Tokenised as it is generated: prompt first, reply after it.
        return RenderedTurn(self._ids(asked) + self._ids(answered[len(asked) :].rstrip("\n")), start)

    def prompt(self, user: str) -> list[int]:
        """A user message with everything that makes the model reply, without the prefix."""
        return self._ids(self._turn_text([_user(user)], reply=True))

    def _after_reply(self, ended: str, going_on: str, reply: str) -> str:
        """What a turn adds to `going_on`, a conversation that goes on after the reply with which `ended` ends."""
        if going_on.startswith(ended):
            return going_on[len(ended) :]
        # Some templates render the last reply in another way, or close every text with a token of its own.
        if reply not in ended or reply not in going_on:
            return ""
        tail, rest = ended.rpartition(reply)[2], going_on.rpartition(reply)[2]
        cut = len(os.path.commonprefix([tail, rest]))
        for token in map(str, self.tokenizer.get_added_vocab()):  # never within one
            for begin in range(max(0, cut - len(token) + 1), cut):
                if rest.startswith(token, begin):
                    cut = begin
        return rest[cut:]

    def _turn_text(self, messages: list[Message], reply: bool = False) -> str:
        return self._text([*self._head, *messages], reply)[len(self.prefix_text) :]

    def _text(self, messages: list[Message], reply: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=reply, chat_template=self.template
        )

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def require_text(text: str) -> None:
    """Raise ValueError for what is no turn: an empty text, or no valid one."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError("the turn is empty: give some text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("the turn is no valid Unicode text: leave lone surrogates out") from error
