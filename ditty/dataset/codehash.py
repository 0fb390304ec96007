"""What a function's result depends on in code, as plain JSON: the walk behind `functions.digest`.

Functions and classes of the user's own code are described by their source text, everything else
by the version of what provides it. Names are numbered in the order in which they are met, so that
no path, module name, memory address or set order gets into the description.
"""

import ast
import builtins
import dataclasses
import enum
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import math
import os
import re
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePath
from typing import Any

from ditty.dataset.codenames import Chain, SourceFile, expression_chains, local_imports, used_chains
from ditty.errors import DataError
from ditty.store.files import canonical_json

Json = Any
Definition = types.FunctionType | type

_HINT = "write a function with `def` at the top level of a module"
_LRU_CACHE = type(functools.lru_cache(len))
_TYPE_EXPRESSIONS = types.GenericAlias | types.UnionType


def describe_function(fn: Callable[..., Any]) -> Json:
    """`fn`, and one part for each function and class of the user's that it reaches.

    Raises:
        DataError: see `functions.digest`.
    """
    plain = _plain_function(fn, "")
    walk = _Walk(plain.__module__)
    return {"root": walk.value(plain, plain.__qualname__), "parts": walk.parts}


class _Walk:
    """One walk: `parts[n]` describes the definition that got number n."""

    def __init__(self, module: str):
        self.parts: list[Json] = []
        self._numbers: dict[Definition, int] = {}
        self._files: dict[str, SourceFile] = {}
        # The root's package is the user's own code even where it is installed: its version may
        # stand still while its source changes.
        self._own = module.partition(".")[0]

    def value(self, value: Any, where: str) -> Json:
        """Describe any value; `where` leads from the root to it."""
        if value is None or type(value) in (bool, int, str):
            return [type(value).__name__, value]
        if isinstance(value, types.FunctionType | type | _LRU_CACHE):
            return self._definition(value, where)
        if isinstance(value, types.ModuleType):
            return self._module(value, where)
        return _constant(value) or self._container(value, where) or self._foreign(value, where)

    def _container(self, value: Any, where: str) -> Json:
        kind = type(value)
        if kind in (list, tuple):
            return [kind.__name__, [self.value(v, f"{where}[{i}]") for i, v in enumerate(value)]]
        if kind in (set, frozenset):
            values = [self.value(v, f"{where}[...]") for v in value]
            return [kind.__name__, sorted(values, key=canonical_json)]
        if kind in (dict, types.MappingProxyType):  # in its order, which a loop over it sees
            pairs = [(self.value(k, where), f"{where}[{k!r}]", v) for k, v in value.items()]
            return [kind.__name__, [[key, self.value(v, label)] for key, label, v in pairs]]
        if isinstance(value, enum.Enum):
            return ["enum", self.value(kind, where), value.name]
        if dataclasses.is_dataclass(value):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            return ["object", self.value(kind, where), self._container(fields, where)]
        return None

    def _definition(self, value: Any, where: str) -> Json:
        definition = value if isinstance(value, type) else _plain_function(value, where)
        if self._origin(definition.__module__) is not None:
            return self._foreign(definition, where)
        if definition not in self._numbers:
            self._numbers[definition] = number = len(self.parts)
            self.parts.append(None)  # takes the number, so that recursion ends here
            describe = self._class if isinstance(definition, type) else self._function
            self.parts[number] = describe(definition, where)
        return ["part", self._numbers[definition]]

    def _function(self, fn: Any, where: str) -> Json:
        _check_function(fn, where)
        source = self._source(fn.__code__.co_filename, where)
        text, node = source.function(fn.__code__, where)
        return {
            "source": text,
            "defaults": self.value(fn.__defaults__, f"{where}'s defaults"),
            "keyword_defaults": self.value(fn.__kwdefaults__, f"{where}'s defaults"),
            "names": self._names(used_chains(fn.__code__), fn.__globals__, where, strict=True),
            "imports": self._imports(node, fn.__module__, where),
        }

    def _class(self, cls: Any, where: str) -> Json:
        module = sys.modules[cls.__module__]
        source = self._source(getattr(module, "__file__", None) or "?", where)
        text, node, code = source.class_(cls, where)
        evaluated = [*node.decorator_list, *node.bases, *(k.value for k in node.keywords)]
        chains = used_chains(code) | {c for e in evaluated for c in expression_chains(e)}
        return {
            "source": text,
            "names": self._names(chains, vars(module), where, strict=False),
            "imports": self._imports(node, cls.__module__, where),
        }

    def _names(
        self, chains: Iterable[Chain], scope: dict[str, Any], where: str, *, strict: bool
    ) -> Json:
        """What global names stand for. Not strict: a class body also names its own attributes."""
        found = {}
        for chain in sorted(chains):
            name, *attributes = chain
            if name.startswith("__") or (name not in scope and hasattr(builtins, name)):
                continue
            if name not in scope:
                if strict:
                    raise DataError(f"{where} uses {name!r}, which its module does not define")
                continue
            value, label = scope[name], f"{where} -> {name}"
            while attributes and isinstance(value, types.ModuleType) and self._is_own(value):
                label = f"{label}.{attributes[0]}"
                value = _attribute(value, attributes.pop(0), label)
            found[".".join(chain)] = self.value(value, label)
        return found

    def _imports(self, node: ast.AST, module: str, where: str) -> Json:
        """What is imported inside a function, where it is no global name."""
        found = {}
        for target, name in local_imports(node, vars(sys.modules[module]).get("__package__")):
            label = f"{where} -> {target}"
            if self._origin(target) is not None:
                found[target] = self._origin(target)
                continue
            if name is None:
                raise DataError(f"{label}: import a module of your own at the top of the file")
            value = _attribute(_imported(target, label), name, f"{label}.{name}")
            found[f"{target}:{name}"] = self.value(value, f"{label}.{name}")
        return found

    def _module(self, module: types.ModuleType, where: str) -> Json:
        if self._is_own(module):
            raise DataError(
                f"{where} is a module used as a value, so what is used of it "
                "cannot be told: import the functions by name, or write module.function"
            )
        return [self._origin(module.__name__), module.__name__]

    def _foreign(self, value: Any, where: str) -> Json:
        """What an installed distribution or the standard library provides, by its name there."""
        if isinstance(value, functools.partial | types.MethodType):
            _plain_function(value, where)  # says why not
        if type(value).__module__ == "typing" or isinstance(value, _TYPE_EXPRESSIONS):
            return ["typing", repr(value)]
        module = getattr(value, "__module__", None) or type(value).__module__
        name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
        origin = self._origin(module) if module in sys.modules else None
        # A wrapper made elsewhere around the user's own function is not to be found by its name.
        if origin is not None and (isinstance(value, type) or _named(module, name) is value):
            return [origin, module, name]
        raise DataError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which has no "
            "content to hash: make it inside the function (functools.lru_cache keeps it), or pass "
            "plain values through operation.kwargs"
        )

    def _is_own(self, module: types.ModuleType) -> bool:
        return self._origin(module.__name__) is None

    def _origin(self, module: str) -> Json | None:
        """None for the user's own code, else what stands for its content."""
        top = module.partition(".")[0]
        return None if top == self._own and not _is_stdlib(top) else _provider(top)

    def _source(self, filename: str, where: str) -> SourceFile:
        if filename not in self._files:
            self._files[filename] = SourceFile.read(filename, where)
        return self._files[filename]


