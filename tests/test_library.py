"""The library as the seed shows it: Data, Pipeline, and what both promise."""

import json
import math

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ditty import Data, Pipeline
from ditty.config.spec import TrainSpec
from ditty.conversion import unpickle
from ditty.distributed.world import World
from ditty.errors import DataError, SpecError
from ditty.models import shards
from ditty.quantization import quantize
from ditty.runs.rundir import RunDir
from ditty.stages import share
from ditty.training.feed import packed_feed, row_lengths
from tests.test_unpickle import pickled
from tests.tiny import make_model_folder, make_tokenizer, random_rows


def longer_than(row, at_least):
    return len(row["text"]) > at_least


def upper(rows):
    return {"text": [t.upper() for t in rows["text"]]}


def encode(rows):
    return dict(make_tokenizer()(rows["text"]))


def texts() -> Dataset:
    return Dataset.from_dict({"text": [f"{'word ' * (i % 7)}number {i}" for i in range(30)]})


def make_data(**options) -> Data:
    return Data(**({"dataset": texts(), "tokenizer": make_tokenizer(), "batch_size": 4} | options))


STEPS = [
    ("filter", longer_than, {"fn_kwargs": {"at_least": 12}}),
    ("map", upper, {"batched": True}),
    ("map", encode, {"batched": True, "remove_columns": ["text"]}),
]


@pytest.fixture
def applied(monkeypatch):
    """Operations that were really run, by method."""
    calls = []
    apply = Data._apply

    def counting(self, method, function, kwargs):
        calls.append(method)
        return apply(self, method, function, kwargs)

    monkeypatch.setattr(Data, "_apply", counting)
    return calls


