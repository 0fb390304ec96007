"""Checkpoints: written aside from training, whole or absent, and read by any number of processes.

The oracles: copies taken before, training that was never interrupted, and the files themselves.
"""

import ast
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig, PreTrainedModel

from ditty.config.spec import TrainSpec
from ditty.distributed.parallel import Part, Replicated
from ditty.distributed.world import single
from ditty.errors import RunMismatch, StoreError
from ditty.runs.rundir import RunDir
from ditty.training import checkpoint
from ditty.training import pieces as pieces_module
from ditty.training.checkpoint import Checkpointer, optimizer_states, shard_tensors
from ditty.training.pieces import Pieces, piece_name, write_pieces
from tests import scenarios
from tests.tables_for_tests import write_rows
from tests.test_trainer import build, run_trainer, settings
from tests.tiny import make_model_folder, random_rows

ROOT = Path(__file__).parent.parent
TRAIN = {
    "max_steps": 8,
    "precision": "fp32",
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-2,
    "save_steps": 2,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoint")
    make_model_folder(root / "model")
    write_rows(root / "data" / "train.arrow", random_rows(30))
    write_rows(root / "data" / "eval.arrow", random_rows(1))
    return root


@pytest.fixture(scope="module")
def results(root):
    return scenarios.launch(root / "job", list(_scenarios(root)))


def scenario(root, name, *, sharding="ddp", processes=2, **options):
    train = {**TRAIN, "sharding": sharding, **options.pop("train", {})}
    train["gradient_accumulation_steps"] *= 2 // processes
    return scenarios.job(root, name, {"adapter": "none"}, train, processes=processes, **options)


def _scenarios(root):
    yield scenario(root, "whole")
    for rank in (0, 1):
        broken = {"rank": rank, "step": 4, "how": "error"}
        name = f"full-disk-{rank}"
        yield scenario(root, f"{name}-a", home=name, fail_save=broken, error="StoreError")
        yield scenario(root, name, home=name)
    # Rank 1 dies in the middle of its file; rank 0 waits in its thread, and must not wait long.
    dying = {"rank": 1, "step": 4, "how": "kill"}
    yield scenario(root, "killed-a", home="killed", fail_save=dying, signals=[0, 9])
    yield scenario(root, "killed", home="killed")
    eight = {"sharding": "fsdp2", "train": {"optimizer": "adamw_8bit"}}
    yield scenario(root, "eight", **eight)
    yield scenario(root, "eight-a", home="eight-b", stop_before=5, **eight)
    yield scenario(root, "eight-one", home="eight-b", processes=1, error="RunMismatch", **eight)
    yield scenario(root, "eight-b", home="eight-b", **eight)


def same_weights(root, a, b):
    first, second = (load_file(root / f"{name}.safetensors") for name in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.fault("disk full")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_process_is_told_to_all_and_leaves_nothing(root, results, rank, figure):
    failed = results[f"full-disk-{rank}-a"]
    for message in failed["errors"]:
        assert message.startswith(f"the checkpoint of step 4 was not written: rank {rank}: ")
        assert "No space left on device" in message and "run again" in message
    assert failed["left"] == ["step_000000002"]
    assert results[f"full-disk-{rank}"]["losses"] == results["whole"]["losses"]
    assert same_weights(root, f"full-disk-{rank}", "whole")
    bad = set(failed["left"]) - {"step_000000002"}
    figure(f"full for rank {rank} of 2: bad commits {len(bad)}, both ranks say so")


def test_a_process_killed_while_it_writes_leaves_no_committed_half(root, results):
    """Which of the two notices first decides who removes what; the next start removes the rest."""
    assert results["killed-a"] == {"signals": [0, 9]}
    resumed = results["killed"]
    assert sorted(map(int, resumed["rows"])) == [2, 3, 4, 5, 6, 7], "it resumed from step 2"
    assert resumed["losses"] == results["whole"]["losses"]
    assert same_weights(root, "killed", "whole")
    folder = root / "homes" / "killed" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step_000000006", "step_000000008"]


def test_8_bit_state_resumes_bitwise_in_the_same_world_and_is_refused_in_another(root, results):
    assert results["eight-a"]["step"] == 5
    (message,) = results["eight-one"]["errors"]
    assert "8-bit state" in message and "Resume with that number" in message
    assert results["eight-b"]["losses"] == results["eight"]["losses"]
    assert same_weights(root, "eight-b", "eight")
    shard = load_file(root / "homes/eight/checkpoints/step_000000008/shard_00001.safetensors")
    assert any(v.dtype == torch.uint8 for v in shard.values()), "nothing is kept in 8 bits"


def test_a_checkpoint_holds_no_code(root, results):
    """Data in safetensors and JSON; and nothing else is ever unpickled."""
    files = [p for p in (root / "homes").rglob("checkpoints/*/*") if p.is_file()]
    assert {p.suffix for p in files} == {".safetensors", ".json"} and len(files) > 30
    for path in files:
        if path.suffix == ".safetensors":
            load_file(path)
    for path in [*(ROOT / "ditty").rglob("*.py"), *(ROOT / "flows").rglob("*.py")]:
        assert unsafe_reads(path.read_text()) == [], path


def unsafe_reads(source):
    """Lines that may unpickle."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {a.name for a in node.names} | {getattr(node, "module", None)}
            if names & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}:
                found.append(node.lineno)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if options.get("weights_only") != "True":
                found.append(node.lineno)
    return sorted(found)


def test_what_counts_as_an_unsafe_read():
    safe = "import torch\ntorch.load('x', weights_only=True)\n"
    assert unsafe_reads(safe) == []
    assert unsafe_reads(safe.replace("True", "False")) == [2]
    assert unsafe_reads("import torch\ntorch.load('x')\nimport pickle\n") == [2, 3]


# One process, in this one.


class Layers(PreTrainedModel):
    """A matrix of 8,192 elements (8-bit states begin at 4,096), one of 64 and a vector."""

    config_class = PreTrainedConfig

    def __init__(self):
        super().__init__(PreTrainedConfig())
        self.wide = torch.nn.Linear(64, 128)
        self.small = torch.nn.Linear(1, 64, bias=False)


def make_parallel(optimizer="adamw", seed=0):
    torch.manual_seed(seed)
    train = TrainSpec(optimizer=optimizer, learning_rate=1e-2, weight_decay=0.1)
    return Replicated(Layers(), train, single())


def step(parallel, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parallel.parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    parallel.step(1e-2)


def values(parallel):
    return {part.name: part.value.detach().reshape(-1).clone() for part in parallel.parts}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Gate:
    """Holds up each write of a checkpoint until it is opened, and counts those on their way."""

    def __init__(self, monkeypatch):
        self.opened, self.reached = threading.Event(), threading.Semaphore(0)
        self.now = self.most = 0
        self.lock = threading.Lock()
        monkeypatch.setattr(checkpoint, "write_pieces", self.write)

    def write(self, path, pieces):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        self.reached.release()
        assert self.opened.wait(60)
        write_pieces(path, pieces)
        with self.lock:
            self.now -= 1


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


def checkpointer(run, keep=2):
    return Checkpointer(run, single(), {"test": "same"}, keep=keep)


def test_a_save_is_on_its_way_while_training_goes_on(run, monkeypatch):
    """It holds the bits of the step it was asked for, whatever happens to them meanwhile."""
    gate, parallel, saver = Gate(monkeypatch), make_parallel(), checkpointer(run)
    step(parallel, 1)
    before = shard_tensors(parallel)
    state = {"progress": {"best_step": 0}}
    saver.save(1, parallel, state)
    assert gate.reached.acquire(timeout=60) and run.committed_steps() == []
    step(parallel, 2)
    torch.rand(3)
    assert not equal(shard_tensors(parallel), before)
    gate.opened.set()
    saver.wait()
    assert run.committed_steps() == [1]
    assert equal(load_file(run.checkpoint(1) / "shard_00000.safetensors"), before)
    again = make_parallel(seed=9)
    assert checkpointer(run).restore(again)[0] == 1
    step(again, 2)
    assert equal(values(again), values(parallel))


def test_two_saves_are_never_on_their_way_at_once(run, monkeypatch):
    gate, parallel, saver = Gate(monkeypatch), make_parallel(), checkpointer(run)
    step(parallel, 1)
    saver.save(1, parallel, {})
    assert gate.reached.acquire(timeout=60)
    second = threading.Thread(target=saver.save, args=(2, parallel, {}))
    second.start()
    assert not gate.reached.acquire(timeout=0.3) and second.is_alive()
    gate.opened.set()
    second.join()
    saver.wait()
    assert gate.most == 1 and run.committed_steps() == [1, 2]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), SafetensorError("I/O error")])
@pytest.mark.parametrize("asked_by", ["save", "wait"])
def test_a_failed_write_is_said_by_the_next_save_or_wait(run, monkeypatch, error, asked_by):
    """safetensors has an error of its own for a full disk."""
    parallel, saver = make_parallel(), checkpointer(run)
    step(parallel, 1)
    saver.save(1, parallel, {})
    saver.wait()

    def fail(path, pieces):
        path.write_bytes(b"half")
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_pieces", fail)
        saver.save(2, parallel, {})
        with pytest.raises(StoreError, match=r"step 2 was not written: rank 0: .*run again"):
            saver.save(3, parallel, {}) if asked_by == "save" else saver.wait()
    assert [p.name for p in run.checkpoints.iterdir()] == ["step_000000001"]
    saver.save(3, parallel, {})  # told once: the next save is another one
    saver.wait()
    assert run.committed_steps() == [1, 3]


def test_a_disk_too_full_for_another_is_said_before_it_is_written(run, monkeypatch):
    parallel, saver = make_parallel(), checkpointer(run)
    step(parallel, 1)
    saver.save(1, parallel, {})
    saver.wait()
    usage = shutil.disk_usage(run.root)
    with monkeypatch.context() as patched:
        size = sum(p.stat().st_size for p in run.checkpoint(1).iterdir())
        patched.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=size))
        with pytest.raises(StoreError, match=rf"step 2 was not written: {size} bytes are free"):
            saver.save(2, parallel, {})
    assert [p.name for p in run.checkpoints.iterdir()] == ["step_000000001"]


def test_an_old_checkpoint_that_cannot_be_removed_is_no_failure(run, monkeypatch, caplog):
    parallel, saver = make_parallel(), checkpointer(run)
    step(parallel, 1)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    for number in (1, 2, 3):
        if number == 3:
            monkeypatch.setattr(checkpoint, "fsync_path", refuse_in(run.checkpoints, refuse))
        saver.save(number, parallel, {})
        saver.wait()
    assert 3 in run.committed_steps() and "stay: " in caplog.text


def refuse_in(folder, refuse):
    """fsync of a committed checkpoint's folder: what `_retire` does and nothing else here."""
    fsync = checkpoint.fsync_path
    return lambda path: refuse(path) if path.parent == folder else fsync(path)


def test_what_a_kill_left_behind_is_removed_at_the_next_start(folder, tmp_path):
    left = tmp_path / "run" / "checkpoints" / ".tmp-step_000000004-0123456789ab"
    left.mkdir(parents=True)
    (left / "shard_00000.safetensors").write_bytes(b"half")
    run_trainer(folder, tmp_path, settings(max_steps=2))
    assert [p.name for p in left.parent.iterdir()] == ["step_000000002"]


@pytest.fixture(scope="module")
def folder(root):
    return root / "model"


def test_a_run_saved_before_fp16_took_its_first_step_resumes(folder, tmp_path, monkeypatch):
    """While the loss scale is too high steps are skipped, and the optimizer has no state yet."""
    import ditty.distributed.parallel

    monkeypatch.setattr(ditty.distributed.parallel, "LOSS_SCALE_START", 2.0**28)
    # Half of it a step, until gradients fit fp16.
    changes = {"precision": "fp16", "micro_batch_size": 1, "gradient_accumulation_steps": 2}
    train = settings(max_steps=20, save_steps=100, **changes)
    whole, _, metrics = run_trainer(folder, tmp_path, train, name="whole")
    module, calls = build(folder), []

    def count(module, *_):
        calls.extend([None] * module.training)  # not those that look for leaks
        if len(calls) == 3 * train.gradient_accumulation_steps:
            RunDir(tmp_path / "run").stop_file.touch()

    module.register_forward_pre_hook(count)
    part, outcome, _ = run_trainer(folder, tmp_path, train, module=module)
    assert outcome.step == 3 and part.loss_scale.scale == 2.0**25
    pieces = Pieces(RunDir(tmp_path / "run").checkpoint(3))
    assert {name.partition("/")[0] for name in pieces.by_name} == {"weight"}
    RunDir(tmp_path / "run").stop_file.unlink()
    resumed, outcome, again = run_trainer(folder, tmp_path, train)
    assert outcome.finished and resumed.loss_scale == whole.loss_scale
    assert [m["loss"] for m in again] == [m["loss"] for m in metrics]
    assert metrics[-1]["loss"] != metrics[0]["loss"], "no step was ever taken"
    assert equal(values(resumed.parallel), values(whole.parallel))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "lion", "lion_8bit", "adafactor"])
