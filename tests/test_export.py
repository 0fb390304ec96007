"""`export` merges and copies what a run has made, verified, and never over something else.

Where only the copy matters the result is a stand-in; that a run leaves word of its own is seen in
test_finetune, what a merge gives in test_merge.
"""

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from prefect.blocks.system import Secret
from transformers import AutoModelForCausalLM, GenerationConfig
from typer.testing import CliRunner

from ditty.config.choices import ExportDtype, ExportTo, Quantization
from ditty.config.spec import RunSpec
from ditty.conversion.ggufexport import FILE
from ditty.errors import DittyError, RemoteDenied, RemoteError, RunError, SpecError
from ditty.quantization.quantize import quantize
from ditty.results.lineage import Node, lineage
from ditty.runs.rundir import RunDir
from ditty.stages import stageline
from ditty.store.artifacts import Store, verify
from ditty.store.files import write_json
from ditty.store.remote import Remote, final_name
from flows.commands.cli import app
from flows.events import Event, EventState, listen
from flows.export import export
from flows.tasks import TOKEN_BLOCK
from tests.architectures import rewrite
from tests.push_hub import TOKEN, push_hub
from tests.remotes import bucket, moto_url, s3_env  # noqa: F401
from tests.served import tiny_spec
from tests.test_merge import trained
from tests.tiny import make_model_folder, tiny_config
from tests.tokenizers_for_tests import train_tokenizer


def leave_word(run: RunDir, spec: RunSpec, key: str) -> None:
    run.root.mkdir(parents=True)
    write_json(run.trained_file, {"train": key, "spec": spec.model_dump(mode="json")})


@pytest.fixture
def made(tmp_path: Path, home: Path, prefect_api: str) -> Path:
    """The result of the run `mine`, in the store and at its target."""
    spec = RunSpec.model_validate(tiny_spec(tmp_path, "mine", 1))
    store, key = Store(home), "a" * 64
    leave_word(RunDir.named("mine", home), spec, key)
    with store.commit("train", key, {"stage": "train", "inputs": {"model": "b"}}) as out:
        (out / "adapter_model.safetensors").write_bytes(b"weights")
    assert spec.upload.url
    (tmp_path / "target").mkdir()
    Remote(spec.upload.url).put(store.path("train", key), final_name("mine", key))
    return store.path("train", key)


def test_to_a_folder_and_to_a_bucket(made: Path, tmp_path: Path, bucket: str) -> None:  # noqa: F811
    out = tmp_path / "model-1"
    done = export("mine", out=str(out))
    assert export("mine")["path"] == done["path"]
    assert done["digest"] == verify(out).digest == verify(Path(done["path"])).digest
    kept = Path(done["path"], "adapter_model.safetensors")
    assert kept.samefile(made / "adapter_model.safetensors"), "it takes no second place"
    assert (out / "adapter_model.safetensors").read_bytes() == b"weights"
    before = (out / "adapter_model.safetensors").stat().st_ino
    assert export("mine", out=str(out)) == done, "a second time"
    assert (out / "adapter_model.safetensors").stat().st_ino == before

    url = f"s3://{bucket.name}/models/one"
    assert export("mine", out=url)["out"] == url
    manifest = Remote(f"s3://{bucket.name}/models").manifest("one")
    assert manifest and manifest.digest == done["digest"]


