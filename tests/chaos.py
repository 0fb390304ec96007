"""Work that is killed at random times, in one process or another, and then done again.

As tests/killed.py does it at points that are known beforehand; see there.
"""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.killed import Place, Turn, ends, outcome, serve

KILLS = 3  # of a round at most, one after the other


class Chaos(Turn):
    """One work, killed at random times for as many rounds as there is time.

    Attributes (further keys of the job): seconds (for the rounds; none: the work is done once, as
    the start of those after it), seed.
    """

    def take(self) -> Iterator[tuple[str, Any]]:
        """(name, what happened) of the undisturbed processes, and of each round."""
        oracle = self.fresh("oracle")
        began = time.monotonic()
        assert not any(ends(self.work, oracle, {}).values())
        took, expected = time.monotonic() - began, outcome(oracle)
        yield "oracle", {"outcome": expected, "seconds": took}
        draw, end = random.Random(self.turn.get("seed", 0)), began + self.turn.get("seconds", 0)
        number = 0
        while time.monotonic() < end:
            yield str(number), self._round(draw, took, self.fresh(str(number)), expected)
            number += 1
        self.finish(oracle)

    def _round(
        self, draw: random.Random, took: float, place: Place, expected: dict[str, Any]
    ) -> dict[str, Any]:
        kills = []
        for _ in range(draw.randint(1, KILLS)):
            # Most of the time goes by until the first step is done.
            rank, after = draw.randrange(place.ranks), took * draw.uniform(0, 1) ** 0.5
            ended = ends(self.work, place, {}, rank, after)
            kills.append({"rank": rank, "after": after, "ended": ended.get(rank)})
            if not any(ended.values()):
                break  # it was done before it could be killed
        return {"kills": kills, **self.again(place, expected)}


def chaos(path: Path) -> None:
    """Do what the job in `path` says; the answers go beside it."""
    serve(path, Chaos)
