"""How much GPU memory a training takes, and which activations it can keep. Without torch.

What is kept from a block's forward pass for its backward pass grows with the tokens of a batch,
and is most of the memory of a LoRA training. A block whose activations are dropped computes them
again when they are needed, a third more work for that block. So as many blocks as fit keep theirs.

The counts are those of a decoder of Llama's kind (and GPT-NeoX's), as its blocks are computed here:
measured on an H200 with shapes of 1B and 8B, see tests/test_gpu_memory.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ditty.config.choices import (
    ActivationCheckpointing,
    Adapter,
    Optimizer,
    Precision,
    Quantization,
    Sharding,
)
from ditty.config.spec import RunSpec, TrainSpec

HALF = (Precision.BF16, Precision.FP16)

SHARE = 0.92
"""Of a card's memory that is planned with: the rest is CUDA's own, and what lies between blocks."""

# Logits are made for so many (token, word) pairs at a time: see ditty.training.linear_loss. Each
# one in the arithmetic's dtype with its gradient, and most of it in fp32.
LOGITS_AT_ONCE = 1 << 28
FP32_LOGIT_BYTES = 3  # measured: all of them are never there at once
STATE_BYTES = {  # of the optimizer, for a trained weight
    Optimizer.ADAMW: 8.0,
    Optimizer.ADAMW_8BIT: 2.0,
    Optimizer.PAGED_ADAMW: 0.0,
    Optimizer.PAGED_ADAMW_8BIT: 0.0,
    Optimizer.LION: 4.0,
    Optimizer.LION_8BIT: 1.0,
    Optimizer.PAGED_LION: 0.0,
    Optimizer.PAGED_LION_8BIT: 0.0,
    Optimizer.ADAFACTOR: 0.0,  # a row and a column of each matrix
    Optimizer.MUON: 4.0,
}
STORED_BYTES = {Quantization.NF4: 0.516, Quantization.INT8: 1.0, Quantization.FP8: 1.0}


@dataclass(frozen=True)
class Sizes:
    """A decoder's sizes. `gated`: its MLP has a gate beside the first projection."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    gated: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Sizes | None":
        """From a config.json; None for models of another kind, mixtures of experts among them."""
        config = config.get("text_config") or config
        if any("experts" in key and config[key] for key in config):
            return None
        try:
            hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
            return cls(
                hidden=hidden,
                layers=int(config["num_hidden_layers"]),
                intermediate=int(config["intermediate_size"]),
                heads=heads,
                kv_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or hidden // heads),
                vocabulary=int(config["vocab_size"]),
                tied=bool(config.get("tie_word_embeddings", True)),
                gated=config.get("model_type") not in ("gpt_neox", "phi", "gpt_bigcode"),
            )
        except (KeyError, TypeError, ValueError):
            return None

    @property
    def layer_sides(self) -> list[tuple[int, int]]:
        """(in, out) of a block's linear layers."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [(self.hidden, queries), (self.hidden, keys), (self.hidden, keys)]
        mlp = [(self.hidden, self.intermediate)] * (2 if self.gated else 1)
        return [*attention, (queries, self.hidden), *mlp, (self.intermediate, self.hidden)]

    @property
    def linear_weights(self) -> int:
        """Weights of all blocks' linear layers."""
        return self.layers * sum(a * b for a, b in self.layer_sides)

    @property
    def word_weights(self) -> int:
        """Weights of the embedding and the head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)


@dataclass(frozen=True)
class Memory:
    """Where the memory of one process goes, in bytes, at the moment when it is the most.

    Attributes:
        recomputed: blocks whose activations are computed again, of `layers`.
        budget: what may be used; None: unknown.
    """

    weights: float
    optimizer: float
    gradients: float
    activations: float
    head: float
    recomputed: int
    layers: int
    budget: float | None = None

    @property
    def peak(self) -> float:
        """All of it."""
        return self.weights + self.optimizer + self.gradients + self.activations + self.head

    @property
    def fits(self) -> bool:
        """Whether the budget, if there is one, is enough."""
        return self.budget is None or self.peak <= self.budget

    def describe(self) -> str:
        """One line for people."""
        parts = {
            "weights": self.weights,
            "optimizer": self.optimizer,
            "gradients": self.gradients,
            "activations": self.activations,
            "head and loss": self.head,
        }
        shown = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
        kept = f"{self.recomputed} of {self.layers} blocks recomputed"
        of = f" of {self.budget / 1e9:.1f}" if self.budget is not None else ""
        return f"{self.peak / 1e9:.1f}{of} GB a process ({shown}); {kept}"


@dataclass(frozen=True)
class Held:
    """What one process holds of a model, whatever the batch.

    Attributes:
        weights: bytes.
        trained: how many of them are trained, in fp32.
        copies: bytes of weights in the dtype of the arithmetic, and of gathered ones.
        full: all weights are trained.
        compiled: the blocks are.
        within: recomputed blocks are recomputed within their program.
        dropout: before the adapter.
    """

    weights: float
    trained: float
    copies: float
    full: bool
    compiled: bool
    within: bool
    dropout: bool


def plan_memory(
    train: TrainSpec, sizes: Sizes, held: Held, tokens: int, budget: float | None
) -> Memory:
    """The memory of a training on GPUs, with as many blocks recomputed as `budget` asks for.

    Args:
        tokens: of a micro batch, at most.
        budget: bytes that a process may use; None: no bound is known.
    """
    choice = train.activation_checkpointing
    if choice is ActivationCheckpointing.AUTO and train.sharding is Sharding.ZERO3:
        choice = ActivationCheckpointing.NONE  # DeepSpeed recomputes all blocks or none
    if choice is ActivationCheckpointing.NONE or (
        choice is ActivationCheckpointing.AUTO and budget is None
    ):
        counts = [0]
    elif choice is ActivationCheckpointing.ALL:
        counts = [sizes.layers]
    else:
        counts = list(range(sizes.layers + 1))
    for recomputed in counts:
        found = replace(_memory(train, sizes, held, tokens, recomputed), budget=budget)
        if found.fits:
            break
    return found


def budget_of(train: TrainSpec, card_bytes: float) -> float:
    """What a process may use of a card's memory, in bytes."""
    most = card_bytes * SHARE
    return most if train.max_memory_gb is None else min(most, train.max_memory_gb * 1e9)


