"""Attention kept inside each document of a flat batch, one kernel call for all or one a document.

transformers builds a block-diagonal N x N mask from position_ids, and only where attention_mask
and the cache are absent; otherwise documents leak into each other in silence. Here the document
boundaries are an argument, and a call without them is an error.

On GPUs in half precision `varlen_attn` runs all documents in one call. Elsewhere each document is
an ordinary causal attention: exact, and on CPUs far cheaper than N x N.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from ditty.errors import ModelError
from ditty.models.batches import Batch, flat_batch, to_device

NAME = "ditty_packed"

# Whether the kernel takes fewer heads of keys than of queries: not in every torch that we allow.
TAKES_FEWER_KEYS = "enable_gqa" in inspect.signature(varlen_attn).parameters

# What architectures add to plain attention, and we do not compute.
UNSUPPORTED = ("softcap", "s_aux", "position_bias")


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within documents, in the signature of transformers' AttentionInterface.

    Args:
        query: [1, heads, N, head_dim]; key, value: [1, kv_heads, N, head_dim].
        attention_mask: None; boundaries come as cu_seq_lens_q [documents + 1], max_length_q.
    Returns:
        [1, N, heads, head_dim], and no weights.
    Raises:
        ModelError: boundaries are missing, or the model asks for more than plain attention.
    """
    boundaries = kwargs.get("cu_seq_lens_q")
    if boundaries is None or attention_mask is not None or query.shape[0] != 1:
        raise ModelError(
            "packed attention got no document boundaries: this model does not pass them on. "
            "Set model.attention: sdpa"
        )
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ModelError(
                f"packed attention does not compute {name}, which this model uses. "
                "Set model.attention: eager"
            )
    if torch.is_autocast_enabled(query.device.type):
        # Rotary tables in fp32 (where the model is) leave query and key in fp32 and value not.
        half = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(half), key.to(half), value.to(half)
    window = kwargs.get("sliding_window")
    scale, dropout = kwargs.get("scaling"), kwargs.get("dropout") or 0.0
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not dropout:
        longest = kwargs["max_length_q"]
        return _varlen(query, key, value, boundaries, (longest, window, scale)), None
    return _one_by_one(query, key, value, boundaries, (dropout, window, scale)), None


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    settings: tuple[int, int | None, float | None],
) -> torch.Tensor:
    longest, window, scale = settings
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    # A window of W tokens includes the token itself; the kernel counts those to its left.
    size = (-1, 0) if window is None else (window - 1, 0)
    options: dict[str, Any] = {"scale": scale, "window_size": size}
    if TAKES_FEWER_KEYS:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    else:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = varlen_attn(q, k, v, boundaries, boundaries, longest, longest, **options)
    assert isinstance(out, torch.Tensor)
    return out[None]


@torch.compiler.disable
def _one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    options: tuple[float, int | None, float | None],
) -> torch.Tensor:
    dropout, window, scale = options
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    ends = boundaries.tolist()
    outputs = []
    for start, end in zip(ends, ends[1:], strict=False):
        if start == end:  # where boundaries are filled up
            continue
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        mask = None
        if window is not None and end - start > window:
            near = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device)
            mask = near.tril() & near.triu(1 - window)
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, mask, dropout_p=dropout, is_causal=mask is None, scale=scale
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    return None


def register() -> None:
    """Make `attn_implementation="ditty_packed"` known to transformers; may be called again."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def forward_kwargs(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """The arguments with which `model` keeps attention inside the documents of a flat batch."""
    kwargs = {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "use_cache": False,
    }
    if model.config._attn_implementation == NAME:
        kwargs |= {
            "cu_seq_lens_q": batch["cu_seqlens"],
            "cu_seq_lens_k": batch["cu_seqlens"],
            "max_length_q": batch["max_seqlen"],
            "max_length_k": batch["max_seqlen"],
        }
    return kwargs


# Relative to the largest logit: a leak measured at least 2e-4 over 35 architectures. A product of
# matrices may round a row otherwise for what is in the other rows, in bf16 on a GPU by more.
LEAK_BOUND = {"cpu": 1e-5, "cuda": 1e-3}


@torch.no_grad()
def check_isolation(forward: torch.nn.Module, model: PreTrainedModel, device: torch.device) -> None:
    """Raise unless the documents of a flat batch leave each other alone in this model.

    Two documents of 16 tokens, and once more with the first one reversed: the logits of the second
    must stay what they are. Models with a state (Mamba) or with masks and positions of their own
    (Bloom, OPT) take the documents for one text and say nothing.

    Args:
        forward: what is called; see Parallel. All processes take part.
    Raises:
        ModelError: they do not.
    """
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(3, vocabulary - 1), vocabulary, (32,), generator=generator)
    other = torch.cat([ids[:16].flip(0), ids[16:]])
    training = model.training
    model.eval()
    logits = []
    for tokens in (ids, other):
        batch = to_device(flat_batch(tokens, tokens, torch.tensor([16, 16])), device)
        logits.append(forward(**forward_kwargs(model, batch)).logits[0, 16:].float())
    model.train(training)
    change = float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())
    if change > LEAK_BOUND[device.type]:
        raise ModelError(
            f"{type(model).__name__} mixes the documents of a packed row with model.attention: "
            f"{model.config._attn_implementation}: the text of one changes the logits of another "
            f"by {change:.1e}. Set data.packing: none and train.micro_batch_size: 1, or use "
            "another model"
        )


@contextmanager
def generating(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the model generates with a cache: sdpa in place of packed attention."""
    implementation = model.config._attn_implementation
    training = model.training
    if implementation == NAME:
        model.set_attn_implementation("sdpa")
    model.eval()
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)
        model.train(training)
