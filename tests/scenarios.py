"""Many small trainings after one import: each in forked processes of its own, which may be killed.

A process of tests/warm.py forks the ranks of one scenario after the other; a rank is a process like
any other: it joins a world, trains, and ends, or dies by SIGKILL where the scenario says so.
"""

import json
import os
import signal
import socket
import threading
import traceback
from itertools import count, groupby, islice
from pathlib import Path
from typing import Any

import psutil

from tests import warm


def job(
    root: Path, name: str, model: dict[str, Any], train: dict[str, Any], **options: Any
) -> dict[str, Any]:
    """A scenario in two processes, on root/model and root/data unless `options` say otherwise."""
    return {
        "name": name,
        "processes": 2,
        "model_dir": str(root / "model"),
        "data_dir": str(root / "data"),
        "home": str(root / "homes" / options.pop("home", name)),
        "model": model,
        "train": train,
        "weights": str(root / f"{name}.safetensors"),
        **options,
    }


def launch(path: Path, scenarios: list[dict[str, Any]], device: str = "cpu") -> dict[str, Any]:
    """Run `scenarios` in turn; {name: what happened}.

    A scenario: name, processes, model_dir, data_dir, home (its run directory); optional: model and
    train (keys of the spec), stop_before and kill_before (steps), evaluate (bool), save (folder for
    the result), weights (file for the trained weights), backend (torch.compile's, where blocks are
    compiled), fail_save ({rank, step, how}: `error` or
    `kill` while that rank writes the checkpoint of that step), error (the DittyError that ends it
    on all ranks), signals (that end the ranks; 0: none).
    """
    path.write_text(json.dumps({"device": device, "scenarios": scenarios}))
    on_cpu = device == "cpu"
    more = warm.CPU_ONLY if on_cpu else {"HF_HUB_OFFLINE": "1"}
    context = warm.SERVER if on_cpu else warm.SPAWN  # CUDA does not survive a fork
    seconds = 60 + 60 * len(scenarios)
    printed = warm.run(
        serve, path, environment={**os.environ, **more}, seconds=seconds, context=context
    )
    found = {s["name"]: _read(path, s["name"]) for s in scenarios}
    if not on_cpu:  # one that failed must not hide what the others measured
        failed = any("losses" not in f for f in found.values())
        print(_without_noise(printed)[-4000:] if failed else "")
        return found
    for scenario in scenarios:
        result = found[scenario["name"]]
        signals = scenario.get("signals")
        if scenario.get("kill_before") is not None:
            signals = [int(signal.SIGKILL)] * scenario["processes"]
        if signals:
            expected = {"signals": signals}
            assert result == expected, f"{scenario['name']}: {result}\n{printed[-4000:]}"
            continue
        wanted = "errors" if scenario.get("error") else "losses"
        assert wanted in result, f"{scenario['name']}: {result}\n{printed[-6000:]}"
        assert result["world_size"] == scenario["processes"]
    return found


def _read(path: Path, name: str) -> dict[str, Any]:
    file = Path(f"{path}.{name}.json")
    return json.loads(file.read_text()) if file.exists() else {"missing": True}


