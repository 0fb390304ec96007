"""What became of the rows: counted again by plain loops, and read back from the API."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from ditty.config.spec import RunSpec
from ditty.dataset.tokenization import load_tokenizer
from ditty.runs.rundir import RunDir
from ditty.stages import datastages, stageline
from ditty.store.artifacts import Store
from flows.pages.datareport import MadeStage, data_markdown, made_stages
from flows.pages.publish import publish_data
from tests.tiny import make_model_folder

TEXTS = [*(f"{'word ' * (n % 90)}{n}" for n in range(300)), *(["no"] * 40), *([""] * 5)]
BAD = {17: '{"text":', 200: '{"text": null}'}
SPEC: dict[str, Any] = {
    "name": "counted_rows",
    "data": {
        "format": "text",
        "seq_len": 64,
        "eval_fraction": 0.2,
        "eval_max_rows": 30,
        "operations": [
            {"method": "filter", "function": "ops.py:keep"},
            {"method": "shuffle", "kwargs": {"seed": 1}},
        ],
    },
}


@pytest.fixture
def made(tmp_path: Path) -> tuple[stageline.StageLine, RunSpec]:
    lines = [BAD.get(n, json.dumps({"text": text})) for n, text in enumerate(TEXTS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    (tmp_path / "ops.py").write_text("def keep(row):\n    return row['text'] != 'no'\n")
    operations = [dict(o) for o in SPEC["data"]["operations"]]
    operations[0]["function"] = f"{tmp_path}/ops.py:keep"
    source = {"source": str(tmp_path / "rows.jsonl"), "operations": operations}
    model = {"base_model": str(make_model_folder(tmp_path / "model"))}
    spec = RunSpec.model_validate({**SPEC, "data": SPEC["data"] | source, "model": model})
    store = Store()
    line = stageline.resolve(spec, store)
    for ref in line.data():
        datastages.build_data(ref, line, spec, store)
    return line, spec


def cells(report: str) -> dict[str, list[str]]:
    """The tables' rows by their first cells."""
    rows = (re.split(r" *\| *", line.strip("| ")) for line in report.splitlines() if "|" in line)
    return {row[0]: row[1:] for row in rows}


def test_every_row_is_accounted_for(made: tuple[stageline.StageLine, RunSpec]) -> None:
    line, spec = made
    store = Store()
    report = data_markdown(spec.name, made_stages(line, store), picture=False)
    found = cells(report)
    assert found["load rows.jsonl"] == ["345", "344", "0", "1"]
    assert found["filter ops.py:keep"] == ["344", "304", "40", "0"]
    assert found["shuffle 1"] == ["304", "304", "0", "0"]
    tokenizer = load_tokenizer(line.model_dir)
    readable = [t for n, t in enumerate(TEXTS) if n not in BAD and t != "no"]
    lengths = [len(tokenizer.backend_tokenizer.encode(t).ids) + 1 for t in readable]
    facts = {stage.stage: stage.facts for stage in made_stages(line, store)}
    unused = facts["tokenize"]["eval_unused"]
    assert unused > 0
    read, kept, left_out, bad = found["tokenize"]
    assert (read, bad) == ("304", "1")
    assert int(left_out) == 5 + unused and int(kept) == 303 - 5 - unused
    assert found["rows cut at seq_len"] == [f"{sum(n > 64 for n in lengths)}"]
    for upto in (8, 16, 32, 64, 128, 256, 512):
        low = upto // 2 if upto > 8 else -1
        expected = sum(low < n <= upto for n in lengths)
        assert found.get(str(upto), ["0"])[0] == f"{expected}", upto
    tokens, supervised = (facts["tokenize"][k] for k in ("tokens", "supervised_tokens"))
    assert found["supervised tokens"] == [f"{supervised:,} ({supervised / tokens:.1%})"]
    assert found["filled with tokens"] == [f"{facts['pack']['fill_rate']:.1%}"]
    assert "- load, cannot be used: not JSON: 1" in report
    assert "- tokenize, dropped: empty: 5" in report
    for stage in ("load", "tokenize"):
        path = store.path(stage, line.need(stage).key) / "quarantine.jsonl"
        assert f"listed in `{path}`" in report and path.is_file()


def test_bars_and_titles_are_bounded() -> None:
    tokens = {
        "rows": 10**12 + 1,
        "train_rows": 10**12,
        "eval_rows": 1,
        "eval_unused": 0,
        "dropped": {},
        "quarantined": {},
        "lengths": {"8": 10**12, "16": 1},
    }
    stages_made = [
        MadeStage("load", "load `|" + "x" * 5000, {"read": 1, "rows": 1}, Path("/a")),
        MadeStage("tokenize", "tokenize", tokens, Path("/b")),
        MadeStage("pack", "pack", {"fill_rate": 0.5}, Path("/c")),
    ]
    report = data_markdown("a_b", stages_made, picture=False)
    assert len(report) < 2000 and report.startswith("# a\\_b: its data")
    assert cells(report)["8"][1] == "█" * 40 and cells(report)["16"][1] == "█"


def test_it_is_on_the_page_of_the_run_and_in_its_directory(
    prefect_api: str, home: Path, made: tuple[stageline.StageLine, RunSpec]
) -> None:
    line, spec = made
    store = Store()

    @flow
    def publishes() -> None:
        publish_data(line, spec.name, store)

    publishes()
    written = RunDir.named(spec.name, store.home).data_file.read_text()
    assert written == data_markdown(spec.name, made_stages(line, store), picture=False)
    with get_client(sync_client=True) as client:
        pattern = ArtifactFilterKey(like_="data-counted-rows--")
        (artifact,) = client.read_artifacts(artifact_filter=ArtifactFilter(key=pattern))
    (data,) = re.findall(r"!\[lengths\]\(data:image/png;base64,([A-Za-z0-9+/=]+)\)", artifact.data)
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True))).convert("RGB")
    colors = {color: count for count, color in image.getcolors(image.width * image.height) or []}
    assert image.size == (900, 300) and colors[(31, 119, 180)] > 1000, "bars"
    without = re.sub(r"!\[lengths\]\([^)]*\)\n\n", "", artifact.data)
    assert without == written
