"""Quantization on an NVIDIA GPU: the same bits as on a CPU, and float8 products. Mark `gpu`.

python -m pytest -m gpu -o addopts= -s tests/test_gpu_quantize.py
"""

import hashlib

import pytest
import torch
from transformers import GemmaConfig, GPTNeoXConfig

from ditty.config.choices import Quantization
from ditty.models import fp8
from ditty.quantization.quantize import quantize
from tests import scenarios
from tests.tables_for_tests import write_rows
from tests.test_gpu_strategies import config, difference, losses, same_bits
from tests.tiny import make_model_folder, random_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]

SIZES = {
    "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 512,
    "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
MODELS = {
    "llama": config(),
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "gemma": GemmaConfig(**SIZES, num_key_value_heads=2, head_dim=64),
}
STEPS = 12


def digests(folder):
    files = sorted(folder.glob("*.safetensors"))
    assert files
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("gpu")
    for name, settings in MODELS.items():
        make_model_folder(root / name, settings)
    write_rows(root / "data" / "train.arrow", random_rows(30, longest=200))
    write_rows(root / "data" / "eval.arrow", random_rows(5, seed=1, longest=200))
    return root


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("to", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("model", MODELS)
def test_a_gpu_makes_the_bits_of_a_cpu(root, tmp_path, model, to, dtype):
    made = {}
    for device in ("cpu", "cuda"):
        (tmp_path / device).mkdir()
        quantize(root / model, tmp_path / device, Quantization(to), dtype, device=device)
        made[device] = digests(tmp_path / device)
    assert made["cuda"] == made["cpu"]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_where_bitsandbytes_own_gpu_kernels_differ(kind, capsys):
    """A report: its CPU and GPU kernels may round otherwise; ditty's bits are those of its CPU."""
    import bitsandbytes.functional as bnb

    from ditty.quantization.formats import int8, nf4

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4096, 1024, generator=generator).to(torch.bfloat16)
    if kind == "nf4":
        ours = nf4(weight.cuda())["weight"]
        theirs = bnb.quantize_4bit(weight.cuda(), quant_type="nf4", compress_statistics=True)[0]
    else:
        ours = int8(weight.cuda())["weight"]
        theirs = bnb.int8_vectorwise_quant(weight.cuda().to(torch.float16))[0]
    apart = (ours.view(-1) != theirs.cpu().view(-1)).float().mean()
    with capsys.disabled():
        print(f"\nbitsandbytes' GPU kernel, {kind}: {float(apart):.2e} of the bytes differ")
    assert apart < 1e-3


def test_products_on_the_tensor_cores_equal_those_in_fp32():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 1024, generator=generator).to(torch.bfloat16)
    weight, scale = fp8.round_rows(torch.randn(768, 1024, generator=generator))
    dy = torch.randn(512, 768, generator=generator).to(torch.bfloat16)
    found = {}
    for device in ("cpu", "cuda"):
        given = x.to(device, copy=True).requires_grad_()
        y = fp8._Frozen.apply(given, weight.to(device), scale.to(device))
        y.backward(dy.to(device))
        found[device] = (y.detach().float().cpu(), given.grad.float().cpu())
    for here, there in zip(found["cuda"], found["cpu"], strict=True):
        # bf16 results, added up with use_fast_accum: 2^-8 of a row's size
        assert float((here - there).norm() / there.norm()) < 5e-3


@pytest.fixture(scope="module")
def trained(root):
    for name in ("fp8", "nf4"):
        (root / f"llama-{name}").mkdir()
        to = Quantization(name)
        quantize(root / "llama", root / f"llama-{name}", to, "bfloat16", device="cuda")

    def job(name, quantization="fp8", sharding="none", **options):
        train = {
            "max_steps": STEPS, "precision": "bf16", "micro_batch_size": 2,
            "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "warmup_steps": 2,
            "save_steps": 5, "sharding": sharding,
        }  # fmt: skip
        folder = "llama" if quantization == "none" else f"llama-{quantization}"
        model = {"lora_r": 8, "quantization": quantization}
        options = {"processes": 1, "model_dir": str(root / folder), **options}
        return scenarios.job(root, name, model, train, **options)

    jobs = [
        job("bf16", "none"),
        job("fp8"),
        job("fp8-a", home="fp8-r", stop_before=7),
        job("fp8-r", home="fp8-r"),
        job("fp8-fsdp2", sharding="fsdp2"),
    ]
    return scenarios.launch(root / "job", jobs, "cuda")


def test_training_beside_float8(root, trained, capsys):
    apart = difference(trained["fp8"], trained["bf16"])
    with capsys.disabled():
        print(f"\nfp8: {losses(trained['fp8'])[-1]:.4f}, at most {apart:.1e} from a bf16 base")
    assert apart < 1e-2
    assert same_bits(root, trained, "fp8-r", "fp8")
    assert same_bits(root, trained, "fp8-fsdp2", "fp8")
