"""The rows of the speed table, each in processes of its own: ditty's, and TRL's beside it.

python -m tests.bench_train [--only REGEX] [--compare] [--profile DIR] [--home DIR]

Rows that begin with "2x" take two GPUs; their tokens are those of both.
"""

import argparse
import json
import re
from pathlib import Path

from ditty.planning.benchmark import bench_spec, run_bench

CKPT = ["train.activation_checkpointing=all"]
NF4 = ["model.quantization=nf4"]
TWICE = ["train.gradient_accumulation_steps=2"]
TWO = ["launch.num_processes=2", "train.sharding=auto"]
SHARDED = ["launch.num_processes=2", "train.sharding=fsdp2"]
GIB = 2**30 / 1e9  # train.max_memory_gb counts in 10^9 bytes
ROWS = {
    # name: (shape, rows of a micro batch, overrides)
    "1b-lora": ("1b", 8, []),
    "1b-lora-varied": ("1b", 8, []),
    "1b-lora-eager": ("1b", 8, ["train.compile=false"]),
    "1b-lora-fp8": ("1b", 8, ["model.quantization=fp8"]),
    "1b-qlora": ("1b", 8, NF4),
    "1b-full": ("1b", 8, ["model.adapter=none"]),
    "8b-lora": ("8b", 4, []),
    "8b-lora-ckpt": ("8b", 4, CKPT),
    "8b-lora-fp8": ("8b", 4, ["model.quantization=fp8"]),
    "8b-lora-fp8-ckpt": ("8b", 4, ["model.quantization=fp8", *CKPT]),
    "8b-lora-20gib": ("8b", 2, [*TWICE, f"train.max_memory_gb={20 * GIB}"]),
    "8b-qlora": ("8b", 4, NF4),
    "8b-qlora-ckpt": ("8b", 4, [*NF4, *CKPT]),
    "8b-qlora-9gib": ("8b", 2, [*NF4, *TWICE, f"train.max_memory_gb={9 * GIB}"]),
    "2x8b-qlora": ("8b", 4, [*NF4, *TWO]),
    "2x8b-qlora-fsdp2": ("8b", 4, [*NF4, *SHARDED]),
    "2x8b-qlora-fsdp2-9gib": ("8b", 2, [*NF4, *SHARDED, *TWICE, f"train.max_memory_gb={9 * GIB}"]),
    "2x8b-lora": ("8b", 4, TWO),
    "2x70b-qlora-fsdp2": ("70b", 1, [*NF4, *SHARDED]),
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=".*")
    parser.add_argument("--compare", action="store_true", help="TRL on the same work right after")
    parser.add_argument("--profile", type=Path, help="a folder for tables of kernels")
    parser.add_argument("--set", nargs="*", default=[], help="section.key=value for all rows")
    parser.add_argument("--shape", help="in place of each row's")
    parser.add_argument("--home", type=Path, default=Path("/tmp/ditty-bench"))  # noqa: S108
    args = parser.parse_args()
    args.home.mkdir(parents=True, exist_ok=True)
    for name in (n for n in ROWS if re.fullmatch(args.only, n)):
        shape, rows, overrides = ROWS[name]
        spec = bench_spec([f"train.micro_batch_size={rows}", *overrides, *args.set])
        options = {"shape": args.shape or shape, "longest": 1024 if "varied" in name else None}
        if args.profile:
            options["profile"] = str(args.profile / f"{name}.txt")
        for by in ["ditty", "trl"] if args.compare else ["ditty"]:
            lines = []
            try:
                found = run_bench(spec, options | {"by": by}, args.home, lines.append)
            except Exception as error:
                print(name, by, "FAILED", error, *lines[-12:], sep="\n", flush=True)
                continue
            notes = [x for x in lines if "compiled" in x or "held in memory" in x]
            shown = {k: v if k == "loss" else _short(v) for k, v in found.items()}
            print(name, by, json.dumps(shown), "; ".join(notes)[:300], flush=True)


def _short(value):
    return round(value, 3) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