def test_every_optimizers_state_comes_back_to_the_bit(run, optimizer):
    parallel = make_parallel(optimizer)
    for seed in (1, 2):
        step(parallel, seed)
    saver = checkpointer(run)
    saver.save(2, parallel, {"best_step": 0})
    saver.wait()
    names = {n.partition("/")[0] for n in Pieces(run.checkpoint(2)).by_name}
    kinds = {
        "adamw": {"state", "scalar"},
        "adamw_8bit": {"state", "int", "block"},
        "lion": {"state", "int"},
        "lion_8bit": {"state", "int", "block"},
        "adafactor": {"state", "scalar", "block"},
    }
    assert names == {"weight"} | kinds[optimizer]
    again = make_parallel(optimizer, seed=9)
    number, state = checkpointer(run).restore(again)
    assert (number, state["best_step"]) == (2, 0)
    assert equal(shard_tensors(again), shard_tensors(parallel))
    step(parallel, 3)
    step(again, 3)
    assert equal(values(again), values(parallel))
    assert equal(shard_tensors(again), shard_tensors(parallel))


def cut(folder, name, value, ends):
    """Write a flat tensor in pieces, a file each."""
    folder.mkdir(exist_ok=True)
    start = 0
    for number, end in enumerate(ends):
        write_pieces(
            folder / f"shard_{number:05d}.safetensors", {piece_name(name, start): value[start:end]}
        )
        start = end
    return Pieces(folder)


