"""A trained model in use: peft loads its adapter, and it generates; and what is never made.

That is what has no values, and what two trainings of one run would write.
"""

# ruff: noqa: F811  (imported fixtures)
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ditty import worker
from ditty.config.choices import Precision
from ditty.config.specfile import parse_spec
from ditty.distributed.parallel import whole_weights
from ditty.distributed.world import single
from ditty.errors import ModelError, RunBusy
from ditty.models import attention
from ditty.models.model import save_trained
from ditty.runs.rundir import RunDir
from ditty.training.evaluate import HeldOut
from tests.processes import Holder
from tests.test_specs import MINIMAL
from tests.test_trainer import CPU, build, folder, run_trainer  # noqa: F401
from tests.tiny import random_rows


def test_peft_loads_the_saved_adapter_and_computes_the_same(folder, tmp_path):
    from peft import PeftModel

    trainer, _, _ = run_trainer(folder, tmp_path, adapter="lora")
    save_trained(
        trainer.parallel.module,
        whole_weights(trainer.parallel, single()),
        "org/base",
        tmp_path / "adapter",
    )
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = base(ids).logits.clone()
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        after = loaded(ids).logits
        with attention.generating(trainer.parallel.model):
            ours = trainer.parallel.module.eval()(input_ids=ids).logits
    assert torch.allclose(after, ours, atol=1e-6) and not torch.allclose(after, before, atol=1e-3)
    assert loaded.peft_config["default"].base_model_name_or_path == "org/base"


def test_generation_uses_a_cache_and_puts_packed_attention_back(folder):
    from ditty.training.evaluate import complete
    from tests.tiny import make_tokenizer

    model = build(folder, adapter="lora")
    base = model.get_base_model()
    held_out = HeldOut(random_rows(2), make_tokenizer(), num_samples=2, sample_max_tokens=5)
    samples = complete(base, held_out, Precision.FP32, CPU)
    assert len(samples) == 2 and set(samples[0]) == {"prompt", "completion", "reference"}
    assert base.config._attn_implementation == attention.NAME and model.training


@pytest.mark.parametrize(
    ("value", "said"), [(torch.empty(0), "empty"), (torch.tensor([1, math.nan]), "not finite")]
)
def test_what_has_no_values_is_not_saved(tmp_path: Path, value: torch.Tensor, said: str) -> None:
    """As the 40 bytes of an adapter that DeepSpeed had cut (trl#4416)."""
    with pytest.raises(ModelError, match=f"lora_A is {said}: not saved"):
        save_trained(torch.nn.Linear(1, 1), {"lora_A": value}, "org/base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_second_training_of_a_run_leaves_before_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "LOCK_WAIT_SECONDS", 0.0)
    run, spec = RunDir.named("x", tmp_path), parse_spec(MINIMAL)
    job = worker.Job(tmp_path, spec, "k" * 64, {}, tmp_path, tmp_path, None, "cpu")
    with Holder(run.root / "lock"), pytest.raises(RunBusy, match="another process trains in"):
        worker.train(job, tmp_path / "attempt")
    assert [path.name for path in run.root.iterdir()] == ["lock"]