def _memory(train: TrainSpec, sizes: Sizes, held: Held, tokens: int, recomputed: int) -> Memory:
    """At the end of the forward pass, or of the backward pass, where all gradients are there."""
    size = itemsize(train.precision)
    a_block, boundary = _block_elements(sizes, held) * size, sizes.hidden * size
    kept = sizes.layers - recomputed
    head = min(LOGITS_AT_ONCE, tokens * sizes.vocabulary) * (2 * size + FP32_LOGIT_BYTES)
    head += tokens * boundary
    if held.full:  # the head's gradient, and once more in the dtype of the arithmetic
        head += sizes.vocabulary * sizes.hidden * (4 + size)
    # A recomputed block's activations, and the gradients on the way through it, come when the
    # head is done; only where they are more than the head's do they count.
    through = tokens * (a_block + 2 * size * (sizes.intermediate + sizes.hidden))
    if held.within:  # one program for both holds more at once (measured)
        through += tokens * 5 * size * sizes.intermediate
    later = held.full and train.gradient_accumulation_steps == 1  # than all this
    forward = Memory(
        weights=held.weights + held.copies,
        optimizer=STATE_BYTES[train.optimizer] * held.trained,
        gradients=0 if later else 4 * held.trained,
        activations=tokens * (kept * a_block + recomputed * boundary),
        head=max(head, through) if recomputed else head,
        recomputed=recomputed,
        layers=sizes.layers,
    )
    backward = replace(
        forward,
        weights=held.weights,
        gradients=4 * held.trained,
        activations=tokens * boundary,
        head=0,
    )
    return max(forward, backward, key=lambda memory: memory.peak)


def _block_elements(sizes: Sizes, held: Held) -> int:
    """Numbers that a block keeps of each token.

    The MLP's projections and their product, the residual before and between, the two normed
    inputs and one more of the hidden size, query, attention's result, and key and value, repeated
    for all heads as the kernel takes them. Uncompiled: also what compilation fuses away.
    """
    mlp = (3 if sizes.gated else 2) * sizes.intermediate
    found = mlp + 5 * sizes.hidden + 4 * sizes.heads * sizes.head_dim
    if not held.compiled:
        found += sizes.intermediate + 5 * sizes.hidden
    if held.dropout:
        found += 2 * sum(a for a, _ in sizes.layer_sides)
    return found


def itemsize(precision: Precision) -> int:
    """Bytes of a number in the arithmetic."""
    return 2 if precision in HALF else 4


def expect_held(spec: RunSpec, sizes: Sizes) -> Held:
    """What a process of `spec` will hold; `held_by` (ditty.training.recompute) counts it there."""
    train, model, size = spec.train, spec.model, itemsize(spec.train.precision)
    full = model.adapter is Adapter.NONE
    stored = STORED_BYTES.get(model.quantization, float(4 if full else size))
    words = sizes.word_weights * (4 if full else size)
    base = sizes.linear_weights * stored + words
    if model.quantization is Quantization.FP8 and spec.sharding in (Sharding.NONE, Sharding.DDP):
        base += sizes.linear_weights  # once more, transposed: see ditty.models.fp8
    sides = sum(a + b for a, b in sizes.layer_sides)
    adapter = 0 if full else sizes.layers * model.lora_r * sides
    trained = sizes.linear_weights + sizes.word_weights if full else adapter
    share = _processes_that_share(spec)
    copies = 0.0
    if share > 1:  # two blocks, embedding and head
        copies = 2 * stored * sizes.linear_weights / sizes.layers + size * sizes.word_weights
    elif full and size == 2:
        copies = size * trained
    held = 0.0 if train.cpu_offload and share > 1 else (base + 4 * adapter) / share
    compiled = train.compile is not False and size == 2 and spec.sharding is not Sharding.ZERO3
    return Held(
        weights=held,
        trained=0 if train.cpu_offload else trained / share,
        copies=copies,
        full=full,
        compiled=compiled,
        within=compiled and model.quantization is Quantization.NONE,
        dropout=bool(model.lora_dropout) and not full,
    )


def _processes_that_share(spec: RunSpec) -> int:
    """Over how many processes a weight is cut."""
    if spec.sharding in (Sharding.FSDP2, Sharding.ZERO3):
        return spec.launch.world_size
    if spec.sharding is Sharding.HYBRID:
        return spec.train.shard_size or spec.launch.num_processes
    return 1
