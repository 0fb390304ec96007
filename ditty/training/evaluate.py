"""Held-out loss, and what the model writes for held-out prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ditty.config.choices import Precision
from ditty.dataset.encoding import IGNORED
from ditty.distributed.world import World
from ditty.models.attention import generating
from ditty.models.batches import collate, to_device
from ditty.training.compiled import as_it_stands
from ditty.training.hooks import OURS, Hooks


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Arithmetic in bf16 or fp16 where the precision says so; nothing in fp32."""
    half = torch.float16 if precision is Precision.FP16 else torch.bfloat16
    return torch.autocast(device.type, dtype=half, enabled=precision is not Precision.FP32)


@dataclass(frozen=True)
class HeldOut:
    """The held-out rows and what is done with them.

    Attributes:
        rows: packed rows, never trained on.
        tokenizer: decodes samples.
        num_samples: prompts to complete; 0: only the loss.
    """

    rows: Sequence[Mapping[str, Any]]
    tokenizer: PreTrainedTokenizerBase | None = None
    num_samples: int = 0
    sample_max_tokens: int = 64


@torch.no_grad()
def held_out_loss(
    forward: torch.nn.Module,
    model: PreTrainedModel,
    rows: Sequence[Mapping[str, Any]],
    precision: Precision,
    world: World,
    hooks: Hooks = OURS,
) -> tuple[float, int]:
    """(mean loss in nats a supervised token, supervised tokens) over all rows and processes.

    Every process makes as many forward passes as the others, since those gather weights: one that
    has no row left takes row 0 again, and does not count it.

    Args:
        forward: what is called; see Parallel.
        model: the transformers model inside.
        hooks: whose loss it is, and its terms.
    """
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for first in range(0, len(rows), world.world_size):
        index = first + world.rank
        batch = to_device(collate([rows[index if index < len(rows) else 0]]), world.device)
        with as_it_stands(), autocast(world.device, precision):
            loss = float(hooks.loss_sum(forward, model, batch))
        if index < len(rows):
            total += loss
            count += hooks.terms(batch)
    model.train(training)
    total, counted = world.sum([total, float(count)])
    return total / max(counted, 1.0), int(counted)


@torch.no_grad()
def complete(
    model: PreTrainedModel, held_out: HeldOut, precision: Precision, device: torch.device
) -> list[dict[str, str]]:
    """Greedy completions of the first held-out prompts: {prompt, completion, reference}."""
    tokenizer = held_out.tokenizer
    assert tokenizer is not None, "samples need a tokenizer"
    samples = []
    with autocast(device, precision):
        for row in islice(held_out.rows, held_out.num_samples):
            prompt, reference = first_prompt(row)
            # The chat's own end of turn, whatever generation_config says.
            ends = sorted({tokenizer.eos_token_id, reference[-1]})
            options = {"max_new_tokens": held_out.sample_max_tokens, "do_sample": False}
            ids = torch.tensor([prompt], device=device)
            texts = (prompt, generate(model, ids, tokenizer, ends, **options), reference)
            decoded = (tokenizer.decode(t, skip_special_tokens=True) for t in texts)
            samples.append(dict(zip(("prompt", "completion", "reference"), decoded, strict=True)))
    return samples


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompt: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
    ends: list[int],
    **options: Any,
) -> list[int]:
    """The tokens with which a model goes on after `prompt`, up to one of `ends`.

    Args:
        prompt: token ids [1, N] where the model computes.
        options: of transformers' `generate`: max_new_tokens, do_sample ...
    """
    with as_it_stands(), generating(model):
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            eos_token_id=ends,
            **options,
        )
    found: list[int] = out[0, prompt.shape[1] :].tolist()
    return found


def first_prompt(row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """(prompt tokens, supervised tokens after it) of a packed row's first document."""
    length = row["lengths"][0]
    ids, labels = list(row["input_ids"][:length]), list(row["labels"][:length])
    start = next((i for i, label in enumerate(labels) if label != IGNORED), length - 1)
    start = max(start, 1)
    end = next((i for i in range(start, length) if labels[i] == IGNORED), length)
    return ids[:start], ids[start:end] or ids[-1:]
