"""Reading one source file: the text of a definition, and the names that its code looks up."""

import ast
import dis
import importlib.util
import linecache
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ditty.errors import DataError

Chain = tuple[str, ...]
"""A global name and the attributes read from it at once: `np.linalg.norm`."""

_LOADS = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}  # the last: Python 3.12

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def used_chains(code: types.CodeType) -> set[Chain]:
    """The global names that a code object and those inside it look up."""
    chains: set[Chain] = set()
    open_chain: list[str] = []
    for instruction in dis.get_instructions(code):
        if instruction.opname in _LOADS:
            chains.add(tuple(open_chain))
            open_chain = [instruction.argval]
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and open_chain:
            open_chain.append(instruction.argval)
        else:
            chains.add(tuple(open_chain))
            open_chain = []
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            chains |= used_chains(constant)
    return chains - {()}


def expression_chains(expression: ast.AST) -> set[Chain]:
    """The same for an expression outside any function: a decorator or a base class."""
    attributes: list[str] = []
    node = expression
    while isinstance(node, ast.Attribute):
        attributes.insert(0, node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        return {(node.id, *attributes)}
    return {c for child in ast.iter_child_nodes(node) for c in expression_chains(child)}


def local_imports(node: ast.AST, package: str | None) -> Iterator[tuple[str, str | None]]:
    """(module, name) of each `from module import name` below `node`; no name: `import module`."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield alias.name, None
        elif isinstance(child, ast.ImportFrom):
            relative = "." * child.level + (child.module or "")
            module = importlib.util.resolve_name(relative, package or "")
            for alias in child.names:
                yield module, alias.name


@dataclass(frozen=True)
class SourceFile:
    """A file as it is on the disk now, which need not be what was imported."""

    filename: str
    lines: list[str]
    tree: ast.Module
    code: types.CodeType

    @classmethod
    def read(cls, filename: str, where: str) -> "SourceFile":
        """Read and compile a file, or a notebook's cell.

        Raises:
            DataError: there is no source, or it no longer compiles.
        """
        linecache.checkcache(filename)
        text = "".join(linecache.getlines(filename))
        if not text:
            raise DataError(f"{where} has no source to read (looked in {filename})")
        try:
            code = compile(text, filename, "exec", dont_inherit=True)
        except SyntaxError as error:
            raise DataError(f"{filename} no longer compiles: {error}") from error
        return cls(filename, text.splitlines(keepends=True), ast.parse(text), code)

    def function(self, code: types.CodeType, where: str) -> tuple[str, FunctionNode]:
        """The text and the tree of a function that was imported from this file.

        Raises:
            DataError: the file was edited since, so its text is not what would run.
        """
        if not any(_same(code, other) for other in _codes(self.code)):
            raise DataError(
                f"{where}: {self.filename} was edited after it was imported; start a new process"
            )
        for node in ast.walk(self.tree):
            if isinstance(node, FunctionNode) and _first_line(node) == code.co_firstlineno:
                return self._text(node), node
        raise AssertionError(f"{where}: code at line {code.co_firstlineno}, but no definition")

    def class_(self, cls: type, where: str) -> tuple[str, ast.ClassDef, types.CodeType]:
        """The text, tree and body code of a class.

        Raises:
            DataError: no class statement makes it, several do, or the file was edited since.
        """
        codes = [c for c in _codes(self.code) if c.co_qualname == cls.__qualname__]
        nodes = [n for n in ast.walk(self.tree) if isinstance(n, ast.ClassDef)]
        nodes = [n for n in nodes if _first_line(n) in {c.co_firstlineno for c in codes}]
        if len(codes) != 1 or len(nodes) != 1:
            raise DataError(
                f"{where}: {len(nodes)} class statements for {cls.__qualname__} in "
                f"{self.filename}, expected 1"
            )
        for method in vars(cls).values():
            code = getattr(getattr(method, "__func__", method), "__code__", None)
            if isinstance(code, types.CodeType) and code.co_filename == self.filename:
                self.function(code, f"{where}.{code.co_name}")
        return self._text(nodes[0]), nodes[0], codes[0]

    def _text(self, node: FunctionNode | ast.ClassDef) -> str:
        return textwrap.dedent("".join(self.lines[_first_line(node) - 1 : node.end_lineno]))


def _first_line(node: FunctionNode | ast.ClassDef) -> int:
    return min([node.lineno, *(d.lineno for d in node.decorator_list)])


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _codes(constant)


def _same(a: Any, b: Any) -> bool:
    """Equal constants or code. Code objects' own `==` also compares caches that fill up."""
    if not isinstance(a, types.CodeType):
        return type(a) is type(b) and (a == b or a != a)
    return (
        isinstance(b, types.CodeType)
        and a.co_qualname == b.co_qualname
        and a.co_firstlineno == b.co_firstlineno
        and (a.co_code, a.co_names, a.co_varnames) == (b.co_code, b.co_names, b.co_varnames)
        and len(a.co_consts) == len(b.co_consts)
        and all(_same(x, y) for x, y in zip(a.co_consts, b.co_consts, strict=True))
    )
