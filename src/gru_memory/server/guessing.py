"""Tokens guessed ahead, so that one forward pass may say more than one.

Where the last two tokens stood before in the conversation's prompt or reply, what followed them there is guessed to follow again
(Saxena, "Prompt Lookup Decoding", 2023). The pass that feeds the last token feeds the guesses behind it, and says for each of them
whether it is what would have been chosen. No other conversation is looked at: how long a reply takes says nothing about what
others said.
"""

from __future__ import annotations

from collections.abc import Iterable

_FADES = 0.9  # of what earlier guesses say about the next one
_HOPE = 0.5  # share of guesses that are right, as long as nothing is known
_WORTH = 0.25  # and from which on it pays: one that is wrong costs a tenth of a pass or so


class Guesser:
    """What is guessed in one conversation.

    Args:
        prompt: the tokens that the model has in sight, from the first on.
    """

    def __init__(self, prompt: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, int], int] = {}  # two tokens -> where the one after them stands
        self._right = _HOPE
        for token in prompt:
            self._append(token)

    def add(self, token: int) -> None:
        """One more token of the reply. It also says how good a guess would have been, whether or not one was made."""
        if (where := self._found()) is not None:
            self._right = _FADES * self._right + (1 - _FADES) * (self._tokens[where] == token)
        self._append(token)

    def guess(self, most: int) -> list[int]:
        """`most` tokens that may come next; none where nothing is known, or where guesses have mostly been wrong."""
        where = self._found()
        if where is None or self._right < _WORTH:
            return []
        guess = self._tokens[where : where + most]
        while len(guess) < most:  # what goes round in a circle goes on so
            guess.append(guess[len(guess) - (len(self._tokens) - where)])
        return guess

    def _found(self) -> int | None:
        return self._after.get(tuple(self._tokens[-2:]))

    def _append(self, token: int) -> None:
        if len(self._tokens) >= 2:
            self._after[self._tokens[-2], self._tokens[-1]] = len(self._tokens)
        self._tokens.append(token)