def test_to_the_hub(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """With the token of a Prefect block, which nothing that was written or said has in it."""
    caplog.set_level("DEBUG")
    with push_hub(tmp_path / "cache", monkeypatch) as hub:
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(RemoteDenied, match="there is no token for the hub"):
            export("mine", out="hub:my-org/mine")
        Secret(value=TOKEN).save(TOKEN_BLOCK)
        done = export("mine", out="hub:my-org/mine")
        again = export("mine", out="hub:my-org/mine")
        assert done == again and done["out"] == "hub:my-org/mine"
        repo = hub.repos["my-org/mine"]
        assert repo["private"] and len(repo["commits"]) == 1
        assert hub.holds("my-org/mine", Path(done["path"]))
        export("mine", out="hub:me/mine", public=True)
        assert not hub.repos["me/mine"]["private"]
    assert repo["files"]["adapter_model.safetensors"] == b"weights"
    assert b"library_name: peft" in repo["files"]["README.md"]
    home = made.parent.parent.parent
    kept = b"".join(p.read_bytes() for p in home.rglob("*") if p.is_file())
    said = "".join(capfd.readouterr()) + caplog.text
    assert "my-org/mine" in said and TOKEN not in said and TOKEN.encode() not in kept


def test_never_over_something_else(made: Path, tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    with other.commit("train", "b" * 64, {}) as out:
        (out / "adapter_model.safetensors").write_bytes(b"others")
    there = tmp_path / "there"
    shutil.copytree(other.path("train", "b" * 64), there)
    with pytest.raises(RemoteError, match="another content is committed"):
        export("mine", out=str(there))
    assert (there / "adapter_model.safetensors").read_bytes() == b"others"


def test_a_result_that_is_gone_here_comes_from_the_target(made: Path, tmp_path: Path) -> None:
    shutil.rmtree(made)
    export("mine", out=str(tmp_path / "out"))
    assert verify(tmp_path / "out") and verify(made)
    shutil.rmtree(made)
    shutil.rmtree(tmp_path / "target")
    (tmp_path / "target").mkdir()
    with pytest.raises(RunError, match="neither in .* nor at file:///"):
        export("mine", out=str(tmp_path / "more"))


def test_no_such_run(made: Path, home: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run yours .* runs there: mine"):
        export("yours", out=str(tmp_path / "out"))
    RunDir.named("begun", home).root.mkdir()
    with pytest.raises(
        RunError, match="run begun has no result yet: its training has not finished"
    ):
        export("begun")


def test_a_place_is_refused_before_anything_is_made_for_it(made: Path, tmp_path: Path) -> None:
    for place in (
        "https://example.org/model",
        str(tmp_path / "no name"),
        str(tmp_path / "no" / "x"),
    ):
        with pytest.raises(DittyError, match="no target|no name|no folder"):
            export("mine", ExportTo.MERGED, place)
    with pytest.raises(RunError, match="is not the model that run mine was trained upon"):
        export("mine", ExportTo.MERGED)


def test_the_key_of_a_merge() -> None:
    first = stageline.merge_ref("a", "b")
    others = [stageline.merge_ref("x", "b"), stageline.merge_ref("a", "x")]
    others += [stageline.merge_ref("a", "b", "bfloat16")]
    assert len({ref.key for ref in (first, *others)}) == 4
    files = [
        stageline.gguf_ref(first, name, ends) for name, ends in (("a", []), ("b", []), ("a", [1]))
    ]
    files.append(stageline.gguf_ref(others[0], "a", []))
    files += [stageline.gguf_ref(first, "a", [], to) for to in (ExportDtype.Q8_0, ExportDtype.Q4_0)]
    assert len({ref.key for ref in files}) == 6
    assert (
        stageline.export_ref(first, "file:///x").key != stageline.export_ref(first, "file:///y").key
    )


@pytest.mark.usefixtures("forked_workers")
def test_a_quantized_training_becomes_a_model(tmp_path: Path, home: Path, prefect_api: str) -> None:
    """An adapter of an nf4 base, merged into fp32: what it is beside the unquantized base."""
    values = tiny_spec(tmp_path, "mine", 4)
    values["model"]["quantization"] = "nf4"
    train_tokenizer(tmp_path / "model")
    spec, store = RunSpec.model_validate(values), Store(home)

    def chain(out: Path) -> tuple[Node, ...]:
        return lineage(str(out), store).parents

    train = stageline.resolve(spec, store).need("train")
    (tmp_path / "nf4").mkdir()
    quantize(tmp_path / "model", tmp_path / "nf4", Quantization.NF4, "float32")
    facts = {"stage": "train", "inputs": train.inputs, "ends": [1]}
    with store.commit("train", train.key, facts) as staging:
        trained(tmp_path / "nf4", staging, "dora")
    leave_word(RunDir.named("mine", home), spec, train.key)
    events: list[Event] = []
    with listen(events.append):
        done = export("mine", ExportTo.MERGED, str(tmp_path / "out"))
        again = export("mine", ExportTo.MERGED)
    states = [e.state for e in events if e.stage.startswith("merge")]
    assert states == [EventState.STARTED, EventState.DONE, EventState.STARTED, EventState.CACHED]
    assert again == done | {"out": None}
    assert verify(tmp_path / "out").digest == verify(Path(done["path"])).digest
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapter = export("mine")
    assert adapter["base"] == str(tmp_path / "model") and done["base"] is None
    ids = torch.arange(3, 40)[None]
    plain = base(ids).logits
    expected = PeftModel.from_pretrained(base, adapter["path"]).eval()(ids).logits
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)

    with pytest.raises(SpecError, match="--dtype: got bf16, but an adapter is copied as"):
        export("mine", dtype=ExportDtype.BF16)
    file = export("mine", ExportTo.GGUF, str(tmp_path / "file"))
    (gguf,) = chain(tmp_path / "file")
    assert file["base"] is None and [parent.kind for parent in gguf.parents] == ["merge"]
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "file", gguf_file=FILE)
    assert torch.equal(read(ids).logits, ours)
    with pytest.raises(SpecError, match="--dtype: q8_0 is of .gguf files: use `--to gguf`, or fp"):
        export("mine", ExportTo.MERGED, dtype=ExportDtype.Q8_0)
    small = export("mine", ExportTo.GGUF, dtype=ExportDtype.Q8_0)["path"]
    read = AutoModelForCausalLM.from_pretrained(small, gguf_file=FILE)
    assert 0 < (read(ids).logits - ours).abs().max() < 0.1
    assert Path(small, FILE).stat().st_size < 0.4 * (tmp_path / "file" / FILE).stat().st_size

    (merge,) = chain(tmp_path / "out")
    assert {parent.kind for parent in merge.parents} == {"train", "model"}
    stops = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    assert stops == [2, 1], "the tokenizer's own, and what its rows ended with"
    rewrite(tmp_path / "model", lambda tensors: [t.mul_(2) for t in tensors.values()])
    with pytest.raises(RunError, match="its files have changed since"):
        export("mine", ExportTo.MERGED)


@pytest.mark.slow
def test_a_model_that_was_trained_whole(tmp_path: Path, home: Path, prefect_api: str) -> None:
    """Cast to bf16, and that written as .gguf: each weight rounded once."""
    values = tiny_spec(tmp_path, "mine", 4)
    values["model"]["adapter"] = "none"
    spec, store = RunSpec.model_validate(values), Store(home)
    train = stageline.resolve(spec, store).need("train")
    with store.commit("train", train.key, {"stage": "train", "inputs": train.inputs}) as staging:
        make_model_folder(staging, tiny_config(hidden_size=32))
        train_tokenizer(staging)
    leave_word(RunDir.named("mine", home), spec, train.key)
    trained = AutoModelForCausalLM.from_pretrained(export("mine")["path"])
    assert export("mine", ExportTo.MERGED)["path"] == export("mine")["path"]
    cast = export("mine", ExportTo.MERGED, dtype=ExportDtype.BF16)["path"]
    export("mine", ExportTo.GGUF, str(tmp_path / "file"), ExportDtype.BF16)
    ours = AutoModelForCausalLM.from_pretrained(cast)
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path / "file", gguf_file=FILE, dtype=torch.bfloat16
    )
    assert ours.dtype == torch.bfloat16
    for name, value in trained.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value.bfloat16()), name
        assert torch.equal(read.state_dict()[name], value.bfloat16()), name


def test_the_command(made: Path) -> None:
    done = CliRunner().invoke(app, ["export", "mine"])
    assert done.exit_code == 0, done.output
    assert (
        str(made.parent.parent / "package") in done.output.replace("\n", "")
        and "PeftModel.from_pretrained" in done.output
    )
