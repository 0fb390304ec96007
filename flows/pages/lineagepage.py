"""The page of a result's lineage: how the chain of artifacts that it was made from is told."""

from collections.abc import Iterator
from typing import Any

from ditty.results.lineage import Node
from flows.pages.markup import code, fenced

SHORT = 12  # digits of a hash that people compare


def lineage_markdown(node: Node) -> str:
    """The chain as nested lists, the newest first, and how to ask for it again."""
    return f"{_list(node)}\n\n{fenced(f'ditty lineage {node.where}')}\n"


def _list(node: Node, depth: int = 0) -> str:
    indent = "  " * depth
    gone = "" if node.where else " (not in this store)"
    lines = [f"{indent}- **{node.kind}** {code(node_title(node))}{gone}"]
    lines += [
        f"{indent}  - {name}: {code(text)}" for name, text in node_facts(node) if name != "where"
    ]
    lines += [_list(parent, depth + 1) for parent in node.parents]
    return "\n".join(lines)


def node_title(node: Node) -> str:
    """Short key and names of one node."""
    return " ".join(filter(None, [node.key[:SHORT], *node.names.values()]))


def node_facts(node: Node) -> Iterator[tuple[str, str]]:
    """(what, its value) of all that is known of one node."""
    if node.where:
        yield "where", node.where
        yield "content", node.digest[:SHORT]
    if node.counts:
        yield "counts", ", ".join(f"{name} {count:,}" for name, count in node.counts.items())
    if node.made_by:
        run = node.made_by.get("flow_run") or "no flow run"
        yield "made by", f"ditty {node.made_by['ditty']}, {run}, {node.made_by['at']}"
    for name, value in node.inputs.items():
        yield name, _short(value)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}={_short(v)}" for k, v in value.items() if v not in (None, [], {}))
    text = str(value)
    is_hash = len(text) == 64 and all(c in "0123456789abcdef" for c in text)
    return text[:SHORT] if is_hash else text
