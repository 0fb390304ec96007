"""Held-out loss, and what the model writes for held-out prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ditty.attention import generating
from ditty.batches import IGNORED, collate, supervised_tokens, to_device
from ditty.loss import token_loss_sum
from ditty.spec import Precision
from ditty.world import World


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Arithmetic in bf16 where the precision says so; nothing in fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision is Precision.BF16)


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
    model: PreTrainedModel,
    rows: Sequence[Mapping[str, Any]],
    precision: Precision,
    world: World,
) -> tuple[float, int]:
    """(mean loss in nats a supervised token, supervised tokens) over all rows and processes."""
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for index in range(world.rank, len(rows), world.world_size):
        batch = to_device(collate([rows[index]]), world.device)
        with autocast(world.device, precision):
            total += float(token_loss_sum(model, model, batch))
        count += supervised_tokens(batch)
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
    with generating(model), autocast(device, precision):
        for row in list(held_out.rows)[: held_out.num_samples]:
            prompt, reference = first_prompt(row)
            ids = torch.tensor([prompt], device=device)
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=held_out.sample_max_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
                # The chat's own end of turn, whatever generation_config says.
                eos_token_id=sorted({tokenizer.eos_token_id, reference[-1]}),
            )
            texts = (prompt, out[0, len(prompt) :].tolist(), reference)
            decoded = (tokenizer.decode(t, skip_special_tokens=True) for t in texts)
            samples.append(dict(zip(("prompt", "completion", "reference"), decoded, strict=True)))
    return samples


def first_prompt(row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """(prompt tokens, supervised tokens after it) of a packed row's first document."""
    length = row["lengths"][0]
    ids, labels = list(row["input_ids"][:length]), list(row["labels"][:length])
    start = next((i for i, label in enumerate(labels) if label != IGNORED), length - 1)
    start = max(start, 1)
    end = next((i for i in range(start, length) if labels[i] == IGNORED), length)
    return ids[:start], ids[start:end] or ids[-1:]
