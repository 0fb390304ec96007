"""The guides (deployments/README.md): the table is the plan's, commands and specs parse, no error
is missing. The README's map: each module, on the side where the import contract has it.
"""

import inspect
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from ditty import errors
from ditty.config.specfile import load_spec, parse_spec
from ditty.planning import methods
from flows.commands.cli import app

ROOT = Path(__file__).parent.parent
HERE = ROOT / "deployments"
TEXT = (HERE / "README.md").read_text()
README = (ROOT / "README.md").read_text()
WITH_SPEC = ("run", "plan", "evaluate", "refresh", "preview")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def commands() -> list[list[str]]:
    """The arguments of each `ditty` command, without the variables before it."""
    lines = [
        shlex.split(line, comments=True) for block in blocks("sh") for line in block.split("\n")
    ]
    found = [words[words.index("ditty") + 1 :] for words in lines if "ditty" in words]
    assert len(found) == len([words for words in lines if words]) >= 15
    return found


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_the_commands_of_the_guides_are_ones(arguments):
    """Parsed as `ditty` parses them, and their specs with the changes they make."""
    name, *rest = arguments
    command = typer.main.get_command(app).commands[name]
    context = command.make_context(name, list(rest))
    if name in WITH_SPEC:
        spec = load_spec(HERE / context.params["spec"], context.params["overrides"] or [])
        assert spec.train.max_steps is None


@pytest.mark.parametrize("block", blocks("yaml"))
def test_the_pieces_of_specs_are_valid(block):
    base = {"name": "x", "data": {"source": "rows.jsonl"}, "model": {"base_model": "org/name"}}
    pieces = yaml.safe_load(block)
    changed = parse_spec(base | pieces).model_dump(mode="json")
    for section, values in pieces.items():
        assert {key: changed[section][key] for key in values} == values


def test_the_table_of_memory_is_that_of_the_plan():
    shown = re.search(
        r"<!-- python -m ditty.planning.methods -->\n(.*?)<!-- end -->", TEXT, re.DOTALL
    )
    made = "\n".join([*methods.memory_table(), "", *methods.memory_table(8)]) + "\n"
    assert shown and shown[1] == made, "write what `python -m ditty.planning.methods` prints"


def test_every_error_has_its_cause_and_cure():
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass)]
    names = {c.__name__ for c in classes if issubclass(c, errors.DittyError)}
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.*?)\s*\|$", TEXT, re.MULTILINE)
    assert {name for name, *_ in rows} == names
    assert all(cause and cure for name, cause, cure in rows if name != "DittyError")
    tree = set(re.findall(r"\b(\w+Error|[A-Z]\w+[a-z])\b", errors.__doc__))
    assert names <= tree


@pytest.mark.parametrize("file", [ROOT / "README.md", HERE / "README.md"], ids=["readme", "guides"])
def test_what_is_linked_to_exists(file):
    found = re.findall(r"\]\((?!https?:)([^)#]+)(?:#([^)]+))?\)", file.read_text())
    assert len(found) >= 5
    for target, place in found:
        assert (file.parent / target).exists(), target
        if place:
            titles = re.findall(r"^#+ (.+)$", (file.parent / target).read_text(), re.MULTILINE)
            assert place in [title.lower().replace(" ", "-") for title in titles]


def test_the_map_has_each_module_once_in_its_folder():
    text = README.partition("## Where things are")[2].partition("**The rest:**")[0]
    named = [
        f"{folder}{name}"
        for folder, rest in re.findall(r"^- `(\S+/)`(.*?)(?=^- |^\*\*|\Z)", text, re.M | re.S)
        for name in re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", rest))
    ]
    modules = [
        str(path.relative_to(ROOT).with_suffix(""))
        for package in ("flows", "ditty")
        for path in (ROOT / package).rglob("*.py")
        if path.stem != "__init__"
    ]
    assert sorted(n for n in named if not n.endswith("/ditty")) == sorted(modules)


def test_each_folder_is_on_its_side_of_torch():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (sides,) = [c for c in contracts["contracts"] if "torch" in c.get("forbidden_modules", ())]
    listed = {*sides["source_modules"], *sides["forbidden_modules"]} - {"flows", "torch"}
    there = {
        path.stem for path in (ROOT / "ditty").iterdir() if path.suffix == ".py" or path.is_dir()
    }
    assert listed == {f"ditty.{name}" for name in there - {"__init__", "__pycache__"}}