def serve(path: Path) -> None:
    """Fork the ranks of each scenario, wait for them, and note how they ended."""
    job = json.loads(path.read_text())
    scenarios, device = job["scenarios"], job["device"]
    if device == "cpu":
        together = [[scenario] for scenario in scenarios]
    else:  # ranks import for themselves, and do several scenarios
        together = [list(g) for _, g in groupby(scenarios, lambda s: s["processes"])]
    for several in together:
        port, size = free_port(), several[0]["processes"]
        ranks = [
            warm.FORK.Process(target=_rank, args=(path, several, device, (rank, size, port)))
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        signals = [max(0, -(process.exitcode or 0)) for process in ranks]
        if any(signals):
            Path(f"{path}.{several[-1]['name']}.json").write_text(json.dumps({"signals": signals}))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank(
    path: Path, several: list[dict[str, Any]], device: str, who: tuple[int, int, int]
) -> None:
    from ditty.distributed.world import join_world, leave_world

    rank, size, port = who
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({k: str(v) for k, v in numbers.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    world = join_world(device, size, 60.0)
    for scenario in several:
        result = _run_or_explain(scenario, world, device)
        if world.main:
            Path(f"{path}.{scenario['name']}.json").write_text(json.dumps(result))
        _free_gpu(device)
    leave_world()


def _run_or_explain(scenario: dict[str, Any], world: Any, device: str) -> dict[str, Any]:
    try:
        return run(scenario, world)
    except Exception:
        if device == "cpu":
            raise
        traceback.print_exc()
        return {"error": traceback.format_exc()[-1500:]}


def _without_noise(output: str) -> str:
    lines = output.splitlines()
    return "\n".join(x for x in lines if not any(w in x for w in ("MatMul8bit", "Warning", "warn")))


def _free_gpu(device: str) -> None:
    if device == "cuda":
        import gc

        import torch

        torch._dynamo.reset()  # or each training's programs are guards to try for the next ones
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def run(scenario: dict[str, Any], world: Any) -> dict[str, Any]:
    """One training in this process; what came of it."""
    from safetensors.torch import save_file

    from ditty import errors
    from ditty.config.spec import ModelSpec, TrainSpec
    from ditty.data import read_rows
    from ditty.distributed.load import load_module
    from ditty.distributed.parallel import whole_weights
    from ditty.models.model import save_trained
    from ditty.runs.rundir import RunDir
    from ditty.training.compiled import programs
    from ditty.training.feed import packed_feed
    from ditty.training.trainer import Place, Trainer

    if scenario.get("backend"):
        _compile_by(scenario["backend"])
    model_dir, data_dir = Path(scenario["model_dir"]), Path(scenario["data_dir"])
    model = ModelSpec(base_model=str(model_dir), **scenario.get("model", {}))
    train = TrainSpec(**scenario["train"])
    run_dir = RunDir(Path(scenario["home"]))
    run_dir.root.mkdir(parents=True, exist_ok=True)
    with PeakMemory() as loading:
        module = load_module(model_dir, model, train, world)
    feed = Spy(packed_feed(read_rows(data_dir / "train.arrow"), train, world), scenario)
    held_out = _held_out(scenario, read_rows(data_dir / "eval.arrow"), train)
    if world.rank == scenario.get("fail_save", {}).get("rank"):
        _fail_save(scenario["fail_save"])
    trainer = Trainer(module, feed, train, Place(run_dir, world, {"test": "same"}), held_out)
    try:
        outcome = trainer.fit()
    except errors.DittyError as error:
        if type(error).__name__ != scenario.get("error"):
            raise
        left = sorted(p.name for p in run_dir.checkpoints.iterdir())
        found = world.gather(str(error))
        return {"world_size": world.world_size, "errors": found, "left": left}
    weights = whole_weights(trainer.parallel, world)
    if world.main and scenario.get("save"):
        save_trained(module, weights, str(model_dir), Path(scenario["save"]))
    if world.main and scenario.get("weights"):
        save_file(weights, scenario["weights"])
    if scenario.get("logits"):
        logits = _logits(trainer, read_rows(data_dir / "eval.arrow")[0])
        if world.main:
            save_file({"logits": logits}, scenario["logits"])
    records = list(run_dir.metrics())
    steps = [r for r in records if r["kind"] == "train"]
    result = {
        "world_size": world.world_size,
        "kind": type(trainer.parallel).__name__,
        "step": outcome.step,
        "finished": outcome.finished,
        "losses": [r["loss"].hex() for r in steps],
        "eval": [r["loss"].hex() for r in records if r["kind"] == "eval"],
        "eval_steps": [r["step"] for r in records if r["kind"] == "eval"],
        "samples": list(run_dir.samples()),
        "rates": [r["learning_rate"].hex() for r in steps],
        "norms": [r["grad_norm"] for r in steps],
        "skipped": [r["step"] for r in records if r.get("action") == "skip"],
        "tokens_per_second": steps[-1]["tokens_per_second"] if steps else None,
        "memory_bytes": max((r["memory_bytes"] for r in steps), default=None),
        "rows": _merged(world.gather(feed.seen)),
        "parts": world.gather(sum(p.value.numel() for p in trainer.parallel.parts)),
        "kept": world.gather(kept_bytes(module)),
        "loading_bytes": world.gather(loading.grown),
        "checkpoints": run_dir.committed_steps(),
        "best_step": trainer.progress.best_step,
        "loss_scale": trainer.loss_scale.scale,
        "programs": programs(),
    }
    if hasattr(trainer.parallel, "engine"):
        trainer.parallel.engine.destroy()  # DeepSpeed's buffers, for the next scenario's sake
    return result


def _logits(trainer: Any, row: Any) -> Any:
    """What the trained model says of the first document of a row, as it is cut over processes."""
    import torch

    from ditty.models.attention import generating

    model = trainer.parallel.model
    ids = torch.tensor([row["input_ids"][: row["lengths"][0]]], device=trainer.world.device)
    with torch.no_grad(), generating(model):
        logits = model(input_ids=ids).logits.float().cpu()
    trainer.parallel.rest()
    return logits


def _held_out(scenario: dict[str, Any], rows: Any, train: Any) -> Any:
    from transformers import AutoTokenizer

    from ditty.training.evaluate import HeldOut

    if not scenario.get("evaluate"):
        return None
    if not train.num_samples:
        return HeldOut(rows)
    tokenizer = AutoTokenizer.from_pretrained(scenario["model_dir"])
    return HeldOut(rows, tokenizer, train.num_samples, train.sample_max_tokens)


def _compile_by(backend: str) -> None:
    """Let blocks be compiled by another backend than inductor, which takes minutes on CPUs."""
    import functools

    import torch

    torch.compile = functools.partial(torch.compile, backend=backend)


def _fail_save(failure: dict[str, Any]) -> None:
    """Let this process fail, or die, in the thread that writes the checkpoint of one step."""
    import ditty.training.checkpoint
    from ditty.runs.rundir import step_name

    write = ditty.training.checkpoint.write_pieces

    def failing(path: Path, pieces: Any) -> None:
        if step_name(failure["step"]) in path.parent.name:
            path.write_bytes(b"half")
            if failure["how"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(28, "No space left on device")
        write(path, pieces)

    ditty.training.checkpoint.write_pieces = failing


class PeakMemory:
    """How much more memory than at its beginning this process held at a time within the block."""

    def __enter__(self) -> "PeakMemory":
        self.process, self.grown, self.done = psutil.Process(), 0, threading.Event()
        self.before = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.002):
            self.grown = max(self.grown, self.process.memory_info().rss - self.before)

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def kept_bytes(module: Any) -> int:
    """Bytes of parameters that this process keeps."""
    total = 0
    for p in module.parameters():
        local = getattr(p, "ds_tensor", None)
        if local is None:
            local = getattr(p, "_local_tensor", p)
        total += local.numel() * local.element_size()
    return total


def _merged(ids: list[dict[int, list[int]]]) -> dict[str, list[int]]:
    """{step: sorted rows of all processes}"""
    return {str(s): sorted(r for one in ids for r in one[s]) for s in sorted(ids[0])}


class Spy:
    """A feed that remembers which rows each step took, and that stops or kills before a step."""

    def __init__(self, feed: Any, scenario: dict[str, Any]):
        self.feed, self.seen, self.bounds = feed, {}, feed.bounds
        self.stop_before = scenario.get("stop_before")
        self.kill_before = scenario.get("kill_before")

    def total_steps(self, train: Any) -> int:
        return self.feed.total_steps(train)

    def samples(self, step: int) -> Any:
        return self.feed.samples(step)

    def steps(self, start: int) -> Any:
        from ditty.models.batches import collate

        micro_batches = self.feed.split.micro_batches(self.feed.order, start)
        for step in count(start):
            if step == self.stop_before:
                signal.raise_signal(signal.SIGTERM)
            if step == self.kill_before:
                os.kill(os.getpid(), signal.SIGKILL)
            group = list(islice(micro_batches, self.feed.split.gradient_accumulation_steps))
            self.seen[step] = [int(i) for indices in group for i in indices]
            yield [collate([self.feed.rows[i] for i in indices]) for indices in group]
