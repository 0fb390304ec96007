"""User functions by name, and a digest that changes when what they do changes.

`datasets` fingerprints a function by pickling it, which stores imported helpers by name: change the
helper and the old result is taken for the new one (datasets#3297). `digest` follows the names.
"""

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ditty.dataset.codehash import describe_function
from ditty.errors import DataError, DittyError
from ditty.store.files import canonical_json, sha256_bytes

DIGEST_VERSION = 1

# Folders in sys.path -> blocks, in any thread, that need them there.
_held: Counter[str] = Counter()
_mutex = threading.Lock()


def resolve(ref: str) -> Callable[..., Any]:
    """The function that `module:name` or `/path/to/file.py:name` means.

    A module is looked for in the current directory first; a file may import its neighbours. A file
    that changed since it was resolved is executed anew.

    Raises:
        DataError: no such module, file or name (with the nearest there is), it cannot be imported,
            or it is not callable.
    """
    target, colon, name = ref.rpartition(":")
    if not (target and colon and name):
        raise DataError(f"{ref!r} names no function: expected module:name or /path/file.py:name")
    module = _load_file(Path(target)) if target.endswith(".py") else _load_module(target)
    value = getattr(module, name, None)
    if value is None:
        raise DataError(f"{target} has no {name!r}{_nearest(name, _callables(module))}")
    if not callable(value):
        raise DataError(f"{ref} is a {type(value).__name__}, expected a function")
    return value


def check_call(
    fn: Callable[..., Any], given: Sequence[str], kwargs: dict[str, Any], what: str
) -> None:
    """Raise a DataError if `fn` does not take such a call: here, not when its stage runs.

    Args:
        given: what it gets by position, in words.
        what: the call's name, for errors.
    """
    signature = inspect.signature(fn)
    try:
        signature.bind(*given, **kwargs)
        return
    except TypeError as error:
        problem, hint = str(error), ""
    by_name = {p.name: p for p in signature.parameters.values() if p.kind in _BY_NAME}
    for parameter in list(signature.parameters.values())[: len(given)]:
        by_name.pop(parameter.name, None)  # it is taken
    needed = [n for n, p in by_name.items() if p.default is p.empty and n not in kwargs]
    if unknown := [name for name in kwargs if name not in by_name]:
        problem, hint = f"no argument {unknown[0]!r}", _nearest(unknown[0], list(by_name))
    elif needed:
        problem = f"it needs the argument {' and '.join(map(repr, needed))}"
    after = " and ".join(given) or "nothing"
    raise DataError(
        f"{what}: {problem}; after {after} it takes {', '.join(by_name) or 'none'}{hint}"
    )


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def depends_on(fn: Callable[..., Any], kwargs: dict[str, Any], what: str) -> dict[str, Any]:
    """What the attribute `identity` of a function says its result depends on: {"depends_on"}.

    That is a function of the same keyword arguments, which returns JSON. Empty without it.

    Args:
        what: is given to the function, for errors.
    Raises:
        DataError: it failed; the arguments are not those that it takes, for example.
    """
    identity = getattr(fn, "identity", None)
    if identity is None:
        return {}
    try:
        return {"depends_on": identity(**kwargs)}
    except DittyError:
        raise
    except Exception as error:  # the user's code ran: anything can come out of it
        raise DataError(
            f"{what}: its `identity` failed for the arguments {kwargs}: "
            f"{type(error).__name__}: {error}"
        ) from error


def digest(fn: Callable[..., Any]) -> str:
    """Hex SHA-256 of what `fn` does: its source and, recursively, everything it names.

    Counted: the source text of the function and of each function and class of the user's own code
    that it reaches by a global name, default arguments, the values of constants, the versions of
    the distributions that third-party names come from, and the Python minor version for names of
    the standard library. Not counted: where the file stands, and what else is in it.

    Raises:
        DataError: a part of it has no content to hash (a lambda, a closure, a bound method, a
            partial, a builtin, a global that is no plain value), or its file was edited after it
            was imported.
    """
    with importable():
        parts = describe_function(fn)
    return sha256_bytes(canonical_json({"version": DIGEST_VERSION, "parts": parts}))


@contextlib.contextmanager
def importable(folder: str | None = None) -> Iterator[None]:
    """Let the block import from `folder` (default: the current directory), and only the block."""
    folder = folder or str(Path.cwd())
    with _mutex:
        ours = folder not in sys.path or _held[folder] > 0
        if ours and not _held[folder]:
            sys.path.insert(0, folder)
            importlib.invalidate_caches()
        _held[folder] += ours
    try:
        yield
    finally:
        with _mutex:
            _held[folder] -= ours
            if ours and not _held[folder]:
                with contextlib.suppress(ValueError):  # the import itself may have edited sys.path
                    sys.path.remove(folder)


def _load_module(name: str) -> types.ModuleType:
    try:
        with importable():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            local = [p.stem for p in Path.cwd().glob("*.py")]
            raise DataError(
                f"no module {error.name!r} in {Path.cwd()} or among the installed packages"
                f"{_nearest(error.name, local)}"
            ) from error
        raise DataError(f"importing {name} failed: {error}") from error
    except Exception as error:  # the module's own code ran: anything can come out of it
        raise DataError(f"importing {name} failed: {type(error).__name__}: {error}") from error


def _load_file(path: Path) -> types.ModuleType:
    """Execute a file as a module of its own; once for each content it has had."""
    path = path.absolute()
    try:
        content = path.read_bytes()
    except OSError as error:
        others = [p.name for p in path.parent.glob("*.py")]
        raise DataError(
            f"cannot read {path}: {error.strerror}{_nearest(path.name, others)}"
        ) from error
    # The module's name goes into pickles for worker processes: one name for each file.
    name = f"ditty_file_{path.stem}_{sha256_bytes(os.fsencode(path))[:12]}"
    digest_now = sha256_bytes(content)
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__ditty_content__", None) == digest_now:
        return loaded
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with importable(str(path.parent)), importable():
            code = compile(content, str(path), "exec", dont_inherit=True)
            # Not through the loader: its bytecode cache misses an edit within the same second.
            exec(code, module.__dict__)  # noqa: S102
    except Exception as error:  # the file's own code ran: anything can come out of it
        del sys.modules[name]
        raise DataError(f"importing {path} failed: {type(error).__name__}: {error}") from error
    module.__dict__["__ditty_content__"] = digest_now
    return module


def _callables(module: types.ModuleType) -> list[str]:
    return [n for n, v in vars(module).items() if callable(v) and not n.startswith("__")]


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
