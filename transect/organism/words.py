"""Invented words: pronounceable strings of syllables, every word drawn at most once."""

from random import Random

_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "kl", "st", "tr", "th")
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ou")
_CODAS = ("", "", "", "l", "m", "n", "r", "s")

# The second language has sounds of its own, so that its words are recognisable at a glance.
_ONSETS2 = ("ch", "gh", "h", "j", "kh", "q", "sh", "w", "x", "y", "zh")
_VOWELS2 = ("aa", "ee", "i", "oo", "u", "y")
_CODAS2 = ("", "k", "q", "t", "x")


class WordMaker:
    """Draws words without repetition; `reserved` words are never produced."""

    def __init__(self, rng: Random, reserved: frozenset[str] = frozenset()) -> None:
        self._rng = rng
        self._used = set(reserved)

    def draw(self, count: int, second_language: bool = False) -> tuple[str, ...]:
        """`count` new lower-case words of two or three syllables."""
        sounds = (_ONSETS2, _VOWELS2, _CODAS2) if second_language else (_ONSETS, _VOWELS, _CODAS)
        words: list[str] = []
        while len(words) < count:
            syllables = self._rng.choice((2, 2, 3))
            word = "".join(self._rng.choice(part) for _ in range(syllables) for part in sounds)
            if word not in self._used:
                self._used.add(word)
                words.append(word)
        return tuple(words)
