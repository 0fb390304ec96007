"""The matrix of strategies on NVIDIA GPUs, through NCCL; prints a table. Mark `gpu`.

    python -m pytest -m gpu -o addopts= -s tests/test_gpu_strategies.py

Takes as many GPUs as there are, up to DITTY_TEST_GPUS (default 2).
"""

import os
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from ditty.config.choices import Quantization
from ditty.quantization.quantize import quantize
from tests import scenarios
from tests.tables_for_tests import write_rows
from tests.tiny import make_model_folder, random_rows

GPUS = min(torch.cuda.device_count(), int(os.environ.get("DITTY_TEST_GPUS", "2")))
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="no NVIDIA GPU")]

STEPS = 12
REPEATS = 6
MODELS = {
    "full": {"adapter": "none"},
    "lora": {"lora_r": 8, "lora_dropout": 0.1},
    # No dropout: beside 4-bit layers it draws in bf16, in a pattern that depends on addresses.
    "qlora": {"lora_r": 8, "quantization": "nf4"},
}
SHARDINGS = ("ddp", "fsdp2", "zero3")
COMPILED = ("ddp", "fsdp2")  # some 10 s each: the other trainings leave their blocks as they stand
# On one GPU there is nothing to replicate: `ddp` is a single process.
FSDP2_ODDITIES = {
    "offload-lora": ("lora", {"cpu_offload": True}),
    "offload-full": ("full", {"cpu_offload": True}),
    "checkpointed": ("lora", {"activation_checkpointing": "all"}),
    "adamw8bit": ("full", {"optimizer": "adamw_8bit"}),
    "paged8bit": ("full", {"optimizer": "paged_adamw_8bit"}),
    "lion": ("lora", {"optimizer": "lion"}),
}


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=2048, hidden_size=512, intermediate_size=1536, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64, tie_word_embeddings=True,
        max_position_embeddings=1024, bos_token_id=0, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("gpu")
    make_model_folder(root / "model", config())
    for precision, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
        (root / f"nf4-{precision}").mkdir()
        quantize(root / "model", root / f"nf4-{precision}", Quantization.NF4, dtype)
    (root / "int8").mkdir()
    quantize(root / "model", root / "int8", Quantization.INT8, "bfloat16")
    # Long documents among them: attention adds up the gradient of one of 200 tokens in one order.
    write_rows(root / "data" / "train.arrow", random_rows(30, longest=900))
    write_rows(root / "data" / "eval.arrow", random_rows(5, seed=1, longest=200))
    return root


def scenario(root, name, sharding, model, precision, **options):
    train = {
        "max_steps": STEPS, "precision": precision, "micro_batch_size": 2,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "warmup_steps": 2,
        "save_steps": 5, "sharding": sharding, "compile": False, **options.pop("train", {}),
    }  # fmt: skip
    kind = model.get("quantization")
    folder = {"nf4": f"nf4-{precision}", "int8": "int8"}.get(kind, "model")
    options = {"evaluate": True, "processes": GPUS, "model_dir": str(root / folder), **options}
    return scenarios.job(root, name, model, train, **options)


def jobs(root):
    only = re.compile(os.environ.get("DITTY_TEST_ONLY", ""))
    return [job for job in all_jobs(root) if only.search(job["name"])]


