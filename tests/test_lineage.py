"""The chain of an artifact, against hashes and counts taken from the files themselves."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ditty.config.spec import RunSpec
from ditty.errors import RunError
from ditty.results.lineage import Node, lineage
from ditty.stages import datastages, stageline
from ditty.store.artifacts import FLOW_RUN_VARIABLE, Store
from ditty.store.files import canonical_json, write_json
from ditty.store.remote import Remote
from flows.commands.cli import app
from flows.pages.lineagepage import lineage_markdown
from tests.tiny import make_model_folder


@pytest.fixture
def made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Store, RunSpec, stageline.StageLine]:
    """Data stages really made; a training whose artifact is a stand-in."""
    monkeypatch.setenv(FLOW_RUN_VARIABLE, "the-flow-run")
    rows = [{"text": f"one two three four {i}"} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = RunSpec.model_validate(
        {
            "name": "chain",
            "data": {
                "source": str(tmp_path / "rows.jsonl"),
                "format": "text",
                "seq_len": 64,
                "operations": [
                    {
                        "method": "filter",
                        "function": "ditty.recipes:has_words",
                        "kwargs": {"column": "text", "at_least": 2},
                    }
                ],
            },
            "model": {"base_model": str(make_model_folder(tmp_path / "model"))},
        }
    )
    store = Store()
    line = stageline.resolve(spec, store)
    for ref in line.data():
        datastages.build_data(ref, line, spec, store)
    train = line.need("train")
    facts = {"stage": "train", "inputs": train.inputs, "run": "chain", "steps": 7}
    with store.commit("train", train.key, facts) as out:
        write_json(out / "adapter.json", {})
    return store, spec, line


def kinds(node: Node) -> list[str]:
    """The chain along its last parents."""
    return [node.kind, *(kinds(node.parents[-1]) if node.parents else [])]


def test_the_chain_goes_back_to_the_source(
    made: tuple[Store, RunSpec, stageline.StageLine],
) -> None:
    store, spec, line = made
    train = line.need("train")
    node = lineage(str(store.path("train", train.key)), store)
    by_kind = {parent.kind: parent for parent in node.parents}
    assert kinds(by_kind["pack"]) == ["pack", "tokenize", "filter", "load"]
    assert by_kind["model"] == Node("model", train.inputs["model"]), "a folder is in no store"
    assert node.counts == {"steps": 7} and node.names == {"run": "chain"}
    assert node.inputs["train"]["seed"] == 0
    assert node.made_by["flow_run"] == "the-flow-run"
    load = by_kind["pack"].parents[0].parents[0].parents[0]
    assert load.counts["rows"] == 30
    # The key is the hash of the inputs that the node names, and those name the file's bytes.
    content = {"stage": "load", "version": stageline.VERSIONS["load"], "inputs": load.inputs}
    assert load.key == hashlib.sha256(canonical_json(content)).hexdigest()
    digest = hashlib.sha256(Path(spec.data.source).read_bytes()).hexdigest()
    assert digest in json.dumps(load.inputs)


def test_a_copy_tells_the_same_and_needs_the_manifest_alone(
    made: tuple[Store, RunSpec, stageline.StageLine], tmp_path: Path
) -> None:
    store, _, line = made
    key = line.need("train").key
    here = lineage(str(store.path("train", key)), store)
    (tmp_path / "target").mkdir()
    Remote(f"file://{tmp_path}/target").put(store.path("train", key), f"chain/final/{key}")
    (tmp_path / "target" / "chain" / "final" / key / "adapter.json").unlink()
    shutil.rmtree(store.path("tokenize", line.need("tokenize").key))
    there = lineage(f"file://{tmp_path}/target/chain/final/{key}", store)
    assert (there.key, there.digest, there.made_by) == (here.key, here.digest, here.made_by)
    pack = there.parents[0]
    assert pack.kind == "pack"
    assert pack.parents == (Node("tokens", line.need("tokenize").key),), "gone, but not forgotten"


def test_the_command_prints_the_chain(made: tuple[Store, RunSpec, stageline.StageLine]) -> None:
    store, spec, line = made
    where = str(store.path("pack", line.need("pack").key))
    shown = CliRunner().invoke(app, ["lineage", where]).stdout
    for word in ("pack", "tokenize", "filter", "load", spec.data.source, "the-flow-run"):
        assert word in shown
    value = json.loads(CliRunner().invoke(app, ["lineage", where, "--json"]).stdout)
    assert value["kind"] == "pack" and value["parents"][0]["kind"] == "tokenize"


def test_what_was_never_committed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no manifest.json. Expected an artifact"):
        lineage(str(tmp_path), Store())
    with pytest.raises(RunError, match="nothing was committed"):
        lineage(f"file://{tmp_path}/nothing", Store())


def test_the_page_shows_the_chain_and_how_to_ask_for_it(made: Any) -> None:
    store, _, line = made
    ref = line.need("train")
    text = lineage_markdown(lineage(str(store.path("train", ref.key)), store))
    for stage in ("train", "pack", "tokenize", "filter", "load"):
        assert f"**{stage}**" in text
    assert text.rstrip("\n`").endswith(f"ditty lineage {store.path('train', ref.key)}")
    assert "the-flow-run" in text
