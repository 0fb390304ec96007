"""Models of 2 GB quantized and converted: memory, bits, and ten kills. Mark `slow` (some minutes).

python -m pytest -m slow -o addopts= -s tests/test_quantize_memory.py
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, Qwen3MoeConfig

from ditty.models.shards import SHARD_BYTES
from ditty.planning.shapes import Shape
from ditty.pretrained.modelfolder import PICKLED, WEIGHTS
from ditty.quantization.quantplan import headers
from ditty.speed.bench import draw_model
from ditty.store.artifacts import Store, verify
from tests import test_ggufread
from tests.processes import ROOT
from tests.test_quantize import differences
from tests.test_shards import stamps
from tests.tiny import make_tokenizer

pytestmark = pytest.mark.slow

SHAPE = Shape(2048, 16, 8192, 32, 8, 32000, tied=True)  # 1.04 billion weights
OVER_IMPORTS = 500_000_000
KILLS = 10
SMALL_SHARD_BYTES = 16 << 20  # for the kills: some 40 shards

CHILD = """
import json, sys, time
from pathlib import Path
from ditty.store.artifacts import Store
from ditty.config.choices import Quantization
from ditty.models import shards
import ditty.quantization.quantize, bitsandbytes, transformers, accelerate, gguf
from ditty.conversion.modelstages import fetches
from transformers import LlamaForCausalLM, Qwen3MoeForCausalLM, BitsAndBytesConfig
from transformers import modeling_gguf_pytorch_utils

def peak():
    text = Path("/proc/self/status").read_text()
    return int(next(x.split()[1] for x in text.splitlines() if x.startswith("VmHWM:"))) * 1024

source, home = map(Path, sys.argv[1:3])
shards.SHARD_BYTES, to = int(sys.argv[3]), sys.argv[4]
before, started = peak(), time.perf_counter()
print("ready", flush=True)
def make(out):
    if to == "none":
        return fetches(source)(out)
    return ditty.quantization.quantize.quantize(source, out, Quantization(to), "bfloat16")
manifest = Store(home).build("prequantize", "key", {}, make, resumable=True)
seconds = time.perf_counter() - started
found = {"imports": before, "peak": peak(), "digest": manifest.digest, "seconds": seconds}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "model"
    draw_model(SHAPE, folder, torch.device("cpu"))
    return folder


def start(
    source: Path, home: Path, shard_bytes: int = SHARD_BYTES, to: str = "nf4"
) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", CHILD, str(source), str(home), str(shard_bytes), to]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def finish(process: "subprocess.Popen[str]") -> dict:
    output, _ = process.communicate()
    assert process.returncode == 0
    return json.loads(output.splitlines()[-1])


def largest_of(folder: Path) -> int:
    return max(header.span.size for header in headers(folder))


def check_memory(found: dict, largest: int, shard: int, what: str, capsys) -> None:
    """Raise unless the peak is at most 0.5 GB over imports, one tensor and one output shard."""
    grown = found["peak"] - found["imports"]
    with capsys.disabled():
        print(
            f"\n{what} in {found['seconds']:.0f} s: peak {grown / 1e6:.0f} MB over "
            f"{found['imports'] / 1e6:.0f} MB of imports; the largest tensor "
            f"{largest / 1e6:.0f} MB, an output shard {shard / 1e6:.0f} MB"
        )
    assert grown <= OVER_IMPORTS + largest + shard


@pytest.mark.parametrize("to", ["int8", "fp8"])
def test_memory_of_other_formats(source, tmp_path, capsys, to):
    found = finish(start(source, tmp_path, to=to))
    check_memory(found, largest_of(source), SHARD_BYTES, f"safetensors to {to}", capsys)


def test_memory_of_bin_files(source, tmp_path, capsys):
    old = tmp_path / "old"
    shutil.copytree(source, old, ignore=shutil.ignore_patterns("*.safetensors*"))
    state = {k: v for file in source.glob("*.safetensors") for k, v in load_file(file).items()}
    torch.save(state, old / PICKLED)
    del state
    found = finish(start(old, tmp_path / "home", to="none"))
    check_memory(found, largest_of(source), SHARD_BYTES, ".bin to safetensors", capsys)


def test_memory_of_a_gguf_file(source, tmp_path, capsys, monkeypatch):
    sizes = SHAPE.config()
    keys = {
        "block_count": sizes["num_hidden_layers"], "embedding_length": sizes["hidden_size"],
        "feed_forward_length": sizes["intermediate_size"],
        "attention.head_count": sizes["num_attention_heads"],
        "attention.head_count_kv": sizes["num_key_value_heads"],
    }  # fmt: skip
    monkeypatch.setitem(test_ggufread.KINDS, "large", ("llama", LlamaConfig(**sizes), keys))
    file = test_ggufread.write(tmp_path / "model.gguf", "large", Type.F16)
    found = finish(start(file, tmp_path / "home", to="none"))
    check_memory(found, largest_of(source), SHARD_BYTES, ".gguf to safetensors", capsys)


def test_memory_of_stacked_experts(tmp_path, capsys):
    """Pieces that are larger than a shard, and files of their own."""
    config = Qwen3MoeConfig(
        hidden_size=2048, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=4,
        vocab_size=320, num_experts=64, num_experts_per_tok=2, moe_intermediate_size=1024,
    )  # fmt: skip
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config).state_dict()
    source = tmp_path / "model"
    source.mkdir()
    tensors = {k: torch.full(v.shape, 0.01, dtype=torch.bfloat16) for k, v in empty.items()}
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(source)
    make_tokenizer().save_pretrained(source)
    largest = max(tensor.nbytes for tensor in tensors.values())
    del tensors
    assert largest > 2 * SHARD_BYTES * 0.9
    found = finish(start(source, tmp_path / "home"))
    check_memory(found, largest, largest, "stacks of experts beside nf4", capsys)


def test_memory_bits_and_ten_kills(source, tmp_path, capsys):
    size = sum(f.stat().st_size for f in source.glob("*.safetensors"))
    assert size > 2e9
    undisturbed = finish(start(source, tmp_path / "undisturbed"))
    seconds = undisturbed["seconds"]
    check_memory(
        undisturbed, largest_of(source), SHARD_BYTES, f"{size / 1e9:.2f} GB to nf4", capsys
    )

    small = finish(start(source, tmp_path / "small", SMALL_SHARD_BYTES))
    chance = random.Random(0)
    part = tmp_path / "killed/store/prequantize/.part-key"
    stands: dict[str, tuple[int, int]] = {}
    for _ in range(KILLS):
        process = start(source, tmp_path / "killed", SMALL_SHARD_BYTES)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(chance.uniform(0, 2 * seconds / KILLS))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        now = stamps(part)
        assert now.items() >= stands.items(), "a shard that stood was written again"
        stands = now
    killed = finish(start(source, tmp_path / "killed", SMALL_SHARD_BYTES))
    made = Store(tmp_path / "killed").path("prequantize", "key")
    assert stamps(made).items() >= stands.items()
    assert len(stands) > KILLS / 2
    assert killed["digest"] == small["digest"] == verify(made).digest
    with capsys.disabled():
        print(f"{KILLS} kills: {len(stands)} of {len(stamps(made))} shards stood at the last start")

    torch.set_num_threads(1)  # as bitsandbytes adds up scales: see ditty.quantization.formats.nf4
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=settings, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    ours = AutoModelForCausalLM.from_pretrained(made)
    assert differences(theirs, ours) == []
