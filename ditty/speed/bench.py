"""How fast a spec trains, on random weights of a named shape and rows of random tokens.

The training is that of `ditty run`, in as many processes; of it nothing is kept. Weights are drawn
once and kept in DITTY_HOME/bench.
"""

import logging
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ditty.config.choices import Adapter, Precision, Quantization
from ditty.config.spec import RunSpec
from ditty.distributed.load import load_module
from ditty.distributed.world import World, peak_memory
from ditty.models.model import DTYPES
from ditty.models.shards import Piece, write_shards
from ditty.planning.shapes import SHAPES, Shape
from ditty.quantization.quantize import quantize
from ditty.runs.rundir import RunDir
from ditty.speed.profiling import Profile
from ditty.training.compiled import programs
from ditty.training.feed import PackedFeed, packed_feed
from ditty.training.readout import Work
from ditty.training.trainer import Place, Trainer

log = logging.getLogger(__name__)

WARM_STEPS = 4  # left out: compilation, and the allocator's first calls
PROFILED_STEPS = 2
HOST = torch.device("cpu")
SHORTEST = 64  # tokens of a document, where rows hold several


def draw(size: torch.Size, seed: int, device: torch.device) -> torch.Tensor:
    """A bf16 weight on `device`: normal of 0.02, a norm's 1; the same each time."""
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    drawn = torch.randn(size, generator=generator, dtype=torch.bfloat16, device=device)
    return drawn * 0.02


def draw_model(shape: Shape, folder: Path, device: torch.device) -> None:
    """Write a folder of random bf16 weights; see `draw`."""
    config = LlamaConfig(**shape.config())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)

    def piece(name: str, size: torch.Size, number: int) -> Piece:
        def make() -> dict[str, torch.Tensor]:
            return {name: draw(size, number, device).cpu()}

        return Piece(name, 2 * size.numel(), 2 * size.numel(), make)

    folder.mkdir(parents=True, exist_ok=True)
    named = [(name, p.shape) for name, p in model.named_parameters()]
    write_shards([piece(name, size, i) for i, (name, size) in enumerate(named)], folder)
    _make_tokenizer(folder)
    config.save_pretrained(folder)  # last: who finds it finds all


def model_folder(
    name: str, to: Quantization, precision: Precision, home: Path, world: World
) -> Path:
    """The weights of the shape `name`, stored as `to`; rank 0 makes what is not there."""
    plain = home / "bench" / name
    folder = plain if to is Quantization.NONE else home / "bench" / f"{name}-{to}"
    if world.main and not (folder / "config.json").exists():
        if not (plain / "config.json").exists():
            log.info("drawing %s", plain)
            draw_model(SHAPES[name], plain, world.device)
        if folder != plain:
            log.info("quantizing %s", folder)
            folder.mkdir(exist_ok=True)
            dtype = str(DTYPES[precision]).removeprefix("torch.")
            quantize(plain, folder, to, dtype, device=world.device.type)
    world.gather(None)
    return folder


