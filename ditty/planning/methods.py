"""Which method for which model and GPU: a guide, and its table of memory.

- QLoRA (`model.quantization: nf4`) where memory is short: the base takes half a byte a weight. It
  computes a little slower than bf16, since each use dequantizes.
- `fp8` multiplies in float8, on GPUs from Ada and Hopper on the fastest of all. It takes a byte a
  weight where the model is cut over processes, two where it is whole. `int8` is for older GPUs.
- LoRA beside a bf16 base (`quantization: none`, the default) where that fits: nothing is rounded.
- Full training (`model.adapter: none`) where the task is far from what the model can do, and there
  are rows enough: sixteen bytes a weight, so mostly on several GPUs with `train.sharding: fsdp2`.
- An adapter's rank (`model.lora_r`) hardly shows in memory; `model.adapter: dora` takes no more.

The table counts one row of 2,048 tokens at a time and no step's rest; `ditty plan` says the same of
a spec, and what `train.activation_checkpointing: auto` makes of this machine's GPU.

    python -m ditty.planning.methods     # prints the table, as deployments/README.md has it
"""

from ditty.config.choices import ActivationCheckpointing, Adapter, Quantization, Sharding
from ditty.config.spec import RunSpec
from ditty.planning.memory import Sizes, expect_held, plan_memory
from ditty.planning.shapes import SHAPES

SEQ_LEN = 2048
MODELS = ("135m", "1b", "8b", "70b")
METHODS = {
    "QLoRA (nf4)": (Adapter.LORA, Quantization.NF4),
    "LoRA, fp8": (Adapter.LORA, Quantization.FP8),
    "LoRA, bf16": (Adapter.LORA, Quantization.NONE),
    "full": (Adapter.NONE, Quantization.NONE),
}


def memory_table(processes: int = 1) -> list[str]:
    """Markdown: GB a process, all activations kept / all recomputed, of each model and method.

    Args:
        processes: GPUs; more than one share the weights (fsdp2).
    """
    lines = [f"| GB a GPU, {processes} GPU{'s' if processes > 1 else ''} | {' | '.join(METHODS)} |"]
    lines.append("| --- |" + " --- |" * len(METHODS))
    for model in MODELS:
        cells = []
        for adapter, quantization in METHODS.values():
            both = [
                _peak(model, adapter, quantization, choice, processes) / 1e9
                for choice in (ActivationCheckpointing.NONE, ActivationCheckpointing.ALL)
            ]
            cells.append(" / ".join(f"{peak:,.1f}" for peak in both))
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return lines


def _peak(
    model: str,
    adapter: Adapter,
    quantization: Quantization,
    choice: ActivationCheckpointing,
    processes: int,
) -> float:
    """Bytes of a process, as `ditty plan` counts them."""
    sharding = Sharding.FSDP2 if processes > 1 else Sharding.NONE
    spec = RunSpec.model_validate(
        {
            "name": "table",
            "data": {"source": "rows.jsonl", "seq_len": SEQ_LEN},
            "model": {"base_model": model, "adapter": adapter, "quantization": quantization},
            "train": {"activation_checkpointing": choice, "sharding": sharding},
            "launch": {"num_processes": processes},
        }
    )
    sizes = Sizes.of(SHAPES[model].config())
    assert sizes is not None, "a Llama's"
    return plan_memory(spec.train, sizes, expect_held(spec, sizes), SEQ_LEN, None).peak


if __name__ == "__main__":
    print("\n".join([*memory_table(), "", *memory_table(8)]))  # noqa: T201
