"""deployments/dpo.py against TRL's DPOTrainer: the same pairs, the same losses."""

import json
from collections import defaultdict

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deployments.dpo import BETA, Dpo
from ditty.config.choices import Sampling
from ditty.errors import SpecError
from ditty.runs.rundir import RunDir
from ditty.training.sampler import SampleOrder
from tests.tiny import make_model_folder, make_tokenizer

STEPS, PAIRS, RATE = 6, 4, 5e-3


def make_pairs() -> list[dict[str, str]]:
    words = ["red", "green", "a long blue", "black and white", "no"]
    pick = [words[i * 7 % 5] for i in range(3 * STEPS * PAIRS)]
    return [
        {"prompt": f"question {i}: ", "chosen": f"{pick[i]}, yes", "rejected": f"{pick[-i]} {i}"}
        for i in range(STEPS * PAIRS)
    ]


def by_trl(folder, rows, start, root):
    from peft import LoraConfig, get_peft_model
    from trl import DPOConfig, DPOTrainer

    losses = defaultdict(float)

    class Recorder(DPOTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            losses[self.state.global_step] += float(loss)
            return loss

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(model, config)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert parameters.keys() == start.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(start[name])
    arguments = DPOConfig(
        output_dir=str(root),
        max_steps=STEPS,
        per_device_train_batch_size=PAIRS // 2,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        optim="adamw_torch",
        beta=BETA,
        max_length=None,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    data = Dataset.from_list(rows)
    trainer = Recorder(model, args=arguments, train_dataset=data, processing_class=make_tokenizer())
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return [losses[step] for step in range(STEPS)], norms, parameters


@pytest.mark.filterwarnings("ignore::FutureWarning")  # old names within TRL and transformers
def test_each_step_equals_that_of_trl(tmp_path):
    folder = make_model_folder(tmp_path / "model")
    rows = make_pairs()
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "batch_size": PAIRS // 2,
        "grad_accum": 2,
        "learning_rate": RATE,
        "precision": "fp32",
    }
    dpo = Dpo(
        str(folder), str(tmp_path / "pairs.jsonl"), output_dir=str(tmp_path / "out"), **options
    )
    start = {}
    ours = dpo.hooks

    def hooks():
        start.update(
            {n: p.detach().clone() for n, p in dpo.module.named_parameters() if p.requires_grad}
        )
        return ours()

    dpo.hooks = hooks
    assert dpo.run().finished
    records = [r for r in RunDir(tmp_path / "out").metrics() if r["kind"] == "train"]
    order = SampleOrder(len(rows), PAIRS, Sampling.RANDOM, 0).epoch(0)
    losses, norms, trained = by_trl(folder, [rows[i] for i in order], start, tmp_path / "trl")
    assert [r["loss"] for r in records] == pytest.approx(losses, rel=1e-5)
    assert [r["grad_norm"] for r in records] == pytest.approx(norms, rel=1e-4)
    # It means something: the loss has left log 2, and gone down.
    assert losses[0] == pytest.approx(0.6931, abs=1e-4) and losses[-1] < 0.6
    adapter = load_file(tmp_path / "out/final/adapter_model.safetensors")
    for name, value in trained.items():
        torch.testing.assert_close(adapter[name.replace(".default", "")], value, rtol=0, atol=1e-5)


def test_without_an_adapter_there_is_no_reference(tmp_path):
    with pytest.raises(SpecError, match="adapter='lora'"):
        Dpo(str(make_model_folder(tmp_path / "m")), "pairs.jsonl", adapter="none")
