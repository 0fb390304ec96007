"""How long quantization and the way to the first step take, beside reading and writing alone.

    python -m tests.bench_quantize --size 8b --home DIR [--device cuda]

Draws a random Llama of the shape of Llama-3.1-8B (16 GB in bf16), and prints, each in a process,
the weights out of the page cache:

- io: reading its files and writing as many bytes as the result has, durably;
- quantize: `ditty.quantization.quantize.quantize` to NF4;
- first step: from the start of the process to the end of one optimizer step of 2,048 tokens; by
  ditty from the quantized folder (whole, and by FSDP2), and by transformers, quantizing at load.

`--size 70b` draws each tensor when it is quantized; nothing of the source is on disk.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from ditty.planning.shapes import SHAPES

SOURCE_SHARD_BYTES = 4 << 30
TOKENS = 2048


def write_model(folder, size, device, *, empty):
    """The files of a checkpoint; `empty`: headers and holes, which take no disk."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from ditty.speed.bench import draw_model
    from tests.tiny import make_tokenizer

    if not empty:
        draw_model(SHAPES[size], folder, torch.device(device))
        return
    folder.mkdir(parents=True)
    config = LlamaConfig(**SHAPES[size].config())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    groups, room = [], 0
    for name, parameter in model.named_parameters():
        need = parameter.numel() * 2
        if not groups or need > room:
            groups.append([])
            room = SOURCE_SHARD_BYTES
        groups[-1].append((name, parameter.shape))
        room -= need
    index = {}
    for number, group in enumerate(groups, 1):
        file = folder / f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        index.update({name: file.name for name, _ in group})
        _write_hole(file, group)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def _write_hole(file, group):
    header, end = {}, 0
    for name, shape in group:
        size = shape.numel() * 2
        offsets = [end, end + size]
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": offsets}
        end += size
    text = json.dumps(header).encode()
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


def forget(folder):
    """Take a folder's weights out of the page cache."""
    os.sync()
    for file in folder.glob("*.safetensors"):
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def peak_gb():
    """Peak resident memory of this process; getrusage's would be the parent's where that's more."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(peak) * 1024 / 1e9


def job_io(args):
    """Read every byte of the source, and write as many as the result has."""
    started = time.perf_counter()
    buffer = bytearray(64 << 20)
    for file in sorted(args.source.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    read = time.perf_counter() - started
    size = sum(f.stat().st_size for f in args.out.glob("*.safetensors"))
    block, left = os.urandom(64 << 20), size
    copy = args.out.with_name("written")
    with open(copy, "wb", buffering=0) as stream:
        while left > 0:
            left -= stream.write(block[:left])
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - started
    copy.unlink()
    return {"read_s": read, "write_s": seconds - read, "seconds": seconds, "written": size}


def job_quantize(args):
    import ditty.quantization.quantize as module
    from ditty.config.choices import Quantization

    imports = peak_gb()
    if args.drawn:
        _draw_instead(module, args.device)
    else:
        import torch

        torch.zeros(1, device=args.device)
    args.out.mkdir()
    started = time.perf_counter()
    to = Quantization(args.to)
    facts = module.quantize(args.source, args.out, to, "bfloat16", device=args.device)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_over_imports_gb": peak_gb() - imports, **facts}


def _draw_instead(module, device):
    import zlib
    from contextlib import contextmanager

    from ditty.speed.bench import draw

    opened = module.safe_open

    @contextmanager
    def drawing(file, framework):
        with opened(file, framework=framework) as stream:

            class Drawn:
                def get_tensor(self, name):
                    shape = stream.get_slice(name).get_shape()
                    return draw(shape, zlib.crc32(name.encode()), device)

            yield Drawn()

    module.safe_open = drawing


def job_step(args):
    """From the start of the process to the end of one step."""
    if args.sharding != "peer":
        from ditty.store.readahead import read_folder_ahead

        read_folder_ahead(args.out)
    import torch

    from ditty.config.choices import Precision
    from ditty.config.spec import ModelSpec, TrainSpec
    from ditty.distributed.load import load_module
    from ditty.distributed.parallel import make_parallel
    from ditty.distributed.world import join_world
    from ditty.models.batches import flat_batch, to_device
    from ditty.training.evaluate import autocast
    from ditty.training.loss import token_loss_sum

    imports, imported = peak_gb(), since_start()
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"})
    world = join_world(args.device, 1, 600)
    spec = ModelSpec(base_model=str(args.out), quantization=args.to)
    peer = args.sharding == "peer"
    train = TrainSpec(
        precision="bf16",
        sharding="none" if peer else args.sharding,
        max_steps=1,
    )
    module = _transformers_module(args) if peer else load_module(args.out, spec, train, world)
    loaded = since_start()
    ids = torch.randint(3, 300, (TOKENS,), generator=torch.Generator().manual_seed(0))
    batch = to_device(flat_batch(ids, ids, torch.tensor([TOKENS])), world.device)
    parallel = make_parallel(module, train, world)
    with autocast(world.device, Precision.BF16):
        loss = token_loss_sum(parallel.forward, parallel.model, batch)
    parallel.backward(loss / TOKENS, 0)
    parallel.gradients()
    parallel.step(1e-4)
    value = float(loss) / TOKENS
    return {
        "imports_s": imported, "loaded_s": loaded, "first_step_s": since_start(), "loss": value,
        "peak_over_imports_gb": peak_gb() - imports,
        "gpu_gb": torch.cuda.max_memory_allocated() / 1e9 if args.device == "cuda" else None,
    }  # fmt: skip


def _transformers_module(args):
    """As TRL and most scripts do: quantized at load."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    from ditty.config.spec import ModelSpec
    from ditty.models.model import attention_name

    model = AutoModelForCausalLM.from_pretrained(
        args.source, dtype=torch.bfloat16, quantization_config=settings,
        attn_implementation=attention_name(ModelSpec(base_model="x")),
        device_map={"": 0} if args.device == "cuda" else None,
    )  # fmt: skip
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora).train()


