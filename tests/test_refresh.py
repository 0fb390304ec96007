"""`evaluate` and `refresh`: what is measured, and what is in place afterwards."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from ditty.config.spec import RunSpec
from ditty.data import read_rows
from ditty.errors import GateFailed, RemoteError, RunError, RunMismatch
from ditty.results.promotion import Comparison, InPlace, Promotions, candidate_name
from ditty.runs.rundir import RunDir
from ditty.store.artifacts import Store, read_manifest
from ditty.store.remote import Remote
from flows.evaluate import evaluate
from flows.events import Event, EventState, listen
from flows.export import export
from flows.finetune import finetune
from flows.refresh import refresh
from flows.serving.automations import PROMOTED
from tests.served import tiny_spec


def spec_of(folder: Path, steps: int = 6, **changes: Any) -> RunSpec:
    values = tiny_spec(folder, "fresh", steps)
    values["data"]["eval_fraction"] = 0.2
    values["evaluate"] = {"require": {"eval_loss": "< base"}, "num_samples": 1}
    values["train"]["sample_max_tokens"] = 6
    values["train"] |= {"learning_rate": 1e-2, "schedule": "constant", "save_steps": 1000}
    return RunSpec.model_validate(values | changes)


def plain_loss(model_dir: Path, adapter: Path | None, rows: Any) -> float:
    """The mean over supervised tokens by transformers and peft, one document at a time."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    total, count = 0.0, 0
    for row in rows:
        start = 0
        for length in row["lengths"]:
            ids = torch.tensor([row["input_ids"][start : start + length]])
            labels = torch.tensor([row["labels"][start : start + length]])
            start += length
            supervised = int((labels[:, 1:] != -100).sum())
            if not supervised:
                continue
            with torch.no_grad():
                loss = model(input_ids=ids, labels=labels).loss
            total += float(loss) * supervised
            count += supervised
    return total / count


def plain_completion(model_dir: Path, adapter: Path | None, prompt: str) -> str:
    """Six tokens by transformers' own `generate`; the prompt is of a user who has said it all."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    said = prompt.removeprefix("user\n").partition("\n")[0]
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": said}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.eval().generate(**ids, do_sample=False, max_new_tokens=6, eos_token_id=2)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def quietly(flow: Any, spec: RunSpec) -> tuple[dict[str, Any], set[EventState]]:
    """The flow's result, and how its stages ended."""
    events: list[Event] = []
    with listen(events.append):
        result = flow(spec)
    return result, {e.state for e in events} - {EventState.STARTED, EventState.PROGRESS}


@pytest.mark.usefixtures("forked_workers")
def test_what_is_better_is_promoted_and_only_that(
    tmp_path: Path, home: Path, prefect_api: str
) -> None:
    spec = spec_of(tmp_path)
    first, _ = quietly(refresh, spec)
    assert first["promoted"] and first["comparison"]["new"] < first["comparison"]["old"], first
    _is_what_others_measure(spec, first, home)
    place = Promotions(spec, Store(home))
    one = place.current()
    assert one and (one.number, one.over, one.run) == (1, None, first["run"])
    target = Path(one.result.removeprefix("file://"))
    assert (target / "adapter_model.safetensors").is_file(), "the result is not at the target"

    _is_stopped_at_a_gate(spec, first, tmp_path)

    again, ends = quietly(refresh, spec)
    assert ends == {EventState.CACHED}
    assert not again["promoted"] and "neither the data nor the spec" in again["why"]

    with open(tmp_path / "rows.jsonl", "a") as file:
        said = [{"role": role, "content": "something new"} for role in ("user", "assistant")]
        file.write(json.dumps({"messages": said}) + "\n")
    short, _ = quietly(refresh, spec_of(tmp_path, steps=25, promote={"margin": 50.0}))
    assert short["run"] != first["run"] and short["train"] != first["train"]
    assert not short["promoted"] and short["in_place"] == one.result, short
    assert short["comparison"]["old"] < first["comparison"]["old"], "the base was taken for it"
    assert place.current() == one

    enough, ends = quietly(refresh, spec_of(tmp_path, steps=25))
    assert enough["promoted"] and enough["train"] == short["train"], enough
    assert ends == {EventState.CACHED, EventState.DONE}, "only the promotion was to be made"
    two = place.current()
    assert two and (two.number, two.over) == (2, first["train"])
    assert _promoted_events(prefect_api, 2) == [one.result, two.result]


