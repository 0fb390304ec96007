"""Tasks of lm-evaluation-harness that a spec names: which they are, before one is run.

A task is a name that the harness knows, or a YAML file of its format; such a file may name data
files, which are looked for beside it, functions in Python files beside it, and other such files.
"""

import difflib
import glob
import os
import re
import sysconfig
from collections.abc import Collection, Iterator
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

import fsspec
import yaml

from ditty.errors import SpecError, cut, install
from ditty.store.files import sha256_file

PACKAGE = "lm_eval"
FUNCTION = "!function "

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
    _find(frozenset(t for t in tasks if not is_file(t) and not re.search(r"[*?\[]", t)))


@cache  # `ditty run` looks before Prefect starts, and its flow once more
def _find(tasks: frozenset[str]) -> None:
    asked = set(tasks)
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

    Of a data set of the hub, and of data at a URL, only the name is known.

    Raises:
        SpecError: there is no such file, it is no task of the harness' format, or something that
            it names is not there.
    """
    if not is_file(task):
        return {"name": task}
    path = Path(os.path.normpath(task))
    files = {path}
    content = _read(path, files)
    if not isinstance(content.get("task"), str):
        raise SpecError(
            f"evaluate.tasks: {path} has no key `task`, which names it; expected a task file of "
            "lm-evaluation-harness"
        )
    files |= set(_data(content, path))
    named = sorted([_called(file, path.parent), sha256_file(file)] for file in files)
    return {"name": content["task"], "files": named}


def identified(tasks: Collection[str], identity: dict[str, Any]) -> str:
    """The task of that identity.

    Raises:
        SpecError: its files have changed meanwhile.
    """
    for task in tasks:
        if identify(task) == identity:
            return task
    raise SpecError(
        f"evaluate.tasks: the files of task {identity['name']} have changed since it was planned: "
        "run the same command again"
    )


def _called(file: Path, folder: Path) -> str:
    """Its name in a key: wherever things lie on this machine, a module is called alike."""
    places = map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib"))
    installed = any(file.is_relative_to(place) for place in places)
    return file.name if installed else os.path.relpath(file, folder)


def _read(path: Path, files: set[Path]) -> dict[str, Any]:
    """A task's file with those that it includes, which it overrides.

    Args:
        files: those that were read so far; files that are found here are added.
    """
    try:
        content = yaml.load(path.read_bytes(), _Loader)  # noqa: S506  # a SafeLoader
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SpecError(f"evaluate.tasks: cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise SpecError(f"evaluate.tasks: {path} is no mapping; expected keys, `task` for example")
    files |= {_module(name, path) for name in _functions(content)}
    included: dict[str, Any] = {}
    for name in _listed(content.pop("include", [])):
        other = Path(os.path.normpath(path.parent / name))
        if other in files:
            raise SpecError(f"evaluate.tasks: {path} includes {other}, which was read before it")
        files.add(other)
        included |= _read(other, files)
    return included | content


def _functions(value: Any) -> Iterator[str]:
    """Each `module.function` that a part of a task's file names."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _functions(part)
    elif isinstance(value, str) and value.startswith(FUNCTION):
        yield value.removeprefix(FUNCTION)


def _module(function: str, path: Path) -> Path:
    """The file of a function that the task's file at `path` names: beside it, or installed."""
    module = function.rpartition(".")[0]
    beside = path.parent / f"{module.replace('.', '/')}.py"
    if beside.is_file():
        return beside
    try:
        found = util.find_spec(module)
    except Exception:  # a part of it is not there, or is imported and fails
        found = None
    if found is None or found.origin is None or not Path(found.origin).is_file():
        raise SpecError(
            f"evaluate.tasks: {path} names the function {function}, and there is neither {beside} "
            f"nor a file of an installed module {module!r}"
        )
    return Path(found.origin)


def _data(content: dict[str, Any], path: Path) -> Iterator[Path]:
    """The files here that a task's rows come from, where `datasets` would find them."""
    options = content.get("dataset_kwargs") or {}
    if not isinstance(options, dict) or not isinstance(options.get("data_dir") or "", str):
        raise SpecError(
            f"evaluate.tasks: {path}: dataset_kwargs is a mapping whose data_dir is text; got "
            f"{cut(repr(options), 200)}"
        )
    source = str(content.get("dataset_path") or "")
    place = path.parent / source
    if source and place.exists():
        yield from _files(place)
    elif not _is_format(source):
        return  # the hub's, and so are its data_files
    else:
        place = path.parent
    place /= options.get("data_dir") or ""
    patterns = options.get("data_files") or []
    if not patterns and options.get("data_dir"):
        patterns = ["**"]
    values = patterns.values() if isinstance(patterns, dict) else [patterns]
    for pattern in (p for value in values for p in _listed(value) if "://" not in p):
        found = _matches(place, pattern)
        if not found:
            raise SpecError(f"evaluate.tasks: {path} names data files {pattern}: none in {place}")
        yield from found


def _is_format(source: str) -> bool:
    """Whether `datasets` has a reader of that name: json, csv, parquet, ..."""
    datasets = util.find_spec("datasets")
    assert datasets is not None and datasets.origin is not None, "ditty needs it"
    return bool(source) and (Path(datasets.origin).parent / "packaged_modules" / source).is_dir()


def _matches(place: Path, pattern: str) -> list[Path]:
    """The files of a name or pattern; fsspec's patterns, which are those of `datasets`."""
    if (place / pattern).is_file():
        return [place / pattern]
    # The folder's own name is no pattern; an absolute pattern takes its place.
    found = fsspec.filesystem("file").glob(str(Path(glob.escape(str(place.absolute()))) / pattern))
    return [Path(name) for name in found if Path(name).is_file()]


def _files(place: Path) -> list[Path]:
    """A file, or all within a folder."""
    return [place] if place.is_file() else [p for p in place.rglob("*") if p.is_file()]


def _listed(value: Any) -> list[str]:
    return [str(one) for one in (value if isinstance(value, list) else [value])]