def test_any_range_is_read_across_pieces(tmp_path):
    whole = torch.randn(20)
    pieces = cut(tmp_path / "a", "weight/x.y", whole, (7, 8, 20))
    assert pieces.names("weight/") == {"x.y"} and pieces.size("weight/x.y") == 20
    for start in range(20):
        for stop in range(start + 1, 21):
            assert torch.equal(pieces.read("weight/x.y", start, stop), whole[start:stop])
    assert torch.equal(pieces.read_exact("weight/x.y", 7), whole[7:8])
    assert pieces.read_exact("weight/x.y", 6) is None
    assert pieces.length("weight/x.y", 8) == 12 and pieces.length("weight/x.y", 9) is None


def test_each_file_is_opened_once_however_much_is_read(tmp_path, monkeypatch):
    """Opening reads all names: once a tensor, a resume of 1,700 of them took 3 s."""
    opened, whole = [], torch.randn(20)
    cut(tmp_path / "a", "weight/x", whole, (7, 20))
    open_file = pieces_module.safe_open
    monkeypatch.setattr(
        pieces_module,
        "safe_open",
        lambda path, **how: opened.append(path) or open_file(path, **how),
    )
    pieces = Pieces(tmp_path / "a")
    assert torch.equal(pieces.read("weight/x", 3, 9), whole[3:9])
    assert torch.equal(pieces.read_exact("weight/x", 7), whole[7:])
    assert torch.equal(pieces.first("weight/x"), whole[:7])
    assert sorted(path.name for path in opened) == sorted(
        p.name for p in (tmp_path / "a").iterdir()
    )


