"""What the `ditty` command draws: trees."""

from typing import Any

from rich.markup import escape
from rich.tree import Tree

from ditty.lineage import Node

SHORT = 12  # digits of a hash that people compare


def lineage_tree(node: Node) -> Tree:
    """The chain as a tree, the newest at the top."""
    tree = Tree(_line(node))
    _fill(tree, node)
    return tree


def _line(node: Node) -> str:
    names = " ".join(escape(name) for name in node.names.values())
    if not node.where:
        return f"[bold]{node.kind}[/] {node.key[:SHORT]} [yellow]not in this store[/]"
    return " ".join(filter(None, [f"[bold]{node.kind}[/]", node.key[:SHORT], names]))


def _fill(tree: Tree, node: Node) -> None:
    if node.where:
        tree.add(f"[dim]{escape(node.where)}[/]")
        tree.add(f"content {node.digest[:SHORT]}")
    if node.counts:
        tree.add(", ".join(f"{name} {count:,}" for name, count in node.counts.items()))
    if node.made_by:
        run = node.made_by.get("flow_run") or "no flow run"
        tree.add(f"made by ditty {node.made_by['ditty']}, {run}, {node.made_by['at']}")
    for name, value in node.inputs.items():
        tree.add(f"{name}: {escape(_short(value))}")
    for parent in node.parents:
        _fill(tree.add(_line(parent)), parent)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}={_short(v)}" for k, v in value.items() if v not in (None, [], {}))
    text = str(value)
    is_hash = len(text) == 64 and all(c in "0123456789abcdef" for c in text)
    return text[:SHORT] if is_hash else text
