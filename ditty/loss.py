"""The language-model loss as a sum, so that any split of a batch adds up to the same number."""

import inspect

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ditty.attention import forward_kwargs
from ditty.batches import IGNORED, Batch


def token_loss_sum(forward: torch.nn.Module, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Summed cross-entropy of the supervised tokens of a flat batch, in nats, fp32 scalar.

    Logits are computed only where a supervised token is predicted: with completion-only loss
    that saves most of the vocabulary projection, and changes no value.

    Args:
        forward: what is called: `model`, or a wrapper of it such as DeepSpeed's engine.
        model: the transformers model inside, for its configuration.
        batch: flat, on the model's device (batches.collate).
    """
    targets = batch["labels"][0, 1:]
    predicts = (targets != IGNORED).nonzero()[:, 0]
    kwargs = forward_kwargs(model, batch)
    if _keeps_some_logits(model):
        logits = forward(**kwargs, logits_to_keep=predicts).logits[0]
    else:
        logits = forward(**kwargs).logits[0, predicts]
    return F.cross_entropy(logits.float(), targets[predicts], reduction="sum")


def _keeps_some_logits(model: PreTrainedModel) -> bool:
    return "logits_to_keep" in inspect.signature(type(model).forward).parameters
