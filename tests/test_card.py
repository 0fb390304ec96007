"""What goes beside the weights: a card that the hub's own library reads, and where to stop."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import GenerationConfig

from ditty.config.choices import ExportTo
from ditty.config.spec import RunSpec
from ditty.results.package import GENERATION_CONFIG, generation_config, learned_ends
from ditty.runs.rundir import RunDir, append_record
from ditty.stages import stageline
from ditty.store.artifacts import Store
from ditty.store.files import sha256_bytes, write_json
from flows.card import card_files
from tests.served import tiny_spec
from tests.tiny import make_tokenizer, random_rows

LOSSES = [3.2, 2.9, 2.5]


@pytest.fixture
def run(tmp_path: Path, home: Path) -> tuple[RunSpec, Store, str]:
    """A run with metrics, and the artifacts that its result was made of."""
    values = tiny_spec(tmp_path, "mine", 3)
    values["model"]["quantization"] = "nf4"
    spec, store = RunSpec.model_validate(values), Store(home)
    directory = RunDir.named("mine", home)
    directory.root.mkdir(parents=True)
    for step, loss in enumerate(LOSSES, 1):
        record = {"kind": "train", "step": step, "total_steps": 3, "loss": loss}
        append_record(directory.metrics_file, record | {"learning_rate": 1e-4})
    source = {"stage": "load", "inputs": {}, "rows": 40, "source": str(tmp_path / "rows.jsonl")}
    with store.commit("load", "a" * 64, source) as out:
        (out / "rows.arrow").write_bytes(b"rows")
    inputs = {"model": "m" * 64, "data": "c" * 64}
    kept = {"stage": "filter", "inputs": {"rows": "a" * 64}, "rows": 30, "function": "ops.py:keep"}
    with store.commit("filter", "f" * 64, kept):
        pass
    with store.commit("tokenize", "b" * 64, {"stage": "tokenize", "inputs": {"rows": "f" * 64}}):
        pass
    with store.commit("pack", "c" * 64, {"stage": "pack", "inputs": {"tokens": "b" * 64}}):
        pass
    evaluated = [{"step": 0, "loss": 3.25}, {"step": 3, "loss": 2.5}]
    facts = {"stage": "train", "inputs": inputs, "steps": 3, "loss": 2.5, "eval": evaluated}
    with store.commit("train", "d" * 64, facts):
        pass
    return spec, store, "d" * 64


def card(files: dict[str, bytes], folder: Path) -> ModelCard:
    (folder / "README.md").write_bytes(files["README.md"])
    return ModelCard.load(folder / "README.md")


def test_the_card_says_what_it_is_and_of_what(run: Any, tmp_path: Path) -> None:
    files = card_files(*run, ExportTo.ADAPTER, "apache-2.0")
    read = card(files, tmp_path)
    data = read.data.to_dict()
    assert data["license"] == "apache-2.0" and data["library_name"] == "peft"
    assert "base_model" not in data, "a folder here is no model of the hub"
    assert "| held-out loss before, in nats a token | 3.2500 |" in read.text
    assert "| held-out loss after | 2.5000 |" in read.text
    rows = sha256_bytes(b"rows")
    manifest = run[1].find("load", "a" * 64)
    assert manifest.files["rows.arrow"] == (4, rows)
    assert f"- load rows.jsonl: 40 rows; SHA-256 `{manifest.digest}`" in read.text
    assert files["loss.png"].startswith(b"\x89PNG") and "![loss](loss.png)" in read.text
    assert str(tmp_path) not in read.text
    spec = yaml.safe_load(read.text.split("```text\n")[1].split("```")[0])
    assert spec["model"] == {"base_model": "model", "quantization": "nf4", "attention": "sdpa"}
    assert set(spec) == {"data", "model", "train"}, "not where it was launched and uploaded"


@pytest.mark.parametrize("to", ExportTo)
def test_of_a_model_of_the_hub(run: Any, tmp_path: Path, to: ExportTo) -> None:
    spec, store, key = run
    model = spec.model.model_copy(update={"base_model": "org/name"})
    read = card(
        card_files(spec.model_copy(update={"model": model}), store, key, to, None), tmp_path
    )
    assert read.data.base_model == "org/name" and read.data.license is None
    assert read.data.library_name == {"adapter": "peft", "merged": "transformers"}.get(to)
    assert ("PeftModel" in read.text) == (to is ExportTo.ADAPTER)
    assert ("gguf_file" in read.text) == (to is ExportTo.GGUF)


def test_the_licence_of_a_local_base(run: Any, tmp_path: Path) -> None:
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\n---\n# A model --- of mine\n")
    assert card(card_files(*run, ExportTo.MERGED, None), tmp_path).data.license == "mit"
    assert card(card_files(*run, ExportTo.MERGED, "gemma"), tmp_path).data.license == "gemma"
    (tmp_path / "model" / "README.md").write_text("# No front --- matter\n---\nlicense: x\n---\n")
    assert card(card_files(*run, ExportTo.MERGED, None), tmp_path).data.license is None


def test_what_a_model_has_learned_to_end_with() -> None:
    """Documents of a chat that end with 7, some that were cut off, and prompts without a label."""
    rows = random_rows(30, seed=3)
    for number, row in enumerate(rows):
        end = 0
        for length in row["lengths"]:
            end += length
            if number % 3:
                row["input_ids"][end - 1] = row["labels"][end - 1] = 7
    assert learned_ends(rows) == [7]
    last = Counter(row["input_ids"][-1] for row in rows)
    assert last[7] < len(rows), "some were cut off"
    assert learned_ends([]) == []
    masked = [{"input_ids": [1, 2], "labels": [-100, -100], "lengths": [2]}]
    assert learned_ends(masked) == []


@pytest.mark.parametrize(
    ("config", "own", "expected"),
    [
        ({"eos_token_id": 0, "temperature": 0.6}, None, [0, 2, 7]),
        ({"eos_token_id": [2, 0]}, None, [2, 0, 7]),
        (None, {"eos_token_id": 5, "bos_token_id": 1}, [5, 2, 7]),
        (None, None, [2, 7]),
    ],
)
def test_generation_stops_where_the_model_does(
    tmp_path: Path, config: Any, own: Any, expected: list[int]
) -> None:
    """The base's own ends, the tokenizer's (2), and what was learned; of an adapter the latter."""
    make_tokenizer().save_pretrained(tmp_path)
    for name, value in ((GENERATION_CONFIG, config), ("config.json", own)):
        if value is not None:
            write_json(tmp_path / name, value)
    data = generation_config(tmp_path, [7])
    (tmp_path / GENERATION_CONFIG).write_bytes(data)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == expected
    assert json.loads(data).get("temperature") == (config or {}).get("temperature")


def test_the_key_of_a_package() -> None:
    from ditty.results.package import package_ref

    merge = stageline.merge_ref("a", "b")
    refs = [package_ref(merge, {"README.md": b"1"}), package_ref(merge, {"README.md": b"2"})]
    refs += [
        package_ref(stageline.merge_ref("a", "c"), {"README.md": b"1"}),
        package_ref(merge, {}),
    ]
    assert len({ref.key for ref in refs}) == 4