def _is_stopped_at_a_gate(spec: RunSpec, first: dict[str, Any], folder: Path) -> None:
    """The same training, asked for more: it goes to no other target, and the error has figures."""
    new, old = first["comparison"]["new"], first["comparison"]["old"]
    asked = {
        "name": first["run"],
        "upload": {"url": f"file://{folder}/other"},
        "evaluate": {
            "require": {"eval_loss": "< base - 50", "eval_perplexity": "> 1"},
            "num_samples": 1,
        },
    }
    values = spec.model_dump(mode="json") | asked
    figures = rf"eval_loss is {new:.4f}, required is < base - 50, which is < {old - 50:.4f} \(ev"
    with pytest.raises(GateFailed, match=figures):
        finetune(RunSpec.model_validate(values))
    assert list((folder / "other").rglob("manifest.json")) == []
    with pytest.raises(GateFailed, match=figures):
        export(first["run"], out="s3://nobody/here/one")
    assert Path(export(first["run"], out=str(folder / "to-look-at"))["path"]).is_dir()


def _is_what_others_measure(spec: RunSpec, first: dict[str, Any], home: Path) -> None:
    """By peft and transformers, and by the training itself; `evaluate` finds both measured."""
    (packed,) = (home / "store" / "pack").glob("[0-9a-f]*")
    rows = read_rows(packed / "eval.arrow")
    model_dir, trained = Path(spec.model.base_model), home / "store" / "train" / first["train"]
    for key, adapter in (("old", None), ("new", trained)):
        plain = plain_loss(model_dir, adapter, rows)
        assert first["comparison"][key] == pytest.approx(plain, rel=1e-5)
    measured = [e["loss"] for e in read_manifest(trained).facts["eval"]]
    losses = [first["comparison"]["old"], first["comparison"]["new"]]
    assert losses == pytest.approx([measured[0], measured[-1]], rel=1e-6)

    found, ends = quietly(evaluate, spec.model_copy(update={"name": first["run"]}))
    assert ends == {EventState.CACHED}
    assert [found["base"]["loss"], found["trained"]["loss"]] == losses
    assert found["trained"]["perplexity"] == math.exp(losses[1])
    for what, adapter in (("base", None), ("trained", trained)):
        (sample,) = found[what]["samples"]
        assert sample["completion"] == plain_completion(model_dir, adapter, sample["prompt"]), what
    assert found["base"]["samples"] != found["trained"]["samples"]


def test_only_what_is_trained_is_evaluated(tmp_path: Path, home: Path, prefect_api: str) -> None:
    with pytest.raises(RunError, match="run `finetune` with the same spec first"):
        evaluate(spec_of(tmp_path))
    assert not (home / "store" / "evaluate").exists()


def _promoted_events(api: str, expected: int) -> list[str]:
    """The results that events tell of, once there are so many."""
    # Other tests tell this server of promotions too.
    only = {"event": {"name": [PROMOTED]}, "resource": {"id": ["ditty.fresh"]}, "order": "ASC"}
    filters = {"filter": only}
    end = time.monotonic() + 30
    while True:
        found = httpx.post(f"{api}/events/filter", json=filters, trust_env=False).json()["events"]
        if len(found) >= expected or time.monotonic() >= end:
            return [event["payload"]["text"].rpartition(" ")[2] for event in found]
        time.sleep(0.2)


@pytest.fixture
def pointer() -> InPlace:
    return InPlace(1, "fresh-a", "a" * 64, {"base_model": "m"}, "tok", "/r", 1.5, None)


def test_of_two_promotions_at_once_one_is_told(tmp_path: Path, pointer: InPlace) -> None:
    (tmp_path / "target").mkdir()
    places = [Promotions(spec_of(tmp_path), Store(tmp_path / f"home-{n}")) for n in range(2)]
    others = [pointer, replace(pointer, train="b" * 64)]
    places[0].promote(places[0].ref(others[0], "e"), others[0])
    with pytest.raises(RemoteError, match="another content is committed"):
        places[1].promote(places[1].ref(others[1], "e"), others[1])
    assert places[1].current() == pointer


