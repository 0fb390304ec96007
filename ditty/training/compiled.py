"""Decoder blocks compiled one by one, with sizes that stay: one program serves every block.

The whole model in one program would take minutes to compile, and a size that changes from step to
step would compile it anew each time; so batches are filled up to one of a few sizes
(ditty.models.batches). Evaluation and generation run as they stand.
"""

import logging
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from ditty.config.choices import Precision, Sharding
from ditty.config.spec import TrainSpec
from ditty.errors import ModelError
from ditty.models.batches import Bounds
from ditty.models.skeleton import blocks
from ditty.training.recompute import recomputes_within, recomputing

log = logging.getLogger(__name__)

Forward = Callable[..., Any]

# Programs for one block's code: sizes of batches, kinds of attention (sliding or not), layers with
# and without something. Beyond it PyTorch would run blocks as they stand, and hardly say so.
PROGRAMS = 32


def are_compiled(
    model: PreTrainedModel, train: TrainSpec, bounds: Bounds | None, device: torch.device
) -> bool:
    """Whether `model`'s blocks are to be compiled: `train.compile` says so, and it can be done.

    Args:
        bounds: what no micro batch exceeds; None: unknown.
    Raises:
        ModelError: `train.compile` is true, and it cannot be done.
    """
    if train.compile is False:
        return False
    why = _why_not(model, train, bounds, device)
    if why is not None and train.compile:
        raise ModelError(f"train.compile is true, but {why}: remove it")
    why = why or _why_not_unasked(train, device)
    if why is not None and not train.compile:
        log.info("blocks are not compiled: %s", why)
        return False
    return True


def compile_blocks(model: PreTrainedModel, train: TrainSpec, recomputed: int = 0) -> None:
    """Compile the blocks of `model` in place; each batch must then go through `fill_up`.

    What a block computes, that is: what happens around it (FSDP2's hooks) stays outside.

    Args:
        recomputed: how many blocks, the first ones, keep nothing but their inputs.
    """
    _configure(train)
    seam = _Seam(recomputes_within(model))
    for number, block in enumerate(blocks(model)):
        compiled = torch.compile(block.forward, dynamic=False)
        if number < recomputed:
            compiled = seam.choose(_compiled_whole(block.forward), recomputing(compiled))
        block.forward = compiled
    log.info("blocks are compiled at the first step")


def _compiled_whole(forward: Forward) -> Forward:
    """`forward` and its recomputation in one program, or torch's Unsupported when it is called.

    Such a program leaves out what the gradients do not need, the last product of matrices above
    all. (`activation_memory_budget` of 0, which torch._functorch offers, keeps as little, and draws
    dropout anew: wrong gradients, with torch 2.13.)
    """
    whole: Forward = torch.compile(recomputing(forward), dynamic=False, fullgraph=True)
    return whole


class _Seam:
    """Where recomputation meets compilation: within a program, or around it.

    Around it where a block can't become one program (a part of it that is not traced): torch then
    would run all of the block as it stands, and say nothing.
    """

    def __init__(self, within: bool) -> None:
        self.within = within

    def choose(self, within: Forward, around: Forward) -> Forward:
        """What runs the first as long as that goes, then the second."""
        from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.within:
                try:
                    return within(*args, **kwargs)
                except (Unsupported, FailOnRecompileLimitHit) as error:  # nothing has run yet
                    self.within = False
                    why = str(error).partition("\n")[0]
                    log.info("blocks are recomputed around what is compiled: %s", why)
            return around(*args, **kwargs)

        return forward


def _why_not_unasked(train: TrainSpec, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "they are on a CPU (train.compile: true does it there too)"
    if train.precision is Precision.FP32:
        return "train.precision: fp32 is for exact comparisons"
    return None


def _why_not(
    model: PreTrainedModel, train: TrainSpec, bounds: Bounds | None, device: torch.device
) -> str | None:
    if train.sharding is Sharding.ZERO3:
        return "DeepSpeed gathers weights in hooks that cannot be compiled"
    if bounds is None:
        return "batches of a DataLoader may have any size"
    kinds = {type(module).__name__ for module in model.modules()}
    if "Linear8bitLt" in kinds:
        return "bitsandbytes' int8 layers cannot be compiled"
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "a part of the model is on the host"
    if any(p.ndim >= 3 for block in _blocks(model) for p in block.parameters()):
        return "the sizes in a mixture of experts change with each batch"
    if not _blocks(model):
        return f"{type(model).__name__} names no blocks"
    compiler = os.environ.get("CXX" if device.type == "cpu" else "CC") or "gcc"
    if not any(shutil.which(name) for name in (compiler, "clang", "cc")):
        return f"there is no C compiler ({compiler}): install gcc"
    return None


def _blocks(model: PreTrainedModel) -> list[torch.nn.Module]:
    try:
        return blocks(model)
    except ModelError:
        return []


def _configure(train: TrainSpec) -> None:
    import torch._dynamo
    import torch._inductor.config as inductor

    settings: Any = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, PROGRAMS)
    # No kernel chosen by a stopwatch: another choice may add in another order.
    inductor.deterministic = train.deterministic


def programs() -> int:
    """How many programs this process has compiled so far."""
    if "torch._dynamo" not in sys.modules:
        return 0
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def as_it_stands() -> AbstractContextManager[Any]:
    """Within the block nothing is compiled, and what is compiled runs as it stands."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
