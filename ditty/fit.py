"""What fits this machine's GPUs: a training's memory, and the sharding that follows from it."""

from pathlib import Path

from ditty import legal
from ditty.choices import Device, Sharding
from ditty.environment import gpu_bytes, resolve_device
from ditty.files import read_json
from ditty.memory import Memory, Sizes, budget_of, expect_held, plan_memory
from ditty.spec import RunSpec


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
    tokens = spec.train.micro_batch_size * spec.data.seq_len
    return plan_memory(spec.train, sizes, expect_held(spec, sizes), tokens, budget)


def fitted(spec: RunSpec, model_dir: Path | None) -> tuple[RunSpec, str]:
    """`spec` with `train.sharding: auto` resolved: replicas, or cut where those do not fit.

    Replicas are faster where they fit: no weight is sent anywhere.

    Returns:
        the spec; and why, or "" where there was nothing to choose.
    """
    if spec.train.sharding is not Sharding.AUTO or spec.launch.world_size == 1:
        return spec, ""
    replicas = _with_sharding(spec, Sharding.DDP)
    memory = expected_memory(replicas, model_dir)
    if memory is None or memory.budget is None:
        return replicas, ""
    sizes = f"{memory.peak / 1e9:.1f} of {memory.budget / 1e9:.1f} GB a process"
    if memory.fits:
        return replicas, f"train.sharding is ddp: a copy of everything fits ({sizes})"
    cut = _with_sharding(spec, Sharding.FSDP2)
    for problem in legal.problems(legal.Strategy.of(cut)):
        return replicas, f"train.sharding is ddp, which may not fit ({sizes}): {problem}"
    return cut, f"train.sharding is fsdp2: a copy of everything would not fit ({sizes})"


def _with_sharding(spec: RunSpec, sharding: Sharding) -> RunSpec:
    return spec.model_copy(update={"train": spec.train.model_copy(update={"sharding": sharding})})
