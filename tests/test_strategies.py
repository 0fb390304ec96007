"""Every strategy gives the same numbers: bitwise in fp32, in one world after the other.

The oracle is DDP and, for that, one process (and TRL, in test_reference.py). The trainings run in
two real processes each; see scenarios.py.
"""

import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ditty.config.choices import Quantization
from ditty.conversion.export import merge
from ditty.data import read_rows
from ditty.models.model import keep_4bit_weights
from ditty.quantization.quantize import quantize
from tests import scenarios
from tests.tables_for_tests import write_rows
from tests.tiny import make_model_folder, random_rows, tiny_config

STEPS = 20
SHARD_MB = 8
TRAIN = {
    "max_steps": STEPS,
    "precision": "fp32",
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "warmup_steps": 3,
    "weight_decay": 0.1,
    "save_steps": 10,
    "max_grad_norm": 1.0,
}
FULL = {"adapter": "none"}
LORA = {"adapter": "lora", "lora_r": 4, "lora_dropout": 0.1}
PLAIN = {**LORA, "lora_dropout": 0.0}
QLORA = {**LORA, "quantization": "nf4"}
SHARDED = ("fsdp2", "zero3")
# What says the same again of another strategy is left to the slow tests.
KILLED = {"ddp": (FULL,), "zero3": (LORA,), "fsdp2": (QLORA,)}
CHANGED = ("fsdp2",)
SKIPPING = ("none", "ddp", "zero3")
SLOW_SKIPPING = ("fsdp2",)
SLOW_KILLED = {"fsdp2": (LORA,)}
SLOW_CHANGED = ("ddp", "zero3")
GROWN = {4: ("ddp", "fsdp2", "zero3", "hybrid"), 8: ("ddp", "fsdp2", "zero3", "hybrid")}
EXPORTED = ("qlora-fsdp2", "full-zero3", "lora-zero3")
KINDS = {"none": "Replicated", "ddp": "Replicated", "fsdp2": "FullySharded", "zero3": "Zero3"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """30 packed rows of unequal length (a step takes 4: an epoch ends within step 8)."""
    root = tmp_path_factory.mktemp("strategies")
    make_model_folder(root / "model")
    (root / "nf4").mkdir()
    quantize(root / "model", root / "nf4", Quantization.NF4, "float32")
    wide = tiny_config(hidden_size=512, intermediate_size=1536, num_hidden_layers=12)
    model = AutoModelForCausalLM.from_config(wide, dtype=torch.bfloat16)
    model.save_pretrained(root / "wide", max_shard_size=f"{SHARD_MB}MB")
    write_rows(root / "data" / "train.arrow", random_rows(30))
    write_rows(root / "data" / "eval.arrow", random_rows(5, seed=1))
    return root


@pytest.fixture(scope="module")
def results(root, request):
    """All trainings, in the order in which some build on others."""
    jobs = [*_loaded(root), *_same_numbers(root), *_killed(root, KILLED)]
    jobs += [scenario(root, "worlds-reference", "ddp", PLAIN), *_switched(root)]
    jobs += [*_changed_worlds(root, CHANGED), *_skipping(root, SKIPPING)]
    ours = (item for item in request.session.items if item.module is request.module)
    if any(item.get_closest_marker("slow") for item in ours):
        jobs += [*_killed(root, SLOW_KILLED), *_changed_worlds(root, SLOW_CHANGED)]
        jobs += [*_skipping(root, SLOW_SKIPPING), *_grown(root)]
    found = scenarios.launch(root / "job", jobs)
    return {name.replace(" ", "-"): result for name, result in found.items()}


def scenario(root, name, sharding, model, processes=2, **options):
    train = {**TRAIN, "sharding": sharding, **options.pop("train", {})}
    if processes == 1 and sharding == "none":
        train["gradient_accumulation_steps"] *= 2
    folder = root / ("nf4" if model.get("quantization") == "nf4" else "model")
    options = {"processes": processes, "model_dir": str(folder), **options}
    return scenarios.job(root, name, model, train, **options)


def _loaded(root):
    """A model of some size in many small files; one step."""
    once = {"max_steps": 1, "precision": "bf16"}
    for sharding in ("ddp", *SHARDED):
        job = scenario(root, f"wide-{sharding}", sharding, {"lora_r": 2}, train=once)
        yield {**job, "model_dir": str(root / "wide")}


def _same_numbers(root):
    one = {"gradient_accumulation_steps": 1}
    for sharding in ("ddp", *SHARDED):
        for model in (FULL, LORA, QLORA):
            name = f"{_short(model)}-{sharding}"
            yield scenario(root, name, sharding, model, **_exported(root, name))
        yield scenario(root, f"full1-{sharding}", sharding, FULL, train=one)
    yield scenario(root, "full1-none", "none", FULL, 1, train=one)
    yield scenario(root, "full-none", "none", FULL, 1)
    four = {**one, "max_steps": 5}
    yield scenario(root, "lora-hybrid", "hybrid", LORA, 4, train={**four, "shard_size": 2})
    yield scenario(root, "lora-fsdp2-4", "fsdp2", LORA, 4, train=four)


def _exported(root, name):
    """What the trained model says while it is still in its processes, and what is saved of it."""
    if name not in EXPORTED:
        return {}
    return {"save": str(root / f"{name}-saved"), "logits": str(root / f"{name}-logits")}


def _skipping(root, which):
    """A low threshold: what is usual is a spike by it."""
    skip = {"max_steps": 12, "on_spike": "skip", "spike_threshold": 0.7, "spike_window": 8}
    for sharding in which:
        processes = 1 if sharding == "none" else 2
        yield scenario(root, f"skip-{sharding}", sharding, PLAIN, processes, train=skip)


def _killed(root, which):
    for sharding, model in ((s, m) for s, models in which.items() for m in models):
        name = f"killed-{sharding}-{_short(model)}"
        yield scenario(root, f"{name}-a", sharding, model, home=name, kill_before=13)
        yield scenario(root, f"{name}-b", sharding, model, home=name, stop_before=16)
        yield scenario(root, name, sharding, model, home=name)


def _grown(root):
    """Eight rows a step, on ever more processes."""
    five = {"max_steps": 5, "gradient_accumulation_steps": 8}
    for model in (FULL, PLAIN):
        # One process takes twice the accumulation of two: see `scenario`.
        one = {**five, "gradient_accumulation_steps": 4}
        yield scenario(root, f"grown-{_short(model)}-1", "none", model, 1, train=one)
        for size, shardings in GROWN.items():
            for sharding in shardings:
                train = {**five, "gradient_accumulation_steps": 8 // size}
                train |= {"shard_size": 2} if sharding == "hybrid" else {}
                name = f"grown-{_short(model)}-{size}-{sharding}"
                yield scenario(root, name, sharding, model, size, train=train)


def _short(model):
    return {"none": "full"}.get(model["adapter"], "qlora" if "quantization" in model else "lora")


def _changed_worlds(root, which):
    """Two processes, then one, then two: each time a stop in the middle of an epoch."""
    half = {"gradient_accumulation_steps": 4}
    for sharding in which:
        name = f"worlds-{sharding}"
        yield scenario(root, f"{name}-a", sharding, PLAIN, home=name, stop_before=6)
        yield scenario(root, f"{name}-b", sharding, PLAIN, 1, home=name, train=half, stop_before=12)
        yield scenario(root, name, sharding, PLAIN, home=name)


def _switched(root):
    """From one strategy to another."""
    name = "worlds-switched"
    yield scenario(root, f"{name}-a", "zero3", PLAIN, home=name, stop_before=6)
    yield scenario(root, f"{name}-b", "fsdp2", PLAIN, home=name, stop_before=12)
    yield scenario(root, name, "ddp", PLAIN, home=name)


def loaded(folder, adapter=None):
    """A folder as anyone loads it, perhaps with an adapter beside it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    keep_4bit_weights(model)
    return (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()


@torch.no_grad()
def logits(model, root):
    row = read_rows(root / "data" / "eval.arrow")[0]
    return model(input_ids=torch.tensor([row["input_ids"][: row["lengths"][0]]])).logits


@pytest.mark.parametrize("name", EXPORTED)
def test_what_is_exported_says_what_the_trained_model_said(root, results, tmp_path, name):
    """Cut over two processes, then saved; merged too, into the base that is not quantized."""
    model, _ = name.split("-")
    base, saved = root / "model", root / f"{name}-saved"
    said = load_file(root / f"{name}-logits")["logits"]
    beside = root / "nf4" if model == "qlora" else base
    ours = loaded(saved) if model == "full" else loaded(beside, saved)
    torch.testing.assert_close(logits(ours, root), said, rtol=1e-6, atol=1e-6)
    assert (said - logits(loaded(beside), root)).abs().max() > 1e-3, "nothing was learned"
    if model == "full":
        return
    merge(base, saved, tmp_path)
    expected = said if model == "lora" else logits(loaded(base, saved), root)
    torch.testing.assert_close(logits(loaded(tmp_path), root), expected, rtol=1e-5, atol=1e-5)


def losses(result):
    return [float.fromhex(value) for value in result["losses"]]


def weights(root, name):
    return load_file(root / f"{name}.safetensors")


def same_weights(root, a, b):
    first, second = weights(root, a), weights(root, b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("model", ["full", "full1", "lora", "qlora"])
def test_two_processes_give_the_same_bits_under_every_sharding(root, results, model, capsys):
    """With accumulation (full1: without), packed rows of unequal length, dropout (lora)."""
    reference = results[f"{model}-ddp"]
    with capsys.disabled():
        print(f"\n{model}: ddp {losses(reference)[0]:.6f} ... {losses(reference)[-1]:.6f}")
    assert len(reference["losses"]) == STEPS and len(set(reference["losses"])) == STEPS
    for sharding in SHARDED:
        other = results[f"{model}-{sharding}"]
        assert other["kind"] == KINDS[sharding]
        assert other["losses"] == reference["losses"], sharding
        assert other["norms"] == pytest.approx(reference["norms"], rel=1e-12)
        assert same_weights(root, f"{model}-{sharding}", f"{model}-ddp"), sharding
        # Really cut: each process holds about half of what is trained, and of all weights.
        assert max(other["parts"]) < 0.6 * reference["parts"][0], other["parts"]
        assert max(other["kept"]) < 0.6 * reference["kept"][0], other["kept"]


@pytest.mark.parametrize("model", ["full", "full1"])
def test_one_process_gives_the_bits_of_two(root, results, model):
    """With accumulation on the two (full), and without."""
    assert results[f"{model}-none"]["losses"] == results[f"{model}-ddp"]["losses"]
    assert same_weights(root, f"{model}-none", f"{model}-ddp")


@pytest.mark.parametrize(
    "sharding", ["ddp", "zero3", pytest.param("fsdp2", marks=pytest.mark.slow)]
)
def test_all_ranks_skip_the_same_steps_and_go_on_from_the_same_weights(root, results, sharding):
    one, several = results["skip-none"], results[f"skip-{sharding}"]
    assert several["world_size"] == 2 and len(several["losses"]) == 12
    assert several["skipped"] == one["skipped"]
    assert len(one["skipped"]) > 1 and one["skipped"][0] < 10, "steps were taken after a skip"
    assert several["losses"] == one["losses"]
    assert same_weights(root, f"skip-{sharding}", "skip-none")


def test_hybrid_gives_the_bits_of_fsdp2(root, results):
    """Four processes: two copies of two halves, against four quarters."""
    hybrid, whole = results["lora-hybrid"], results["lora-fsdp2-4"]
    assert losses(hybrid) == pytest.approx(losses(whole), rel=1e-6)
    assert max(hybrid["kept"]) > 1.6 * max(whole["kept"])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["full", "lora"])
@pytest.mark.parametrize("size", GROWN)
def test_more_processes_give_the_losses_of_one(root, results, model, size, capsys):
    """Sums of four or eight numbers, in another order than one process adds them."""
    one = results[f"grown-{model}-1"]
    assert len(one["losses"]) == 5
    for sharding in GROWN[size]:
        found = results[f"grown-{model}-{size}-{sharding}"]
        assert (found["world_size"], found["rows"]) == (size, one["rows"])
        apart = max(abs(a - b) / b for a, b in zip(losses(found), losses(one), strict=True))
        with capsys.disabled():
            print(f"\n{model}, {size} processes, {sharding}: {apart:.1e} from one")
        assert apart < 1e-6
        if sharding in SHARDED:
            assert max(found["kept"]) < 1.3 / size * one["kept"][0]


@pytest.mark.parametrize(
    "name",
    ["ddp-full", "zero3-lora", "fsdp2-qlora", pytest.param("fsdp2-lora", marks=pytest.mark.slow)],
)
def test_killed_and_stopped_and_resumed_ends_with_the_same_bits(root, results, name):
    """SIGKILL before step 13 (the checkpoint of step 10 stays), a stop before step 16, the end;
    the epoch ends within step 8 and step 15; dropout is on where there is an adapter."""
    killed, sharding, model = results[f"killed-{name}"], *name.split("-")
    reference = results[f"{model}-{sharding}"]
    assert results[f"killed-{name}-a"]["signals"] == [9, 9]
    assert results[f"killed-{name}-b"]["step"] == 16
    assert (killed["step"], killed["finished"]) == (STEPS, True)
    assert killed["losses"] == reference["losses"]
    assert same_weights(root, f"killed-{name}", f"{model}-{sharding}")


@pytest.mark.fault("world size")
@pytest.mark.parametrize(
    "sharding",
    [
        "fsdp2",
        "switched",
        pytest.param("ddp", marks=pytest.mark.slow),
        pytest.param("zero3", marks=pytest.mark.slow),
    ],
)
def test_another_number_of_processes_keeps_samples_and_rates(root, results, sharding, figure):
    reference, changed = results["worlds-reference"], results[f"worlds-{sharding}"]
    assert (changed["step"], changed["finished"]) == (STEPS, True)
    rows = {}
    for part in ("-a", "-b", ""):
        rows |= results[f"worlds-{sharding}{part}"]["rows"]
    for step in range(STEPS):
        assert rows[str(step)] == reference["rows"][str(step)], f"step {step}"
    assert changed["rates"] == reference["rates"]
    found, expected = weights(root, f"worlds-{sharding}"), weights(root, "worlds-reference")
    worst = max(float((found[k] - expected[k]).abs().max()) for k in expected)
    assert worst < 1e-5
    figure(f"{sharding}, 2 to 1 to 2 processes: same ids and rates, weights {worst:.0e} apart")


def test_loading_takes_the_memory_of_the_own_part_and_one_file(root, results, capsys):
    """Each process reads its slices: it never holds the model, nor a second file beside it."""
    for sharding in SHARDED:
        found, tiny = results[f"wide-{sharding}"], results[f"lora-{sharding}"]
        fixed = max(tiny["loading_bytes"])  # modules, imports: what a model of no size takes
        for kept, grown in zip(found["kept"], found["loading_bytes"], strict=True):
            with capsys.disabled():
                print(f"\n{sharding}: {grown / 1e6:.0f} MB to load a part of {kept / 1e6:.0f} MB")
            assert kept < 0.55 * results["wide-ddp"]["kept"][0]
            assert kept < grown < kept + fixed + 4 * SHARD_MB * 1_000_000


def test_a_checkpoint_for_other_weights_is_refused(root, results, tmp_path):
    from ditty.errors import RunMismatch
    from ditty.training.pieces import Pieces

    home = root / "homes" / "lora-ddp" / "checkpoints"
    folder = tmp_path / "checkpoint"
    shutil.copytree(next(home.glob("step_*20")), folder)
    (folder / "shard_00000.safetensors").unlink()
    pieces = Pieces(folder)
    with pytest.raises(RunMismatch, match="holds 0 of the 4 elements"):
        pieces.read("weight/anything", 0, 4)
