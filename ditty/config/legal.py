"""Which strategies go together: the matrix of sharding, adapter, quantization and precision.

A pair that cannot work is refused by the spec with its reason and the nearest choice that does.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ditty.config.choices import (
    SCHEDULE_OPTIONS,
    ActivationCheckpointing,
    Adapter,
    Optimizer,
    Precision,
    Quantization,
    Schedule,
    Sharding,
)

SHARDED = (Sharding.FSDP2, Sharding.HYBRID, Sharding.ZERO3)


@dataclass(frozen=True)
class Strategy:
    """What the matrix is asked about; `sharding` is resolved, never `auto`."""

    sharding: Sharding
    adapter: Adapter
    quantization: Quantization
    precision: Precision
    optimizer: Optimizer
    cpu_offload: bool
    activation_checkpointing: ActivationCheckpointing
    compile: bool | None
    world_size: int
    shard_size: int | None

    @classmethod
    def of(cls, spec: Any) -> "Strategy":
        """The strategy of a RunSpec."""
        train, model, world_size = spec.train, spec.model, spec.launch.world_size
        sharding = train.sharding
        if sharding is Sharding.AUTO:
            sharding = Sharding.DDP if world_size > 1 else Sharding.NONE
        shard_size = train.shard_size
        if sharding is Sharding.HYBRID and shard_size is None:
            shard_size = spec.launch.num_processes
        return cls(
            sharding,
            model.adapter,
            model.quantization,
            train.precision,
            train.optimizer,
            train.cpu_offload,
            train.activation_checkpointing,
            train.compile,
            world_size,
            shard_size,
        )

    def describe(self) -> str:
        """One line for people: what is trained, beside what, held where."""
        trained = {
            Adapter.NONE: "all weights in fp32",
            Adapter.LORA: "LoRA in fp32",
            Adapter.DORA: "DoRA in fp32",
        }[self.adapter]
        base = ""
        if self.adapter is not Adapter.NONE:
            stored = self.precision if self.quantization is Quantization.NONE else self.quantization
            base = f" beside a frozen base in {stored}"
        part = self.shard_size or self.world_size
        held = {
            Sharding.NONE: "in one process",
            Sharding.DDP: f"whole in each of {self.world_size} processes (DDP)",
            Sharding.FSDP2: f"1/{part} in each of {self.world_size} processes (FSDP2)",
            Sharding.HYBRID: f"1/{part} in each of {self.world_size} processes (hybrid FSDP2)",
            Sharding.ZERO3: f"1/{part} in each of {self.world_size} processes (ZeRO-3)",
        }[self.sharding]
        offload = ", offloaded to host memory" if self.cpu_offload else ""
        return (
            f"{trained}{base}, {held}{offload}; {self.precision} arithmetic, "
            f"{self.optimizer} optimizer"
        )


def check(strategy: Strategy) -> None:
    """Raise ValueError with the first reason why `strategy` cannot work."""
    for problem in problems(strategy):
        raise ValueError(problem)


def schedule_options(schedule: Schedule) -> str:
    """The options of a schedule, in words."""
    words = {str: "a word", int: "a whole number", float: "a number"}
    kinds = SCHEDULE_OPTIONS[schedule].items()
    return ", ".join(f"{name} ({words[kind]})" for name, kind in kinds) or "none"


def check_schedule_options(schedule: Schedule, options: Mapping[str, float | str]) -> None:
    """Raise ValueError for an option that the schedule has not, or of another type.

    What is out of its range is refused when the schedule is made (ditty.distributed.optim).
    """
    for name, value in options.items():
        kind = SCHEDULE_OPTIONS[schedule].get(name)
        numeric = isinstance(value, int | float) and math.isfinite(value)
        fits = isinstance(value, str) if kind is str else numeric
        if kind is None or not fits or (kind is int and value != int(value)):
            raise ValueError(
                f"{name}: {value!r} is no option of schedule: {schedule}; expected "
                f"{schedule_options(schedule)}; correct or remove it, or choose another "
                "train.schedule"
            )


def problems(s: Strategy) -> Iterator[str]:
    """Each reason why a strategy cannot work, with the nearest one that does."""
    yield from _memory_problems(s)
    yield from _model_problems(s)
    yield from _optimizer_problems(s)
    yield from _compile_problems(s)


def _compile_problems(s: Strategy) -> Iterator[str]:
    if s.compile and s.sharding is Sharding.ZERO3:
        yield (
            "train.compile: true cannot follow the hooks by which train.sharding: zero3 gathers "
            "weights; remove it, or use train.sharding: fsdp2"
        )
    if s.compile and s.quantization is Quantization.INT8:
        yield (
            "train.compile: true cannot compile the layers of model.quantization: int8; "
            "remove it, or use quantization: fp8 or nf4"
        )


def _memory_problems(s: Strategy) -> Iterator[str]:
    if s.sharding is Sharding.NONE and s.world_size > 1:
        yield (
            f"train.sharding: none is one process, and launch makes {s.world_size}; "
            "use train.sharding: ddp (or fsdp2), or launch.num_processes: 1"
        )
    if s.sharding is not Sharding.HYBRID and s.shard_size is not None:
        yield (
            f"train.shard_size is for hybrid, not for train.sharding: {s.sharding}; "
            "remove it, or set train.sharding: hybrid"
        )
    if s.sharding is Sharding.HYBRID:
        assert s.shard_size is not None
        if s.world_size % s.shard_size or s.world_size == s.shard_size:
            yield (
                f"train.sharding: hybrid repeats shards of {s.shard_size} processes, and there are "
                f"{s.world_size}: expected a larger multiple; use train.sharding: fsdp2, or a "
                "train.shard_size that divides the processes"
            )
    if s.cpu_offload and s.sharding not in SHARDED and s.quantization is not Quantization.INT8:
        yield (
            f"train.cpu_offload works with sharded weights or an int8 base, not with sharding: "
            f"{s.sharding}; use train.sharding: fsdp2, also for one process"
        )

    if s.cpu_offload and s.quantization is Quantization.INT8 and s.world_size > 1:
        yield (
            f"train.cpu_offload with an int8 base is for one GPU, and launch makes {s.world_size} "
            "processes; use quantization: nf4 with train.sharding: fsdp2, or one process"
        )
    recomputes = s.activation_checkpointing is ActivationCheckpointing.ALL
    if s.cpu_offload and s.quantization is Quantization.INT8 and not recomputes:
        yield (
            "train.cpu_offload with an int8 base streams layers to the GPU, and without "
            "recomputation every one of them would stay there until the backward pass; "
            "set train.activation_checkpointing: all"
        )


def _model_problems(s: Strategy) -> Iterator[str]:
    if s.quantization is not Quantization.NONE and s.adapter is Adapter.NONE:
        yield (
            f"model.quantization: {s.quantization} freezes the base, and model.adapter: none "
            "trains it; use adapter: lora, or quantization: none"
        )
    if s.quantization is Quantization.INT8 and s.sharding in SHARDED:
        yield (
            f"model.quantization: int8 cannot be cut by train.sharding: {s.sharding}: bitsandbytes "
            "keeps its scales on the weight object itself; use quantization: nf4, or sharding: ddp"
        )
    if s.quantization is Quantization.FP8 and s.sharding is Sharding.ZERO3:
        yield (
            "model.quantization: fp8 cannot be cut by train.sharding: zero3, whose flat partitions "
            "have one dtype; use train.sharding: fsdp2, or quantization: nf4"
        )
    if s.quantization is Quantization.FP8 and s.adapter is Adapter.DORA:
        yield (
            "model.adapter: dora needs the values of each row of the base, and model.quantization: "
            "fp8 only multiplies with them; use adapter: lora, or quantization: nf4"
        )
    if (
        s.adapter is Adapter.DORA
        and s.quantization is Quantization.NF4
        and s.sharding in (Sharding.FSDP2, Sharding.HYBRID)
    ):
        yield (
            "model.adapter: dora starts from the length of each row of the base, and an NF4 base "
            f"under train.sharding: {s.sharding} is nowhere whole; use adapter: lora, or "
            "sharding: ddp"
        )
    if s.adapter is Adapter.DORA and s.sharding is Sharding.ZERO3:
        yield (
            "model.adapter: dora needs each layer's whole weight beside its adapter, which ZeRO-3 "
            "gives to the layer alone; use train.sharding: fsdp2, or adapter: lora"
        )
    if s.precision is Precision.FP16 and s.sharding is Sharding.ZERO3:
        yield (
            "train.precision: fp16 with ZeRO-3 would bring a second loss scale, DeepSpeed's own; "
            "use precision: bf16, or train.sharding: fsdp2"
        )


def _optimizer_problems(s: Strategy) -> Iterator[str]:
    if s.optimizer in (Optimizer.ADAFACTOR, Optimizer.MUON) and s.sharding in SHARDED:
        yield (
            f"train.optimizer: {s.optimizer} looks at whole matrices, and train.sharding: "
            f"{s.sharding} cuts them; use optimizer: adamw, or sharding: ddp"
        )
    if s.sharding is Sharding.ZERO3 and s.optimizer is not Optimizer.ADAMW:
        yield (
            f"train.sharding: zero3 takes optimizer: adamw, not {s.optimizer}: its state is kept "
            "in DeepSpeed's flat partitions; use train.sharding: fsdp2"
        )
    if s.cpu_offload and s.sharding in SHARDED and s.optimizer.startswith("paged_"):
        yield (
            f"train.cpu_offload keeps the optimizer on the host already, and train.optimizer: "
            f"{s.optimizer} pages it from a GPU; use {s.optimizer.removeprefix('paged_')}"
        )
