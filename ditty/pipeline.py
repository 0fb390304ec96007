"""`Pipeline`: fine-tune from Python. Subclass it, override `dataset()`, call `run()`."""

import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from ditty.config.choices import FinalWeights
from ditty.config.launchspec import LaunchSpec
from ditty.config.spec import ModelSpec, RunSpec, TrainSpec
from ditty.config.specfile import parse_spec
from ditty.conversion.modelstages import base_folder, quantized_folder
from ditty.distributed.load import load_module
from ditty.distributed.parallel import whole_weights
from ditty.distributed.world import World, join_world, leave_world
from ditty.errors import ModelError, RunBusy, SpecError
from ditty.models.batches import Batch
from ditty.models.model import save_trained
from ditty.planning import preflight
from ditty.pretrained import basemodel
from ditty.processes.environment import resolve_device
from ditty.runs.progress import Outcome
from ditty.runs.rundir import RunDir
from ditty.stages import stageline
from ditty.store.artifacts import Store, commit_dir
from ditty.store.files import sha256_bytes
from ditty.training.feed import LoaderFeed
from ditty.training.hooks import OURS, Hooks
from ditty.training.trackers import reporting
from ditty.training.trainer import Place, Trainer

# The seed's names for keys of the spec.
ALIASES = {
    "model_name_or_path": "base_model",
    "batch_size": "micro_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "checkpoint_every": "save_steps",
}


class Pipeline:
    """One training: base model, adapter, data, checkpoints.

        class Mine(Pipeline):
            def dataset(self):
                data = Data(load_kwargs={...}, tokenizer=self.tokenizer, seed=self.seed,
                            batch_size=self.batch_size, grad_accum=self.grad_accum)
                return data.prepare([("filter", keep, {}), ("map", tokenize, {})])

        Mine("org/model", output_dir="out", adapter="lora", learning_rate=1e-4).run()

    Run it with python, or with `accelerate launch` on several processes. Running it again resumes
    from the newest checkpoint in `output_dir`.

    Args:
        base_model: hub id, folder, or .gguf file.
        output_dir: a run directory (checkpoints, metrics.jsonl); the result goes to `final`.
        options: keys of the spec's sections `model` and `train`, or their older names
            (model_name_or_path, batch_size, grad_accum, checkpoint_every).
    Raises:
        SpecError: an unknown option (with the nearest known one), a value that does not fit, or
            one that needs held-out rows.
    """

    def __init__(self, base_model: str = "", output_dir: str = "./output", **options: Any):
        options = {ALIASES.get(name, name): value for name, value in options.items()}
        base_model = options.pop("base_model", base_model)
        if not base_model:
            raise SpecError("Pipeline needs base_model: a hub id, a folder, or a .gguf file")
        _refuse_evaluation(options)
        self.spec = _spec(base_model, options)
        if self.spec.train.micro_batch_size == "auto":
            raise SpecError("Pipeline: dataset() makes the batches, so batch_size must be a number")
        self.output_dir = Path(output_dir).absolute()
        self.store = Store()
        self.seed = self.spec.train.seed
        self.batch_size = self.spec.train.micro_batch
        self.grad_accum = self.spec.train.gradient_accumulation_steps
        self.base = basemodel.identify(self.spec.model.base_model, self.spec.model.revision)
        self.module: Any = None  # what is trained, from before `dataset` on
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self.model_dir())
        return self._tokenizer

    def dataset(self) -> DataLoader[Any]:
        """Override: the batches to train on, dicts of input_ids, attention_mask, labels [B, T]."""
        raise NotImplementedError(
            f"{type(self).__name__} has no dataset(): override it to return a "
            "torch.utils.data.DataLoader, e.g. Data(...).prepare([...])"
        )

    def hooks(self) -> Hooks:
        """Override: callbacks, and a loss or an optimizer of your own (ditty.training.hooks)."""
        return OURS

    def model_dir(self) -> Path:
        """The base model's folder, fetched (.gguf and .bin files converted) on first use."""
        return base_folder(self.base, self.spec, self.store)

    def weights_dir(self) -> Path:
        """The folder that is loaded: the base model's, or its quantized twin from the store."""
        source = self.model_dir()
        if not stageline.prequantizes(self.spec):
            return source
        return quantized_folder(source, self.spec, self.store, resolve_device(LaunchSpec()))

    def run(self) -> Outcome:
        """Train, resuming from the newest checkpoint; write the result to `output_dir`/final.

        Raises:
            DittyError: see Trainer.fit.
            RunBusy: another process trains in `output_dir`.
        """
        preflight.check_trackers(self.spec.train.report_to, os.environ)
        device = resolve_device(LaunchSpec())
        world = join_world(device, self.spec.launch.world_size)
        run = RunDir(self.output_dir)
        run.root.mkdir(parents=True, exist_ok=True)
        lock = run.training_lock()
        if not world.from_main(lock.acquire(timeout=0) if world.main else True):
            raise RunBusy(f"another process trains in {self.output_dir}: wait for it, or stop it")
        try:
            return self._train(world, run)
        finally:
            if world.main:
                lock.release()
            leave_world()

    def _train(self, world: World, run: RunDir) -> Outcome:
        train = self.spec.train
        module = self.module = load_module(self.weights_dir(), self.spec.model, train, world)
        loader = self.dataset()
        if not isinstance(loader, DataLoader):
            raise ModelError(
                f"{type(self).__name__}.dataset() returned {type(loader).__name__}, "
                "expected a torch.utils.data.DataLoader"
            )
        feed = LoaderFeed(loader, train.gradient_accumulation_steps, world)
        rows = world.from_main(_digest(next(feed.steps(0))))
        identity = stageline.training_identity(self.spec, basemodel.key(self.base), rows)
        hooks = self.hooks()
        if decide := hooks.identity():
            identity["hooks"] = decide
        place = Place(run, world, identity)
        with reporting(self.spec, place) as reports:
            trainer = Trainer(module, feed, train, place, hooks=reports.hooks(hooks))
            outcome = self._finish(trainer, trainer.fit())
            if world.main and outcome.finished:
                reports.result(run.root / "final", self.store)
        return outcome

    def _finish(self, trainer: Trainer, outcome: Outcome) -> Outcome:
        """Write the result, if all steps are done."""
        final, identity = trainer.run.root / "final", trainer.checkpointer.identity
        weights = whole_weights(trainer.parallel, trainer.world) if outcome.finished else {}
        if outcome.finished and trainer.world.main and not final.exists():
            with commit_dir(final, {"step": outcome.step, "identity": identity}) as out:
                save_trained(self.module, weights, self.spec.model.base_model, out)
                self.tokenizer.save_pretrained(out)
        return outcome