def test_a_promotion_without_its_manifest_is_none(tmp_path: Path, pointer: InPlace) -> None:
    (tmp_path / "target").mkdir()
    place = Promotions(spec_of(tmp_path), Store(tmp_path / "home"))
    assert place.current() is None
    where = place.promote(place.ref(pointer, "e"), pointer)
    second = replace(pointer, number=2)
    there = place.promote(place.ref(second, "e"), second)
    assert place.current() == second
    Path(there.removeprefix("file://"), "manifest.json").unlink()  # as if it was cut short there
    assert place.current() == pointer and Remote(place.url).names("fresh/promoted") == [
        where.removeprefix(f"{place.url}/")
    ]
    assert place.promote(place.ref(second, "e"), second) == there
    assert place.current() == second


def test_another_target_is_told_its_own_place(tmp_path: Path, pointer: InPlace) -> None:
    store, found = Store(tmp_path / "home"), []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        place = Promotions(spec_of(tmp_path, upload={"url": f"file://{tmp_path}/{name}"}), store)
        there = replace(pointer, result=place.result_url(pointer.run, pointer.train))
        place.promote(place.ref(there, "e"), there)
        found.append(place.current())
    assert [p and p.result.split("/")[-4] for p in found] == ["one", "two"]


def test_without_a_target_promotions_are_in_the_home(tmp_path: Path, pointer: InPlace) -> None:
    spec = spec_of(tmp_path, upload={})
    place = Promotions(spec, Store(tmp_path / "a home"))
    place.promote(place.ref(pointer, "e"), pointer)
    assert (tmp_path / "a home/promoted/fresh/promoted/000001/pointer.json").is_file()
    assert place.current() == pointer


def test_no_comparison_with_what_is_gone_or_speaks_otherwise(
    tmp_path: Path, home: Path, prefect_api: str, pointer: InPlace
) -> None:
    spec = spec_of(tmp_path, upload={})
    place = Promotions(spec, Store(home))
    place.promote(place.ref(pointer, "e"), pointer)
    with pytest.raises(RunError, match="another tokenizer"):
        refresh(spec)
    tokenizer = _tokenizer(spec)
    model = spec.model.model_dump(mode="json")
    gone = replace(pointer, number=2, tokenizer=tokenizer, model=model)
    place.promote(place.ref(gone, "e"), gone)
    with pytest.raises(RunError, match="neither in"):
        refresh(spec)


def _tokenizer(spec: RunSpec) -> str:
    from ditty.pretrained.basemodel import tokenizer_digest

    return tokenizer_digest(Path(spec.model.base_model))


@pytest.mark.parametrize(
    ("new", "old", "margin", "better"),
    [
        (1.0, 1.1, 0.0, True),
        (1.0, 1.0, 0.0, False),
        (1.0, 1.1, 0.2, False),
        (1.0, 1.5, 0.2, True),
        (math.nan, 1.0, 0.0, False),
        (1.0, math.nan, 0.0, False),
    ],
)
def test_better_is_by_more_than_the_margin(
    new: float, old: float, margin: float, better: bool
) -> None:
    assert Comparison(new, old, margin).better is better


def test_a_name_leaves_room_for_the_hash() -> None:
    assert candidate_name("n" * 54, "f" * 64) == "n" * 54 + "-ffffffff"
    with pytest.raises(RunError, match="at most 54"):
        candidate_name("n" * 55, "f" * 64)


def test_a_name_taken_by_another_spec_is_refused(
    tmp_path: Path, home: Path, prefect_api: str
) -> None:
    spec = spec_of(tmp_path)
    run = RunDir.named("fresh", home)
    run.new_attempt("train")
    other = spec_of(tmp_path, steps=7).model_dump(mode="json")
    run.spec_file.write_text(json.dumps(other))
    with pytest.raises(RunMismatch, match=r"train.max_steps was 7, now 6"):
        refresh(spec)
