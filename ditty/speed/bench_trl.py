"""The work of ditty.speed.bench by TRL's SFTTrainer: random weights, full rows of random tokens.

As its documentation has it for speed: weights in the spec's precision, packed, Liger's kernels if
that package is there, and blocks recomputed where the spec says so.
"""

import importlib.util
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ditty.config.choices import ActivationCheckpointing, Adapter, Precision, Quantization
from ditty.config.spec import RunSpec
from ditty.distributed.world import World
from ditty.errors import SpecError
from ditty.models.model import DTYPES
from ditty.planning.shapes import SHAPES
from ditty.speed.bench import WARM_STEPS, model_folder, random_rows

log = logging.getLogger(__name__)


def measure_trl(spec: RunSpec, options: dict[str, Any], home: Path, world: World) -> dict[str, Any]:
    """As ditty.speed.bench.measure; TRL's tokens_per_second and peak_bytes.

    Raises:
        SpecError: TRL is not installed, or has no such method.
    """
    if importlib.util.find_spec("trl") is None:
        raise SpecError("--compare trl needs TRL: pip install trl liger-kernel")
    if spec.model.quantization not in (Quantization.NONE, Quantization.NF4):
        raise SpecError(f"TRL trains no LoRA beside a base in {spec.model.quantization}")
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTTrainer

    precision = spec.train.precision  # TRL quantizes at load
    folder = model_folder(options["shape"], Quantization.NONE, precision, home, world)
    rows = random_rows(spec, SHAPES[options["shape"]].vocabulary, None, world.world_size)
    data = Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows])
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory(dir=home) as temporary:
        trainer = SFTTrainer(
            model=str(folder),
            args=_arguments(spec, temporary, world),
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(folder, pad_token="a"),  # noqa: S106
            peft_config=_adapter(spec),
            callbacks=[Clock()],
        )
        trainer.train()
    seconds = (times[-1] - times[WARM_STEPS - 1]) / (len(times) - WARM_STEPS)
    train = spec.train
    a_step = train.micro_batch * train.gradient_accumulation_steps * world.world_size
    peak = torch.cuda.max_memory_allocated(world.device) if world.device.type == "cuda" else None
    return {
        "tokens_per_second": a_step * spec.data.seq_len / seconds,
        "peak_bytes": peak,
        "loss": trainer.state.log_history[-1].get("train_loss"),
    }


def _arguments(spec: RunSpec, folder: str, world: World) -> Any:
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig

    gpu = world.device.type == "cuda"
    model: dict[str, Any] = {"dtype": DTYPES[spec.train.precision]}
    if spec.model.quantization is Quantization.NF4:
        model["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=model["dtype"],
        )
    recomputes = spec.train.activation_checkpointing is ActivationCheckpointing.ALL
    return SFTConfig(
        output_dir=folder,
        max_steps=spec.train.max_steps or 1,
        per_device_train_batch_size=spec.train.micro_batch,
        gradient_accumulation_steps=spec.train.gradient_accumulation_steps,
        bf16=spec.train.precision is Precision.BF16,
        fp16=spec.train.precision is Precision.FP16,
        use_cpu=not gpu,
        gradient_checkpointing=recomputes,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        max_length=spec.data.seq_len,
        packing=True,
        packing_strategy="wrapped",
        use_liger_kernel=gpu and importlib.util.find_spec("liger_kernel") is not None,
        logging_steps=1000,
        save_strategy="no",
        report_to=[],
        learning_rate=spec.train.learning_rate,
        optim="adamw_torch_fused",
        disable_tqdm=True,
        model_init_kwargs=model,
    )


def _adapter(spec: RunSpec) -> Any:
    if spec.model.adapter is Adapter.NONE:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=spec.model.lora_r,
        lora_alpha=spec.model.lora_alpha,
        target_modules=spec.model.target_modules,
        task_type="CAUSAL_LM",
    )
