"""The processes of one training: who we are, and the few things they tell each other."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ditty.errors import RunError

# A rank that is gone must end the others: without a limit they wait for ever.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """One process among `world_size`; `device` is where its model lives."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Rank 0: the one that writes."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over processes, in float64 so that counts stay exact."""
        if self.world_size == 1:
            return values
        # fp64 lives on the CPU and on NVIDIA GPUs; MPS, which lacks it, has no process group.
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(v) for v in tensor.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """One small picklable value a process, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """Rank 0's value."""
        return self.gather(value if self.main else None)[0]


def single(device: str = "cpu") -> World:
    """A world of one process."""
    return World(0, 0, 1, torch.device(device))


def join_world(device: str, expected: int) -> World:
    """Join the processes that `accelerate launch` started.

    Args:
        device: "cpu" or "cuda".
        expected: the spec's number of processes. Several launches of accelerate's start one
            process, or separate ones, and say nothing; so it is checked here, in production.
    Raises:
        RunError: another number of processes came up.
    """
    from accelerate import PartialState

    options = {"timeout": COLLECTIVE_TIMEOUT} if int(os.environ.get("WORLD_SIZE", "1")) > 1 else {}
    state = PartialState(cpu=device == "cpu", **options)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size != expected or state.num_processes != expected:
        raise RunError(
            f"launched {expected} processes, but {world_size} found each other "
            f"(accelerate: {state.distributed_type}, {state.num_processes}). "
            "Look at accelerate.yaml and launch.json of this attempt"
        )
    if device == "cuda":
        torch.cuda.set_device(state.local_process_index)
    where = torch.device(device, state.local_process_index if device == "cuda" else None)
    return World(state.process_index, state.local_process_index, world_size, where)


def leave_world() -> None:
    """End the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
