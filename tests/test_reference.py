"""The training loop against TRL's SFTTrainer: the same data in the same order, the same losses.

TRL pads documents into batches and lets transformers divide by the supervised tokens of a step;
ditty lays documents end to end. If both are right, every step has the same loss and gradients.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from ditty.config.choices import Adapter, Precision, Sampling
from ditty.config.spec import ModelSpec, TrainSpec
from ditty.distributed.world import single
from ditty.models.model import load_base, prepare_model, trainable
from ditty.runs.rundir import RunDir
from ditty.training.feed import packed_feed
from ditty.training.trainer import Place, Trainer
from tests.tiny import VOCABULARY, make_model_folder, make_tokenizer

STEPS, DOCUMENTS_PER_STEP = 20, 8
RATE, WARMUP = 1e-3, 3
LORA = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}


@dataclass(frozen=True)
class Case:
    """What is trained, on which tokens, and how ditty lays it out."""

    adapter: Adapter = Adapter.NONE
    completion_only: bool = False
    documents_per_row: int = 1
    micro_batch_size: int = 1
    schedule: str = "cosine"
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Document:
    tokens: list[int]
    prompt: int  # tokens before the completion


@dataclass(frozen=True)
class Course:
    """What is compared of a training, by step, and its trained weights at the end."""

    losses: list[float]
    norms: list[float]
    rates: list[float]
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def make_documents(count: int) -> list[Document]:
    """Arithmetic sequences of 4 to 40 tokens: they can be learned, so a wrong gradient shows."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    documents = []
    for _ in range(count):
        first, stride, length = draw(3, VOCABULARY), draw(1, 4), draw(4, 41)
        tokens = [3 + (first + i * stride) % (VOCABULARY - 3) for i in range(length)]
        documents.append(Document(tokens, draw(1, length)))
    return documents


def packed_rows(documents: list[Document], case: Case) -> Dataset:
    rows = []
    for start in range(0, len(documents), case.documents_per_row):
        row: dict[str, list[int]] = {"input_ids": [], "labels": [], "lengths": []}
        for document in documents[start : start + case.documents_per_row]:
            ignored = document.prompt if case.completion_only else 0
            row["input_ids"] += document.tokens
            row["labels"] += [-100] * ignored + document.tokens[ignored:]
            row["lengths"].append(len(document.tokens))
        rows.append(row)
    return Dataset.from_list(rows)


def prepare(folder: Path, case: Case) -> torch.nn.Module:
    spec = ModelSpec(
        base_model=str(folder),
        adapter=case.adapter,
        lora_r=LORA["r"],
        lora_alpha=LORA["lora_alpha"],
        lora_dropout=LORA["lora_dropout"],
        target_modules=LORA["target_modules"],
    )
    base = load_base(folder, spec, Precision.FP32, torch.device("cpu"))
    return prepare_model(base, spec, seed=0)


def copy_of(weights: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in weights.items()}


def by_ditty(module: torch.nn.Module, documents: list[Document], case: Case, root: Path) -> Course:
    rows_per_step = DOCUMENTS_PER_STEP // case.documents_per_row
    train = TrainSpec(
        max_steps=STEPS,
        micro_batch_size=case.micro_batch_size,
        gradient_accumulation_steps=rows_per_step // case.micro_batch_size,
        learning_rate=RATE,
        schedule=case.schedule,
        warmup_steps=WARMUP,
        max_grad_norm=case.max_grad_norm,
        weight_decay=case.weight_decay,
        precision=Precision.FP32,
        sampling=Sampling.SEQUENTIAL,
    )
    run = RunDir(root)
    run.root.mkdir()
    feed = packed_feed(packed_rows(documents, case), train, single())
    outcome = Trainer(module, feed, train, Place(run, single(), {})).fit()
    assert outcome.finished and outcome.step == STEPS
    records = [r for r in run.metrics() if r["kind"] == "train"]
    columns = ([r[key] for r in records] for key in ("loss", "grad_norm", "learning_rate"))
    return Course(*columns, weights=copy_of(trainable(module)))


