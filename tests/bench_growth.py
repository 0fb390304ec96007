"""How training grows with the number of GPUs, or of gloo processes on a CPU: one table.

    python -m tests.bench_growth [--cards 1 2 4 8] [--only REGEX] [--shape tiny] [--set ...]

Each row: tokens/s of all cards, the share of linear growth from the fewest cards of its work that
fit, peak memory of a card, seconds from the start of its processes to the first step, and what a
checkpoint took. Cards that are not there are left out; a 70B model is drawn as it is quantized
(`python -m tests.bench_quantize --size 70b`), and linked into DIR/bench.
"""

import argparse
import json
import re
from pathlib import Path

import torch

from ditty.errors import DittyError
from ditty.planning.benchmark import bench_spec, run_bench

NF4 = ["model.quantization=nf4"]
WORKS = {
    # name: (shape, rows of a micro batch, overrides)
    "8b-lora": ("8b", 4, []),
    "8b-qlora": ("8b", 4, NF4),
    "8b-full": ("8b", 1, ["model.adapter=none"]),
    "70b-qlora": ("70b", 1, NF4),
}
SHARDINGS = ("auto", "fsdp2", "hybrid", "zero3")


def jobs(cards):
    """(name, shape, sharding, cards, spec) of all that can be: hybrid needs four."""
    for work, (shape, rows, overrides) in WORKS.items():
        for sharding in SHARDINGS:
            for count in cards:
                if (sharding == "hybrid" and count < 4) or (sharding != "auto" and count < 2):
                    continue
                keys = [f"train.micro_batch_size={rows}", f"launch.num_processes={count}"]
                keys += [f"train.sharding={sharding}", *overrides]
                keys += ["train.shard_size=2"] if sharding == "hybrid" else []
                yield f"{work}-{sharding}", shape, count, keys


def measure(shape, keys, args):
    """What ditty.speed.bench.measure found, with a checkpoint; or why there is nothing."""
    lines = []
    options = {"shape": args.shape or shape, "longest": None, "by": "ditty", "checkpoint": True}
    try:
        found = run_bench(bench_spec([*keys, *args.set]), options, args.home, lines.append)
    except DittyError as error:
        return {"error": str(error).partition("\n")[0][:200]}
    return found


def main():
    there = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cards", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--only", default=".*", help="of names as in 8b-lora-fsdp2")
    parser.add_argument("--shape", help="in place of each row's")
    parser.add_argument("--set", nargs="*", default=[], help="section.key=value for all rows")
    parser.add_argument("--home", type=Path, default=Path("/tmp/ditty-bench"))  # noqa: S108
    args = parser.parse_args()
    args.home.mkdir(parents=True, exist_ok=True)
    cards = [c for c in sorted(args.cards) if c <= there or not there]
    fewest: dict[str, float] = {}
    for name, shape, count, keys in jobs(cards):
        if not re.fullmatch(args.only, name):
            continue
        found = measure(shape, keys, args)
        row = {"cards": count, **{k: _short(found[k]) for k in KEPT if found.get(k) is not None}}
        if rate := found.get("tokens_per_second"):
            a_card = fewest.setdefault(name, rate / count)
            row["of_linear"] = _short(rate / count / a_card)
        print(name, json.dumps(row), flush=True)


KEPT = (
    "tokens_per_second", "peak_bytes", "host_peak_bytes", "load_seconds", "first_step_seconds",
    "stalled_seconds", "save_seconds", "loss", "device", "error",
)  # fmt: skip


def _short(value):
    return round(value, 3) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
