"""`python -m ditty.bench JOB.json`: how fast a spec trains, on random weights of a named shape.

The training is the one that `ditty run` starts, in one process, on rows of random tokens; nothing
is saved. Weights are drawn once and kept in DITTY_HOME/bench.
"""

import json
import logging
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ditty.batches import Batch
from ditty.choices import Adapter, Quantization
from ditty.compiled import programs
from ditty.errors import SpecError
from ditty.feed import PackedFeed, packed_feed
from ditty.load import load_module
from ditty.model import DTYPES
from ditty.quantize import quantize
from ditty.rundir import RunDir
from ditty.shards import Piece, write_shards
from ditty.spec import RunSpec
from ditty.trainer import Place, Trainer
from ditty.world import World, join_world

log = logging.getLogger(__name__)

PROFILED = 2  # steps
WARM_STEPS = 4  # left out: compilation, and the allocator's first calls


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes, as its config.json has them."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool

    def config(self) -> LlamaConfig:
        """transformers' configuration."""
        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
            max_position_embeddings=8192,
            rope_theta=500000.0,
            dtype="bfloat16",
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )

    def weights_a_token(self) -> int:
        """Weights that each token is multiplied with."""
        keys = 2 * self.hidden * self.hidden * self.kv_heads // self.heads
        block = 2 * self.hidden**2 + keys + 3 * self.hidden * self.intermediate
        return self.layers * block + self.vocabulary * self.hidden


SHAPES = {
    "135m": Shape(576, 30, 1536, 9, 3, 49152, tied=True),  # SmolLM2-135M
    "1b": Shape(2048, 16, 8192, 32, 8, 128256, tied=True),  # Llama-3.2-1B
    "8b": Shape(4096, 32, 14336, 32, 8, 128256, tied=False),  # Llama-3.1-8B
    "70b": Shape(8192, 80, 28672, 64, 8, 128256, tied=False),  # Llama-3.1-70B
}


def draw_model(shape: Shape, folder: Path, device: torch.device) -> None:
    """Write a folder of random bf16 weights: normal of 0.02, norms 1; the same each time."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config())

    def piece(name: str, size: torch.Size, number: int) -> Piece:
        def make() -> dict[str, torch.Tensor]:
            if len(size) == 1:
                return {name: torch.ones(size, dtype=torch.bfloat16)}
            generator = torch.Generator(device).manual_seed(number)
            drawn = torch.randn(size, generator=generator, dtype=torch.bfloat16, device=device)
            return {name: (drawn * 0.02).cpu()}

        return Piece(name, 2 * size.numel(), 2 * size.numel(), make)

    folder.mkdir(parents=True, exist_ok=True)
    named = [(name, p.shape) for name, p in model.named_parameters()]
    write_shards([piece(name, size, i) for i, (name, size) in enumerate(named)], folder)
    shape.config().save_pretrained(folder)


def model_folder(name: str, spec: RunSpec, home: Path, device: torch.device) -> Path:
    """The weights that `spec` wants, of the shape `name`, made if they are not there."""
    plain = home / "bench" / name
    if not (plain / "config.json").exists():
        log.info("drawing %s", plain)
        draw_model(SHAPES[name], plain, device)
        _make_tokenizer(plain)
    to = spec.model.quantization
    if to is Quantization.NONE:
        return plain
    folder = home / "bench" / f"{name}-{to}"
    if not (folder / "config.json").exists():
        folder.mkdir(exist_ok=True)
        dtype = str(DTYPES[spec.train.precision]).removeprefix("torch.")
        quantize(plain, folder, to, dtype, device=device.type)
    return folder


def _make_tokenizer(folder: Path) -> None:
    """What every model's folder has; it is not used."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def random_feed(spec: RunSpec, vocabulary: int, world: World, longest: int | None) -> PackedFeed:
    """Rows of `data.seq_len` random tokens, all of them supervised.

    Args:
        longest: cut into documents of 64 to so many tokens; None: one document a row.
    """
    from datasets import Dataset

    steps, train = spec.train.max_steps or 1, spec.train
    count = steps * train.micro_batch_size * train.gradient_accumulation_steps * world.world_size
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(count):
        ids = torch.randint(2, vocabulary, (spec.data.seq_len,), generator=generator).tolist()
        lengths = [spec.data.seq_len]
        while longest is not None and lengths[-1] > longest:
            cut = int(torch.randint(64, longest, (1,), generator=generator))
            lengths[-1:] = [cut, lengths[-1] - cut]
        rows.append({"input_ids": ids, "labels": ids, "lengths": lengths})
    return packed_feed(Dataset.from_list(rows), train, world)