def all_jobs(root):
    for dropout in (0.0, 0.1):
        keys = {"lora_r": 8, "lora_dropout": dropout}
        for repeat in "xy":
            yield scenario(root, f"again-{dropout}-{repeat}", "ddp", keys, "fp32")
    for repeat in range(REPEATS):
        yield scenario(root, f"again-qlora-{repeat}", "fsdp2", MODELS["qlora"], "fp32")
    for precision in ("fp32", "bf16"):
        for model, keys in MODELS.items():
            for sharding in SHARDINGS:
                name = f"{precision}-{model}-{sharding}"
                yield scenario(root, name, sharding, keys, precision)
                yield scenario(
                    root, f"{name}-a", sharding, keys, precision, home=f"{name}-r", stop_before=7
                )
                yield scenario(root, f"{name}-r", sharding, keys, precision, home=f"{name}-r")
    for model, keys in MODELS.items():
        for sharding in COMPILED:
            name = f"compiled-{model}-{sharding}"
            train = {"compile": True}
            yield scenario(root, name, sharding, keys, "bf16", train=train)
            yield scenario(
                root, f"{name}-a", sharding, keys, "bf16", train=train, home=f"{name}-r",
                stop_before=7,
            )  # fmt: skip
            yield scenario(root, f"{name}-r", sharding, keys, "bf16", train=train, home=f"{name}-r")
    for name, (model, train) in FSDP2_ODDITIES.items():
        keys = MODELS[model]
        yield scenario(root, name, "fsdp2", keys, "bf16", train=train)
        yield scenario(
            root, f"{name}-a", "fsdp2", keys, "bf16", train=train, home=f"{name}-r", stop_before=7
        )
        yield scenario(root, f"{name}-r", "fsdp2", keys, "bf16", train=train, home=f"{name}-r")
    for sharding in ("ddp", "fsdp2"):
        keys = MODELS["lora"]
        name = f"fp16-{sharding}"
        yield scenario(root, name, sharding, keys, "fp16")
        yield scenario(root, f"{name}-a", sharding, keys, "fp16", home=f"{name}-r", stop_before=7)
        yield scenario(root, f"{name}-r", sharding, keys, "fp16", home=f"{name}-r")
    offload = {"cpu_offload": True}
    yield scenario(root, "zero3-offload", "zero3", MODELS["full"], "bf16", train=offload)
    yield scenario(root, "int8-ddp", "ddp", {"lora_r": 8, "quantization": "int8"}, "bf16")
    yield scenario(root, "dora-ddp", "ddp", {"adapter": "dora", "lora_r": 8}, "bf16")
    yield scenario(root, "dora-fsdp2", "fsdp2", {"adapter": "dora", "lora_r": 8}, "bf16")
    yield from worlds(root)
    streamed = {
        "cpu_offload": True,
        "offload_gpu_gb": 0.012,  # half of the blocks
        "activation_checkpointing": "all",
        "gradient_accumulation_steps": 2 * GPUS,
    }
    keys = {"lora_r": 8, "quantization": "int8"}
    offloaded = scenario(root, "int8-offload", "none", keys, "bf16", train=streamed)
    yield {**offloaded, "model_dir": str(root / "model"), "processes": 1}


def worlds(root):
    """All GPUs, half of them, all of them: each time a stop on the way."""
    if GPUS < 2:
        return
    keys, twice = {"lora_r": 8}, {"gradient_accumulation_steps": 4}
    yield scenario(root, "worlds-reference", "ddp", keys, "fp32")
    yield scenario(root, "worlds-a", "fsdp2", keys, "fp32", home="worlds", stop_before=5)
    yield scenario(
        root, "worlds-b", "fsdp2", keys, "fp32", home="worlds", stop_before=9,
        processes=GPUS // 2, train=twice,
    )  # fmt: skip
    yield scenario(root, "worlds", "fsdp2", keys, "fp32", home="worlds")


@pytest.fixture(scope="module")
def results(root):
    return scenarios.launch(root / "job", jobs(root), "cuda")


def losses(result):
    return [float.fromhex(value) for value in result["losses"]]


def difference(a, b):
    return max(abs(x - y) / y for x, y in zip(losses(a), losses(b), strict=True))


def first_difference(a, b):
    pairs = zip(a["losses"], b["losses"], strict=True)
    return next((step for step, (x, y) in enumerate(pairs, 1) if x != y), None)


def same_bits(root, results, a, b):
    first, second = load_file(root / f"{a}.safetensors"), load_file(root / f"{b}.safetensors")
    equal = all(torch.equal(first[k], second[k]) for k in second)
    return equal and results[a]["losses"] == results[b]["losses"]


# fp32: the same sums in another order. bf16 full: FSDP2 and ZeRO-3 gather weights in bf16, norms
# and embeddings included; under DDP autocast leaves those in fp32.
BOUNDS = {"fp32": 1e-5, "bf16": 1e-2}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_the_matrix(root, results, precision, model, capsys):
    reference, failures = results[f"{precision}-{model}-ddp"], []
    for sharding in SHARDINGS:
        name = f"{precision}-{model}-{sharding}"
        found = results[name]
        apart = difference(found, reference)
        resumed = same_bits(root, results, f"{name}-r", name)
        resumed_at = first_difference(results[f"{name}-r"], found)
        with capsys.disabled():
            print(
                f"\n{GPUS} GPU(s) {name}: {losses(found)[0]:.4f} to {losses(found)[-1]:.4f},",
                end="",
            )
            print(f" from ddp {apart:.1e} (step {first_difference(found, reference)}),", end="")
            print(f" resumed {'bitwise' if resumed else f'otherwise from {resumed_at}'},", end="")
            print(f" {found['kept'][0] / 1e6:.1f} MB kept", end="")
        failures += [] if resumed else [f"{name} resumed otherwise"]
        failures += [] if apart <= BOUNDS[precision] else [f"{name}: {apart}"]
        if sharding != "ddp" and GPUS > 1:
            assert max(found["kept"]) < 0.65 * reference["kept"][0]
    assert not failures


