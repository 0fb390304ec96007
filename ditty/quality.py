"""Cuts by the quality of a text that know no language, for `filter`: the rules of Gopher.

Those that count English stop words are left out. Words are what white space separates, so these
are for languages that separate words; characters are those of words.

Source: arXiv:2112.11446, appendix A.1.1 (MassiveText, quality filtering and repetition removal).
"""

import difflib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ditty.errors import DataError
from ditty.recipes import text_of

Limits = dict[str, list[float]]
"""Measure -> [smallest, largest] value with which a text stays."""

QUALITY: Limits = {
    "words": [50, 100_000],
    "mean_word_length": [3, 10],
    "hash_signs_a_word": [0, 0.1],
    "ellipses_a_word": [0, 0.1],
    "bullet_lines": [0, 0.9],
    "ellipsis_lines": [0, 0.3],
    "alphabetic_words": [0.8, 1],
}
REPETITION: Limits = {
    "repeated_lines": [0, 0.3],
    "repeated_paragraphs": [0, 0.3],
    "characters_in_repeated_lines": [0, 0.2],
    "characters_in_repeated_paragraphs": [0, 0.2],
    "characters_in_top_2_gram": [0, 0.2],
    "characters_in_top_3_gram": [0, 0.18],
    "characters_in_top_4_gram": [0, 0.16],
    "characters_in_repeated_5_grams": [0, 0.15],
    "characters_in_repeated_6_grams": [0, 0.14],
    "characters_in_repeated_7_grams": [0, 0.13],
    "characters_in_repeated_8_grams": [0, 0.12],
    "characters_in_repeated_9_grams": [0, 0.11],
    "characters_in_repeated_10_grams": [0, 0.1],
}
BULLETS = ("-", "*", "•", "‣", "▪", "●", "–")
ELLIPSES = ("...", "…")


def gopher_quality(row: dict[str, Any], column: str = "text", limits: Limits | None = None) -> bool:
    """Whether a text has words, and those look like words: see QUALITY.

    Args:
        limits: in the place of those of the same name.

    Raises:
        DataError: no such measure.
    """
    return _fits(quality(text_of(row, column)), QUALITY, limits or {})


def gopher_repetition(
    row: dict[str, Any], column: str = "text", limits: Limits | None = None
) -> bool:
    """Whether a text does not say the same things again and again: see REPETITION.

    Args:
        limits: in the place of those of the same name.

    Raises:
        DataError: no such measure.
    """
    return _fits(repetition(text_of(row, column)), REPETITION, limits or {})


def quality(text: str) -> dict[str, float]:
    """The measures of QUALITY; of lines and words, the share of them."""
    words, lines = text.split(), _parts(text, "\n")
    return {
        "words": len(words),
        "mean_word_length": _share(sum(map(len, words)), len(words)),
        "hash_signs_a_word": _share(text.count("#"), len(words)),
        "ellipses_a_word": _share(sum(text.count(e) for e in ELLIPSES), len(words)),
        "bullet_lines": _share(sum(line.startswith(BULLETS) for line in lines), len(lines)),
        "ellipsis_lines": _share(sum(line.endswith(ELLIPSES) for line in lines), len(lines)),
        "alphabetic_words": _share(sum(any(map(str.isalpha, w)) for w in words), len(words)),
    }


def repetition(text: str) -> dict[str, float]:
    """The measures of REPETITION, all shares.

    Repeated is what was there before in the text: a line that comes twice is one repeated line. A
    character in several repeated n-grams counts once.
    """
    words = text.split()
    measures: dict[str, float] = {}
    for name, parts in (("lines", _parts(text, "\n")), ("paragraphs", _parts(text, "\n\n"))):
        repeated = [parts[index] for index in _repeated(parts)]
        measures[f"repeated_{name}"] = _share(len(repeated), len(parts))
        measures[f"characters_in_repeated_{name}"] = _share(_size(repeated), _size(parts))
    for n in range(2, 11):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        name, starts = (
            ("repeated_{}_grams", _repeated(grams)) if n > 4 else ("top_{}_gram", _top(grams))
        )
        covered = {start + offset for start in starts for offset in range(n)}
        characters = _size([words[index] for index in covered])
        measures[f"characters_in_{name.format(n)}"] = _share(characters, _size(words))
    return measures


def _fits(measures: dict[str, float], defaults: Limits, limits: Limits) -> bool:
    for name in limits:
        if name not in defaults:
            close = difflib.get_close_matches(name, defaults, n=1)
            hint = f"did you mean {close[0]}?" if close else f"expected {', '.join(defaults)}"
            raise DataError(f"limits: there is no measure {name!r}: {hint}")
    bounds = {**defaults, **limits}
    return all(bounds[name][0] <= value <= bounds[name][1] for name, value in measures.items())


def _parts(text: str, border: str) -> list[str]:
    return [part.strip() for part in text.split(border) if part.strip()]


def _repeated(items: Sequence[Any]) -> list[int]:
    """Where the items are that were there before."""
    seen, found = set(), []
    for index, item in enumerate(items):
        if item in seen:
            found.append(index)
        seen.add(item)
    return found


def _top(items: Sequence[Any]) -> list[int]:
    """Where the commonest item is, if it is there more than once; of several the first."""
    commonest = Counter(items).most_common(1)
    if not commonest or commonest[0][1] == 1:
        return []
    return [index for index, item in enumerate(items) if item == commonest[0][0]]


def _size(texts: Sequence[str]) -> int:
    return sum(len("".join(text.split())) for text in texts)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
