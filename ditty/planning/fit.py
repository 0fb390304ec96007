"""What fits this machine's GPUs: a training's memory, and the sharding that follows from it."""

from pathlib import Path
from typing import Any

from ditty.config import legal
from ditty.config.choices import Device, Sharding, Where
from ditty.config.spec import RunSpec
from ditty.errors import SpecError
from ditty.planning.memory import Memory, Sizes, budget_of, expect_held, plan_memory
from ditty.processes.environment import gpu_bytes, resolve_device
from ditty.store.files import read_json

ENOUGH_TOKENS = 32768
"""Of a micro batch: a GPU is as busy as it gets."""


def expected_memory(spec: RunSpec, model_dir: Path | None) -> Memory | None:
    """The memory of a process of `spec` on this machine's GPUs; None where it is not predicted.

    Args:
        model_dir: of the base model; None: not fetched yet.
    """
    sizes = _sizes(spec, model_dir)
    return None if sizes is None else _memory(spec, sizes, _card(spec))


def fitted(spec: RunSpec, model_dir: Path | None) -> tuple[RunSpec, list[str]]:
    """`spec` with what is `auto` in it resolved by this machine's GPUs.

    Returns:
        the spec; and why, in lines.
    Raises:
        SpecError: `train.micro_batch_size: auto` of a model whose memory is not predicted.
    """
    cuts = spec.train.sharding is Sharding.AUTO and spec.launch.world_size > 1
    if not cuts and spec.train.micro_batch_size != "auto":
        return spec, []
    sizes = _sizes(spec, model_dir)
    card = None if sizes is None else _card(spec)  # asks a program: once, not for each candidate
    why = []
    if cuts:
        spec, line = _with_sharding(spec, sizes, card)
        why.append(line)
    if spec.train.micro_batch_size == "auto":
        spec, line = _with_micro_batch(spec, sizes, card)
        why.append(line)
    return spec, [line for line in why if line]


def _sizes(spec: RunSpec, model_dir: Path | None) -> Sizes | None:
    if model_dir is None or resolve_device(spec.launch) != Device.CUDA:
        return None
    config = read_json(model_dir / "config.json")
    return Sizes.of(config) if config else None


def _card(spec: RunSpec) -> float | None:
    """Memory of the GPUs that the run will have, in bytes; None where they are not this machine's,
    or do not tell."""
    return gpu_bytes() if spec.launch.backend is Where.LOCAL else None


def _memory(spec: RunSpec, sizes: Sizes, card: float | None) -> Memory:
    budget = budget_of(spec.train, card) if card else None
    tokens = spec.train.micro_batch * spec.data.seq_len
    return plan_memory(spec.train, sizes, expect_held(spec, sizes), tokens, budget)


def _with_sharding(spec: RunSpec, sizes: Sizes | None, card: float | None) -> tuple[RunSpec, str]:
    """Replicas, or weights that are cut where those do not fit.

    Replicas are faster where they fit: no weight is sent anywhere.
    """
    replicas = _with_train(spec, sharding=Sharding.DDP)
    if resolve_device(spec.launch) != Device.CUDA:
        return replicas, ""
    if sizes is None or not card:
        return replicas, "train.sharding is ddp: the memory that it takes, or there is, is unknown"
    memory = _memory(replicas, sizes, card)
    assert memory.budget is not None, "of a known card"
    share = f"{memory.peak / 1e9:.1f} of {memory.budget / 1e9:.1f} GB a process"
    if memory.fits:
        return replicas, f"train.sharding is ddp: a copy of everything fits ({share})"
    cut = _with_train(spec, sharding=Sharding.FSDP2)
    for problem in legal.problems(legal.Strategy.of(cut)):
        return replicas, f"train.sharding is ddp, which may not fit ({share}): {problem}"
    return cut, f"train.sharding is fsdp2: a copy of everything would not fit ({share})"


def _with_micro_batch(
    spec: RunSpec, sizes: Sizes | None, card: float | None
) -> tuple[RunSpec, str]:
    """As many rows at once as fit with all activations kept; beyond ENOUGH_TOKENS none is faster.

    The rows of a step stay: each number that divides them is tried, the largest first.
    """
    one = _with_train(spec, micro_batch_size=1)
    rows = spec.train.gradient_accumulation_steps
    if resolve_device(spec.launch) != Device.CUDA:
        return one, "train.micro_batch_size is 1, on CPUs"
    if sizes is None or not card:
        raise SpecError(
            "train.micro_batch_size: auto needs a model whose memory is predicted, and GPUs that "
            "tell theirs (nvidia-smi): set a number"
        )
    first = _memory(one, sizes, card)
    for at_once in range(max(1, ENOUGH_TOKENS // spec.data.seq_len), 1, -1):
        if rows % at_once:
            continue
        steps = rows // at_once
        more = _with_train(one, micro_batch_size=at_once, gradient_accumulation_steps=steps)
        memory = _memory(more, sizes, card)
        if memory.fits and memory.recomputed == first.recomputed:
            return more, f"train.micro_batch_size is {at_once}, {steps} times a step"
    return one, f"train.micro_batch_size is 1, {rows} times a step"


def _with_train(spec: RunSpec, **keys: Any) -> RunSpec:
    return spec.model_copy(update={"train": spec.train.model_copy(update=keys)})
