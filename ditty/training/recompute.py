"""Blocks that drop their activations, and compute them again in the backward pass.

How many of them follows from the memory that the GPU has (ditty.planning.memory).
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ditty.config.choices import ActivationCheckpointing
from ditty.config.spec import TrainSpec
from ditty.distributed.parallel import Parallel
from ditty.distributed.sharded import is_cut
from ditty.distributed.world import World
from ditty.distributed.zero import is_zero
from ditty.errors import LESS_MEMORY
from ditty.models.batches import Bounds
from ditty.models.skeleton import blocks
from ditty.planning.memory import Held, Memory, Sizes, budget_of, itemsize, plan_memory

log = logging.getLogger(__name__)


def choose_recomputed(
    parallel: Parallel, train: TrainSpec, bounds: Bounds | None, world: World, *, compiled: bool
) -> tuple[int, Memory | None]:
    """How many blocks recompute, the same on all ranks, and the memory that this is planned with.

    Args:
        bounds: what no micro batch exceeds; None: unknown, and then nothing is planned.
    """
    choice, model = train.activation_checkpointing, parallel.model
    sizes = Sizes.of(model.config.to_dict())
    planned = world.device.type == "cuda" and bounds is not None and sizes is not None
    if not planned or is_zero(parallel.module):
        if choice is ActivationCheckpointing.ALL and not is_zero(parallel.module):
            return len(blocks(model)), None
        if choice is ActivationCheckpointing.AUTO and world.device.type == "cuda":
            log.info("all activations are kept: the memory of this training is not predicted")
        return 0, None
    assert bounds is not None and sizes is not None
    _, card = torch.cuda.mem_get_info(world.device)
    smallest = min(world.gather(budget_of(train, card)))
    held = held_by(parallel, train, compiled=compiled)
    memory = plan_memory(train, sizes, held, bounds.tokens, smallest)
    log.info("memory: %s", memory.describe())
    if not memory.fits:
        log.warning("that is more than there is: %s", LESS_MEMORY)
    return max(world.gather(memory.recomputed)), memory


def held_by(parallel: Parallel, train: TrainSpec, *, compiled: bool) -> Held:
    """What this process holds of a model that is loaded."""
    model, size = parallel.model, itemsize(train.precision)
    here = [_local(p) for p in parallel.module.parameters()]
    buffers = [b for b in parallel.module.buffers() if b.is_cuda]
    trained = sum(part.value.numel() for part in parallel.parts if part.value.is_cuda)
    full = all(p.requires_grad for p in model.parameters())
    copies = 0.0
    if is_cut(parallel.module):
        group = [p for block in blocks(model)[:1] for p in block.parameters()]
        layers = (model.get_input_embeddings(), model.get_output_embeddings())
        words = {id(p): p for layer in layers if layer is not None for p in layer.parameters()}
        whole = [*group, *group, *words.values()]
        copies = float(sum(p.numel() * min(p.itemsize, size) for p in whole))
    elif full and size == 2:
        copies = float(size * trained)
    return Held(
        weights=float(sum(t.nbytes for t in (*here, *buffers) if t.is_cuda)),
        trained=float(trained),
        copies=copies,
        full=full,
        compiled=compiled,
        within=compiled and recomputes_within(model),
        dropout=any(
            isinstance(m, torch.nn.Dropout) and m.p > 0 and "lora_dropout" in name
            for name, m in parallel.module.named_modules()
        ),
    )


def recomputes_within(model: PreTrainedModel) -> bool:
    """Whether a compiled block may recompute within its program.

    Not with quantized weights: the program would keep what they are unpacked to (8B in NF4 took 19
    GB in place of 10).
    """
    return getattr(model.config, "quantization_config", None) is None


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter._local_tensor if isinstance(parameter, DTensor) else parameter


def recompute_blocks(model: PreTrainedModel, count: int) -> None:
    """Let the first `count` blocks of `model` recompute.

    The first ones: when the backward pass comes to them, all that later blocks have kept is gone.

    Raises:
        ModelError: the model names no blocks.
    """
    if not count:
        return
    for block in blocks(model)[:count]:
        block.forward = recomputing(block.forward)


def recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, of which nothing but its inputs is kept for the backward pass."""

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return recomputed
