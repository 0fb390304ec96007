"""Ready-made row operations, to be named in a spec as `ditty.recipes:NAME`."""

from typing import Any


def has_words(row: dict[str, Any], column: str = "text", at_least: int = 1) -> bool:
    """For `filter`: the column's text has at least so many words."""
    return len(row[column].split()) >= at_least


def strip(row: dict[str, Any], column: str = "text") -> dict[str, str]:
    """For `map`: the column's text without white space around it."""
    return {column: row[column].strip()}


def chat_of_size(row: dict[str, Any], at_most: int, answer_at_least: int = 1) -> bool:
    """For `filter` of chat rows: characters of all messages, and of the last one."""
    sizes = [len(message["content"]) for message in row["messages"]]
    return sum(sizes) <= at_most and sizes[-1] >= answer_at_least
