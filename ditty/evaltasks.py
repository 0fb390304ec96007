"""Tasks of lm-evaluation-harness that a spec names: which they are, before one is run.

A task is a name that the harness knows, or a YAML file of its format; such a file may name data
files, which are looked for beside it, and functions in Python files beside it.
"""

import difflib
import re
from collections.abc import Collection, Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any

import yaml

from ditty.errors import SpecError, install
from ditty.files import sha256_file

PACKAGE = "lm_eval"

_NAMED = re.compile(r"""\b(?:task|group|tag)["']?:[ \t]*["']?([\w.-]+)""")
_NO_NAME = re.compile(r"""[\s"',:\[\]{}]+""")


class _Loader(yaml.SafeLoader):
    """Reads the harness' own tags (`!function utils.f`) as if they were text."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: f"!{suffix} {node.value}")


def is_file(task: str) -> bool:
    """Whether a task is a file rather than a name."""
    return task.endswith((".yaml", ".yml"))


def version() -> str:
    """The harness' version, whose names its tasks are.

    Raises:
        SpecError: it is not installed.
    """
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise SpecError(
            "evaluate.tasks needs the package lm_eval, which is not installed: "
            f"{install('eval')}, or remove evaluate.tasks"
        ) from error


def check_names(tasks: Collection[str]) -> None:
    """Raise SpecError where a task is a name that no file of the harness has in it.

    Looks for words, which takes a second: the harness needs ten, and torch, to tell its names. So a
    word that is there and names no task is refused only by the harness.
    """
    asked = {task for task in tasks if not is_file(task) and not re.search(r"[*?\[]", task)}
    if not asked:
        return
    package = util.find_spec(PACKAGE)
    assert package is not None and package.submodule_search_locations, "see version()"
    names: set[str] = set()
    for path in Path(package.submodule_search_locations[0], "tasks").rglob("*"):
        if path.suffix in ("", ".yaml", ".yml") and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            names.update(_NAMED.findall(text))
            asked.difference_update(_NO_NAME.split(text))
        if not asked:
            return
    task = min(asked)
    near = difflib.get_close_matches(task, names, n=1)
    hint = f"did you mean {near[0]}?" if near else "`lm_eval ls tasks` has those it knows"
    raise SpecError(
        f"evaluate.tasks: lm-evaluation-harness {version()} has no task {task!r}; {hint}"
    )


def identify(task: str) -> dict[str, Any]:
    """What decides the questions of a task: its name, or its files' content.

    Raises:
        SpecError: there is no such file, or it is no task of the harness' format.
    """
    if not is_file(task):
        return {"name": task}
    path = Path(task)
    try:
        content = yaml.load(path.read_bytes(), _Loader)  # noqa: S506  # a SafeLoader
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SpecError(f"evaluate.tasks: cannot read {path}: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("task"), str):
        raise SpecError(
            f"evaluate.tasks: {path} has no key `task`, which names it; expected a task file of "
            "lm-evaluation-harness"
        )
    files = [path, *sorted(path.parent.glob("*.py")), *_named(content, path.parent)]
    return {"name": content["task"], "files": {file.name: sha256_file(file) for file in files}}


def _named(content: dict[str, Any], folder: Path) -> Iterator[Path]:
    """The files beside it that a task names."""
    data = (content.get("dataset_kwargs") or {}).get("data_files") or {}
    for value in [content.get("include"), *(data.values() if isinstance(data, dict) else [data])]:
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str) and (folder / name).is_file():
                yield folder / name
