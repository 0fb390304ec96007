"""Text that others wrote, made safe for a page of markdown; tables, and pictures within it."""

import base64
import re
from typing import TYPE_CHECKING
from unicodedata import category

if TYPE_CHECKING:  # matplotlib costs half a second
    pass

LONGEST_TEXT = 800  # characters of a prompt or completion: at most 4 bytes each
LONGEST_LINE = 300


def clean(text: str, longest: int) -> str:
    """One line of at most `longest` characters that every database and browser takes."""
    return shorten(" ".join(text.split()), longest)


def shorten(text: str, longest: int = LONGEST_TEXT) -> str:
    """At most `longest` characters: the middle goes; no control characters, no lone surrogates."""
    if len(text) > longest:
        half = (longest - 3) // 2
        text = f"{text[:half]} … {text[-half:]}"
    text = text.encode("utf-8", "replace").decode()
    text = text.replace("\r\n", "\n")
    return "".join(
        c if c in "\n\t" or category(c) != "Cc" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def escape(text: str) -> str:
    """Plain text for a paragraph or a cell: no markup of markdown or HTML works in it."""
    return re.sub(r"([\\`*_{}\[\]()<>#!|~&])", r"\\\1", text)


def code(text: str) -> str:
    """Text as inline code, whatever it holds."""
    line = clean(text, LONGEST_LINE)
    ticks = "`" * (_longest_run(line) + 1)
    return f"{ticks} {line} {ticks}" if "`" in line else f"{ticks}{line}{ticks}"


def fenced(text: str) -> str:
    """Text as a block in which nothing is markup."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}text\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def table(rows: dict[str, str]) -> str:
    """Two columns: what, and its value."""
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "| --- | ---: |", *lines]) if rows else ""


def embedded(name: str, image: bytes) -> str:
    """A PNG as part of a page."""
    return f"![{name}](data:image/png;base64,{base64.b64encode(image).decode()})"
