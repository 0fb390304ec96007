"""The columns that a format reads: where they are, and whether their values fit.

Every value that passes `row_problem` can be encoded; see ditty.dataset.encoding.
"""

import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ditty.config.choices import DataFormat, LossOn
from ditty.config.dataspec import SHAPES, DataSpec
from ditty.dataset.quarantine import BadRow
from ditty.dataset.tables import DEEPEST
from ditty.errors import DataError, shown

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""Who speaks in ShareGPT's `from`, as a chat template calls them."""


def find_columns(data: DataSpec, present: Sequence[str]) -> dict[str, str]:
    """Standard name -> the column's name in the data, for what the format reads.

    Raises:
        DataError: a column is missing; lists those there are, and names the format that they fit.
    """
    shape = SHAPES[data.format]
    columns = {name: data.columns.get(name, name) for name in (*shape.required, *shape.optional)}
    for standard, name in columns.items():
        if name in present:
            continue
        if standard in shape.required and standard in data.columns:
            close = difflib.get_close_matches(name, present, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]}?" if close else ": name one of these"
            raise DataError(
                f"data.columns maps {standard} to {name!r}, and the rows have "
                f"{', '.join(present)}{hint}"
            )
        if standard in shape.required:
            raise DataError(
                f"format: {data.format} needs a column {name!r}, the data has "
                f"{', '.join(present)}: {_advice(data.format, name, standard, present)}"
            )
        if standard in data.columns:
            raise DataError(
                f"data.columns: {{{standard}: {name}}} names no column, the data has "
                f"{', '.join(present)}"
            )
    if data.loss_on is LossOn.LABELS and columns["labels"] not in present:
        raise DataError(
            f"loss_on: labels needs a column {columns['labels']!r}, the data has "
            f"{', '.join(present)}: set data.columns: {{labels: <its name>}}, or loss_on: all"
        )
    return {standard: name for standard, name in columns.items() if name in present}


def _advice(asked: DataFormat, name: str, standard: str, present: Sequence[str]) -> str:
    fitting = [f for f, shape in SHAPES.items() if set(shape.required) <= set(present)]
    if fitting and asked not in fitting:
        return f"set data.format: {' or '.join(fitting)}, which those columns fit"
    close = difflib.get_close_matches(name, present, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}Set data.columns: {{{standard}: <its name>}}, or another data.format"


def row_problem(row: Mapping[str, Any], columns: Mapping[str, str]) -> BadRow | None:
    """What the format cannot read in a row of standard names; None: nothing."""
    for standard, value in row.items():
        found = _CHECKS.get(standard, _text_problem)(value)
        if found:
            return BadRow(f"column {columns[standard]!r} {found.reason}", row, found.detail)
    return None


def empty_row(columns: Iterable[str]) -> dict[str, Any]:
    """A row of standard names that every encoder takes, for nothing."""
    optional = {name for shape in SHAPES.values() for name in shape.optional}
    lists = ("messages", "conversations", "input_ids")
    return {name: None if name in optional else [] if name in lists else "" for name in columns}


def tool_list(value: Any) -> list[dict[str, Any]] | None:
    """The tools of a row, given as JSON text or as a list; None where there are none."""
    return (json.loads(value) if isinstance(value, str) and value else value) or None


class _Problem(NamedTuple):
    """`reason`: in words that many rows share, since rows are counted by it."""

    reason: str
    detail: str = ""


def _holds(value: Any, expected: str) -> _Problem:
    if value is None:
        return _Problem("is null")
    return _Problem(f"holds {type(value).__name__}, {expected}", shown(value))


def _text_problem(value: Any) -> _Problem | None:
    return None if isinstance(value, str) else _holds(value, "expected a string")


def _input_problem(value: Any) -> _Problem | None:
    return None if value is None else _text_problem(value)


def _messages_problem(value: Any) -> _Problem | None:
    found = _turns_problem(value, ("role", "content"))
    if found and _are_turns(value, ("from", "value")):
        hint = f"{found.reason}. Turns of {{from, value}} are data.format: conversations"
        return found._replace(reason=hint)
    return found


def _conversations_problem(value: Any) -> _Problem | None:
    found = _turns_problem(value, ("from", "value"))
    if found and _are_turns(value, ("role", "content")):
        return found._replace(
            reason=f"{found.reason}. Turns of {{role, content}} are data.format: messages, with "
            "data.columns: {messages: <this column>}"
        )
    if found:
        return found
    for turn, message in enumerate(value):
        if message["from"] not in SPEAKERS:
            return _Problem(
                f"has a speaker that is not one of {', '.join(SPEAKERS)}: rename it with a `map` "
                "operation",
                f"{message['from']!r} at turn {turn}",
            )
    return None


def _turns_problem(value: Any, keys: tuple[str, str]) -> _Problem | None:
    speaker, said = keys
    expected = f"expected a list of {{{speaker}, {said}}}"
    if not isinstance(value, list):
        return _holds(value, expected)
    for turn, message in enumerate(value):
        if not isinstance(message, dict) or not {speaker, said} <= message.keys():
            return _Problem(f"has a turn of another kind, {expected}", _turn(message, turn))
        for key in keys:
            # A turn that only calls tools has no content.
            if message[key] is None and key == said and message.get("tool_calls"):
                continue
            if not isinstance(message[key], str):
                kind = "null" if message[key] is None else type(message[key]).__name__
                reason = f"has a turn whose {key} is {kind}, expected a string"
                return _Problem(reason, _turn(message[key], turn))
    return None


def _turn(value: Any, turn: int) -> str:
    return f"{shown(value)} at turn {turn}"


def _are_turns(value: Any, keys: tuple[str, str]) -> bool:
    return isinstance(value, list) and _turns_problem(value, keys) is None


def _tools_problem(value: Any) -> _Problem | None:
    expected = "expected a list of JSON schemas, or that as JSON text"
    try:
        tools = tool_list(value)
    except ValueError as error:
        return _Problem(f"holds text that is no JSON, {expected}", str(error))
    except RecursionError:
        return _Problem(_TOO_DEEP)
    if _is_deep(tools):
        return _Problem(_TOO_DEEP)
    if tools is None or (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
        return None
    return _holds(tools, expected)


_TOO_DEEP = f"is nested deeper than {DEEPEST} levels"


def _is_deep(value: Any) -> bool:
    """Whether JSON text had more levels than any other value of a row has."""
    level = [value]
    for _ in range(DEEPEST):
        nested = [item for item in level if isinstance(item, list | dict)]
        if not nested:
            return False
        level = [i for item in nested for i in (item.values() if isinstance(item, dict) else item)]
    return True


def _ids_problem(value: Any) -> _Problem | None:
    if isinstance(value, list) and all(type(item) is int for item in value):
        return None
    return _holds(value, "expected a list of integers")


def _optional_ids_problem(value: Any) -> _Problem | None:
    return None if value is None else _ids_problem(value)


_CHECKS: dict[str, Callable[[Any], _Problem | None]] = {
    "messages": _messages_problem,
    "conversations": _conversations_problem,
    "tools": _tools_problem,
    "input": _input_problem,
    "input_ids": _ids_problem,
    "labels": _optional_ids_problem,
    "attention_mask": _optional_ids_problem,
}
