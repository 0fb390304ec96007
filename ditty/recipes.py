"""Ready-made row operations, to be named in a spec as `ditty.recipes:NAME`."""

from typing import Any


def has_words(row: dict[str, Any], column: str = "text", at_least: int = 1) -> bool:
    """For `filter`: the column's text has at least so many words."""
    return len(row[column].split()) >= at_least


def strip(row: dict[str, Any], column: str = "text") -> dict[str, str]:
    """For `map`: the column's text without white space around it."""
    return {column: row[column].strip()}
