""".bin files to safetensors: the same model for transformers, and nothing in them is run."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ditty.config.choices import Precision, Quantization
from ditty.config.spec import RunSpec
from ditty.conversion import modelstages
from ditty.conversion.unpickle import convert_pickled
from ditty.errors import ModelError
from ditty.models import shards
from ditty.pretrained import basemodel
from ditty.pretrained.basemodel import Kind
from ditty.pretrained.modelfolder import PICKLED, PICKLED_INDEX
from ditty.store.artifacts import Store, verify
from flows.quantize import quantize

from .fake_hub import REPO, fake_hub
from .tiny import make_model_folder, tiny_config

HALVES = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("plain") / "model", tiny_config())


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def pickled(plain: Path, target: Path, *, halves: bool = False, **options: Any) -> Path:
    """The model as transformers wrote it before safetensors: tied weights are one storage."""
    shutil.copytree(plain, target)
    (target / "model.safetensors").unlink()
    state = state_of(plain)
    if not halves:
        torch.save(state, target / PICKLED, **options)
        return target
    names = list(state)
    parts = (names[: len(names) // 2], names[len(names) // 2 :])
    for file, part in zip(HALVES, parts, strict=True):
        torch.save({name: state[name] for name in part}, target / file)
    weight_map = {name: file for file, part in zip(HALVES, parts, strict=True) for name in part}
    (target / PICKLED_INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return target


@pytest.mark.parametrize(
    "options",
    [{}, {"halves": True}, {"_use_new_zipfile_serialization": False}],
    ids=["one file", "two files", "before 1.6"],
)
def test_transformers_reads_the_same_model(plain, tmp_path, options, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 100_000)
    source, out = pickled(plain, tmp_path / "old", **options), tmp_path / "out"
    out.mkdir()
    seen: list[str] = []
    facts = convert_pickled(source, out, lambda done, total, name: seen.append(name))
    ours, theirs = state_of(out), state_of(plain)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert facts["shards"] > 1 and facts["tensors"] == len(seen) == len(theirs)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight


class Harmful:
    """Runs a command when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


def test_code_in_a_file_is_refused_and_not_run(plain, tmp_path):
    source = pickled(plain, tmp_path / "old")
    torch.save({"weight": Harmful(tmp_path / "run")}, source / PICKLED)
    torch.load(source / PICKLED, weights_only=False)
    assert (tmp_path / "run").exists(), "the file is as harmful as it should be"
    (tmp_path / "run").unlink()
    with pytest.raises(ModelError, match="cannot be read as weights alone: UnpicklingError"):
        convert_pickled(source, tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"model": {"weight": torch.ones(2)}, "step": 3}, "holds model, which is no tensor"),
        (b"no pickle", "cannot be read as weights alone"),
    ],
)
def test_what_else_may_be_in_a_file(plain, tmp_path, content, match):
    source = pickled(plain, tmp_path / "old")
    if isinstance(content, bytes):
        (source / PICKLED).write_bytes(content)
    else:
        torch.save(content, source / PICKLED)
    with pytest.raises(ModelError, match=match):
        convert_pickled(source, tmp_path)


@pytest.mark.usefixtures("forked_workers")
def test_bin_files_in_a_folder_and_at_the_hub_are_base_models(
    plain, tmp_path, home, prefect_api, monkeypatch
):
    source = pickled(plain, tmp_path / "old", halves=True)
    with fake_hub(source, tmp_path / "cache", monkeypatch) as hub:
        refs = [basemodel.identify(name) for name in (str(source), REPO)]
        assert [ref.kind for ref in refs] == [Kind.PICKLED, Kind.HUB]
        assert [basemodel.locate(ref, Store(home)) for ref in refs] == [None, None]
        names = (str(source), str(plain), REPO)
        found = [quantize(name, Quantization.NF4, None, Precision.FP32) for name in names]
        places = [basemodel.locate(ref, Store(home)) for ref in refs]
        assert places[0] != places[1] and {p.parent for p in places} == {home / "store/fetch"}
        hub.requests.clear()
        assert quantize(REPO, Quantization.NF4, None, Precision.FP32) == found[2]
        assert not [request for request in hub.requests if "/resolve/" in request]
        values = {"name": "mine", "data": {"source": "a.jsonl"}, "model": {"base_model": REPO}}
        spec, other = RunSpec.model_validate(values), Store(tmp_path / "library")
        folder = modelstages.base_folder(refs[1], spec, other)  # as a Pipeline does
    assert verify(folder).digest == verify(places[1]).digest
    assert found[2]["digest"] == found[0]["digest"]

    def tensors(path: str) -> dict[str, torch.Tensor]:
        return AutoModelForCausalLM.from_pretrained(path).state_dict()

    ours, theirs = (tensors(f["path"]) for f in found[:2])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
