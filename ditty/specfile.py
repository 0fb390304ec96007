"""Reading a spec from YAML and `--set`, with errors that name the key and the nearest valid one."""

import difflib
import glob
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ditty import datafiles
from ditty.dataspec import SQL
from ditty.errors import SpecError, scrub
from ditty.spec import RunSpec

# PyYAML lets through what it meets on its way: bytes that are no text, 2026-13-45, a thousand "[".
NO_YAML = (yaml.YAMLError, ValueError, RecursionError)


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
        lines = [_explain(e) for e in error.errors()]
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
    """Whether `text` is a pattern of something below `base`, as `datafiles.find` reads patterns."""
    return datafiles.is_glob(text) and any(glob.iglob(text, root_dir=base, recursive=True))  # noqa: PTH207


def _read_template(data: Any, base: Path) -> None:
    """Put a chat template's text in the place of its file's name."""
    named = data.get("chat_template") if isinstance(data, dict) else None
    if not isinstance(named, str) or "{" in named:
        return
    path = base / Path(named).expanduser()
    if not path.is_file():
        hint = datafiles.nearest(path) or ", expected Jinja text or a file's name"
        raise SpecError(f"data.chat_template: there is no file {path}{hint}")
    try:
        data["chat_template"] = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"data.chat_template: cannot read {path}: {error}") from error


def _explain(error: Any) -> str:
    """One pydantic error as a sentence: the key, what is wrong, what was expected."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = list(_model_at(error["loc"][:-1]).model_fields)
        close = _nearest(str(error["loc"][-1]), known)
        hint = f"did you mean {close}?" if close else f"expected one of {', '.join(known)}"
        return f"unknown key {key}: {hint}"
    if error["type"] == "missing":
        return f"missing key {key}"
    message = error["msg"].removeprefix("Value error, ")
    got = error["input"]
    if isinstance(got, dict | BaseModel):
        return f"{key}: {message}" if key else message
    if error["type"] == "enum":
        return f"{key}: {_enum_hint(got, error['ctx']['expected'])}"
    return f"{key}: {message}, got {got!r}"


def _nearest(name: str, known: Sequence[str]) -> str | None:
    """The known name that was probably meant: spelled alike, or abbreviated to its initials."""
    initials = {"".join(word[0] for word in k.split("_")): k for k in known}
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return close[0] if close else initials.get(name)


def _enum_hint(got: Any, expected: str) -> str:
    names = [part.strip(" '") for part in expected.replace(" or ", ",").split(",")]
    close = _nearest(str(got), names)
    hint = f" (did you mean {close}?)" if close else ""
    return f"got {got!r}, expected {expected}{hint}"


def _model_at(location: Sequence[Any]) -> type[BaseModel]:
    """The section class at a path of keys, looking through lists and optionals."""
    model: Any = RunSpec
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        while not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            options = [
                a for a in typing.get_args(annotation) if a is not types.NoneType and a is not str
            ]
            annotation = options[-1]
        model = annotation
    return model
