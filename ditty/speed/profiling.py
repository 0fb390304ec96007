"""Which kernels a step spends its time in, and where the GPU waits for the CPU."""

from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

KERNELS = 40  # lines of the table
GAPS = 12


class Profile:
    """Kernels between `start` and `stop`, written to a file as a table.

    Args:
        path: of the text file.
    """

    def __init__(self, path: Path):
        self.path, self._profiler = path, torch.profiler.profile()

    def start(self) -> None:
        """Begin to record."""
        self._profiler.start()

    def stop(self, steps: int) -> None:
        """Write the tables of what was recorded, per step."""
        self._profiler.stop()
        events = [e for e in self._profiler.events() or [] if e.device_type == DeviceType.CUDA]
        self.path.write_text(kernel_table(events, steps) + gap_table(events, steps))


def kernel_table(events: list[Any], steps: int) -> str:
    """Kernels by their share of a step: milliseconds and calls a step, and name."""
    spent: dict[str, list[float]] = {}
    for event in events:
        spent.setdefault(event.name, []).append(event.time_range.elapsed_us())
    total = sum(map(sum, spent.values())) / steps / 1e3
    lines = [f"{total:9.2f} ms a step in kernels"]
    for name, times in sorted(spent.items(), key=lambda item: -sum(item[1]))[:KERNELS]:
        milliseconds = sum(times) / steps / 1e3
        lines.append(f"{milliseconds:9.2f} ms {len(times) / steps:7.0f} x  {name[:120]}")
    return "\n".join(lines) + "\n"


def gap_table(events: list[Any], steps: int) -> str:
    """Where the GPU waited for the CPU: milliseconds a step in all, and the longest ones."""
    ordered = sorted(events, key=lambda e: e.time_range.start)
    gaps: list[tuple[float, str, str]] = []
    end, before = (ordered[0].time_range.start, "") if ordered else (0.0, "")
    for event in ordered:
        if event.time_range.start > end:
            gaps.append((event.time_range.start - end, before, event.name))
        if event.time_range.end > end:
            end, before = event.time_range.end, event.name
    total = sum(gap for gap, *_ in gaps) / steps / 1e3
    lines = [f"{total:9.2f} ms a step between kernels"]
    for gap, one, other in sorted(gaps, reverse=True)[:GAPS]:
        lines.append(f"{gap / 1e3:9.2f} ms  {one[:50]} -> {other[:50]}")
    return "\n".join(lines) + "\n"
