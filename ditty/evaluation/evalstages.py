"""What the stages that measure a model write, in the process of a worker."""

import logging
import math
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ditty.config.spec import RunSpec
from ditty.data import read_rows
from ditty.distributed.load import load_trained
from ditty.distributed.world import single
from ditty.errors import RunError
from ditty.models.model import base_model
from ditty.store.artifacts import Make
from ditty.store.files import write_json
from ditty.training.evaluate import HeldOut, complete, held_out_loss

log = logging.getLogger(__name__)


def evaluates(
    model_dir: Path, trained: Path | None, data_dir: Path, spec: RunSpec, device: str
) -> Make:
    """What measures the held-out loss, and lets the model complete held-out prompts.

    Args:
        model_dir, trained: see `load_trained`.
        data_dir: the packed rows.
        device: "cpu" or "cuda".
    """

    def make(out: Path) -> dict[str, Any]:
        world, precision = single(device), spec.train.precision
        rows = read_rows(data_dir / "eval.arrow")
        if not len(rows):
            raise RunError(
                "no row is held out, so there is nothing to evaluate on: raise data.eval_fraction "
                f"(it is {spec.data.eval_fraction:g})"
            )
        module = load_trained(model_dir, trained, spec.model, spec.train, world.device)
        model = base_model(module)
        loss, tokens = held_out_loss(module, model, rows, precision, world)
        found = {"loss": loss, "perplexity": _exp(loss), "tokens": tokens, "rows": len(rows)}
        write_json(out / "evaluation.json", found)
        log.info("held-out loss %.4f over %d tokens", loss, tokens)
        if count := spec.evaluate.num_samples:
            tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
            held_out = HeldOut(rows, tokenizer, count, spec.train.sample_max_tokens)
            write_json(out / "samples.json", complete(model, held_out, precision, world.device))
        return found

    return make


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def runs_task(model_dir: Path, trained: Path | None, task: str, spec: RunSpec, device: str) -> Make:
    """What lets the model answer one of `evaluate.tasks`; arguments as of `evaluates`."""

    def make(out: Path) -> dict[str, Any]:
        from ditty.evaluation.harness import run_task

        world = single(device)
        module = load_trained(model_dir, trained, spec.model, spec.train, world.device)
        tokenizer = AutoTokenizer.from_pretrained(trained or model_dir, local_files_only=True)
        found: dict[str, Any] = {}
        found |= run_task(module, tokenizer, task, spec.evaluate, spec.train.precision)
        write_json(out / "scores.json", found)
        for name, value in found.items():
            log.info("%s %.4f", name, value)
        return found

    return make