class _Measured(Trainer):
    """Leaves no checkpoint; where `profile` is set, the kernels of PROFILED steps go there."""

    profile: Path | None = None
    _profiler: Any = None

    def save(self, step: int) -> None:
        """Nothing."""

    def _step(self, step: int, micro_batches: list[Batch], tokens: int) -> None:
        if self.profile is not None and step == WARM_STEPS:
            self._profiler = torch.profiler.profile()
            self._profiler.start()
        super()._step(step, micro_batches, tokens)
        if self.profile is not None and step == WARM_STEPS + PROFILED - 1:
            self._profiler.stop()
            text = kernel_table(self._profiler, PROFILED) + gap_table(self._profiler, PROFILED)
            self.profile.write_text(text)


def gap_table(profiler: Any, steps: int, rows: int = 12) -> str:
    """Where the GPU waited for the CPU: milliseconds a step, between which kernels."""
    cuda = torch.autograd.DeviceType.CUDA
    found = [e for e in profiler.events() if e.device_type == cuda]
    found.sort(key=lambda e: e.time_range.start)
    gaps: list[tuple[float, str, str]] = []
    end, before = (found[0].time_range.start, "") if found else (0.0, "")
    for event in found:
        if event.time_range.start > end:
            gaps.append((event.time_range.start - end, before, event.name))
        if event.time_range.end > end:
            end, before = event.time_range.end, event.name
    gaps.sort(reverse=True)
    total = sum(gap for gap, *_ in gaps)
    lines = [f"{total / steps / 1e3:9.2f} ms a step between kernels"]
    lines += [f"{gap / 1e3:9.2f} ms  {a[:50]} -> {b[:50]}" for gap, a, b in gaps[:rows]]
    return "\n".join(lines) + "\n"


def kernel_table(profiler: Any, steps: int, rows: int = 40) -> str:
    """Kernels by their share of a step: milliseconds and calls a step, and name."""
    found = [e for e in profiler.key_averages() if e.self_device_time_total > 0 and not e.cpu_time]
    found.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in found)
    lines = [f"{total / steps / 1e3:9.2f} ms a step in kernels"]
    for event in found[:rows]:
        milliseconds = event.self_device_time_total / steps / 1e3
        lines.append(f"{milliseconds:9.2f} ms {event.count / steps:7.0f} x  {event.key[:120]}")
    return "\n".join(lines) + "\n"


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Train as `job` says, and what came of it.

    Args:
        job: shape (a name of SHAPES), spec, home, device, longest (see `random_feed`), profile
            (a file that gets a table of kernels).
    Returns:
        tokens_per_second of all steps but the first WARM_STEPS, share_of_ceiling, ceiling_tflops
        (a bf16 product measured here), peak_bytes, first_step_seconds (from the start of the
        training), programs compiled, the last loss.
    Raises:
        SpecError: too few steps.
    """
    started = time.time()
    spec = RunSpec.model_validate(job["spec"])
    if (spec.train.max_steps or 0) <= WARM_STEPS + 1:
        raise SpecError(f"train.max_steps must be more than {WARM_STEPS + 1} for a measurement")
    world = join_world(job["device"], spec.launch.world_size)
    home, shape = Path(job["home"]), SHAPES[job["shape"]]
    folder = model_folder(job["shape"], spec, home, world.device)
    made = time.time()
    module = load_module(folder, spec.model, spec.train, world)
    feed = random_feed(spec, shape.vocabulary, world, job.get("longest"))
    with tempfile.TemporaryDirectory(dir=home) as temporary:
        run = RunDir(Path(temporary))
        trainer = _Measured(module, feed, spec.train, Place(run, world))
        if job.get("profile"):
            trainer.profile = Path(job["profile"])
        loaded = time.time()
        trainer.fit()
        steps = [r for r in run.metrics() if r["kind"] == "train"]
    seconds = (steps[-1]["time"] - steps[WARM_STEPS - 1]["time"]) / (len(steps) - WARM_STEPS)
    rate = steps[-1]["tokens"] / seconds
    times = 6 if spec.model.adapter is Adapter.NONE else 4
    attention = 6 * shape.layers * shape.hidden * spec.data.seq_len
    found = {
        "tokens_per_second": rate,
        "peak_bytes": steps[-1]["memory_bytes"],
        "load_seconds": loaded - made,
        "first_step_seconds": steps[0]["time"] - loaded,
        "weights_seconds": made - started,
        "programs": programs(),
        "loss": steps[-1]["loss"],
    }
    if world.device.type == "cuda":
        ceiling = matmul_ceiling(world.device)
        flops = rate * (times * shape.weights_a_token() + attention) / world.world_size
        found |= {"ceiling_tflops": ceiling / 1e12, "share_of_ceiling": flops / ceiling}
    return found


def matmul_ceiling(device: torch.device) -> float:
    """FLOP/s of a large bf16 product on this card."""
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(10):
        a @ a
    torch.cuda.synchronize(device)
    return 10 * 2 * 8192**3 / (time.perf_counter() - started)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    print(json.dumps(measure(json.loads(Path(sys.argv[1]).read_text()))))  # noqa: T201
