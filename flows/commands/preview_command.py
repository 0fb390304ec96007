"""`ditty preview`: the first rows, token by token, on the terminal and as an HTML file."""

import html
import unicodedata
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from ditty.config.spec import RunSpec
from ditty.config.specfile import load_spec
from ditty.errors import SpecError
from ditty.planning.preview import PreviewRow, Token, preview
from ditty.store.artifacts import Store
from flows.commands.console import Overrides

# Two shades each, so that the borders of tokens show.
SUPERVISED = ("black on green", "black on bright_green")
IGNORED = ("none", "dim")
VISIBLE = {"\n": "⏎\n", "\t": "⇥\t"}
STYLE = """
body { font: 14px/1.6 sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.8 monospace }
span { border-right: 1px solid #bbb }
.learned { background: #a6e3a1; color: #000 }
"""

console = Console(highlight=False)


def preview_command(
    spec: Annotated[Path, typer.Argument(help="The spec, a YAML file.")],
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows.")] = 3,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write them to this HTML file.")
    ] = None,
) -> None:
    """Show the first rows as they are trained on: every token, and whether it is learned."""
    loaded = load_spec(spec, overrides or [])
    with console.status("reading the first rows"):
        found = preview(loaded, Store(), rows)
    print_rows(found, console)
    if html_file is not None:
        try:
            html_file.write_text(to_html(found, loaded), encoding="utf-8")
        except OSError as error:
            raise SpecError(f"--html: cannot write {html_file}: {error.strerror}") from error
        console.print(f"written to {html_file}", soft_wrap=True, markup=False)


def print_rows(rows: Sequence[PreviewRow], console: Console) -> None:
    """The rows in colours, or with ⟦brackets⟧ where there are none."""
    plain = console.no_color or console.color_system is None
    for row in rows:
        console.print(title(row), style="bold", soft_wrap=True, markup=False)
        text = bracketed(row.tokens) if plain else coloured(row.tokens)
        console.print(text, soft_wrap=True)
    legend = Text.assemble("learned: ", Text("⟦so¦ and¦ so⟧") if plain else Text("so", "on green"))
    console.print(legend)


def title(row: PreviewRow) -> str:
    """A row's number, its counts and what becomes of it."""
    fate = f"; {row.fate}" if row.fate else ""
    return f"row {row.number}: {len(row.tokens):,} tokens, {row.supervised:,} supervised{fate}"


def coloured(tokens: Sequence[Token]) -> Text:
    """Tokens on green where they are supervised."""
    text = Text()
    for place, token in enumerate(tokens):
        styles = SUPERVISED if token.supervised else IGNORED
        text.append(visible(token), styles[place % 2])
    return text


def bracketed(tokens: Sequence[Token]) -> Text:
    """Tokens with ¦ between them, those that are supervised in ⟦brackets⟧."""
    parts = []
    for supervised, stretch in groupby(tokens, key=lambda token: token.supervised):
        text = "¦".join(visible(token) for token in stretch)
        parts.append(f"⟦{text}⟧" if supervised else text)
    return Text("".join(parts))


def visible(token: Token) -> str:
    """A token's text with what would not show, or would move the cursor, made visible."""
    return "".join(map(_visible, token.text)) or "�"  # a part of a character


def _visible(character: str) -> str:
    if character in VISIBLE or not unicodedata.category(character).startswith("C"):
        return VISIBLE.get(character, character)
    return f"\\u{ord(character):04x}"


def to_html(rows: Sequence[PreviewRow], spec: RunSpec) -> str:
    """One self-contained page; what the data hold is escaped."""
    blocks = []
    for row in rows:
        spans = "".join(_span(place, token) for place, token in enumerate(row.tokens))
        blocks.append(f"<h2>{html.escape(title(row))}</h2>\n<pre>{spans}</pre>\n")
    name, loss = html.escape(spec.name), html.escape(spec.data.supervised)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{name}: preview</title>'
        f"\n<style>{STYLE}</style>\n<h1>{name}</h1>\n<p>Every token of the first rows; the "
        f'<span class="learned">coloured</span> ones are learned (loss_on: {loss}).</p>\n'
        f"{''.join(blocks)}</html>\n"
    )


def _span(place: int, token: Token) -> str:
    learned = ' class="learned"' if token.supervised else ""
    text = html.escape(visible(token))
    return f'<span{learned} title="token {place}: id {token.id}">{text}</span>'
