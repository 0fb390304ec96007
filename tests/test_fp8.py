"""float8: against compressed-tensors, against the exact products, and as the base of a training."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config

from ditty.config.choices import Precision, Quantization
from ditty.config.spec import ModelSpec
from ditty.errors import ModelError
from ditty.models import fp8
from ditty.models.fp8 import E4M3, Fp8Linear, restore, round_rows
from ditty.models.model import load_base
from ditty.quantization import formats
from ditty.quantization.quantize import quantize
from tests import scenarios
from tests.tables_for_tests import write_rows
from tests.tiny import VOCABULARY, make_model_folder, random_rows, tiny_config

LORA = {"adapter": "lora", "lora_r": 4, "lora_dropout": 0.1}
TRAIN = {"max_steps": 12, "precision": "fp32", "micro_batch_size": 1, "learning_rate": 1e-3}
IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fp8")
    make_model_folder(root / "model", tiny_config(attention_bias=True))
    (root / "fp8").mkdir()
    quantize(root / "model", root / "fp8", Quantization.FP8, "float32")
    write_rows(root / "data" / "train.arrow", random_rows(30))
    write_rows(root / "data" / "eval.arrow", random_rows(5, seed=1))
    return root


def load(folder: Path) -> Any:
    spec = ModelSpec(base_model=str(folder), quantization=Quantization.FP8, attention="sdpa")
    return load_base(folder, spec, Precision.FP32, torch.device("cpu"))


def test_each_number_is_the_nearest_of_its_row() -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[3] = 0
    weight[5] *= 1e-30
    weight[6] *= 1e20
    rounded, scale = round_rows(weight)
    assert rounded.dtype == E4M3 and scale.shape == (48, 1)
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    codes = codes[codes.isfinite()]
    nearest = (weight / scale)[..., None].sub(codes).abs().amin(-1)
    assert torch.equal((weight / scale - rounded.float()).abs(), nearest)
    assert rounded.float().abs().amax(1).eq(448).sum() >= 46  # each row uses the whole range
    error = (restore(rounded, scale) - weight).double().norm(dim=1) / weight.double().norm(dim=1)
    usual = error[error.isfinite() & (weight.abs().amax(1) > 1e-9)]
    print(f"relative error a row: {usual.mean():.4f}, at most {usual.max():.4f}")
    assert len(usual) == 46 and usual.max() < 2**-4 and restore(rounded, scale)[3].eq(0).all()


def test_a_large_weight_is_done_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(33, 48)
    whole, scales = round_rows(weight)
    monkeypatch.setattr(formats, "CHUNK", 200)
    parts = formats.fp8(weight)
    assert torch.equal(parts["weight"].view(torch.uint8), whole.view(torch.uint8))
    assert torch.equal(parts["weight_scale"], scales)


def test_the_gradient_is_that_of_what_was_computed() -> None:
    torch.manual_seed(0)
    layer = Fp8Linear(64, 32, True, torch.float32)
    dense = torch.randn(32, 64) * 0.05
    weight, scale = round_rows(dense)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
    layer.bias = torch.nn.Parameter(torch.randn(32))
    x = torch.randn(2, 5, 64, requires_grad=True)
    y = layer(x)
    inputs, input_scale = round_rows(x.detach().view(-1, 64))
    expected = restore(inputs, input_scale) @ restore(weight, scale).T + layer.bias
    torch.testing.assert_close(y.view(-1, 32), expected)

    dy = torch.randn_like(y)
    y.backward(dy)
    exact = dy.view(-1, 32) @ restore(weight, scale)
    assert (x.grad.view(-1, 64) - exact).norm() / exact.norm() < 0.04
    rows, row_scale = round_rows(dy.view(-1, 32) * scale.T)
    torch.testing.assert_close(x.grad.view(-1, 64), restore(rows, row_scale) @ weight.float())
    assert layer.weight.grad is None and layer.bias.grad is not None


def test_autocast_decides_what_comes_out(root: Path) -> None:
    layer = load(root / "fp8").model.layers[0].mlp.up_proj
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 64)).dtype == torch.bfloat16
    assert layer(torch.randn(2, 64)).dtype == torch.float32


def test_compressed_tensors_computes_the_same(root: Path) -> None:
    """transformers without ditty: the layout is a known one, and so is the arithmetic."""
    ours, theirs = load(root / "fp8"), AutoModelForCausalLM.from_pretrained(root / "fp8")
    assert not any(isinstance(m, Fp8Linear) for m in theirs.modules())
    assert sum(isinstance(m, Fp8Linear) for m in ours.modules()) == 2 * 7
    with torch.no_grad():
        one, other = ours(IDS).logits, theirs(IDS).logits
        plain = AutoModelForCausalLM.from_pretrained(root / "model")(IDS).logits
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    error = float((one - plain).norm() / plain.norm())
    print(f"logits, float8 against fp32: {error:.4f} relative")
    assert 1e-4 < error < 0.1


def test_the_folder(root: Path) -> None:
    config = json.loads((root / "fp8" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and config["ignore"] == ["lm_head"]
    tensors = load_file(root / "fp8" / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == E4M3
    assert tensors["model.layers.0.mlp.up_proj.weight_scale"].shape == (128, 1)
    assert tensors["model.embed_tokens.weight"].dtype == torch.float32
    card = (root / "fp8" / "README.md").read_text()
    assert "in fp8" in card and "needs compressed-tensors" in card


def test_what_cannot_be_float8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = make_model_folder(tmp_path / "odd", tiny_config(intermediate_size=120))
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=r"gate_proj has a weight of \[120, 64\].*multiples of 16"):
        quantize(odd, tmp_path / "out", Quantization.FP8, "float32")
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=128, n_embd=64, n_layer=2, n_head=4)
    gpt2 = make_model_folder(tmp_path / "gpt2", config)
    with pytest.raises(ModelError, match="no linear layer that could be quantized"):
        quantize(gpt2, tmp_path / "out", Quantization.FP8, "float32")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(ModelError, match="A100 has no float8 arithmetic"):
        fp8.check_device(torch.device("cuda"))


@pytest.fixture(scope="module")
def results(root: Path) -> dict[str, Any]:
    """A training under each sharding, one of them killed; and one beside an fp32 base."""

    def job(name: str, sharding: str, processes: int = 2, **options: Any) -> dict[str, Any]:
        model = {**LORA, "quantization": "fp8", **options.pop("model", {})}
        train = {**TRAIN, "sharding": sharding, "gradient_accumulation_steps": 4 // processes}
        folder = root / ("fp8" if model["quantization"] == "fp8" else "model")
        options = {"processes": processes, "model_dir": str(folder), **options}
        return scenarios.job(root, name, model, {**train, "save_steps": 5}, **options)

    jobs = [job("ddp", "ddp"), job("fsdp2", "fsdp2"), job("fp8", "none", 1)]
    jobs += [job("killed-a", "fsdp2", home="killed", kill_before=8)]
    jobs += [job("killed", "fsdp2", home="killed")]
    jobs += [job("fp32", "none", 1, model={"quantization": "none"})]
    found = scenarios.launch(root / "job", jobs)
    return {name.replace(" ", "-"): result for name, result in found.items()}


def losses(result: dict[str, Any]) -> list[float]:
    return [float.fromhex(value) for value in result["losses"]]


def test_every_sharding_gives_the_same_bits(root: Path, results: dict[str, Any]) -> None:
    assert results["fsdp2"]["world_size"] == 2 and losses(results["ddp"]) == losses(
        results["fsdp2"]
    )
    whole, cut = (load_file(root / f"{name}.safetensors") for name in ("ddp", "fsdp2"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[k], cut[k]) for k in whole)
    assert max(results["fsdp2"]["kept"]) < 0.6 * results["ddp"]["kept"][0], "it was not cut"


def test_killed_and_resumed_it_ends_alike(root: Path, results: dict[str, Any]) -> None:
    one, other = (load_file(root / f"{name}.safetensors") for name in ("fsdp2", "killed"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert min(int(step) for step in results["killed"]["rows"]) > 1, "it began again"


def test_the_losses_are_near_those_beside_the_base_as_it_was(results: dict[str, Any]) -> None:
    pairs = list(zip(losses(results["fp8"]), losses(results["fp32"]), strict=True))
    worst = max(abs(a - b) / b for a, b in pairs)
    print(f"losses beside float8 and fp32: at most {worst:.5f} apart, relative")
    assert 0 < worst < 0.005