def since_start():
    """Seconds since this process began."""
    import psutil

    return time.time() - psutil.Process().create_time()


def one(args, job, **options):
    """One measurement in a process of its own."""
    for folder in (args.source, args.out):
        forget(folder)
    given = [f"--{k}={v}" for k, v in options.items()]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench_quantize", f"--size={args.size}", f"--to={args.to}",
         f"--home={args.home}", f"--device={args.device}", f"--job={job}", *given],
        capture_output=True, text=True,
    )  # fmt: skip
    name = " ".join([job, *options.values()])
    if done.returncode:
        print(name, "FAILED", done.stderr[-3000:], flush=True)
        return {}
    found = json.loads(done.stdout.splitlines()[-1])
    found |= {"process_s": time.perf_counter() - started}
    shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}
    print(f"{args.size} {name}:", json.dumps(shown), flush=True)
    return found


def run(args):
    drawn = args.size == "70b"
    started = time.perf_counter()
    if not args.source.exists():
        write_model(args.source, args.size, args.device, empty=drawn)
    print(f"the model was written in {time.perf_counter() - started:.0f} s", flush=True)
    made = one(args, "quantize", **({"drawn": "yes"} if drawn else {}))
    if not drawn:
        io = one(args, "io")
        if made and io:
            print(f"{args.size} quantize / io: {made['seconds'] / io['seconds']:.2f}", flush=True)
    ours = one(args, "step", sharding="none")
    one(args, "step", sharding="fsdp2")
    if not drawn:
        peer = one(args, "step", sharding="peer")
        if ours and peer:
            print(
                f"{args.size} first step, ours / transformers':"
                f" {ours['first_step_s'] / peer['first_step_s']:.2f}",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SHAPES, default="tiny")
    parser.add_argument("--to", choices=["nf4", "fp8"], default="nf4")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--job", choices=["io", "quantize", "step"])
    parser.add_argument("--sharding", default="none")
    parser.add_argument("--drawn", default="")
    args = parser.parse_args()
    args.source, args.out = args.home / f"{args.size}-bf16", args.home / f"{args.size}-{args.to}"
    if args.job is None:
        run(args)
        return
    jobs = {"io": job_io, "quantize": job_quantize, "step": job_step}
    print(json.dumps(jobs[args.job](args)))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
