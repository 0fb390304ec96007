"""A trained model in use: peft loads its adapter, and it generates."""

# ruff: noqa: F811  (imported fixtures)
import torch
from transformers import AutoModelForCausalLM

from ditty.config.choices import Precision
from ditty.distributed.parallel import whole_weights
from ditty.distributed.world import single
from ditty.models import attention
from ditty.models.model import save_trained
from ditty.training.evaluate import HeldOut
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
