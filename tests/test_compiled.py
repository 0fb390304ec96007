"""Compiled blocks against the same training as it stands, and batches filled up to few sizes."""

import functools
import logging
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from ditty.config.choices import Precision, Quantization
from ditty.config.legal import Strategy, problems
from ditty.config.spec import ModelSpec, RunSpec, TrainSpec
from ditty.data import read_rows
from ditty.distributed.load import load_module
from ditty.distributed.world import single
from ditty.errors import ModelError
from ditty.models.attention import forward_kwargs
from ditty.models.batches import QUARTERS, Bounds, collate, fill_up
from ditty.models.model import load_base
from ditty.quantization.quantize import quantize
from ditty.runs.rundir import RunDir
from ditty.training import compiled, trainer
from ditty.training.feed import LoaderFeed, packed_feed, row_bounds
from ditty.training.trainer import Place, Trainer
from tests import scenarios
from tests.tables_for_tests import write_rows
from tests.tiny import make_model_folder, random_rows, tiny_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("compiled")
    make_model_folder(root / "model")
    write_rows(root / "train.arrow", random_rows(24))
    return root


@pytest.fixture
def without_inductor(monkeypatch):
    """Traced and differentiated as always, without minutes of a C++ compiler."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def train_on(root: Path, home: Path, *, stop_before: int | None = None, model=None, **keys):
    keys = {"max_steps": 12, **keys}
    train = TrainSpec(
        precision="fp32", micro_batch_size=2, gradient_accumulation_steps=1,
        learning_rate=1e-3, save_steps=5, **keys,
    )  # fmt: skip
    model = {"lora_dropout": 0.0, **(model or {})}
    spec = ModelSpec(base_model=str(root / "model"), **model)
    module = load_module(root / "model", spec, train, single())
    run = RunDir(home)
    home.mkdir(exist_ok=True)
    feed = packed_feed(read_rows(root / "train.arrow"), train, single())
    training = Trainer(module, feed, train, Place(run))
    counts = []
    step = training._step

    def counted(work, *args):
        step(work, *args)
        counts.append(compiled.programs())
        if work.step == stop_before:
            run.stop_file.touch()

    training._step = counted
    outcome = training.fit()
    run.stop_file.unlink(missing_ok=True)
    return training, outcome, counts


def losses(home: Path) -> list[float]:
    return [r["loss"] for r in RunDir(home).metrics() if r["kind"] == "train"]


def test_compiled_blocks_train_alike_and_resume_bitwise(root, tmp_path, without_inductor):
    train_on(root, tmp_path / "plain")
    before = compiled.programs()
    training, _, counts = train_on(root, tmp_path / "compiled", compile=True)
    assert training.filled and counts[-1] > before
    plain, found = losses(tmp_path / "plain"), losses(tmp_path / "compiled")
    assert len(found) == 12
    assert found == pytest.approx(plain, rel=1e-6)
    sizes = {
        fill_up(b, training.feed.bounds)["input_ids"].shape[1]
        for group in (next(training.feed.steps(s)) for s in range(12))
        for b in group
    }
    assert 1 < len(sizes) <= QUARTERS  # and none of them compiled twice: see the next test

    _, outcome, _ = train_on(root, tmp_path / "resumed", compile=True, stop_before=7)
    assert (outcome.step, outcome.finished) == (7, False)
    train_on(root, tmp_path / "resumed", compile=True)
    assert losses(tmp_path / "resumed") == found


def test_nothing_is_compiled_anew_once_all_sizes_were_seen(root, tmp_path, without_inductor):
    before = compiled.programs()
    keys = {"compile": True, "sampling": "sequential", "max_steps": 24}
    _, _, counts = train_on(root, tmp_path / "run", **keys)  # the 24 rows in pairs, twice
    assert before < counts[0] < counts[11]
    assert len(set(counts[11:])) == 1


def keep(saved: list[torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    saved.append(tensor)
    return tensor


@pytest.fixture
def recomputing_blocks(monkeypatch):
    """Says how many blocks of the next training recompute."""
    return lambda count: monkeypatch.setattr(
        trainer, "choose_recomputed", lambda *_, **__: (count, None)
    )


def test_blocks_are_compiled_together_with_their_recomputation(
    root, tmp_path, monkeypatch, recomputing_blocks
):
    """The same bits, dropout included, and of each block no more than its inputs is kept."""
    backend = "aot_eager_decomp_partition"  # chooses what to keep as inductor does
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    found, kept = [], []
    for count in (0, 2):
        torch._dynamo.reset()
        recomputing_blocks(count)
        before, saved = compiled.programs(), []
        with torch.autograd.graph.saved_tensors_hooks(functools.partial(keep, saved), lambda t: t):
            train_on(
                root, tmp_path / str(count), compile=True, max_steps=2, sampling="sequential",
                model={"attention": "sdpa", "lora_dropout": 0.5},
            )  # fmt: skip
        assert compiled.programs() > before
        found.append(losses(tmp_path / str(count)))
        kept.append(sum(t.numel() for t in saved if not isinstance(t, torch.nn.Parameter)))
    assert found[0] == found[1] and len(found[0]) == 2
    assert kept[1] < 0.6 * kept[0]


def test_what_is_not_traced_is_recomputed_around_what_is(
    root, tmp_path, without_inductor, caplog, recomputing_blocks
):
    """Packed attention on CPUs is not: torch would compile nothing of the block, and not say so."""
    caplog.set_level(logging.INFO)
    train_on(root, tmp_path / "plain", max_steps=2)
    recomputing_blocks(2)
    before = compiled.programs()
    train_on(root, tmp_path / "compiled", compile=True, max_steps=2)
    assert "blocks are recomputed around what is compiled" in caplog.text
    assert compiled.programs() > before
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)


def test_other_documents_do_not_see_what_a_batch_is_filled_up_with(root):
    spec = ModelSpec(base_model=str(root / "model"))
    model = load_base(root / "model", spec, Precision.FP32, CPU).eval()
    batch = collate(random_rows(2))
    tokens = batch["input_ids"].shape[1]
    bounds = Bounds(4 * tokens, 20, batch["max_seqlen"] + 5)
    for more in (0, 1, tokens - 1):
        filled = fill_up(batch, Bounds(4 * (tokens + more), 20, bounds.longest))
        assert filled["input_ids"].shape[1] == tokens + more
        assert int(filled["cu_seqlens"][-1]) == tokens + more
        lengths = filled["cu_seqlens"].diff()
        assert int(lengths.max()) <= filled["max_seqlen"] == bounds.longest
        assert filled["predicts"] is batch["predicts"]
        with torch.no_grad():
            plain = model(**forward_kwargs(model, batch)).logits
            found = model(**forward_kwargs(model, filled)).logits
        torch.testing.assert_close(found[:, :tokens], plain, rtol=1e-5, atol=1e-6)


def test_every_micro_batch_has_one_of_few_sizes(root):
    rows = read_rows(root / "train.arrow")
    bounds = row_bounds(rows, 3)
    shapes = set()
    for first in range(len(rows) - 3):
        batch = collate([rows[i] for i in range(first, first + 3)])
        assert batch["input_ids"].shape[1] <= bounds.tokens
        assert batch["cu_seqlens"].numel() - 1 <= bounds.documents
        assert batch["max_seqlen"] <= bounds.longest
        filled = fill_up(batch, bounds)
        assert filled["input_ids"].shape[1] - batch["input_ids"].shape[1] <= bounds.tokens / 4 + 1
        shapes.add((filled["input_ids"].shape, filled["cu_seqlens"].shape, filled["max_seqlen"]))
    assert len({shape[0] for shape in shapes}) <= QUARTERS
    assert len({shape[1:] for shape in shapes}) == 1


def test_batches_of_any_size_are_not_compiled(root, tmp_path, caplog):
    train = TrainSpec(precision="fp32", max_steps=1, compile=True)
    spec = ModelSpec(base_model=str(root / "model"))
    module = load_module(root / "model", spec, train, single())
    loader = DataLoader(list(range(4)), collate_fn=lambda _: collate(random_rows(1)))
    feed = LoaderFeed(loader, 1, single())
    with pytest.raises(ModelError, match=r"train.compile is true, but batches of a DataLoader"):
        Trainer(module, feed, train, Place(RunDir(tmp_path)))
    with caplog.at_level(logging.INFO):
        Trainer(module, feed, train.model_copy(update={"compile": None}), Place(RunDir(tmp_path)))
    assert "blocks are not compiled: batches of a DataLoader may have any size" in caplog.text


@pytest.mark.parametrize(
    ("section", "key", "value", "match"),
    [
        ("train", "sharding", "zero3", "hooks by which train.sharding: zero3 gathers"),
        ("model", "quantization", "int8", "cannot compile the layers of model.quantization: int8"),
    ],
)
def test_what_cannot_be_compiled_is_refused_by_the_spec(section, key, value, match):
    spec = {
        "name": "x", "data": {"source": "rows.jsonl"}, "model": {"base_model": "m"},
        "train": {"compile": True}, "launch": {"num_processes": 2, "device": "cpu"},
    }  # fmt: skip
    spec[section][key] = value
    with pytest.raises(ValueError, match=match):
        RunSpec.model_validate(spec)
    spec["train"]["compile"] = None
    assert not list(problems(Strategy.of(RunSpec.model_validate(spec))))


def test_two_processes_with_cut_and_recomputed_blocks(root, tmp_path):
    """FSDP2 names a block's class anew, and recomputation goes around what is compiled. More
    blocks are no more programs."""
    make_model_folder(tmp_path / "deep", tiny_config(num_hidden_layers=5))
    for name, source in (("nf4", root / "model"), ("deep-nf4", tmp_path / "deep")):
        (tmp_path / name).mkdir()
        quantize(source, tmp_path / name, Quantization.NF4, "float32")
    write_rows(tmp_path / "data" / "train.arrow", random_rows(16))
    write_rows(tmp_path / "data" / "eval.arrow", random_rows(2, seed=1))
    train = {
        "max_steps": 4, "precision": "fp32", "micro_batch_size": 2,
        "gradient_accumulation_steps": 1, "learning_rate": 1e-3, "save_steps": 4,
    }  # fmt: skip
    cut = {"sharding": "fsdp2", "compile": True, "activation_checkpointing": "all"}
    jobs = [
        scenarios.job(
            tmp_path, name, {"lora_r": 4, "quantization": "nf4"}, {**train, **change},
            model_dir=str(tmp_path / folder), backend="aot_eager",
        )
        for name, folder, change in (
            ("plain", "nf4", {"sharding": "ddp"}),
            ("compiled", "nf4", cut),
            ("deep", "deep-nf4", {**cut, "max_steps": 1}),
            ("shallow", "nf4", {**cut, "max_steps": 1}),
        )
    ]  # fmt: skip
    results = scenarios.launch(tmp_path / "job", jobs)
    assert results["plain"]["programs"] == 0 and results["compiled"]["programs"] > 0
    assert results["deep"]["programs"] == results["shallow"]["programs"] > 0
    plain, found = ([float.fromhex(x) for x in results[n]["losses"]] for n in ("plain", "compiled"))
    assert len(found) == 4 and found == pytest.approx(plain, rel=1e-6)
