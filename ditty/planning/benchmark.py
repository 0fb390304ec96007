"""Starting a measurement of speed: the spec, and the processes that carry it out. Without torch."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ditty.config.spec import RunSpec
from ditty.config.specfile import apply_override, parse_spec
from ditty.errors import SpecError
from ditty.planning.shapes import SHAPES
from ditty.processes.environment import resolve_device
from ditty.processes.launch import raise_for_result, run_stage
from ditty.store.files import make_dir, read_json

LEAST_STEPS = 6
BASE = "random weights"
REPORT = "bench.json"


def bench_spec(overrides: list[str]) -> RunSpec:
    """LoRA on rows of 2,048 tokens, four in a step of 14; `overrides` as `--set` has them.

    Raises:
        SpecError: an override is wrong, or there are too few steps to measure.
    """
    values: dict[str, Any] = {
        "name": "bench",
        "data": {"source": "random.jsonl", "seq_len": 2048},
        "model": {"base_model": BASE},
        "train": {"max_steps": 14, "micro_batch_size": 4, "gradient_accumulation_steps": 1},
    }
    for override in overrides:
        apply_override(values, override)
    spec = parse_spec(values, where="bench")
    if spec.train.micro_batch_size == "auto":
        raise SpecError("train.micro_batch_size: auto is for a model that is there: set a number")
    if (spec.train.max_steps or 0) < LEAST_STEPS:
        raise SpecError(
            f"train.max_steps: got {spec.train.max_steps}, and the first steps are not measured: "
            f"expected at least {LEAST_STEPS}"
        )
    return spec


def run_bench(
    spec: RunSpec, options: dict[str, Any], home: Path, on_line: Callable[[str], None]
) -> dict[str, Any]:
    """Measure `spec` in processes of its own.

    Args:
        options: those of ditty.speed.bench.measure, and `by`: "ditty" or "trl".
        on_line: gets each line that they print.
    Returns:
        what ditty.speed.bench.measure returns.
    Raises:
        SpecError: no such shape; or see `run_stage`.
        DittyError: what stopped it.
    """
    if options["shape"] not in SHAPES:
        raise SpecError(f"no shape {options['shape']!r}: expected one of {', '.join(SHAPES)}")
    folder = make_dir(home / "bench")
    job = {
        "home": str(home),
        "spec": spec.model_dump(mode="json"),
        "key": "",
        "inputs": options,
        "model_dir": str(home),
        "data_dir": None,
        "device": resolve_device(spec.launch),
    }
    with TemporaryDirectory(dir=folder) as temporary:
        attempt = Path(temporary)
        result = run_stage(
            "bench",
            job,
            attempt,
            spec.launch,
            distributed=True,
            on_line=on_line,
            check=lambda: None,
        )
        raise_for_result(result)
        found = read_json(attempt / REPORT)
    assert found is not None, "the first process writes it"
    return found
