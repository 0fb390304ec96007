"""The curves of a training, and a picture of them."""

import io
import math
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # matplotlib costs a second; who imports this module may draw nothing
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURE_BYTES = 100_000  # a third more in base64
POINTS = (800, 200, 50)  # of a curve; fewer where the picture gets too large
INCHES, DPI = (9.0, 6.0), 100

CURVES = ("loss", "learning_rate", "tokens_per_second", "memory_bytes", "seconds")


@dataclass
class Curve:
    """Values by ascending step; a smaller step than the last one takes back what lies after it."""

    names: Sequence[str]
    steps: array = field(default_factory=lambda: array("q"))
    values: dict[str, array] = field(init=False)

    def __post_init__(self) -> None:
        self.values = {name: array("d") for name in self.names}

    def rewind(self, step: int) -> None:
        """Forget `step` and all after it: the run was resumed before."""
        if self.steps and self.steps[-1] >= step:
            keep = bisect_left(self.steps, step)
            for column in (self.steps, *self.values.values()):
                del column[keep:]

    def add(self, step: int, record: dict[str, Any]) -> None:
        """Append; what is missing or not finite is NaN, which is not drawn."""
        self.rewind(step)
        self.steps.append(step)
        for name, column in self.values.items():
            value = record.get(name)
            good = isinstance(value, (int, float)) and math.isfinite(value)
            column.append(float(value) if good else math.nan)  # type: ignore[arg-type]

    def __getitem__(self, name: str) -> array:
        return self.values[name]

    def known(self, name: str) -> list[float]:
        """The finite values."""
        return [value for value in self[name] if not math.isnan(value)]

    def last(self, name: str) -> float | None:
        """The newest value, if it is finite."""
        column = self[name]
        return column[-1] if column and not math.isnan(column[-1]) else None


def picture(train: Curve, evaluated: Curve) -> bytes | None:
    """A PNG of a training's curves, at most PICTURE_BYTES; None where even few points do not fit.

    Args:
        train: of CURVES.
        evaluated: the held-out `loss`.
    """
    for points in POINTS:
        image = _draw(train, evaluated, points)
        if len(image) <= PICTURE_BYTES:
            return image
    return None


def _draw(train: Curve, evaluated: Curve, points: int) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, dpi=DPI, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    beside = below.twinx()
    _line(above, train, "loss", points, color="tab:blue", label="loss")
    _line(above, evaluated, "loss", points, color="tab:red", label="held-out loss")
    _line(below, train, "learning_rate", points, color="tab:green")
    _line(beside, train, "tokens_per_second", points, color="tab:gray", linewidth=0.8)
    above.legend(loc="upper right")
    above.grid(alpha=0.3)
    above.set_ylabel("loss")
    below.set_xlabel("step")
    below.set_ylabel("learning rate", color="tab:green")
    beside.set_ylabel("tokens/s", color="tab:gray")
    beside.set_ylim(bottom=0)
    return png(figure)


def _line(axes: "Axes", curve: Curve, name: str, points: int, **style: Any) -> None:
    steps, values = thin(curve.steps, curve[name], points)
    few = len(steps) < 50
    axes.plot(steps, values, marker="o" if few else "", markersize=4, **style)


def thin(steps: Sequence[int], values: Sequence[float], points: int) -> tuple[Any, Any]:
    """At most `points` of a curve: means over equally many values, NaN only where all are."""
    import numpy as np

    x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    size = -(-len(x) // points)
    if size <= 1:
        return x, y
    starts = np.arange(0, len(x), size)
    good = ~np.isnan(y)
    count = np.add.reduceat(good.astype(float), starts)
    total = np.add.reduceat(np.where(good, y, 0.0), starts)
    means = np.divide(total, count, out=np.full(len(starts), np.nan), where=count > 0)
    lengths = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / lengths, means


def png(figure: "Figure") -> bytes:
    """A figure as a picture; without pyplot, whose state is global, since flows have threads."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()