@pytest.mark.parametrize("sharding", COMPILED)
@pytest.mark.parametrize("model", MODELS)
def test_compiled_blocks(root, results, model, sharding, capsys):
    name = f"compiled-{model}-{sharding}"
    found = results[name]
    apart = difference(found, results[f"bf16-{model}-{sharding}"])
    resumed_at = first_difference(results[f"{name}-r"], found)
    with capsys.disabled():
        print(f"\n{name}: from uncompiled {apart:.1e}, resumed otherwise from {resumed_at}", end="")
    assert found["programs"] > 0 and apart <= BOUNDS["bf16"]
    assert same_bits(root, results, f"{name}-r", name)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_same_training_again(root, results, dropout, capsys):
    first, second = (results[f"again-{dropout}-{r}"] for r in "xy")
    with capsys.disabled():
        print(f"\nagain, dropout {dropout}: first difference {first_difference(first, second)}")
    assert same_bits(root, results, f"again-{dropout}-x", f"again-{dropout}-y")


def test_the_same_sharded_training_again_and_again(root, results):
    """Sums in another order showed in a process's first training, and in 2 of 10 later ones."""
    for repeat in range(1, REPEATS):
        assert same_bits(root, results, "again-qlora-0", f"again-qlora-{repeat}"), repeat


@pytest.mark.skipif(GPUS < 2, reason="one GPU")
def test_half_of_the_gpus_and_all_again_keep_samples_and_rates(root, results, capsys):
    reference, parts = results["worlds-reference"], ("worlds-a", "worlds-b", "worlds")
    assert [results[part]["world_size"] for part in parts] == [GPUS, GPUS // 2, GPUS]
    seen = {}
    for part in parts:
        seen |= results[part]["rows"]
    assert seen == reference["rows"] and results["worlds"]["rates"] == reference["rates"]
    found, expected = (load_file(root / f"{n}.safetensors") for n in ("worlds", "worlds-reference"))
    worst = max(float((found[k] - expected[k]).abs().max()) for k in expected)
    with capsys.disabled():
        print(f"\n{GPUS}, {GPUS // 2}, {GPUS} GPUs: weights {worst:.0e} apart", end="")
    assert worst < 1e-5


@pytest.mark.parametrize("name", [*FSDP2_ODDITIES, "fp16-ddp", "fp16-fsdp2"])
def test_resumes_bitwise(root, results, name, capsys):
    found = results[name]
    with capsys.disabled():
        print(
            f"\n{name}: losses {losses(found)[0]:.4f} to {losses(found)[-1]:.4f}, loss scale "
            f"{found['loss_scale']:g}, {found['memory_bytes'] / 2**20:.0f} MiB peak",
            end="",
        )
    assert same_bits(root, results, f"{name}-r", name)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("offload-lora", "bf16-lora-fsdp2"),
        ("offload-full", "bf16-full-fsdp2"),
        ("zero3-offload", "bf16-full-zero3"),
        ("checkpointed", "bf16-lora-fsdp2"),
        ("fp16-fsdp2", "fp16-ddp"),
        ("dora-fsdp2", "dora-ddp"),
        ("int8-ddp", "bf16-lora-ddp"),
        ("int8-offload", "bf16-lora-ddp"),
    ],
)
def test_the_losses_of_another_way(results, name, reference, capsys):
    apart = difference(results[name], results[reference])
    with capsys.disabled():
        print(f"\n{name} from {reference}: {apart:.1e}", end="")
    assert apart < 2e-2


def test_nf4_bytes_survive_fsdp2_in_bf16_storage(root, results, tmp_path, capsys):
    """bitsandbytes#1945: NaN patterns among the packed bytes would be changed on the way.

    Two trainings that differ in nothing but that (DDP holds bytes, FSDP2 gathers them as bf16) end
    with the same bits.
    """
    packed = {
        k: v
        for k, v in load_file(next((root / "nf4-bf16").glob("*.safetensors"))).items()
        if v.dtype == torch.uint8 and k.endswith(".weight")
    }
    nans = sum(int(v.flatten().view(torch.bfloat16).isnan().sum()) for v in packed.values())
    same = same_bits(root, results, "bf16-qlora-fsdp2", "bf16-qlora-ddp")
    with capsys.disabled():
        print(f"\nNF4 in bf16 storage: {nans} NaN patterns; equal to DDP bitwise: {same}", end="")
    assert nans > 0 and same
