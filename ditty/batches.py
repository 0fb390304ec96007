"""Batches without padding: documents of several rows laid end to end in one row of tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

IGNORED = -100  # label of a token that is not supervised, as everywhere in transformers

Batch = dict[str, Any]


def collate(rows: Sequence[Mapping[str, Any]]) -> Batch:
    """Lay packed rows end to end.

    Args:
        rows: each with input_ids [t], labels [t] (not shifted), lengths [documents].
    Returns:
        input_ids, position_ids, labels: int64 [1, N], N the sum of t; positions restart at 0
        with each document, and a document's first label is ignored (nothing predicts it);
        cu_seqlens: int32 [documents + 1], where documents begin, and N;
        max_seqlen: int, tokens of the longest document.
    """
    lengths = torch.tensor([n for row in rows for n in row["lengths"]], dtype=torch.int64)
    ids = torch.cat([torch.as_tensor(row["input_ids"], dtype=torch.int64) for row in rows])
    labels = torch.cat([torch.as_tensor(row["labels"], dtype=torch.int64) for row in rows])
    return flat_batch(ids, labels, lengths)


def flat_batch(ids: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor) -> Batch:
    """The batch of `collate` from tokens [N], labels [N] and document lengths [documents]."""
    assert int(lengths.sum()) == ids.numel() == labels.numel(), "lengths must cover the tokens"
    ends = lengths.cumsum(0)
    starts = ends - lengths
    positions = torch.arange(ids.numel()) - torch.repeat_interleave(starts, lengths)
    labels = labels.clone()
    labels[starts] = IGNORED
    return {
        "input_ids": ids[None],
        "position_ids": positions[None],
        "labels": labels[None],
        "cu_seqlens": torch.cat([ends.new_zeros(1), ends]).to(torch.int32),
        "max_seqlen": int(lengths.max()),
    }


def flatten(batch: Mapping[str, Any]) -> Batch:
    """A padded batch (input_ids, attention_mask, labels: [B, T]) as a flat one.

    A batch that is flat already passes through. Padding goes; without attention_mask every
    position counts as a token, without labels every token is supervised. Rows padded on the
    left or on the right come out the same.
    """
    if "cu_seqlens" in batch:
        return dict(batch)
    ids = torch.as_tensor(batch["input_ids"])
    given = batch.get("attention_mask")
    mask = (
        torch.ones_like(ids, dtype=torch.bool) if given is None else torch.as_tensor(given).bool()
    )
    labels = torch.as_tensor(batch["labels"]) if "labels" in batch else ids
    lengths = mask.sum(1)
    return flat_batch(ids[mask], labels[mask], lengths[lengths > 0])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    return {
        k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v
        for k, v in batch.items()
    }


def supervised_tokens(batch: Batch) -> int:
    """Tokens of a flat batch that enter the loss."""
    return int((batch["labels"] != IGNORED).sum())
