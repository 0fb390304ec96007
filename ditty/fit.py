"""What fits this machine's GPUs: a training's memory, and the sharding that follows from it."""

from pathlib import Path
from typing import Any

from ditty import legal
from ditty.choices import Device, Sharding
from ditty.environment import gpu_bytes, resolve_device
from ditty.errors import SpecError
from ditty.files import read_json
from ditty.memory import Memory, Sizes, budget_of, expect_held, plan_memory
from ditty.spec import RunSpec

ENOUGH_TOKENS = 32768
"""Of a micro batch: a GPU is as busy as it gets."""


def expected_memory(spec: RunSpec, model_dir: Path | None) -> Memory | None:
    """The memory of a process of `spec` on this machine's GPUs; None where it is not predicted.

    Args:
        model_dir: of the base model; None: not fetched yet.
    """
    config = read_json(model_dir / "config.json") if model_dir else None
    sizes = Sizes.of(config) if config else None
    if sizes is None or resolve_device(spec.launch) != Device.CUDA:
        return None
    card = gpu_bytes()
    budget = budget_of(spec.train, card) if card else None
    tokens = spec.train.micro_batch * spec.data.seq_len
    return plan_memory(spec.train, sizes, expect_held(spec, sizes), tokens, budget)


def fitted(spec: RunSpec, model_dir: Path | None) -> tuple[RunSpec, list[str]]:
    """`spec` with what is `auto` in it resolved by this machine's GPUs.

    Returns:
        the spec; and why, in lines.
    Raises:
        SpecError: `train.micro_batch_size: auto` of a model whose memory is not predicted.
    """
    spec, sharding = _with_sharding(spec, model_dir)
    spec, rows = _with_micro_batch(spec, model_dir)
    return spec, [line for line in (sharding, rows) if line]


def _with_sharding(spec: RunSpec, model_dir: Path | None) -> tuple[RunSpec, str]:
    """Replicas, or weights that are cut where those do not fit.

    Replicas are faster where they fit: no weight is sent anywhere.
    """
    if spec.train.sharding is not Sharding.AUTO or spec.launch.world_size == 1:
        return spec, ""
    replicas = _with_train(spec, sharding=Sharding.DDP)
    memory = expected_memory(replicas, model_dir)
    if resolve_device(spec.launch) != Device.CUDA:
        return replicas, ""
    if memory is None or memory.budget is None:
        return replicas, "train.sharding is ddp: the memory that it takes, or there is, is unknown"
    sizes = f"{memory.peak / 1e9:.1f} of {memory.budget / 1e9:.1f} GB a process"
    if memory.fits:
        return replicas, f"train.sharding is ddp: a copy of everything fits ({sizes})"
    cut = _with_train(spec, sharding=Sharding.FSDP2)
    for problem in legal.problems(legal.Strategy.of(cut)):
        return replicas, f"train.sharding is ddp, which may not fit ({sizes}): {problem}"
    return cut, f"train.sharding is fsdp2: a copy of everything would not fit ({sizes})"


def _with_micro_batch(spec: RunSpec, model_dir: Path | None) -> tuple[RunSpec, str]:
    """As many rows at once as fit with all activations kept; beyond ENOUGH_TOKENS none is faster.

    The rows of a step stay: each number that divides them is tried, the largest first.
    """
    if spec.train.micro_batch_size != "auto":
        return spec, ""
    one = _with_train(spec, micro_batch_size=1)
    rows = spec.train.gradient_accumulation_steps
    if resolve_device(spec.launch) != Device.CUDA:
        return one, "train.micro_batch_size is 1, on CPUs"
    first = expected_memory(one, model_dir)
    if first is None or first.budget is None:
        raise SpecError(
            "train.micro_batch_size: auto needs a model whose memory is predicted, and GPUs that "
            "tell theirs (nvidia-smi): set a number"
        )
    for at_once in range(max(1, ENOUGH_TOKENS // spec.data.seq_len), 1, -1):
        if rows % at_once:
            continue
        steps = rows // at_once
        more = _with_train(one, micro_batch_size=at_once, gradient_accumulation_steps=steps)
        memory = expected_memory(more, model_dir)
        if memory is not None and memory.fits and memory.recomputed == first.recomputed:
            return more, f"train.micro_batch_size is {at_once}, {steps} times a step"
    return one, f"train.micro_batch_size is 1, {rows} times a step"


def _with_train(spec: RunSpec, **keys: Any) -> RunSpec:
    return spec.model_copy(update={"train": spec.train.model_copy(update=keys)})
