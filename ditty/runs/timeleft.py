"""How long a training will still take, from what its recent steps took."""

import math
import statistics
from collections.abc import Sequence

RECENT_STEPS = 20


def seconds_left(step: int, total: int, recent: Sequence[float]) -> float | None:
    """Steps left x the median of what recent ones took; None where nothing is known."""
    known = [s for s in recent if not math.isnan(s)]
    return max(total - step, 0) * statistics.median(known) if known and total else None


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"
