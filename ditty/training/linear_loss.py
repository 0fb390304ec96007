"""The vocabulary projection and its cross-entropy in one, a few tokens at a time.

The logits of 16,000 tokens over 128,000 words are 8 GB in fp32, and their gradient as much again.
Here they exist for CHUNK_ELEMENTS at a time: each chunk's gradient is computed with its loss and
multiplied back at once, so that the backward pass has nothing left to do but scale.

Source: the idea is that of liger-kernel's fused linear cross-entropy (arXiv:2410.10989).
"""

from collections.abc import Callable
from typing import Any

import torch

CHUNK_ELEMENTS = {"cuda": 1 << 28, "cpu": 1 << 22}  # logits at a time
CHUNK_ROWS = 128  # chunks are multiples of so many tokens, if of more than that

ChunkLoss = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
) -> torch.Tensor:
    """Summed cross-entropy of softmax(hidden weight^T + bias) at `targets`, in nats, fp32 scalar.

    Products are made in autocast's dtype, or in that of `hidden`; the softmax in fp32.

    Args:
        hidden: [n, d]; weight: [vocabulary, d]; bias: [vocabulary]; targets: int64 [n].
    """
    kind = hidden.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else hidden.dtype
    wanted = torch.is_grad_enabled()
    with torch.autocast(kind, enabled=False):
        loss: torch.Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, targets, dtype, wanted)
    return loss


def _chunk_loss(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(summed loss fp32, its gradient by the logits in their dtype), of logits [n, vocabulary]."""
    values = logits.float()
    total = torch.logsumexp(values, dim=-1, keepdim=True)
    words = torch.arange(logits.shape[1], device=logits.device)
    hit = words == targets.unsqueeze(1)
    loss = (total.squeeze(1) - torch.where(hit, values, 0.0).sum(dim=-1)).sum()
    gradient = torch.exp(values - total) - hit.to(values.dtype)
    return loss, gradient.to(logits.dtype)


_compiled: ChunkLoss | None = None


def _chunk_function(device: torch.device) -> ChunkLoss:
    """On GPUs one kernel for all of it, by torch.compile; elsewhere as it stands."""
    global _compiled
    if device.type != "cuda":
        return _chunk_loss
    if _compiled is None:
        _compiled = torch.compile(_chunk_loss, dynamic=True)
    return _compiled


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        dtype: torch.dtype,
        wanted: bool,
    ) -> torch.Tensor:
        needed = [wanted and flag for flag in ctx.needs_input_grad[:3]]
        x, w = hidden.to(dtype), weight.to(dtype)
        b = None if bias is None else bias.to(dtype)
        gradients: list[torch.Tensor | None] = [
            torch.zeros_like(tensor, dtype=torch.float32) if need and tensor is not None else None
            for tensor, need in zip((hidden, weight, bias), needed, strict=True)
        ]
        if gradients[0] is not None:
            gradients[0] = torch.zeros_like(x)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        chunk_loss = _chunk_function(hidden.device)
        for start, stop in _chunks(x.shape[0], w.shape[0], hidden.device.type):
            rows = slice(start, stop)
            logits = torch.nn.functional.linear(x[rows], w, b)
            chunk, dlogits = chunk_loss(logits, targets[rows])
            loss += chunk
            _add_gradients(gradients, rows, dlogits, x, w)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        return loss

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (scale,) = outer
        scaled = [
            None if gradient is None else (gradient * scale.to(gradient.dtype)).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None


def _add_gradients(
    gradients: list[torch.Tensor | None],
    rows: slice,
    dlogits: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
) -> None:
    """Multiply a chunk's gradient back to the input, the weight and the bias that want it."""
    by_input, by_weight, by_bias = gradients
    if by_input is not None:
        torch.mm(dlogits, w, out=by_input[rows])
    if by_weight is not None and w.is_cuda and w.dtype != torch.float32:
        # Added up in fp32 within the product; as a sum of its own it took as long as the product.
        torch.addmm(by_weight, dlogits.T, x[rows], out_dtype=torch.float32, out=by_weight)
    elif by_weight is not None:
        by_weight += dlogits.T @ x[rows]
    if by_bias is not None:
        by_bias += dlogits.sum(dim=0, dtype=torch.float32)


def _chunks(rows: int, vocabulary: int, kind: str) -> list[tuple[int, int]]:
    """[start, stop) of each chunk."""
    size = max(1, CHUNK_ELEMENTS[kind] // vocabulary)
    size = size // CHUNK_ROWS * CHUNK_ROWS or size
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]