def plain_model(folder: Path, case: Case, start: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The model as transformers and peft make it, from the weights `start`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if case.adapter is Adapter.LORA:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert parameters.keys() == start.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(start[name])
    return model


def by_trl(model: torch.nn.Module, documents: list[Document], case: Case, root: Path) -> Course:
    # Imported here: it takes seconds. Without TRL this must fail, not skip.
    from trl import SFTConfig, SFTTrainer

    losses: dict[int, float] = defaultdict(float)

    class Recorder(SFTTrainer):
        """Logs are for reading; these are the losses as they are, before any rounding.

        Each micro batch's is its part of the step's: transformers has divided the sum over its
        tokens by the supervised tokens of the whole step.
        """

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            losses[self.state.global_step] += float(loss)
            return loss

    arguments = SFTConfig(
        output_dir=str(root),
        max_steps=STEPS,
        per_device_train_batch_size=DOCUMENTS_PER_STEP // 2,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        learning_rate=RATE,
        lr_scheduler_type=case.schedule,
        warmup_steps=WARMUP,
        max_grad_norm=case.max_grad_norm,
        weight_decay=case.weight_decay,
        optim="adamw_torch",
        completion_only_loss=case.completion_only,
        max_length=None,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows: dict[str, list[list[int]]] = {"input_ids": [d.tokens for d in documents]}
    if case.completion_only:
        rows["completion_mask"] = [
            [int(i >= d.prompt) for i in range(len(d.tokens))] for d in documents
        ]
    trainer = Recorder(
        model, arguments, train_dataset=Dataset.from_dict(rows), processing_class=make_tokenizer()
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert [entry["step"] for entry in logs] == list(range(1, STEPS + 1))
    return Course(
        [losses[step] for step in range(STEPS)],
        [entry["grad_norm"] for entry in logs],
        [entry["learning_rate"] for entry in logs],
        copy_of({n: p for n, p in model.named_parameters() if p.requires_grad}),
    )


def largest_relative(got: list[float], expected: list[float]) -> float:
    assert len(got) == len(expected) == STEPS
    return max(abs(a - b) / abs(b) for a, b in zip(got, expected, strict=True))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # old names within TRL and transformers
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(), id="full"),
        # An adapter's gradients are small: at 1.0 nothing would be clipped.
        pytest.param(Case(adapter=Adapter.LORA, schedule="linear", max_grad_norm=0.5), id="lora"),
        pytest.param(Case(completion_only=True), id="completion"),
        pytest.param(Case(documents_per_row=2), id="packed"),
        pytest.param(
            Case(
                completion_only=True,
                documents_per_row=2,
                micro_batch_size=2,
                schedule="linear",
                weight_decay=0.1,
            ),
            id="packed-completion",
        ),
    ],
)
def test_twenty_steps_equal_those_of_trl(folder, tmp_path, capsys, request, case):
    documents = make_documents(5 * DOCUMENTS_PER_STEP)  # four passes
    module = prepare(folder, case)
    start = copy_of(trainable(module))
    ours = by_ditty(module, documents, case, tmp_path / "ditty")
    theirs = by_trl(plain_model(folder, case, start), documents, case, tmp_path / "trl")

    loss = largest_relative(ours.losses, theirs.losses)
    norm = largest_relative(ours.norms, theirs.norms)
    assert ours.weights.keys() == theirs.weights.keys()
    weight = max(float((w - theirs.weights[n]).abs().max()) for n, w in ours.weights.items())
    name = request.node.callspec.id
    with capsys.disabled():
        print(
            f"\n{name}: loss {theirs.losses[0]:.4f} to {theirs.losses[-1]:.4f}, "
            f"largest differences: losses {loss:.1e}, gradient norms {norm:.1e} (relative), "
            f"weights {weight:.1e}"
        )
    assert loss < 1e-5
    assert norm < 1e-4
    assert ours.rates == pytest.approx(theirs.rates, rel=1e-12)
    assert weight < 1e-5
    # The comparison means something: the model learned, and gradients were clipped.
    assert theirs.losses[-1] < theirs.losses[0] - 0.05
    assert max(theirs.norms) > case.max_grad_norm
    assert all(not torch.equal(w, start[n]) for n, w in ours.weights.items())
