"""A model of 2 GB quantized: its memory, its bits, and ten kills. Mark `slow` (some minutes).

python -m pytest -m slow -o addopts= -s tests/test_quantize_memory.py
"""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ditty.planning.shapes import Shape
from ditty.quantization.quantplan import headers
from ditty.quantization.shards import SHARD_BYTES
from ditty.speed.bench import draw_model
from ditty.store.artifacts import Store, verify
from tests.processes import ROOT
from tests.test_quantize import differences
from tests.test_shards import stamps

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
from ditty.quantization import shards
import ditty.quantization.quantize, bitsandbytes, transformers, accelerate
from transformers import LlamaForCausalLM, BitsAndBytesConfig

def peak():
    text = Path("/proc/self/status").read_text()
    return int(next(x.split()[1] for x in text.splitlines() if x.startswith("VmHWM:"))) * 1024

source, home = map(Path, sys.argv[1:3])
shards.SHARD_BYTES = int(sys.argv[3])
before, started = peak(), time.perf_counter()
print("ready", flush=True)
make = lambda out: ditty.quantization.quantize.quantize(source, out, Quantization.NF4, "bfloat16")
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


def start(source: Path, home: Path, shard_bytes: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", CHILD, str(source), str(home), str(shard_bytes)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def finish(process: "subprocess.Popen[str]") -> dict:
    output, _ = process.communicate()
    assert process.returncode == 0
    return json.loads(output.splitlines()[-1])


def test_memory_bits_and_ten_kills(source, tmp_path, capsys):
    size = sum(f.stat().st_size for f in source.glob("*.safetensors"))
    assert size > 2e9
    undisturbed = finish(start(source, tmp_path / "undisturbed", SHARD_BYTES))
    seconds = undisturbed["seconds"]
    grown = undisturbed["peak"] - undisturbed["imports"]
    largest = max(header.span.size for header in headers(source))
    with capsys.disabled():
        print(
            f"\n{size / 1e9:.2f} GB to nf4 in {seconds:.0f} s: peak {grown / 1e6:.0f} MB over "
            f"{undisturbed['imports'] / 1e6:.0f} MB of imports; the largest tensor "
            f"{largest / 1e6:.0f} MB, an output shard {SHARD_BYTES / 1e6:.0f} MB"
        )
    assert grown <= OVER_IMPORTS + largest + SHARD_BYTES

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
