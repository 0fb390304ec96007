"""DPO, from ditty's library alone: learn from pairs of answers which one people prefer.

    Dpo("HuggingFaceTB/SmolLM2-135M-Instruct", pairs="pairs.jsonl", output_dir="out",
        batch_size=2, learning_rate=5e-6, epochs=1).run()

A row of the file is {"prompt": "...", "chosen": "...", "rejected": "..."}, the prompt as the model
is to see it. Checkpoints, resuming, quantized bases and several processes (`accelerate launch`) are
the library's. The reference is the base model: the same weights, with the adapter switched off.

Source: arXiv:2305.18290, equation 7.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils.data import DataLoader

from ditty import Data, Hooks, Pipeline
from ditty.config.choices import Adapter
from ditty.errors import SpecError
from ditty.models.attention import forward_kwargs
from ditty.models.batches import Batch, collate

BETA = 0.1  # how far the trained model may go from the reference: the smaller, the further


class Dpo(Pipeline):
    """A training on pairs.

    Args:
        pairs: a file of rows, as `datasets` reads JSON.
        options: see Pipeline.
    Raises:
        SpecError: there is no adapter to switch off.
    """

    def __init__(self, base_model: str, pairs: str, **options: Any):
        super().__init__(base_model, **options)
        if self.spec.model.adapter is Adapter.NONE:
            raise SpecError("Dpo: the base is the reference, so train beside it: adapter='lora'")
        self.pairs = pairs

    def dataset(self) -> DataLoader[Any]:
        """Batches of pairs."""
        data = Data(
            load_args=("json",),
            load_kwargs={"data_files": self.pairs},
            tokenizer=self.tokenizer,
            seed=self.seed,
            batch_size=self.batch_size,
            grad_accum=self.grad_accum,
            collator=pair_batch,
            remove_unused_columns=False,
            cache=False,
        )
        return data.prepare([("map", self.tokens, {})])

    def tokens(self, row: dict[str, str]) -> dict[str, Any]:
        """A pair as a packed row of two documents, of which the answers are supervised."""
        packed: dict[str, list[int]] = {"input_ids": [], "labels": [], "lengths": []}
        prompt = self.tokenizer(row["prompt"])["input_ids"]
        for answer in (row["chosen"], row["rejected"]):
            ids = self.tokenizer(row["prompt"] + answer + self.tokenizer.eos_token)["input_ids"]
            packed["input_ids"] += ids
            packed["labels"] += [-100] * len(prompt) + ids[len(prompt) :]
            packed["lengths"].append(len(ids))
        return packed

    def hooks(self) -> Hooks:
        """The loss over pairs."""
        return Hooks(loss=dpo_loss, terms=pairs_of)


def pair_batch(rows: list[dict[str, Any]]) -> Batch:
    """Pairs end to end: chosen, rejected, chosen, rejected ..."""
    return collate(rows)


def pairs_of(batch: Batch) -> int:
    """How many pairs a batch has."""
    return (len(batch["cu_seqlens"]) - 1) // 2


def dpo_loss(forward: torch.nn.Module, model: Any, batch: Batch) -> torch.Tensor:
    """The summed loss of a batch of pairs; see Hooks.loss."""
    reference = reference_logps(forward, model, batch)
    gains = answer_logps(forward, model, batch) - reference
    return -F.logsigmoid(BETA * (gains[0::2] - gains[1::2])).sum()


def answer_logps(forward: torch.nn.Module, model: Any, batch: Batch) -> torch.Tensor:
    """Log-probability of each document's supervised tokens, fp32 [documents]."""
    logits = forward(**forward_kwargs(model, batch)).logits[0, batch["predicts"]]
    logps = -F.cross_entropy(logits.float(), batch["targets"], reduction="none")
    document = torch.bucketize(batch["predicts"], batch["cu_seqlens"], right=True) - 1
    return logps.new_zeros(len(batch["cu_seqlens"]) - 1).index_add(0, document, logps)


def reference_logps(forward: torch.nn.Module, model: Any, batch: Batch) -> torch.Tensor:
    """`answer_logps` of the base alone."""
    switch_adapter(model, on=False)
    try:
        with torch.no_grad():
            return answer_logps(forward, model, batch)
    finally:
        switch_adapter(model, on=True)


def switch_adapter(model: torch.nn.Module, *, on: bool) -> None:
    """Let the model's layers add what their adapters say, or not."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(on)
