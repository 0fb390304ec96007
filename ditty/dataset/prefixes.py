"""The tokens of texts that are the beginnings of others, whose tokens are known.

A tokenizer splits text at its control tokens before anything else, so what stands before one has
the same tokens whatever follows it. Of a beginning only what comes from its last control token on
is encoded: in a chat a few words, the same in most conversations.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

CHECKED = 16
"""Beginnings, the first ones, that are compared with what the tokenizer makes of them."""


class Beginning(NamedTuple):
    """A text, and where the one that it begins stands."""

    text: str
    whole: int


class _Cut(NamedTuple):
    """The control tokens of a text: where each starts and ends in it, and is among its tokens."""

    starts: list[int]
    ends: list[int]
    places: list[int]


class PrefixEncoder:
    """Encodes beginnings with one tokenizer.

    Args:
        special: bool [vocabulary], its control tokens.
        encode: texts to token ids, of the same tokenizer.
    """

    def __init__(
        self,
        tokenizer: Any,
        special: "np.ndarray",
        encode: "Callable[[Sequence[str]], list[np.ndarray]]",
    ):
        import numpy as np

        names = [str(t) for t in tokenizer.convert_ids_to_tokens(np.flatnonzero(special).tolist())]
        longest_first = sorted(names, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if names else None
        self._special, self._encode = special, encode
        self._checked = False

    def encode(
        self, beginnings: Sequence[Beginning], texts: Sequence[str], ids: "Sequence[np.ndarray]"
    ) -> "list[np.ndarray]":
        """The token ids of each, as if it were encoded alone.

        Args:
            texts: the whole ones; ids: their tokens.
        """
        import numpy as np

        cut = [self._cut(text, known) for text, known in zip(texts, ids, strict=True)]
        found = [self._known(b, texts[b.whole], cut[b.whole]) for b in beginnings]
        rest = [b.text[place[0] :] for b, place in zip(beginnings, found, strict=True)]
        unique = list(dict.fromkeys(rest))
        encoded = dict(zip(unique, self._encode(unique), strict=True))
        made = [
            np.concatenate([ids[b.whole][:count], encoded[tail]])
            for b, (_, count), tail in zip(beginnings, found, rest, strict=True)
        ]
        return made if self._checked or self._holds(beginnings, made) else self._alone(beginnings)

    def _cut(self, text: str, ids: "np.ndarray") -> _Cut:
        """Where the control tokens of a text are."""
        import numpy as np

        if self._pattern is None:
            return _Cut([], [], [])
        spans = [match.span() for match in self._pattern.finditer(text)]
        places = np.flatnonzero(self._special[ids]).tolist()
        if len(spans) != len(places):  # one that is split only between words, say
            return _Cut([], [], [])
        return _Cut([a for a, _ in spans], [b for _, b in spans], places)

    def _known(self, beginning: Beginning, whole: str, cut: _Cut) -> tuple[int, int]:
        """How many characters, and tokens of the whole, come before its last control token."""
        last = bisect_right(cut.ends, len(beginning.text)) - 1
        if last < 0 or not whole.startswith(beginning.text):
            return 0, 0
        return cut.starts[last], cut.places[last]

    def _holds(self, beginnings: Sequence[Beginning], made: "list[np.ndarray]") -> bool:
        """Whether the first ones are what the tokenizer makes of them; else none is told so."""
        import numpy as np

        alone = self._alone(beginnings[:CHECKED])
        same = all(np.array_equal(*pair) for pair in zip(alone, made, strict=False))
        self._checked = same and bool(beginnings)
        self._pattern = self._pattern if same else None
        return same

    def _alone(self, beginnings: Sequence[Beginning]) -> "list[np.ndarray]":
        return self._encode([b.text for b in beginnings])