def _digest(batches: list[Batch]) -> str:
    """SHA-256 of all that the batches of a step hold."""
    values = [
        {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in sorted(batch.items())}
        for batch in batches
    ]
    return sha256_bytes(repr(values).encode())


def _refuse_evaluation(options: dict[str, Any]) -> None:
    """Nothing is held out of the batches that `dataset()` gives."""
    asked = {
        "early_stopping_patience": options.get("early_stopping_patience") is not None,
        "final_weights: best": options.get("final_weights") == FinalWeights.BEST,
        "num_samples": bool(options.get("num_samples")),
        "sample_steps": options.get("sample_steps") is not None,
        "eval_steps": options.get("eval_steps") is not None,
    }
    for name, is_set in asked.items():
        if is_set:
            raise SpecError(
                f"Pipeline: {name} needs held-out rows, and a Pipeline has none: write a spec for "
                "`ditty run`, or use Trainer with held_out; or remove that option"
            )


def _spec(base_model: str, options: dict[str, Any]) -> RunSpec:
    """A spec from flat options, each put into the section that knows it."""
    model: dict[str, Any] = {"base_model": base_model}
    train: dict[str, Any] = {}
    for name, value in options.items():
        section = model if name in ModelSpec.model_fields else train
        section[name] = value
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    values = {
        "name": "pipeline",
        "launch": {"num_processes": local, "num_machines": size // local, "machine_rank": 0},
        "data": {"source": "Pipeline.dataset"},
        "model": model,
        "train": train,
    }
    return parse_spec(values, where="Pipeline")


assert not set(ModelSpec.model_fields) & set(TrainSpec.model_fields), "an option must be one thing"
