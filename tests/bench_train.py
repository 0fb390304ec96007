"""The rows of the speed table on one GPU, each in a process: ditty's, and TRL's beside it.

python -m tests.bench_train [--only REGEX] [--steps 14] [--home DIR]
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROWS = {
    # name: (shape, rows a step, keys of the spec)
    "1b-lora": ("1b", 8, {}),
    "1b-lora-varied": ("1b", 8, {}),
    "1b-lora-fp8": ("1b", 8, {"model.quantization": "fp8"}),
    "1b-qlora": ("1b", 8, {"model.quantization": "nf4"}),
    "1b-full": ("1b", 8, {"model.adapter": "none"}),
    "8b-lora": ("8b", 4, {}),
    "8b-lora-ckpt": ("8b", 4, {"train.gradient_checkpointing": True}),
    "8b-lora-fp8": ("8b", 4, {"model.quantization": "fp8"}),
    "8b-lora-fp8-ckpt": (
        "8b",
        4,
        {"model.quantization": "fp8", "train.gradient_checkpointing": True},
    ),
    "8b-qlora": ("8b", 4, {"model.quantization": "nf4"}),
    "8b-qlora-ckpt": (
        "8b",
        4,
        {"model.quantization": "nf4", "train.gradient_checkpointing": True},
    ),
}


def job(args, name):
    shape, rows, keys = ROWS[name.removesuffix("-eager")]
    spec = {
        "name": "bench",
        "data": {"source": "random.jsonl", "seq_len": args.seq_len},
        "model": {"base_model": "random"},
        "train": {
            "max_steps": args.steps,
            "micro_batch_size": rows,
            "gradient_accumulation_steps": 1,
            "compile": False if name.endswith("-eager") else None,
        },
    }
    for key, value in keys.items():
        section, _, key = key.partition(".")
        spec[section][key] = value
    for assignment in args.set:
        key, _, value = assignment.removeprefix("train.").partition("=")
        spec["train"][key] = json.loads(value)
    found = {"shape": args.shape or shape, "spec": spec, "home": args.home, "device": args.device}
    if args.profile:
        found["profile"] = f"{args.profile}/{name}.txt"
    return found | ({"longest": 1024} if "varied" in name else {})


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=".")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--shape")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--profile", help="a folder for tables of kernels")
    parser.add_argument("--set", nargs="*", default=[], help="train.key=json")
    parser.add_argument("--home", default="/tmp/ditty-bench")  # noqa: S108
    args = parser.parse_args()
    Path(args.home).mkdir(parents=True, exist_ok=True)
    names = [name for base in ROWS for name in (base, f"{base}-eager")]
    for name in (n for n in names if re.fullmatch(args.only, n)):
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(job(args, name), file)
            file.flush()
            done = subprocess.run(
                [sys.executable, "-m", "ditty.bench", file.name], capture_output=True, text=True
            )
        if done.returncode:
            print(name, "FAILED", done.stderr[-2500:], flush=True)
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        notes = [
            line for line in done.stderr.splitlines() if "compiled" in line or "logits" in line
        ]
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}
        print(name, json.dumps(shown), "; ".join(notes)[:300], flush=True)


if __name__ == "__main__":
    main()