def test_prepare_equals_datasets_and_is_cached(applied):
    loader = make_data().prepare(STEPS)
    reference = texts().filter(lambda r: len(r["text"]) > 12).map(upper, batched=True)
    expected = [make_tokenizer()(t)["input_ids"] for t in reference["text"]]
    rows = [
        ids[mask.bool()].tolist()
        for batch in loader
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert sorted(rows) == sorted(expected)
    assert applied == ["filter", "map", "map"]
    make_data().prepare(STEPS)
    assert len(applied) == 3, "the second time something ran"
    make_data(dataset=texts().select(range(20))).prepare(STEPS)
    assert len(applied) == 6, "other rows were taken for the same"


def test_padding_is_masked_and_the_end_is_learned_although_pad_is_eos():
    data = make_data()
    assert data.tokenizer.pad_token_id == data.tokenizer.eos_token_id == 2
    batch = data.pad([{"input_ids": [5, 6, 2]}, {"input_ids": [7, 2]}])
    assert batch["labels"].tolist() == [[5, 6, 2], [7, 2, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_length_grouping_puts_similar_rows_together_and_loses_none():
    spread = {}
    for grouped in (False, True):
        loader = make_data(group_by_length=grouped, grad_accum=2).prepare(STEPS[2:])
        sizes = [batch["attention_mask"].sum(1).tolist() for batch in loader]
        assert sum(len(s) for s in sizes) == 30
        spread[grouped] = sum(max(s) - min(s) for s in sizes)
    assert spread[True] < spread[False] / 2


def test_packed_rows_are_grouped_by_length_across_processes(tmp_path):
    rows = Dataset.from_list(random_rows(40))
    assert row_lengths(rows).tolist() == [len(r) for r in rows["input_ids"]]
    assert row_lengths(rows.select([3, 1])).tolist() == [len(rows[i]["input_ids"]) for i in (3, 1)]
    train = TrainSpec(micro_batch_size=2, gradient_accumulation_steps=1, sampling="length_grouped")
    worlds = [World(rank, rank, 2, torch.device("cpu")) for rank in range(2)]
    feeds = [packed_feed(rows, train, world).steps(0) for world in worlds]
    tokens = [[next(f)[0]["input_ids"].numel() for f in feeds] for _ in range(10)]
    assert sum(map(sum, tokens)) == sum(row_lengths(rows))
    assert tokens == sorted(tokens, reverse=True), "the longest rows do not come first"


def test_epochs_differ_and_come_back():
    loader = make_data(seed=1).prepare(STEPS[2:])
    order = []
    for epoch in (0, 1, 0):
        loader.batch_sampler.set_epoch(epoch)
        order.append([batch["input_ids"].tolist() for batch in loader])
    assert order[0] == order[2] != order[1]


def test_what_cannot_be_a_key_is_refused_with_a_way_out():
    step = [("filter", lambda row: True, {})]
    with pytest.raises(DataError):
        make_data().prepare(step)
    assert len(make_data(cache=False).prepare([*step, *STEPS[2:]]).dataset) == 30
    with pytest.raises(DataError, match="no method 'fliter'"):
        make_data().prepare([("fliter", longer_than, {})])
    with pytest.raises(DataError, match="leaves no row"):
        make_data().prepare([("filter", longer_than, {"fn_kwargs": {"at_least": 999}})])
    with pytest.raises(DataError, match="load_kwargs"):
        Data(tokenizer=make_tokenizer())


class Mine(Pipeline):
    """As in the README."""

    def dataset(self):
        data = Data(
            dataset=texts(),
            tokenizer=self.tokenizer,
            seed=self.seed,
            batch_size=self.batch_size,
            grad_accum=self.grad_accum,
        )
        return data.prepare(STEPS)


OPTIONS = {"batch_size": 2, "grad_accum": 2, "precision": "fp32", "learning_rate": 1e-3}


@pytest.mark.parametrize("adapter, quantization", [("none", "none"), ("lora", "nf4")])
def test_pipeline_trains_resumes_and_saves_what_transformers_loads(tmp_path, adapter, quantization):
    folder = str(make_model_folder(tmp_path / "model"))
    options = {**OPTIONS, "adapter": adapter, "quantization": quantization, "max_steps": 9}
    whole = Mine(folder, output_dir=str(tmp_path / "whole"), **options).run()
    assert whole.finished and whole.step == 9
    records = [r for r in RunDir(tmp_path / "whole").metrics() if r["kind"] == "train"]
    assert len(records) == 9 and records[-1]["loss"] < records[0]["loss"]

    part = Mine(folder, output_dir=str(tmp_path / "part"), **options)
    run = RunDir(tmp_path / "part")
    run.root.mkdir()
    run.stop_file.touch()
    assert part.run().step == 0
    run.stop_file.unlink()
    resumed = Mine(folder, output_dir=str(tmp_path / "part"), **options).run()
    assert resumed.finished
    name = "model.safetensors" if adapter == "none" else "adapter_model.safetensors"
    one, two = (load_file(tmp_path / p / "final" / name) for p in ("whole", "part"))
    assert one and all(torch.equal(one[k], two[k]) for k in one)
    if adapter == "none":
        AutoModelForCausalLM.from_pretrained(tmp_path / "whole/final")
    else:
        config = json.loads((tmp_path / "whole/final/adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == folder


def test_a_pipeline_converts_bin_files_and_shares_what_it_has_made(tmp_path, monkeypatch):
    folder = pickled(make_model_folder(tmp_path / "model"), tmp_path / "old")
    options = {**OPTIONS, "adapter": "lora", "quantization": "nf4", "max_steps": 1}
    (tmp_path / "shared").mkdir()
    monkeypatch.setenv(share.VARIABLE, f"file://{tmp_path / 'shared'}")
    made = []
    real = shards.write_shards
    for module in (quantize, unpickle):
        monkeypatch.setattr(module, "write_shards", lambda *a: (made.append(a), real(*a))[1])
    outcomes = []
    for home in ("one", "two"):
        monkeypatch.setenv("DITTY_HOME", str(tmp_path / home))
        assert Mine(str(folder), output_dir=str(tmp_path / f"out-{home}"), **options).run().finished
        outcomes.append(load_file(tmp_path / f"out-{home}" / "final/adapter_model.safetensors"))
        assert len(made) == 2, "converted and quantized once, by the first"
    one, two = outcomes
    assert one and all(torch.equal(one[k], two[k]) for k in one)


def test_pipeline_loss_is_that_of_transformers(tmp_path):
    """The first step's loss equals the token-weighted mean of transformers' own on padded rows."""
    folder = str(make_model_folder(tmp_path / "model"))
    options = {**OPTIONS, "adapter": "none", "max_steps": 1}
    pipeline = Mine(folder, output_dir=str(tmp_path / "out"), **options)
    pipeline.run()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = count = 0.0
    for batch in list(pipeline.dataset())[:2]:
        n = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch).loss) * n
        count += n
    (record,) = [r for r in RunDir(tmp_path / "out").metrics() if r["kind"] == "train"]
    assert math.isclose(record["loss"], total / count, rel_tol=1e-5)
    assert record["supervised_tokens"] == count


def test_pipeline_mistakes(tmp_path):
    with pytest.raises(SpecError, match="did you mean train.learning_rate"):
        Mine("x", learningrate=1)
    with pytest.raises(SpecError, match="batch_size must be a number"):
        Mine("gpt2", batch_size="auto")
    with pytest.raises(SpecError, match="needs base_model"):
        Mine()
    for key, value in [
        ("early_stopping_patience", 1),
        ("final_weights", "best"),
        ("num_samples", 2),
        ("eval_steps", 5),
        ("sample_steps", 5),
    ]:
        for more in ({}, {"eval_steps": 2}):
            with pytest.raises(SpecError, match=f"{key}.*held-out rows.*`ditty run`.*Trainer"):
                Mine("x", **{**more, key: value})
    folder = str(make_model_folder(tmp_path / "model"))
    unset = {"early_stopping_patience": None, "final_weights": "last", "num_samples": 0}
    assert Mine(folder, **unset).spec.train.num_samples == 0
    with pytest.raises(NotImplementedError, match="override it"):
        Pipeline(folder, output_dir=str(tmp_path / "out"), max_steps=1, precision="fp32").run()
