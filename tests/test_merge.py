"""A merged model is what the adapter beside its base is; the oracle is peft.

Its own `merge_and_unload` for the weights, and the model that is not merged for the logits.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ditty.config.choices import Precision, Quantization
from ditty.config.spec import ModelSpec
from ditty.conversion import export
from ditty.conversion.export import merge
from ditty.errors import ModelError
from ditty.models import shards
from ditty.models.model import add_adapter, load_base, save_trained, trainable
from ditty.quantization.quantize import quantize
from ditty.store.files import read_json, write_json
from tests.architectures import make, rewrite
from tests.tiny import VOCABULARY

ATTENTION = r".*\.(q_proj|v_proj)"
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"adapter": "dora"},
    "rslora": {"rank_stabilized": True},
    "head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "embeddings_lora": {"target_modules": ["embed_tokens", "q_proj"]},
    "head_lora": {"target_modules": ["lm_head", "q_proj"]},
    "attention": {"target_modules": ATTENTION},
}
# merge_and_unload adds these to the tensor that head and embeddings share, and so to both.
IN_PLACE = ("embeddings_lora", "head_lora")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("merge")
    for name in ("llama", "llama_untied", "gpt2", "gemma", "mixtral"):
        make(root, name)
    return root


def trained(base: Path, out: Path, kind: str, scale: float = 0.05) -> Path:
    """An adapter as a training leaves it: every matrix of it is other than at the start."""
    spec = ModelSpec.model_validate({"base_model": str(base), "lora_r": 4, **KINDS[kind]})
    device = torch.device("cpu")
    module = add_adapter(load_base(base, spec, Precision.FP32, device), spec, seed=0)
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: value.detach() + scale * torch.randn(value.shape, generator=generator)
        for name, value in trainable(module).items()
    }
    save_trained(module, weights, str(base), out)
    return out


def loaded(folder: Path) -> PreTrainedModel:
    """The folder as anyone loads it; nothing missing, nothing needless."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    AutoTokenizer.from_pretrained(folder)
    return model.eval()


def beside(base: Path, adapter: Path) -> PeftModel:
    """The oracle: the adapter beside its base, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(ids).logits


def merged(base: Path, adapter: Path | None, out: Path, **options: Any) -> dict[str, Any]:
    out.mkdir()
    return merge(base, adapter, out, **options)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("llama", kind) for kind in KINDS),
        *(("llama_untied", kind) for kind in ("lora", "head", "embeddings_lora")),
        *(("gpt2", kind) for kind in ("lora", "dora", "head")),
        ("gemma", "lora"),
    ],
)
def test_the_logits_are_those_of_the_adapter_beside_its_base(
    root: Path, tmp_path: Path, name: str, kind: str
) -> None:
    base, out = root / name, tmp_path / "out"
    adapter = trained(base, tmp_path / "adapter", kind)
    facts = merged(base, adapter, out)
    oracle, ours = beside(base, adapter), loaded(out)
    plain = logits(loaded(base))
    expected = logits(oracle)
    assert (expected - plain).abs().max() > 1e-2, "the adapter does nothing"
    torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)

    tied_before = loaded(base).config.tie_word_embeddings
    one_of_two = kind.startswith(("head", "embeddings"))
    assert ours.config.tie_word_embeddings == (tied_before and not one_of_two)
    assert bool(facts["untied"]) == (tied_before and one_of_two)
    if not (tied_before and kind in IN_PLACE):
        theirs, own = oracle.merge_and_unload().state_dict(), ours.state_dict()
        assert theirs.keys() == own.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(own[key], value, rtol=0, atol=1e-6, msg=key)
    # Names and all that is not trained are as in the base, to the byte.
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() <= after.keys()
    kept = [v for v in after.values() if any(v.equal(other) for other in before.values())]
    assert facts["other_weights"] == sum(v.numel() for v in kept)
    assert (
        facts["merged_weights"] == sum(v.numel() for v in after.values()) - facts["other_weights"]
    )


@pytest.mark.parametrize("kind", ["lora", "head"])
def test_a_checkpoint_whose_names_lack_the_prefix(root: Path, tmp_path: Path, kind: str) -> None:
    """As GPT-2's on the hub: `wte.weight` is the model's `transformer.wte.weight`."""
    base = shutil.copytree(root / "gpt2", tmp_path / "base")

    def bare(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    rewrite(base, bare)
    adapter = trained(base, tmp_path / "adapter", kind)
    merged(base, adapter, tmp_path / "out")
    assert "wte.weight" in load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(
        logits(loaded(tmp_path / "out")), logits(beside(base, adapter)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["lora", "dora", "head"])
def test_a_bf16_base_is_rounded_once(root: Path, tmp_path: Path, kind: str) -> None:
    base = shutil.copytree(root / "llama_untied", tmp_path / "base")
    rewrite(base, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    write_json(base / "config.json", {**read_json(base / "config.json"), "dtype": "bfloat16"})
    adapter = trained(base, tmp_path / "adapter", kind)
    merged(base, adapter, tmp_path / "out")
    exact = beside(base, adapter).merge_and_unload().state_dict()
    written = load_file(tmp_path / "out" / "model.safetensors")
    for key, value in written.items():
        assert value.dtype == torch.bfloat16 and torch.equal(value, exact[key].bfloat16()), key
    assert loaded(tmp_path / "out").dtype == torch.bfloat16


def test_another_dtype(root: Path, tmp_path: Path) -> None:
    adapter = trained(root / "llama", tmp_path / "adapter", "lora")
    merged(root / "llama", adapter, tmp_path / "out", dtype="bfloat16")
    assert loaded(tmp_path / "out").dtype == torch.bfloat16
    exact = beside(root / "llama", adapter).merge_and_unload().state_dict()
    for key, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(value, exact[key].bfloat16()), key


def test_without_an_adapter_it_casts(root: Path, tmp_path: Path) -> None:
    merged(root / "llama", None, tmp_path / "out", dtype="float16")
    exact = loaded(root / "llama").state_dict()
    ours = loaded(tmp_path / "out")
    assert ours.dtype == torch.float16 and ours.config.tie_word_embeddings
    for key, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert value.dtype == torch.float16 and torch.equal(value, exact[key].half()), key


def test_no_more_than_a_layer_is_in_memory(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the base: after each tensor the model is without weights again, shards are bounded."""
    models: list[PeftModel] = []
    load = export._adapted

    def remember(*args: Any) -> PeftModel:
        models.append(load(*args))
        return models[-1]

    held: list[int] = []

    def look(done: int, total: int, name: str) -> None:
        values = models[0].named_parameters()
        held.append(sum(p.numel() for n, p in values if "lora_" not in n and not p.is_meta))

    monkeypatch.setattr(export, "_adapted", remember)
    monkeypatch.setattr(shards, "SHARD_BYTES", 100_000)
    base = root / "llama_untied"
    adapter = trained(base, tmp_path / "adapter", "dora")
    facts = merged(base, adapter, tmp_path / "out", progress=look)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(held) == len(load_file(base / "model.safetensors")) and set(held) == {0}
    assert facts["shards"] == len(files) > 2
    assert max(file.stat().st_size for file in files) < 110_000  # the header is not counted
    torch.testing.assert_close(
        logits(loaded(tmp_path / "out")), logits(beside(base, adapter)), rtol=1e-5, atol=1e-5
    )


