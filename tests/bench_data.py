"""How fast rows become packed tokens, beside the tokenizer alone, `datasets.map` and TRL.

    python -m tests.bench_data [--megabytes 200] [--home DIR]

The rows are Python sources of this machine's libraries, as JSON lines; the tokenizer is SmolLM2's.
Each measurement runs in a process of its own, all in one call, since machines differ:

- raw: `encode_batch_fast` of the texts, nothing kept, on all cores;
- ours: load, filter, map, tokenize and pack, each stage committed (written, hashed, synced);
- again: the same once more, all cached;
- tenth: the same with a tenth of the rows, for its memory;
- map: `datasets`: load, tokenize by `map` with a process a core; nothing packed;
- trl: SFTTrainer's own preparation, packing on, with a process a core;
- rawchat, chat: `raw` and `ours` for conversations of two turns, as SmolLM2's template renders
  them; the loss is on the assistant's turns.

Beside seconds there are those of the processor, of all processes: where others have the machine as
well, these say more.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

ROW_BYTES = (200, 100_000)  # of a source file that is taken
CORES = len(os.sched_getaffinity(0))


def clean(row):
    """The filter of the measurement."""
    return len(row["text"]) > 300


def stripped(row):
    """The map of the measurement."""
    return {"text": row["text"].strip()}


def write_rows(path, megabytes):
    """Python sources of the installed libraries; the same ones each time."""
    import torch

    folder, size = Path(torch.__file__).parent.parent, 0
    with path.open("w") as out:
        for file in sorted(folder.rglob("*.py")):
            data = file.read_bytes()
            if not ROW_BYTES[0] <= len(data) <= ROW_BYTES[1]:
                continue
            try:
                out.write(json.dumps({"text": data.decode()}) + "\n")
            except UnicodeDecodeError:
                continue
            size += len(data)
            if size >= megabytes * 1_000_000:
                return
    print(f"only {size / 1e6:.0f} MB of sources are here")


def write_chats(rows, path):
    """Each file in pieces of 4,000 characters, each of which two people write by turns."""
    with path.open("w") as out:
        for text in (json.loads(line)["text"] for line in rows.open()):
            for start in range(0, len(text) - 400, 4000):
                piece = text[start : start + 4000]
                ends = [len(piece) * n // 8 for n in (0, 1, 4, 5, 8)]
                said = [piece[a:b] for a, b in zip(ends, ends[1:], strict=False)]
                turns = zip(("user", "assistant") * 2, said, strict=True)
                chat = {"messages": [{"role": r, "content": c} for r, c in turns]}
                out.write(json.dumps(chat) + "\n")


class Watch:
    """Since it was made: seconds by the clock and of the processor, and memory of this process.

    Memory is what is not in a file: pages of mapped files go when others need the place.
    """

    def __init__(self):
        self.peak, self.done = 0, threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()
        self.clock, self.processor = time.perf_counter(), processor()

    def _look(self):
        while not self.done.wait(0.02):
            (line,) = re.findall(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())
            self.peak = max(self.peak, int(line) // 1024)

    def read(self):
        seconds, cpu = time.perf_counter() - self.clock, processor() - self.processor
        self.done.set()
        return {"seconds": round(seconds, 2), "cpu": round(cpu, 2), "peak_mb": self.peak}


def processor():
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def encode_all(tokenizer, texts):
    watch, tokens = Watch(), 0
    for first in range(0, len(texts), 1000):
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts[first : first + 1000])
        tokens += sum(len(e.ids) for e in encoded)
    return watch.read() | {"tokens": tokens}


def job_raw(args):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    return encode_all(tokenizer, [json.loads(line)["text"] for line in args.rows.open()])


def job_rawchat(args):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    chats = [json.loads(line)["messages"] for line in args.home.joinpath("chats.jsonl").open()]
    return encode_all(tokenizer, [tokenizer.apply_chat_template(c, tokenize=False) for c in chats])


def job_ours(args):
    here = Path(__file__)
    operations = [{"method": m, "function": f"{here}:{f}"} for m, f in
                  (("filter", "clean"), ("map", "stripped"))]  # fmt: skip
    data = {"source": str(args.rows), "format": "text", "operations": operations}
    return build(args, data)


def job_tenth(args):
    few, size = args.home / "tenth.jsonl", args.rows.stat().st_size // 10
    with args.rows.open() as lines, few.open("w") as out:
        for line in lines:
            out.write(line)
            if out.tell() >= size:
                break
    return job_ours(argparse.Namespace(**vars(args) | {"rows": few}))


def job_chat(args):
    return build(args, {"source": str(args.home / "chats.jsonl"), "format": "messages"})


def build(args, data):
    import transformers  # noqa: F401  (its import is not what is measured)

    from ditty.config.spec import RunSpec
    from ditty.stages import datastages, stageline
    from ditty.store.artifacts import Store

    spec = RunSpec.model_validate(
        {
            "name": "bench",
            "data": data | {"seq_len": 2048, "num_proc": CORES},
            "model": {"base_model": str(args.model)},
            "launch": {"device": "cpu"},
        }
    )  # fmt: skip
    store = Store(args.home / "store")
    watch = Watch()
    line = stageline.resolve(spec, store)
    found = {}
    for ref in line.data():
        begun = time.perf_counter()
        facts = datastages.build_data(ref, line, spec, store).facts
        found[ref.stage] = round(time.perf_counter() - begun, 2)
    counts = {"rows": facts["documents"], "fill_rate": facts["fill_rate"]}
    return watch.read() | {"stages": found} | counts


job_again = job_ours


def job_map(args):
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    cache = str(args.home / "datasets")
    watch = Watch()
    rows = load_dataset("json", data_files=str(args.rows), split="train", cache_dir=cache)
    rows.map(
        lambda batch: tokenizer(batch["text"]), batched=True, num_proc=CORES,
        remove_columns=["text"],
    )  # fmt: skip
    return watch.read()


def job_trl(args):
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    cache = str(args.home / "trl")
    watch = Watch()
    rows = load_dataset("json", data_files=str(args.rows), split="train", cache_dir=cache)
    options = SFTConfig(
        output_dir=str(args.home / "out"), packing=True, max_length=2048, use_cpu=True,
        dataset_num_proc=CORES, report_to=[], bf16=False,
    )  # fmt: skip
    SFTTrainer(
        LlamaForCausalLM(config), args=options, train_dataset=rows, processing_class=tokenizer
    )
    return watch.read()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--home", type=Path, default=Path("/tmp/ditty-bench-data"))  # noqa: S108
    parser.add_argument("--jobs", default="raw,ours,again,tenth,map,trl,rawchat,chat")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.rows, args.model = args.home / "rows.jsonl", args.home / "model"
    if args.job:
        found = globals()[f"job_{args.job}"](args)
        print(json.dumps(found))
        return
    prepare(args)
    results = {}
    for job in args.jobs.split(","):
        command = [sys.executable, "-m", "tests.bench_data", "--job", job, "--home", args.home]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
        environment |= {"HF_HOME": str(args.home / "hf")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            print(job, "FAILED", done.stderr[-2000:], flush=True)
            continue
        results[job] = found = json.loads(done.stdout.splitlines()[-1])
        raw = results["rawchat" if job.endswith("chat") else "raw"]
        rate = raw["tokens"] / found["seconds"] / 1e6
        shares = [f"{raw[of] / max(found[of], 0.01):.2f}" for of in ("seconds", "cpu")]
        told = f"{rate:6.2f} Mtok/s, of raw {shares[0]} (cpu {shares[1]})"
        print(f"{job:7} {told}: {json.dumps(found)}", flush=True)


def prepare(args):
    """The rows and the tokenizer's folder; a store of an earlier call goes."""
    import shutil

    from ditty.conversion.convert import convert_gguf
    from ditty.pretrained.demo_model import smollm2

    args.home.mkdir(parents=True, exist_ok=True)
    for name in ("store", "datasets", "trl", "out"):
        shutil.rmtree(args.home / name, ignore_errors=True)
    if not args.rows.exists():
        write_rows(args.rows, args.megabytes)
    if not (args.home / "chats.jsonl").exists():
        write_chats(args.rows, args.home / "chats.jsonl")
    if not args.model.exists():
        convert_gguf(Path(smollm2(args.home)), args.model)


if __name__ == "__main__":
    main()
