"""The demo's data: functions of Python's standard library, each with its own docstring.

A data set that every machine has already: real code, no download, about 5,000 rows. Use it as
`data.source: ditty.docstrings:docstrings`.
"""

import ast
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ditty.store.files import canonical_json, sha256_bytes

PROMPT = "Write the docstring of this Python function."
DOCSTRING_CHARACTERS = range(20, 801)
CODE_CHARACTERS = range(60, 1501)
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__"}

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def docstrings() -> Iterator[dict[str, Any]]:
    """Functions and methods of the running Python's library, in the order of its files.

    Yields:
        {"messages": [user: the code without its docstring, assistant: the docstring],
        "name": "module.qualname"}
    """
    root = _library()
    for path in _files(root):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # some files are wrong on purpose, for tests of tools
            continue
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for name, node in _functions(tree, module):
            row = _row(name, node)
            if row is not None:
                yield row


def _identity() -> dict[str, str]:
    """What the rows depend on besides this code: the library's files, by name and size."""
    root = _library()
    files = [[p.relative_to(root).as_posix(), p.stat().st_size] for p in _files(root)]
    return {"python": platform.python_version(), "files": sha256_bytes(canonical_json(files))}


docstrings.identity = _identity  # type: ignore[attr-defined]


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _files(folder: Path) -> Iterator[Path]:
    """Python files below `folder`, without those of tests, sorted at every level."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in SKIPPED:
            yield from _files(path)
        elif path.suffix == ".py" and path.is_file():
            yield path


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, FunctionNode]]:
    """Functions and methods in a module's or class's body; not those inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FunctionNode):
            yield f"{prefix}.{child.name}", child
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}.{child.name}")
        elif isinstance(child, ast.If | ast.Try):
            yield from _functions(child, prefix)


def _row(name: str, node: FunctionNode) -> dict[str, Any] | None:
    """A row, or None: no docstring, nothing but a docstring, or one of the two is too long."""
    docstring = ast.get_docstring(node)
    if docstring is None or len(node.body) < 2:
        return None
    answer = docstring.strip()
    if len(answer) not in DOCSTRING_CHARACTERS:
        return None
    node.body = node.body[1:]
    code = ast.unparse(node)
    if len(code) not in CODE_CHARACTERS:
        return None
    question = f"{PROMPT}\n\n```python\n{code}\n```"
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, "name": name}