def _plain_function(value: Any, where: str) -> types.FunctionType:
    """The function itself; `lru_cache` does not change what it returns."""
    where = where or getattr(value, "__qualname__", None) or repr(value)
    if isinstance(value, _LRU_CACHE):
        value = value.__wrapped__
    if isinstance(value, functools.partial):
        raise DataError(f"{where} is a partial: pass the values through operation.kwargs")
    if isinstance(value, types.MethodType):
        raise DataError(f"{where} is a bound method, and objects are not hashed: {_HINT}")
    if isinstance(value, types.BuiltinFunctionType):
        raise DataError(f"{where} is a builtin without source: {_HINT}")
    if not isinstance(value, types.FunctionType):
        raise DataError(f"{where} is a {type(value).__name__}, expected a function: {_HINT}")
    return value


def _check_function(fn: types.FunctionType, where: str) -> None:
    if fn.__name__ == "<lambda>":
        raise DataError(f"{where} is a lambda, whose source cannot be told apart: {_HINT}")
    if fn.__code__.co_freevars and not hasattr(fn, "__wrapped__"):
        free = ", ".join(fn.__code__.co_freevars)
        raise DataError(
            f"{where} is a closure over {free}, and such values are not hashed: {_HINT} and "
            "pass the value through operation.kwargs"
        )
    if fn.__code__.co_freevars:
        raise DataError(f"{where} is wrapped by a decorator, whose state is not hashed: {_HINT}")


