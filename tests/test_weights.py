"""Any part of any weight, and every buffer, as from_pretrained has it: for each architecture."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, initialization
from transformers.core_model_loading import WeightRenaming
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel
from transformers.pytorch_utils import Conv1D

from ditty.config.choices import Precision
from ditty.config.spec import ModelSpec
from ditty.errors import ModelError
from ditty.models import skeleton
from ditty.models.model import load_base
from ditty.models.weights import WeightFiles
from ditty.pretrained.layernames import check_layers, of_tensors
from ditty.pretrained.tensorfiles import headers
from tests.architectures import BUILT, make, rewrite

CPU = torch.device("cpu")
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def theirs(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def ours(folder, dtype=torch.float32):
    attention = "eager" if folder.name == "gpt_neo" else "packed"
    spec = ModelSpec(base_model=str(folder), attention=attention)
    model = skeleton.empty_model(folder, spec, dtype)
    return model, WeightFiles(folder, model)


def different(files, reference):
    """Names of weights (tied ones: each name) of which a part is not the reference's."""
    found = []
    for name, weight in reference.named_parameters(remove_duplicate=False):
        flat, n = weight.reshape(-1), weight.numel()
        for start, stop in ((0, n), (n // 3, 2 * n // 3 + 1), (0, 1), (n - 1, n), (n // 2, n // 2)):
            part = files.read(name, start, stop, weight.shape)
            if not torch.equal(part.to(weight.dtype), flat[start:stop]):
                found.append((name, start, stop))
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    return {name: make(root, name) for name in BUILT}


@pytest.mark.parametrize("name", BUILT)
def test_the_same_weights_buffers_and_blocks_as_from_pretrained(folders, name):
    reference, (model, files) = theirs(folders[name]), ours(folders[name])
    assert all(p.is_meta for p in model.parameters())
    assert different(files, reference) == []
    skeleton.fill_buffers(model, files, CPU)
    expected, found = dict(reference.named_buffers()), dict(model.named_buffers())
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    assert skeleton.blocks(model) == list(lists[0]) and len(lists[0]) == 2
    assert all(p.is_meta for p in model.parameters())  # and nothing was made up


@pytest.mark.parametrize("name", BUILT)
def test_each_layer_can_be_named_in_a_spec(folders, name):
    """What the files are asked for, before there is a model, is no stricter than the model."""
    layers = of_tensors(header.name for header in headers(folders[name]))
    linear = [
        name
        for name, module in theirs(folders[name]).named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding | Conv1D)
    ]
    assert len(linear) > 5
    for layer in linear:
        check_layers(layers, [layer], [layer.rpartition(".")[2]])
        check_layers(layers, layer.replace(".", r"\."), [])


def test_what_a_model_keeps_in_fp32(folders, monkeypatch):
    kept = {"post_attention_layernorm", "k_proj"}
    monkeypatch.setattr(LlamaPreTrainedModel, "_keep_in_fp32_modules_strict", kept)
    reference, (model, _) = (f(folders["llama"], torch.bfloat16) for f in (theirs, ours))
    expected = {name: p.dtype for name, p in reference.named_parameters()}
    assert set(expected.values()) == {torch.float32, torch.bfloat16}
    assert {name: p.dtype for name, p in model.named_parameters()} == expected


def test_several_files(folders, tmp_path):
    reference = theirs(folders["llama_untied"])
    reference.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 4
    assert different(ours(tmp_path)[1], reference) == []


def test_half_of_each_weight_costs_half_the_bytes(folders):
    model, files = ours(folders["llama_untied"])
    for name, weight in model.named_parameters():
        n = weight.numel()
        files.read(name, n // 2, n, weight.shape)
    assert files.bytes_read == sum(4 * (p.numel() - p.numel() // 2) for p in model.parameters())
    files.bytes_read = 0
    files.read(HEAD, 100, 101, (320, 64))
    assert files.bytes_read == 64 * 4  # whole rows


@pytest.mark.parametrize("name", [EMBED, HEAD])
def test_tied_weights_are_found_under_either_name(tmp_path, name):
    folder = make(tmp_path, "llama")
    rewrite(folder, lambda tensors: tensors.update({name: tensors.pop(EMBED)}))
    assert different(ours(folder)[1], theirs(folder)) == []


def test_tied_weights_stored_twice(tmp_path):
    """from_pretrained would train both; what config.json says is then not what is trained."""
    folder = make(tmp_path, "llama")
    rewrite(folder, lambda tensors: tensors.update({HEAD: tensors[EMBED].clone()}))
    assert different(ours(folder)[1], theirs(folder)) == []
    rewrite(folder, lambda tensors: tensors[HEAD][300].add_(1))
    assert theirs(folder).lm_head.weight is not theirs(folder).model.embed_tokens.weight
    with pytest.raises(ModelError, match=f"{HEAD} and {EMBED}.*tie_word_embeddings to false"):
        ours(folder)


def test_names_of_the_hub(tmp_path):
    """GPT-2's: of the model without its head, and with the causal masks of old versions."""
    folder, reference = make(tmp_path, "gpt2"), theirs(tmp_path / "gpt2")

    def change(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("transformer.")] = tensors.pop(key)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 128, 128)

    rewrite(folder, change)
    assert "wte.weight" in load_file(folder / "model.safetensors")
    assert different(ours(folder)[1], reference) == []


def test_experts_in_either_layout(folders, tmp_path):
    """As on the hub, one tensor for each, and as in memory, one for all."""
    reference = theirs(folders["mixtral"])
    reference.save_pretrained(tmp_path, save_original_format=False)
    stored = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.mlp.experts.gate_up_proj" in stored
    assert "model.layers.0.mlp.experts.gate_up_proj" not in load_file(
        folders["mixtral"] / "model.safetensors"
    )
    assert different(ours(tmp_path)[1], reference) == []


def test_a_name_that_needs_no_renaming_is_left_alone(folders, monkeypatch):
    """As in from_pretrained: a rule for an older layout may also match a name of the new one."""
    rules = [WeightRenaming("model.norm", "model.final_norm")]
    monkeypatch.setattr("ditty.models.weights.get_model_conversion_mapping", lambda *a: rules)
    assert different(ours(folders["llama"])[1], theirs(folders["llama"])) == []


@pytest.mark.parametrize(
    ("name", "lost", "missing"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        ("llama_untied", HEAD, HEAD),
        ("llama", EMBED, HEAD),
    ],
)
def test_missing_tensor(tmp_path, name, lost, missing):
    folder = rewrite(make(tmp_path, name), lambda tensors: tensors.pop(lost))
    with pytest.raises(ModelError, match=f"{folder} has no tensor for {missing}"):
        ours(folder)[1].read(missing, 0, 1, (1,))


def test_a_file_cut_short(tmp_path):
    folder = make(tmp_path, "llama")
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match=f"{file} is damaged.*copy or download it again"):
        ours(folder)


def test_weights_of_another_config(tmp_path):
    folder = make(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    model, files = ours(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ModelError, match=rf"{name} .*\[128, 64\].*\[256, 64\]"):
        files.read(name, 0, 64, model.get_parameter(name).shape)


def test_stored_and_computed_buffers_of_one_module(tmp_path):
    """What the file holds stays, though the module's computed buffers are made again."""
    folder = make(tmp_path, "llama")
    rewrite(folder, lambda tensors: tensors.update({"model.rotary_emb.gain": torch.arange(3.0)}))
    model = skeleton.empty_model(folder, ModelSpec(base_model=str(folder)), torch.float32)
    rotary, original = model.model.rotary_emb, model._init_weights
    rotary.register_buffer("gain", torch.empty(3, device="meta"))
    rotary.register_buffer("here", torch.ones(2), persistent=False)

    def init_weights(module):
        original(module)
        if module is rotary:
            initialization.zeros_(module.gain)

    model._init_weights = init_weights
    skeleton.fill_buffers(model, WeightFiles(folder, model), CPU)
    assert torch.equal(rotary.gain, torch.arange(3.0))
    assert torch.equal(rotary.here, torch.ones(2))
    assert torch.equal(rotary.inv_freq, theirs(folder).model.rotary_emb.inv_freq)


@pytest.mark.parametrize("owner", ["", "model.layers.0"])
def test_a_buffer_that_nobody_computes(folders, owner):
    model, files = ours(folders["llama"])
    empty = torch.empty(3, device="meta")
    model.get_submodule(owner).register_buffer("table", empty, persistent=False)
    name = f"{owner}.table".removeprefix(".")
    with pytest.raises(ModelError, match=f"^{name} is in no file.*train.sharding: ddp"):
        skeleton.fill_buffers(model, files, CPU)


def test_a_model_without_blocks(folders):
    model, _ = ours(folders["llama"])
    model._no_split_modules = None
    with pytest.raises(ModelError, match="LlamaForCausalLM names no blocks.*train.sharding: ddp"):
        skeleton.blocks(model)


def test_blocks_inside_blocks_are_not_cut_again(folders):
    model, _ = ours(folders["llama"])
    model._no_split_modules = {"LlamaDecoderLayer", "LlamaMLP"}
    assert skeleton.blocks(model) == list(model.model.layers)


@pytest.mark.parametrize("load", [skeleton.empty_model, load_base])
def test_an_attention_that_cannot_be_replaced(folders, load):
    spec = ModelSpec(base_model="x", attention="packed")
    last = (torch.float32,) if load is skeleton.empty_model else (Precision.FP32, CPU)
    with pytest.raises(ModelError, match="no attention but its own. Set model.attention: eager"):
        load(folders["gpt_neo"], spec, *last)


def test_a_folder_that_transformers_cannot_build(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(ModelError, match="cannot build the model of .*nothing"):
        skeleton.empty_model(tmp_path, ModelSpec(base_model="x"), torch.float32)
