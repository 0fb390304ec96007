"""Two machines, one place: what the first has made, the second fetches and does not make again."""

import shutil
from pathlib import Path

import pytest

from ditty.config.spec import RunSpec
from ditty.errors import RemoteError, SpecError
from ditty.planning.plan import make_plan
from ditty.runs.rundir import RunDir
from ditty.stages import share, stageline
from ditty.store.artifacts import MANIFEST, Store, verify
from flows.events import Event, EventState, listen
from flows.finetune import finetune
from flows.quantize import quantize
from tests.remotes import bucket, moto_url, s3_env  # noqa: F401
from tests.served import tiny_spec
from tests.tiny import make_model_folder, tiny_config

MADE = ("load", "tokenize", "pack", "prequantize")


@pytest.fixture
def spec(tmp_path: Path) -> RunSpec:
    values = tiny_spec(tmp_path, "mine", 2)
    values["model"]["quantization"] = "nf4"
    del values["upload"]
    return RunSpec.model_validate(values)


def use(home: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("DITTY_HOME", str(home))
    monkeypatch.setenv(share.VARIABLE, url)
    return Store(home)


@pytest.mark.usefixtures("forked_workers")
def test_a_second_machine_makes_nothing_that_the_first_has_made(
    spec: RunSpec,
    tmp_path: Path,
    prefect_api: str,
    bucket,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = f"s3://{bucket.name}/store"
    one = use(tmp_path / "one", url, monkeypatch)
    finetune(spec)
    shared = {o.key for o in bucket.objects.all() if o.key.endswith(MANIFEST)}
    assert sorted(key.split("/")[1] for key in shared) == sorted(MADE)

    two = use(tmp_path / "two", url, monkeypatch)
    planned = {p.stage: p for p in make_plan(spec, two).stages}
    assert {planned[stage].state for stage in MADE} == {"will be fetched"}
    assert url in planned["prequantize"].why and planned["train"].state == "will run"
    finetune(spec)
    run = RunDir.named("mine", tmp_path / "two")
    assert run.attempts("prequantize") == [] and len(run.attempts("train")) == 1
    for ref in stageline.resolve(spec, two).refs:
        there, here = one.path(ref.stage, ref.key), two.path(ref.stage, ref.key)
        assert verify(here).digest == verify(there).digest, ref.title
        if ref.stage in MADE:  # fetched as it is: also when it was made, and by whom
            assert (here / MANIFEST).read_bytes() == (there / MANIFEST).read_bytes()


@pytest.mark.usefixtures("forked_workers")
def test_a_damaged_copy_is_made_again(
    tmp_path: Path, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, url = make_model_folder(tmp_path / "model", tiny_config()), (tmp_path / "shared").as_uri()
    use(tmp_path / "one", url, monkeypatch)
    made = quantize(str(base))
    (copy,) = (tmp_path / "shared/prequantize").iterdir()
    (copy / "model.safetensors").write_bytes(b"damaged")
    use(tmp_path / "two", url, monkeypatch)
    events: list[Event] = []
    with listen(events.append):
        again = quantize(str(base))
    assert again["digest"] == made["digest"] and again["path"].startswith(str(tmp_path / "two"))
    assert [e.state for e in events][-1] is EventState.DONE
    assert len(RunDir.named("quantize-model-nf4", tmp_path / "two").attempts("prequantize")) == 1


@pytest.mark.usefixtures("forked_workers")
def test_a_place_that_cannot_be_asked_is_an_error(
    tmp_path: Path, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_model_folder(tmp_path / "model", tiny_config())
    use(tmp_path / "one", "not a url", monkeypatch)
    with pytest.raises(SpecError, match="DITTY_STORE_URL"):
        quantize(str(base))
    place = tmp_path / "shared"
    use(tmp_path / "one", place.as_uri(), monkeypatch)
    quantize(str(base))
    shutil.rmtree(place)
    place.write_text("a file where the folder was")
    use(tmp_path / "two", place.as_uri(), monkeypatch)
    with pytest.raises(RemoteError, match="shared"):
        quantize(str(base))