def _constant(value: Any) -> Json:
    """A value that is neither a container nor code; None where it is none of the known."""
    kind = type(value)
    if kind is float:
        return ["float", value.hex() if math.isfinite(value) else repr(value)]
    if kind in (complex, Decimal, Fraction, range, slice) or value is Ellipsis:
        return [kind.__name__, repr(value)]
    if kind in (bytes, bytearray):
        return [kind.__name__, value.hex()]
    if kind is re.Pattern:
        return ["pattern", _constant(value.pattern) or value.pattern, value.flags]
    if isinstance(value, PurePath):
        return ["path", str(value)]
    if isinstance(value, logging.Logger):
        return ["logger"]  # what it does leaves no trace in a row
    return None


def _attribute(module: types.ModuleType, name: str, where: str) -> Any:
    try:
        return getattr(module, name)
    except AttributeError as error:
        try:
            return importlib.import_module(f"{module.__name__}.{name}")
        except ImportError:
            raise DataError(f"{where} does not exist") from error


def _imported(name: str, where: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(f"{where} cannot be imported: {error}. Is it installed?") from error


def _named(module: str, name: str | None) -> Any:
    value: Any = sys.modules[module]
    for part in (name or "").split("."):
        value = getattr(value, part, None)
    return value


@functools.lru_cache
def _is_stdlib(top: str) -> bool:
    path = _location(top)
    if path is None:
        return top in sys.stdlib_module_names or top in sys.builtin_module_names
    folders = {os.path.realpath(sysconfig.get_path(k)) for k in ("stdlib", "platstdlib")}
    return not _is_installed(path) and any(path.startswith(f + os.sep) for f in folders)


def _is_installed(path: str) -> bool:
    return not {"site-packages", "dist-packages"}.isdisjoint(PurePath(path).parts)


def _location(top: str) -> str | None:
    """Where a top-level module comes from, without importing it; None: built in, or nowhere."""
    module = sys.modules.get(top)
    if module is not None:
        file = getattr(module, "__file__", None) or next(
            iter(getattr(module, "__path__", [])), None
        )
        return os.path.realpath(file) if file else None
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin in ("built-in", "frozen"):
        return None
    found = spec.origin or next(iter(spec.submodule_search_locations or []), None)
    return os.path.realpath(found) if found else None


def _provider(top: str) -> Json | None:
    """The Python minor version or the distributions behind a top-level module; None: own code."""
    if _is_stdlib(top):
        return {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    path = _location(top)
    if path is None or not _is_installed(path):
        return None
    names = _distributions(tuple(sys.path)).get(top, [])
    # A loose file in site-packages has no version: then its source has to stand for it.
    return {n: importlib.metadata.version(n) for n in sorted(set(names))} or None


@functools.lru_cache
def _distributions(path: tuple[str, ...]) -> dict[str, list[str]]:
    """Top-level module -> distributions, as seen with this `sys.path`."""
    return dict(importlib.metadata.packages_distributions())