def test_experts_beside_the_adapter_are_copied_and_under_it_refused(
    root: Path, tmp_path: Path
) -> None:
    base = root / "mixtral"
    adapter = trained(base, tmp_path / "attention", "attention")
    merged(base, adapter, tmp_path / "out")
    torch.testing.assert_close(
        logits(loaded(tmp_path / "out")), logits(beside(base, adapter)), rtol=1e-5, atol=1e-5
    )
    adapter = trained(base, tmp_path / "all", "lora")
    with pytest.raises(ModelError, match="experts fused in one tensor.*merge_and_unload"):
        merged(base, adapter, tmp_path / "refused")
    assert list((tmp_path / "refused").iterdir()) == []


def broken(change: Callable[[dict[str, torch.Tensor]], Any], adapter: Path) -> Path:
    file = adapter / "adapter_model.safetensors"
    (adapter / "model.safetensors").write_bytes(file.read_bytes())
    rewrite(adapter, change)
    shutil.move(adapter / "model.safetensors", file)
    return adapter


def test_what_does_not_fit_is_refused(root: Path, tmp_path: Path) -> None:
    base = root / "llama"
    adapter = trained(base, tmp_path / "adapter", "lora")
    with pytest.raises(ModelError, match=r"does not fit the model in .*gpt2"):
        merged(root / "gpt2", adapter, tmp_path / "1")
    with pytest.raises(ModelError, match="expected float32"):
        merged(base, adapter, tmp_path / "2", dtype="int4")
    (tmp_path / "nf4").mkdir()
    quantize(base, tmp_path / "nf4", Quantization.NF4, "float32")
    with pytest.raises(ModelError, match="is quantized"):
        merged(tmp_path / "nf4", adapter, tmp_path / "3")
    huge = broken(lambda t: [v.mul_(1e6) for v in t.values()], adapter)
    with pytest.raises(ModelError, match="weight is not finite .* torch.float16"):
        merged(base, huge, tmp_path / "4", dtype="float16")
    short = broken(lambda t: t.pop(min(t)), adapter)
    with pytest.raises(ModelError, match="it has no .*lora_A"):
        merged(base, short, tmp_path / "5")
