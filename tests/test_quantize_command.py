"""`ditty quantize`: once, into the store, where trainings find it; and copied out."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from ditty.config.choices import Precision, Quantization
from ditty.config.spec import RunSpec
from ditty.errors import ModelError, SpecError
from ditty.results.lineage import lineage
from ditty.runs.rundir import RunDir
from ditty.stages import stageline
from ditty.store.artifacts import Store, verify
from flows.commands.cli import app
from flows.events import Event, EventState, listen
from flows.quantize import quantize
from tests.served import tiny_spec
from tests.test_quantize import differences, theirs
from tests.tiny import make_model_folder, tiny_config


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_model_folder(tmp_path / "model", tiny_config())


@pytest.mark.usefixtures("forked_workers")
def test_once_and_then_found_by_the_command_and_by_a_training(
    base: Path, tmp_path: Path, home: Path, prefect_api: str
) -> None:
    events: list[Event] = []
    with listen(events.append):
        done = quantize(str(base), Quantization.NF4, str(tmp_path / "out"), Precision.FP32)
        again = quantize(str(base), Quantization.NF4, str(tmp_path / "out"), Precision.FP32)
    states = [e.state for e in events if e.stage.startswith("prequantize")]
    assert states == [EventState.STARTED, EventState.DONE, EventState.STARTED, EventState.CACHED]
    assert done == again and done["out"] == (tmp_path / "out").as_uri()
    store = Store(home)
    assert len(RunDir.named("quantize-model-nf4", home).attempts("prequantize")) == 1

    values = tiny_spec(tmp_path, "mine", 1)
    values["model"] = {"base_model": str(base), "quantization": "nf4"}
    values["train"]["precision"] = "fp32"
    ref = stageline.resolve_model(RunSpec.model_validate(values), store).need("prequantize")
    assert str(store.path("prequantize", ref.key)) == done["path"]

    assert verify(tmp_path / "out").digest == done["digest"]
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert differences(theirs(base, torch.float32), ours) == []
    AutoTokenizer.from_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# LlamaForCausalLM in nf4" in card and "double quantization" in card
    facts = verify(tmp_path / "out").facts
    assert f"quantized weights: {facts['quantized_weights']:,}" in card
    assert {parent.kind for parent in lineage(str(tmp_path / "out"), store).parents} == {"model"}


def test_what_decides_the_bits_is_in_the_key(
    base: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(quantization: str = "nf4", precision: str = "bf16") -> str:
        values = tiny_spec(tmp_path, "mine", 1)
        values["model"] = {"base_model": str(base), "quantization": quantization}
        values["train"] = {"precision": precision}
        line = stageline.resolve_model(RunSpec.model_validate(values), Store(home))
        return line.need("prequantize").key

    keys = {key(), key("int8"), key(precision="fp32")}
    monkeypatch.setattr(stageline.metadata, "version", lambda name: "0.99")
    keys.add(key())
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    assert len(keys | {key()}) == 5


def test_refused(base: Path, home: Path, prefect_api: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="quantizes nothing"):
        quantize(str(base), Quantization.NONE)
    with pytest.raises(ModelError, match="there is no"):
        quantize(str(tmp_path / "modle"))


@pytest.mark.usefixtures("forked_workers")
def test_the_command(base: Path, home: Path, prefect_api: str, tmp_path: Path) -> None:
    arguments = ["quantize", str(base), "--to", "int8", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert str(tmp_path / "out") in done.output.replace("\n", "")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").is_loaded_in_8bit
