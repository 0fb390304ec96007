"""Sharded QLoRA of a real model, killed, resumed, exported and used. Mark `slow` (some minutes).

python -m pytest -m slow -o addopts= -s tests/test_smollm2.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ditty.data import read_rows
from ditty.model import keep_4bit_weights
from ditty.rundir import RunDir
from tests.processes import ROOT, kill_when
from tests.test_kills import adapter_hash

pytestmark = pytest.mark.slow

OVERRIDES = {
    "train.sharding": "fsdp2",
    "launch.num_processes": 2,
    "launch.device": "cpu",
    "train.max_steps": 4,
    "train.gradient_accumulation_steps": 1,
    "train.save_steps": 2,
    "model.lora_dropout": 0.1,
    "data.max_rows": 400,
    "data.eval_max_rows": 4,
}
COMMAND = (
    "import sys; sys.argv = ['ditty', 'demo', *sys.argv[1:]]; from flows.cli import main; main()"
)


def start(home: Path, output: Path) -> "subprocess.Popen[bytes]":
    arguments = [part for key, v in OVERRIDES.items() for part in ("--set", f"{key}={v}")]
    with open(output, "ab") as file:
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments],
            cwd=ROOT,
            env={**os.environ, "DITTY_HOME": str(home)},
            stdout=file,
            stderr=file,
        )


def test_fsdp2_qlora_of_smollm2_on_two_processes(tmp_path, capsys):
    undisturbed, home, output = tmp_path / "undisturbed", tmp_path / "killed", tmp_path / "output"
    assert start(undisturbed, output).wait() == 0, output.read_text()
    run = RunDir.named("demo", home)
    kill_when(start(home, output), lambda: 2 in run.committed_steps())
    assert start(home, output).wait() == 0, output.read_text()
    state = json.loads((run.checkpoint(4) / "state.json").read_text())
    assert state["world_size"] == 2
    assert adapter_hash(home) == adapter_hash(undisturbed)

    records = [r for r in run.metrics() if r["kind"] == "eval"]
    ours, before = records[-1]["loss"], records[0]["loss"]
    theirs = loss_through_peft(home)
    with capsys.disabled():
        print(f"\nheld-out loss {before:.4f} before, {ours:.6f} after; through peft {theirs:.6f}")
    assert theirs == pytest.approx(ours, rel=1e-5) and ours < before


@torch.no_grad()
def loss_through_peft(home: Path) -> float:
    """Held-out loss of the quantized base and the saved adapter as transformers and peft load
    them, each document alone."""
    from peft import PeftModel

    (adapter,) = (home / "store/train").glob("*")
    (base,) = (home / "store/prequantize").glob("*")
    (data,) = (home / "store/pack").glob("*")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    keep_4bit_weights(model)  # else a bf16 kernel where the CPU has one: 1e-4 apart
    model = PeftModel.from_pretrained(model, adapter).eval()
    total, count = 0.0, 0
    for row in read_rows(data / "eval.arrow"):
        start = 0
        for length in row["lengths"]:
            ids = torch.tensor(row["input_ids"][start : start + length])
            labels = torch.tensor(row["labels"][start : start + length])[1:]
            logits = model(ids[None], use_cache=False).logits[0, :-1]
            wanted = labels != -100
            losses = torch.nn.functional.cross_entropy(
                logits[wanted], labels[wanted], reduction="sum"
            )
            total, count = total + float(losses), count + int(wanted.sum())
            start += length
    return total / count
