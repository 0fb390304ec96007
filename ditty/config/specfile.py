"""Reading a spec from YAML and `--set`, with errors that name the key and the nearest valid one."""

import difflib
import glob
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ditty.config.dataspec import SQL
from ditty.config.spec import RunSpec
from ditty.errors import SpecError, scrub
from ditty.store import paths

# PyYAML lets through what it meets on its way: bytes that are no text, 2026-13-45, a thousand "[".
NO_YAML = (yaml.YAMLError, ValueError, RecursionError)
MANY_KEYS = 12  # more than that are not listed in a message
# What pydantic puts into a location for the member of a union that it has tried.
_MEMBER = re.compile(r"\[key\]|constrained-\w+|(literal|list)\[.*\]|str|int|float")
BOUNDS = {
    "minimum": "from",
    "exclusiveMinimum": "above",
    "maximum": "to",
    "exclusiveMaximum": "below",
}
"""Of a number, by JSON schema's names."""


def load_spec(path: Path, overrides: Sequence[str] = ()) -> RunSpec:
    """Read a spec file; `overrides` are `section.key=value` with YAML values.

    Relative paths in it are taken relative to the file; the file that `data.chat_template` names
    is read here, so that the spec holds its text wherever it goes.

    Raises:
        SpecError: unreadable, not YAML, an unknown key, a wrong value, or an illegal pair.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"cannot read the spec {path}: {error.strerror}") from error
    except NO_YAML as error:
        raise SpecError(f"{path} is not YAML: {error}") from error
    if values is None:
        raise SpecError(f"{path} is empty; expected at least data.source and model.base_model")
    if not isinstance(values, dict):
        raise SpecError(
            f"{path} holds {type(values).__name__}, expected the sections "
            f"{', '.join(RunSpec.model_fields)}"
        )
    values.setdefault("name", path.stem.lower())
    for override in overrides:
        apply_override(values, override)
    resolve_paths(values, path.parent.absolute())
    _read_template(values.get("data"), path.parent)
    return parse_spec(values, where=str(path))


def parse_spec(values: dict[str, Any], where: str = "spec") -> RunSpec:
    """Validate plain values.

    Raises:
        SpecError: one line for each thing that is wrong.
    """
    try:
        return RunSpec.model_validate(values)
    except ValidationError as error:
        lines = _explain(error.errors())
        # Not `from error`: it holds what was given, maybe with a password.
        raise SpecError(scrub("\n".join(f"{where}: {line}" for line in lines))) from None


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set `section.key=value` in nested plain values; the value is read as YAML.

    Raises:
        SpecError: no `=`, or a section that is not a mapping.
    """
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise SpecError(f"--set {override!r}: expected section.key=value")
    *parents, last = dotted.split(".")
    target = values
    for name in parents:
        target = target.setdefault(name, {})
        if not isinstance(target, dict):
            raise SpecError(f"--set {override!r}: {name} is not a section")
    try:
        target[last] = _number(yaml.safe_load(text))
    except NO_YAML as error:
        raise SpecError(f"--set {override!r}: the value is not YAML: {error}") from error


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-4` as a string; a user means the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A spec's values by dotted key, as `--set` takes them: {"train.max_steps": 3, ...}"""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def resolve_paths(values: dict[str, Any], base: Path) -> None:
    """Make relative paths of a spec absolute, in place, where the file exists below `base`.

    So is a pattern that matches something there.
    """

    def absolute(section: Any, key: str) -> None:
        if not isinstance(section, dict) or not isinstance(section.get(key), str):
            return
        if "://" in section[key] or section[key].startswith(SQL):
            return
        text, colon, name = section[key].partition(":")
        if Path(text).is_absolute():
            return
        if (base / text).exists() or _matches(text, base):
            section[key] = f"{base / text}{colon}{name}"

    data = values.get("data")
    absolute(data, "source")
    absolute(values.get("model"), "base_model")
    evaluate = values.get("evaluate")
    if isinstance(evaluate, dict) and isinstance(evaluate.get("tasks"), list):
        named = [{"task": task} for task in evaluate["tasks"]]
        for task in named:
            absolute(task, "task")
        evaluate["tasks"] = [task["task"] for task in named]
    for several, key in (("operations", "function"), ("sources", "source")):
        if isinstance(data, dict) and isinstance(data.get(several), list):
            for section in data[several]:
                absolute(section, key)
                absolute(section.get("kwargs") if isinstance(section, dict) else None, "file")


def _matches(text: str, base: Path) -> bool:
    """Whether `text` is a pattern of something below `base`, as `data.source` reads them."""
    return paths.is_glob(text) and any(glob.iglob(text, root_dir=base, recursive=True))  # noqa: PTH207


def _read_template(data: Any, base: Path) -> None:
    """Put a chat template's text in the place of its file's name."""
    named = data.get("chat_template") if isinstance(data, dict) else None
    if not isinstance(named, str) or "{" in named:
        return
    path = base / Path(named).expanduser()
    if not path.is_file():
        hint = paths.nearest(path) or ", expected Jinja text or a file's name"
        raise SpecError(f"data.chat_template: there is no file {path}{hint}")
    try:
        data["chat_template"] = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"data.chat_template: cannot read {path}: {error}") from error


def _explain(errors: Sequence[Any]) -> Iterator[str]:
    """pydantic's errors as sentences: the key, what was given, what was expected."""
    told = set()
    for error in errors:
        location = error["loc"]
        if error["type"] != "extra_forbidden":
            location = [p for p in location if not _MEMBER.fullmatch(str(p))]
        key = ".".join(map(str, location))
        if key in told and error["type"] not in ("value_error", "extra_forbidden"):
            continue  # the other members of a union
        told.add(key)
        yield _sentence(error, key, location)


def _sentence(error: Any, key: str, location: Sequence[Any]) -> str:
    if error["type"] in ("extra_forbidden", "invalid_key"):
        return _unknown(key, location)
    if error["type"] == "missing":
        return _missing(key, location)
    got = error["input"]
    if error["type"] != "value_error":
        return f"{key}: got {_told(got)}, expected {_wanted(key, location, got)}"
    message = error["msg"].removeprefix("Value error, ")
    if not isinstance(got, dict | BaseModel):
        there = scrub(repr(got)) in scrub(message)
        return f"{key}: {message}" if there else f"{key}: {message}, got {got!r}"
    first, colon, rest = message.partition(": ")
    if key and colon and first in _schema_at(location).get("properties", {}):
        return f"{key}.{first}: {rest}"
    return f"{key}: {message}" if key else message


def _told(got: Any) -> str:
    return (
        "a mapping" if isinstance(got, dict) else "a list" if isinstance(got, list) else repr(got)
    )


def _unknown(key: str, location: Sequence[Any]) -> str:
    known = list(_schema_at(location[:-1])["properties"])
    within = ".".join(map(str, location[:-1]))
    if close := _nearest(str(location[-1]), known):
        return f"unknown key {key}: did you mean {within + '.' if within else ''}{close}?"
    if len(known) <= MANY_KEYS:
        return f"unknown key {key}: expected one of {', '.join(known)}"
    part = f"{location[0]}spec" if location[0] in ("data", "launch") else "spec"
    file = f"ditty/config/{part}.py"
    return f"unknown key {key}: the {len(known)} keys of {within} are documented in {file}"


def _missing(key: str, location: Sequence[Any]) -> str:
    required = _schema_at(location).get("required")
    if required is None and key != "data":
        return f"missing key {key}"
    return f"missing section {key}: {{{', '.join(f'{k}: ...' for k in required or ['source'])}}}"


def _wanted(key: str, location: Sequence[Any], got: Any) -> str:
    """What a key takes, in words, with what was given as an example where it is nearly that."""
    if key == "evaluate.require":
        return 'measure: condition, e.g. {eval_loss: "< base"}'
    if key.startswith("evaluate.require."):
        return f'a condition in quotes, e.g. "<= {got}"'
    words = []
    for schema in _members(_schema_at(location)):
        kind = schema.get("type", "")
        if "enum" in schema or "const" in schema:
            words.append(_choices(schema, got))
        elif kind in ("integer", "number"):
            words.append(_number_words(schema))
        elif kind == "array":
            words.append(_list_words(schema["items"], got))
        elif kind == "object":
            words.append(_section_words(schema, location, got))
        elif kind != "null":
            # "" takes any value, so only the key can be wrong: YAML reads `on` as true.
            words.append(
                {"string": "text", "boolean": "true or false", "": "text as its key"}[kind]
            )
    return ", or ".join(words)


def _choices(schema: dict[str, Any], got: Any) -> str:
    if "const" in schema:
        return str(schema["const"])
    *names, last = map(repr, schema["enum"])
    close = _nearest(str(got), schema["enum"])
    hint = f" (did you mean {close}?)" if close else ""
    return f"{', '.join(names)} or {last}{hint}"


def _number_words(schema: dict[str, Any]) -> str:
    words = ["a whole number" if schema["type"] == "integer" else "a number"]
    for name, word in BOUNDS.items():
        words += [f"{word} {schema[name]:.10g}"] if name in schema else []
    return " ".join(words)


def _list_words(items: dict[str, Any], got: Any) -> str:
    if isinstance(got, dict) and items.get("type") == "string":
        return f"a list of names: [{', '.join(map(str, got))}]"  # values may be secrets
    if isinstance(got, dict):
        first = next(iter(got.items()), None)
        return f"a list of them: [{{{first[0]}: {first[1]}, ...}}]" if first else "a list of them"
    return "a list" if got is None else f"a list: [{got}]"


def _section_words(schema: dict[str, Any], location: Sequence[Any], got: Any) -> str:
    if "properties" not in schema:
        return "a mapping"
    first = next(iter(schema["properties"] if "required" not in schema else schema["required"]))
    rest = ", function: ..." if schema["title"] == "Operation" else ""
    value = got if isinstance(got, str | int | float) else "..."
    example = f"{{{first}: {value}{rest}}}"
    return example if isinstance(location[-1], int) else f"a section: {example}"


def _nearest(name: str, known: Sequence[str]) -> str | None:
    """The known name that was probably meant: spelled alike, or abbreviated to its initials."""
    initials = {"".join(word[0] for word in k.split("_")): k for k in known}
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return close[0] if close else initials.get(name)


def _members(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The schemas of a union's members, or the one there is; references resolved."""
    found = []
    for member in schema.get("anyOf", [schema]):
        name = member.get("$ref", "").rpartition("/")[2]
        found.append(_schema()["$defs"][name] if name else member)
    return found


def _schema_at(location: Sequence[Any]) -> dict[str, Any]:
    """The JSON schema at a path of keys, looking through lists, mappings and unions."""
    schema = _schema()
    for part in location:
        members = _members(schema)
        if items := [m["items"] for m in members if "items" in m]:
            schema = items[0]
        else:
            (within,) = [m for m in members if m.get("type") == "object"]
            properties = within.get("properties")
            values = within.get("additionalProperties")
            schema = properties[part] if properties else values if isinstance(values, dict) else {}
    members = _members(schema)
    return members[0] if len(members) == 1 else schema


@lru_cache(maxsize=1)
def _schema() -> dict[str, Any]:
    return RunSpec.model_json_schema()
