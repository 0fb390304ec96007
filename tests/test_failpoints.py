"""Killed at every point where something durable is done, and done again: nothing tells.

The oracle of each work is a process that nothing disturbed: its files, losses, learning rates and
rows of each step.
"""

import ast
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import killed
from tests.chaos import chaos
from tests.processes import ROOT
from tests.remotes import bucket, moto_url, s3_env  # noqa: F401
from tests.tiny import make_model_folder

KILLED = -9


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    rows = [
        {"messages": [{"role": r, "content": f"{r} says {i}"} for r in ("user", "assistant")]}
        for i in range(60)
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_model_folder(root / "model")
    return root


def check(told: dict[str, Any], trains: bool) -> None:
    """No kill left a trace, and there were kills."""
    assert told["oracle"]["left"] == []
    kills = {point: found for point, found in told.items() if point != "oracle"}
    assert kills
    for point, found in kills.items():
        assert found["ended"] == KILLED, f"{point}: ended with {found['ended']}"
        assert set(found["again"]) == {0}, f"{point}: done again, it failed"
        assert found["damaged"] == [], f"{point}: half-made, and taken for whole"
        assert found["other"] == [], f"{point}: another result"
        assert found["left"] == [], f"{point}: left for ever"
        assert not trains or found["resumed"] == found["saved"], f"{point}: a step done twice"


# What makes something durable, or takes it away, has to be behind a fail point. The files of a
# commit are written as their stage likes: the commit syncs each.
ACTS = {"os.fsync", "os.rename", "os.replace", "os.link", "fs.put_file", "fs.pipe_file"}
S3_ACTS = {"delete_object", "abort_multipart_upload"}
EXEMPT = {"heartbeat.py": "one that a crash takes with it is not missed"}


def test_every_durable_act_is_behind_a_fail_point() -> None:
    found = 0
    for path in [*(ROOT / "ditty").rglob("*.py"), *(ROOT / "flows").rglob("*.py")]:
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef) or path.name in EXEMPT:
                continue
            calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
            acts = {ast.unparse(call.func) for call in calls} & ACTS
            acts |= {ast.unparse(a).strip("'") for call in calls for a in call.args} & S3_ACTS
            points = [call for call in calls if ast.unparse(call.func) == "fail_point"]
            assert len(points) >= len(acts), f"{path.name}: {function.name} does {acts}"
            found += len(acts)
    assert found >= 8, "the names of the acts have changed"


def say(
    figure: Callable[..., None], turns: list[dict[str, Any]], told: list[dict[str, Any]]
) -> None:
    """What `check` has found, as figures."""
    kills: Counter[str] = Counter()
    for turn, found in zip(turns, told, strict=True):
        kills[turn["work"]] += len(found) - 1
    figure(
        f"{kills['train']} kills at fail points of trainings: each goes on at its last save, "
        "0 rows twice or never, files bitwise equal",
        "sigkill",
    )
    figure(f"{kills['copy']} kills at fail points: partial ones accepted 0", "upload killed")


def acts_of(told: list[dict[str, Any]]) -> set[str]:
    return {point.split()[0] for found in told for point in found["oracle"]["points"]}


def known_acts() -> set[str]:
    """The first arguments of all fail points in the source."""
    text = "".join(path.read_text() for path in (ROOT / "ditty").rglob("*.py"))
    return set(re.findall(r'fail_point\("(\w+)"', text))


@pytest.mark.fault("sigkill")
@pytest.mark.fault("upload killed")
def test_killed_at_a_spread_of_points(
    inputs: Path,
    tmp_path: Path,
    bucket: Any,  # noqa: F811
    figure: Callable[[str], None],
) -> None:
    turns: list[dict[str, Any]] = [
        {"work": "shards", "only": "(rename|remove) shard"},
        {"work": "make_data", "every": 4, "keep": True},
        {"work": "quantize", "every": 4, "keep": True},
        {"work": "train", "ranks": 2, "rank": 1, "only": "barrier aside"},
        {"work": "train", "every": 3, "keep": True},
        {"work": "promote", "every": 8},
        {"work": "launching", "every": 4},
        {"work": "copy", "s3": f"s3://{bucket.name}", "only": "put|delete", "every": 3},
        {"work": "copy", "every": 6},
    ]
    told = killed.launch(tmp_path / "job", inputs, turns)
    for turn, found in zip(turns, told, strict=True):
        check(found, turn["work"] == "train")
    say(figure, turns, told)
    # Half a multipart upload, of 32 MB and more: test_s3.py.
    assert acts_of(told) == known_acts() - {"abort"}, "a point that no tiny run passes"


@pytest.mark.fault("sigkill")
@pytest.mark.fault("upload killed")
@pytest.mark.slow
def test_killed_at_every_point(
    inputs: Path,
    tmp_path: Path,
    bucket: Any,  # noqa: F811
    figure: Callable[[str], None],
) -> None:
    """About 350 kills: every point of one process, one of each kind of two."""
    turns: list[dict[str, Any]] = [
        {"work": "shards", "all": True, "only": "shard|tokenize"},
        {"work": "make_data", "all": True, "keep": True},
        {"work": "quantize", "all": True, "keep": True},
        {"work": "train", "ranks": 2, "rank": 0},
        {"work": "train", "ranks": 2, "rank": 1},
        {"work": "train", "all": True, "keep": True},
        {"work": "promote", "all": True},
        {"work": "launching", "all": True},
        {"work": "copy", "all": True, "s3": f"s3://{bucket.name}"},
        {"work": "copy", "all": True},
    ]
    told = killed.launch(tmp_path / "job", inputs, turns)
    for turn, found in zip(turns, told, strict=True):
        check(found, turn["work"] == "train")
    kills = sum(len(found) - 1 for found in told)
    say(figure, turns, told)
    assert kills > 300


CHAOS_SECONDS = 240


@pytest.mark.fault("sigkill")
@pytest.mark.slow
def test_killed_at_random_times(
    inputs: Path, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    """Rounds of up to three kills of one of two ranks, as many as there is time for."""
    turns: list[dict[str, Any]] = [
        {"work": "make_data", "keep": True},
        {"work": "quantize", "keep": True},
        {"work": "train", "ranks": 2, "seconds": CHAOS_SECONDS, "seed": 9},
    ]
    *_, told = killed.launch(tmp_path / "job", inputs, turns, chaos)
    rounds = [found for name, found in told.items() if name != "oracle"]
    kills = [kill for found in rounds for kill in found["kills"] if kill["ended"] == KILLED]
    for found in rounds:
        assert set(found["again"]) == {0}, f"{found['kills']}: done again, it failed"
        assert found["damaged"] == found["other"] == found["left"] == [], found["kills"]
    assert len(kills) >= 10 and {kill["rank"] for kill in kills} == {0, 1}
    resumed = sum(found["saved"] > 0 for found in rounds)
    assert resumed >= 3, "too few of them came after a checkpoint"
    figure(
        f"{len(kills)} kills at random times in {len(rounds)} runs of two ranks, {resumed} of them "
        "after a checkpoint: files, losses, learning rates and rows of each step as undisturbed"
    )
