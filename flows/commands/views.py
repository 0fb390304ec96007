"""How a chain of artifacts is shown on a terminal."""

from rich.markup import escape
from rich.tree import Tree

from ditty.results.lineage import Node
from flows.pages.lineagepage import node_facts, node_title


def lineage_tree(node: Node) -> Tree:
    """The chain as a tree, the newest at the top."""
    tree = Tree(f"[bold]{node.kind}[/] {escape(node_title(node))}".rstrip())
    _fill(tree, node)
    return tree


def _fill(tree: Tree, node: Node) -> None:
    if not node.where:
        tree.add("[yellow]not in this store[/]")
    for name, text in node_facts(node):
        tree.add(f"{name} {escape(text)}" if name != "where" else f"[dim]{escape(text)}[/]")
    for parent in node.parents:
        _fill(tree.add(f"[bold]{parent.kind}[/] {escape(node_title(parent))}".rstrip()), parent)