def test_a_range_that_is_not_there_is_refused(tmp_path):
    pieces = cut(tmp_path / "a", "weight/x", torch.arange(20), (7, 8, 20))
    with pytest.raises(RunMismatch, match="holds 5 of the 6 elements of weight/x from 15 on"):
        pieces.read("weight/x", 15, 21)
    with pytest.raises(RunMismatch, match="holds 0 of the 4 elements of weight/z"):
        pieces.read("weight/z", 0, 4)
    (tmp_path / "a" / "shard_00001.safetensors").unlink()
    with pytest.raises(RunMismatch, match="holds 19 of the 20 elements"):
        Pieces(tmp_path / "a").read("weight/x", 0, 20)


def test_state_is_read_however_it_was_cut_and_8_bit_state_is_not(tmp_path):
    """Two processes wrote it; a part here is a piece, the whole, or any range."""
    whole, scales = torch.randn(20), torch.randn(2)
    folder = tmp_path / "a"
    folder.mkdir()
    for number, (start, stop) in enumerate([(0, 12), (12, 20)]):
        tensors = {
            piece_name("weight/x", start): whole[start:stop],
            piece_name("state/exp_avg/x", start): whole[start:stop] * 2,
            piece_name("scalar/step/x", start): torch.tensor([3.0]),
            piece_name("int/count/x", start): torch.tensor([4]),
        }
        save_file(tensors, folder / f"shard_{number:05d}.safetensors")
    for start, stop in [(0, 20), (5, 15), (12, 20)]:
        part = Part("x", (20,), start, whole[start:stop], True)
        (state,) = optimizer_states(Pieces(folder), [part])
        assert torch.equal(state["exp_avg"], whole[start:stop] * 2)
        assert state["step"].shape == () and float(state["step"]) == 3.0
        assert state["count"] == 4 and type(state["count"]) is int
    empty = Part("x", (20,), 20, whole[20:], True)
    assert optimizer_states(Pieces(folder), [empty]) == [{}]
    with pytest.raises(RunMismatch, match="no optimizer state for y"):
        optimizer_states(Pieces(folder), [Part("y", (20,), 0, whole, True)])

    blocks = load_file(folder / "shard_00000.safetensors")
    blocks[piece_name("block/absmax1/x", 0)] = scales
    save_file(blocks, folder / "shard_00000.safetensors")
    same = Part("x", (20,), 0, whole[:12], True)
    (state,) = optimizer_states(Pieces(folder), [same])
    assert torch.equal(state["absmax1"], scales)
    for start, stop in [(0, 20), (0, 6), (12, 20)]:
        with pytest.raises(RunMismatch, match="cut for another number of processes"):
            optimizer_states(Pieces(folder), [Part("x", (20,), start, whole[start:stop], True)])
