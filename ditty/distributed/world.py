"""The processes of one training: who we are, and the few things they tell each other."""

import os
import resource
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ditty.errors import RunError
from ditty.failpoints import fail_point

COLLECTIVE_TIMEOUT_SECONDS = 600.0  # the spec's default


@dataclass(frozen=True)
class World:
    """One process among `world_size`.

    Attributes:
        device: where its model lives.
        local_world_size: processes on this machine.
        group: the process group of `sum` and `gather`, which talk on the CPU: a GPU's work goes on
            meanwhile; None: torch's default one.
        timeout: of a collective; torch gives each new group its own default, up to half an hour.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    local_world_size: int = 1
    group: Any = None
    timeout: timedelta = timedelta(seconds=COLLECTIVE_TIMEOUT_SECONDS)

    @property
    def main(self) -> bool:
        """Rank 0: the one that writes."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over processes, in float64 so that counts stay exact."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.group)
        return [float(v) for v in tensor.tolist()]

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """`values`, a tensor on the device, summed over processes in place; nothing waits."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """One small picklable value a process, in rank order."""
        if self.world_size == 1:
            return [value]
        fail_point("barrier", "main" if self.group is None else "aside")
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_main(self, value: Any) -> Any:
        """Rank 0's value."""
        return self.gather(value if self.main else None)[0]

    def aside(self) -> "World":
        """The same processes with a gloo group of their own, to talk in from another thread."""
        if self.world_size == 1:
            return self
        return replace(self, group=dist.new_group(backend="gloo", timeout=self.timeout))


def single(device: str = "cpu") -> World:
    """A world of one process."""
    return World(0, 0, 1, torch.device(device))


def join_world(
    device: str, expected: int, timeout_seconds: float = COLLECTIVE_TIMEOUT_SECONDS
) -> World:
    """Join the processes that `accelerate launch` started.

    Args:
        device: "cpu" or "cuda".
        expected: the spec's number of processes, on all machines. Several launches of accelerate's
            start one process, or separate ones, and say nothing; so it is checked here, in
            production.
        timeout_seconds: a collective that takes longer raises. A rank that ended closes its
            connections, and the others notice at once; a cut link is silence, and only this ends
            the wait.
    Raises:
        RunError: another number of processes came up.
    """
    from accelerate import PartialState

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    timeout = timedelta(seconds=timeout_seconds)
    options = {"timeout": timeout} if several else {}
    state = PartialState(cpu=device == "cpu", **options)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size != expected or state.num_processes != expected:
        raise RunError(
            f"launched {expected} processes, but {world_size} found each other "
            f"(accelerate: {state.distributed_type}, {state.num_processes}). "
            "Look at accelerate.yaml and launch.json of this attempt"
        )
    steady_cublas(device)
    if device == "cuda":
        torch.cuda.set_device(state.local_process_index)
    where = torch.device(device, state.local_process_index if device == "cuda" else None)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    ranks = (state.process_index, state.local_process_index, world_size)
    # On GPUs a second group beside NCCL's, whose every word would wait for the GPU.
    beside = device == "cuda" and several
    group = dist.new_group(backend="gloo", timeout=timeout) if beside else None
    return World(*ranks, where, local, group, timeout)


def steady_cublas(device: str) -> None:
    """A workspace a stream for cuBLAS, without which it may add in another order.

    In the environment, before cuBLAS starts; what is there stays. torch refuses products of
    matrices in deterministic mode where it is missing.
    """
    if device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def leave_world() -> None:
    """End the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this process: allocated by torch on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: in bytes
    # Not getrusage's: that begins at what the parent process held.
    (peak,) = (x.split()[1] for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
    return int(peak) * 1024
