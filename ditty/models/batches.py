"""Batches without padding: documents of several rows laid end to end in one row of tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ditty.dataset.encoding import IGNORED

Batch = dict[str, Any]


@dataclass(frozen=True)
class Bounds:
    """What no micro batch exceeds.

    Attributes:
        tokens: of all its documents.
        documents: how many.
        longest: tokens of its longest document.
    """

    tokens: int
    documents: int
    longest: int


def collate(rows: Sequence[Mapping[str, Any]]) -> Batch:
    """Lay packed rows end to end.

    Args:
        rows: each with input_ids [t], labels [t] (not shifted), lengths [documents].
    Returns:
        input_ids, position_ids, labels: int64 [1, N], N the sum of t; positions restart at 0
        with each document, and a document's first label is ignored (nothing predicts it);
        predicts: int64 [P], the places whose next token is supervised; targets: int64 [P], those
        tokens;
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
    # Here and not where the loss is: on a GPU, counting them would wait for all that is under way.
    predicts = (labels[1:] != IGNORED).nonzero()[:, 0]
    return {
        "input_ids": ids[None],
        "position_ids": positions[None],
        "labels": labels[None],
        "predicts": predicts,
        "targets": labels[predicts + 1],
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


QUARTERS = 4  # sizes to which batches are filled up: as many parts of the largest


def fill_up(batch: Batch, bounds: Bounds) -> Batch:
    """`batch` with its sizes brought to one of QUARTERS, so that few programs serve all batches.

    Tokens come behind the others, in documents of their own: no other one sees them, and none of
    them is supervised. Boundaries are repeated up to a fixed number: empty documents.

    Args:
        bounds: what no batch exceeds.
    """
    tokens = batch["input_ids"].shape[1]
    part = -(-bounds.tokens // QUARTERS)
    missing = -(-tokens // part) * part - tokens
    # Of a quarter at most, in documents of the longest's length, and a shorter one.
    places = bounds.documents + part // bounds.longest + 2
    extra = torch.arange(missing) % bounds.longest
    ends = torch.arange(bounds.longest, max(missing, bounds.longest), bounds.longest) + tokens
    boundaries = torch.cat([batch["cu_seqlens"], ends.to(torch.int32)])
    boundaries = F.pad(boundaries, (0, places - boundaries.numel()), value=tokens + missing)
    return batch | {
        "input_ids": F.pad(batch["input_ids"], (0, missing)),
        "position_ids": torch.cat([batch["position_ids"], extra[None]], dim=1),
        "labels": F.pad(batch["labels"], (0, missing), value=IGNORED),
        "cu_seqlens": boundaries,
        "max_seqlen": bounds.longest,
    }


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`; a GPU's work goes on meanwhile."""

    def moved(value: torch.Tensor) -> torch.Tensor:
        # From memory that may be paged out, the copy would wait for all that is under way.
        pinned = value.pin_memory() if device.type == "cuda" else value
        return pinned.to(device, non_blocking=True)

    return {k: moved(v) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def supervised_tokens(batch: Batch) -> int:
    """Tokens of a flat batch that enter the loss."""
    return int(batch["targets"].numel())
