"""The generators that models and data code draw from: seeded, saved, and kept apart.

And the other source of chance: kernels that add in the order in which their blocks end.
"""

import random
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch

T = TypeVar("T")


def seed_all(seed: int) -> None:
    """Seed the generators that models and data code may draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def choose_kernels(deterministic: bool) -> None:
    """Let this process use only kernels that give the same bits each time, or all.

    An operation that has no such kernel is then a RuntimeError, see `without_fixed_order`. With a
    mere warning in its place (`warn_only`) flash attention keeps adding up the queries' gradient as
    its blocks end, which documents of some hundred tokens and more show. cuDNN's attention, which a
    mask in bf16 leads to, does not follow the switch; memory-efficient attention, which fp32 leads
    to, was seen not to. Both are off, and there attention takes memory for all pairs of tokens.
    """
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cuda.enable_mem_efficient_sdp(not deterministic)
    torch.backends.cuda.enable_cudnn_sdp(not deterministic)


def without_fixed_order(error: RuntimeError) -> str | None:
    """What to tell the user if `error` is that of `choose_kernels`; None: it is another."""
    said = str(error)
    if "deterministic" not in said:
        return None
    operation = said.partition(" does not have a deterministic implementation")[0]
    return (
        f"{operation} has no kernel that adds in a fixed order, and train.deterministic asks for "
        "those alone. Set train.deterministic: false; a resume is then equal but for rounding"
    )


def rng_state() -> dict[str, torch.Tensor]:
    """All generators of this process as tensors."""
    version, words, gauss = random.getstate()
    assert version == 3, "Python's generator state has changed its layout"
    legacy: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached = legacy
    assert name == "MT19937", name
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([np.nan if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Put `rng_state` back."""
    torch.set_rng_state(state["torch"])
    gauss = float(state["python_gauss"])
    random.setstate((3, tuple(state["python"].tolist()), None if np.isnan(gauss) else gauss))
    position, has_gauss = (int(v) for v in state["numpy_position"])
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, float(state["numpy_gauss"])))
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


class RngStream:
    """Generators of its own for code that draws from the global ones.

    What runs inside neither sees nor moves the generators outside, so that reading data again at
    a resume leaves dropout where it was.
    """

    def __init__(self, seed: int):
        outside = rng_state()
        seed_all(seed)
        self._state = _without_gpu(rng_state())
        set_rng_state(outside)

    def run(self, function: Callable[[], T]) -> T:
        """Call `function` with this stream in the place of the global generators."""
        outside = _without_gpu(rng_state())
        set_rng_state(self._state)
        try:
            return function()
        finally:
            self._state = _without_gpu(rng_state())
            set_rng_state(outside)


def _without_gpu(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if name != "cuda"}