def _make_tokenizer(folder: Path) -> None:
    """What every model's folder has; it is not used."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def random_rows(
    spec: RunSpec, vocabulary: int, longest: int | None, world_size: int
) -> list[dict[str, Any]]:
    """Rows of `data.seq_len` random tokens, all supervised, for all steps and processes.

    Args:
        longest: cut into documents of SHORTEST to so many tokens; None: one document a row.
    """
    train, tokens = spec.train, spec.data.seq_len
    a_step = train.micro_batch * train.gradient_accumulation_steps * world_size
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(a_step * (train.max_steps or 1)):
        ids = torch.randint(2, vocabulary, (tokens,), generator=generator).tolist()
        lengths = [tokens]
        while longest is not None and lengths[-1] > longest:
            cut = int(torch.randint(SHORTEST, longest, (1,), generator=generator))
            lengths[-1:] = [cut, lengths[-1] - cut]
        rows.append({"input_ids": ids, "labels": ids, "lengths": lengths})
    return rows


class _Measured(Trainer):
    """Leaves no checkpoint, but for the one after `saved` steps; where `profile` is set, the
    kernels of some steps go there."""

    profile: Profile | None = None
    saved: int | None = None

    def save(self, step: int) -> None:
        """Nothing."""

    def _step(self, work: Work, micro_batches: list[Any]) -> None:
        if self.profile is not None and work.step == WARM_STEPS + 1:
            self.settle()
            self.profile.start()
        super()._step(work, micro_batches)
        if work.step == self.saved:
            super().save(work.step)
        if self.profile is not None and work.step == WARM_STEPS + PROFILED_STEPS:
            self.settle()
            self.profile.stop(PROFILED_STEPS)


def measure(spec: RunSpec, options: dict[str, Any], home: Path, world: World) -> dict[str, Any]:
    """Train on random weights, and say how fast that was.

    Args:
        options: shape (a name of SHAPES), longest (see `random_rows`), profile (a file that gets a
            table of kernels, or None), checkpoint (bool: save one halfway).
    Returns:
        tokens_per_second over all processes, of all steps but the first WARM_STEPS;
        peak_bytes of this process (on a GPU, the GPU's); host_peak_bytes, the most that any process
        held above what it did before the model was loaded; load_seconds; first_step_seconds, from
        the loaded model; programs compiled; the last loss; what memory was planned (planned_bytes,
        recomputed_blocks), where it was; with a checkpoint, what it took of the training's time
        (see `_saving`); on GPUs also ceiling_tflops (a bf16 product measured
        here) and share_of_ceiling.
    """
    shape = SHAPES[options["shape"]]
    stored, precision = spec.model.quantization, spec.train.precision
    folder = model_folder(options["shape"], stored, precision, home, world)
    imports, started = peak_memory(HOST), time.time()
    module = load_module(folder, spec.model, spec.train, world)
    feed = _feed(spec, shape, options.get("longest"), world)
    with tempfile.TemporaryDirectory(dir=home) as temporary:
        run = RunDir(Path(temporary))
        trainer = _Measured(module, feed, spec.train, Place(run, world))
        if options.get("profile") and world.main:
            trainer.profile = Profile(Path(options["profile"]))
        if options.get("checkpoint"):
            trainer.saved = (WARM_STEPS + trainer.total_steps) // 2
        loaded = time.time()
        trainer.fit()
        records = list(run.metrics())
    steps = [r for r in records if r["kind"] == "train"]
    above = max(world.gather(peak_memory(HOST) - imports))
    if not world.main:
        return {}
    seconds = (steps[-1]["time"] - steps[WARM_STEPS - 1]["time"]) / (len(steps) - WARM_STEPS)
    found = {
        "tokens_per_second": steps[-1]["tokens"] / seconds,
        "peak_bytes": steps[-1]["memory_bytes"],
        "host_peak_bytes": above,
        "load_seconds": loaded - started,
        "first_step_seconds": steps[0]["time"] - loaded,
        "programs": programs(),
        "loss": steps[-1]["loss"],
        "planned_bytes": trainer.memory.peak if trainer.memory else None,
        "recomputed_blocks": trainer.memory.recomputed if trainer.memory else None,
    }
    found |= _saving(steps, [r for r in records if r["kind"] == "save"])
    return found | _share(spec, shape, found["tokens_per_second"], world)


def _saving(steps: list[dict[str, Any]], saves: list[dict[str, Any]]) -> dict[str, Any]:
    """What a checkpoint took of the training's time: `stalled_seconds`, while no step ran, and
    `save_seconds`, by which the step after it and those beside its writing took longer as well."""
    if not saves:
        return {}
    (save,) = saves
    usual = median(r["seconds"] for r in steps[WARM_STEPS : save["step"]])
    longer = sum(r["seconds"] - usual for r in steps[save["step"] :])
    return {"stalled_seconds": save["stalled_seconds"], "save_seconds": longer}


def _feed(spec: RunSpec, shape: Shape, longest: int | None, world: World) -> PackedFeed:
    from datasets import Dataset

    rows = random_rows(spec, shape.vocabulary, longest, world.world_size)
    return packed_feed(Dataset.from_list(rows), spec.train, world)


def _share(spec: RunSpec, shape: Shape, rate: float, world: World) -> dict[str, Any]:
    """What part of the cards' arithmetic the training is: 4 or 6 operations a weight and token."""
    if world.device.type != "cuda":
        return {}
    times = 6 if spec.model.adapter is Adapter.NONE else 4
    flops = times * shape.weights_a_token() + shape.attention_flops_a_token(spec.data.seq_len)
    ceiling = matmul_ceiling(world.device)
    share = rate * flops / world.world_size / ceiling
    return {
        "device": torch.cuda.get_device_name(world.device),
        "ceiling_tflops": ceiling / 1e12,
        "share_of_ceiling": share,
    }


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
