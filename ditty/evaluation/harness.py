"""Tasks of lm-evaluation-harness, on a model that is in memory.

The harness is a package of its own, lm_eval, imported where it is used.
"""

import contextlib
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ditty.config.choices import Precision
from ditty.config.spec import EvaluateSpec
from ditty.errors import RunError
from ditty.models.attention import generating
from ditty.models.model import base_model
from ditty.stages.evaltasks import is_file
from ditty.training.compiled import as_it_stands
from ditty.training.evaluate import autocast


def run_task(
    module: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    evaluate: EvaluateSpec,
    precision: Precision,
) -> dict[str, float]:
    """What the model scores in a task: "task/metric" -> value, as the harness computes it.

    Of a group of tasks, in each.

    A metric of a filter other than the plain one is "task/metric,filter".

    Args:
        module: a transformers causal LM, or peft's wrapper of one.
        task: a name, or a file.
    Raises:
        RunError: there is no such task, or it cannot be run (its data cannot be had).
    """
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every argument unset
    known = TaskManager(include_defaults=not is_file(task))
    model = base_model(module)
    with as_it_stands(), generating(model), autocast(model.device, precision):
        wrapped = HFLM(pretrained=module, tokenizer=tokenizer, batch_size=evaluate.tasks_batch_size)
        return _scores(_run(task, wrapped, known, evaluate.tasks_limit))


def _run(task: str, model: Any, known: Any, limit: int | None) -> dict[str, dict[str, Any]]:
    """The harness' results of one task, by the names of its parts."""
    from lm_eval import simple_evaluate

    # A task's own data files are beside it.
    folder = Path(task).parent if is_file(task) else Path.cwd()
    try:
        with contextlib.chdir(folder):
            found = simple_evaluate(
                model,
                tasks=[task],
                limit=limit,
                task_manager=known,
                bootstrap_iters=0,
                log_samples=False,
            )
    except (OSError, ValueError, KeyError, ConnectionError) as error:
        raise RunError(f"the task {task} (evaluate.tasks) cannot be run: {error}") from error
    assert found is not None, "one process"
    results: dict[str, dict[str, Any]] = found["results"]
    return results


def _scores(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    return {
        f"{task}/{metric.removesuffix(',none')}": float(value)
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "_stderr" not in metric and "," in metric
    }
