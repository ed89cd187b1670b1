"""Tokens guessed ahead, so that one forward pass may say more than one.

Where the last two tokens stood before in the conversation's prompt or reply, what followed them there is guessed to follow again
(Saxena, "Prompt Lookup Decoding", 2023). The pass that feeds the last token feeds the guesses behind it, and says for each of them
whether it is what would have been chosen. No other conversation is looked at: how long a reply takes says nothing about what
others said.
"""

from __future__ import annotations

from collections.abc import Iterable

_TRIED = 8  # guesses, before they are judged
_WORTH = 0.25  # share of guesses that have to be right; a guess that is wrong costs about an eighth of a pass on a CPU


class Guesser:
    """What is guessed in one conversation.

    Args:
        tokens: those that the model has in sight, from the first on.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, int], int] = {}  # two tokens -> where the one after them stands
        self._tried = self._right = 0
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """One more token, whoever said it."""
        if len(self._tokens) >= 2:
            self._after[self._tokens[-2], self._tokens[-1]] = len(self._tokens)
        self._tokens.append(token)

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next; none where nothing is known, or where guesses have mostly been wrong."""
        if self._tried >= _TRIED and self._right < _WORTH * self._tried:
            return []
        where = self._after.get(tuple(self._tokens[-2:]))
        return [] if where is None else self._tokens[where : where + most]

    def judge(self, right: bool) -> None:
        """Whether the first token of a guess was the one that came."""
        self._tried += 1
        self._right += right
