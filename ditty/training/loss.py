"""The language-model loss as a sum, so that any split of a batch adds up to the same number."""

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ditty.models.attention import forward_kwargs
from ditty.models.batches import Batch
from ditty.training.linear_loss import linear_cross_entropy

log = logging.getLogger(__name__)

# Models whose logits are not what their head returns, or whose head is no plain layer.
_with_logits: "WeakSet[PreTrainedModel]" = WeakSet()


def token_loss_sum(forward: torch.nn.Module, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Summed cross-entropy of the supervised tokens of a flat batch, in nats, fp32 scalar.

    The loss is computed in the place of the model's head, where its weight is whole under every
    sharding, and the logits never exist all at once (`linear_loss`). Where a model does more with
    its logits, which shows at the first call, or has no plain head, they do.

    Only supervised tokens enter the vocabulary projection: with completion-only loss that saves
    most of it, and changes no value.

    Args:
        forward: what is called: `model`, or a wrapper of it such as DeepSpeed's engine.
        model: the transformers model inside, for its configuration.
        batch: flat, on the model's device (ditty.models.batches).
    """
    kwargs = forward_kwargs(model, batch)
    predicts, targets = batch["predicts"], batch["targets"]
    keeps = _keeps_some_logits(model)
    if keeps:
        kwargs["logits_to_keep"] = predicts
    head = _plain_head(model)
    if head is not None:
        with _loss_in_place_of(head, None if keeps else predicts, targets) as made:
            logits = forward(**kwargs).logits
        if len(made) == 1 and made[0].data_ptr() == logits.data_ptr():
            return logits.reshape(())
        _use_logits(model, "it changes its logits after its head, or has several")
    logits = forward(**kwargs).logits[0]
    if not keeps:
        logits = logits[predicts]
    return F.cross_entropy(logits.float(), targets, reduction="sum")


@contextmanager
def _loss_in_place_of(
    head: torch.nn.Linear, predicts: torch.Tensor | None, targets: torch.Tensor
) -> Iterator[list[torch.Tensor]]:
    """Within the block `head` returns the loss [1, 1, 1]; the list gets it.

    It must come out of the model's forward pass, and not beside it: FSDP2 and DeepSpeed put what
    starts their backward pass on the model's outputs.
    """
    made: list[torch.Tensor] = []

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden[0] if predicts is None else hidden[0, predicts]
        found = linear_cross_entropy(rows, head.weight, head.bias, targets)
        made.append(found.reshape(1, 1, 1))
        return made[-1]

    before = head.__dict__.get("forward")
    head.forward = loss
    try:
        yield made
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


def _plain_head(model: PreTrainedModel) -> torch.nn.Linear | None:
    if model in _with_logits:
        return None
    head: Any = model.get_output_embeddings()
    if type(head) is torch.nn.Linear and not hasattr(head, "_hf_hook"):
        return head
    _use_logits(model, f"its head is a {type(head).__name__}")
    return None


def _use_logits(model: PreTrainedModel, why: str) -> None:
    _with_logits.add(model)
    log.warning("the logits of %s are held in memory: %s", type(model).__name__, why)


def _keeps_some_logits(model: PreTrainedModel) -> bool:
    return "logits_to_keep" in inspect.signature(type(model).forward).parameters
