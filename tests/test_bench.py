"""`ditty bench`: the training of `ditty run` on random weights, measured; and TRL on the same."""

import pytest
from typer.testing import CliRunner

from ditty.errors import SpecError
from ditty.planning.benchmark import LEAST_STEPS, bench_spec, run_bench
from ditty.planning.shapes import SHAPES
from flows.commands.cli import app
from tests import warm

SMALL = ["data.seq_len=64", f"train.max_steps={LEAST_STEPS}", "train.precision=fp32"]


def test_two_processes_train_on_weights_that_are_drawn_once(tmp_path, monkeypatch):
    options = {"shape": "tiny", "longest": None, "by": "ditty"}
    lines: list[str] = []
    spec = bench_spec([*SMALL, "launch.num_processes=2", "launch.device=cpu"])
    found = run_bench(spec, options, tmp_path, lines.append)
    assert found["tokens_per_second"] > 0 and found["loss"] == pytest.approx(5.77, abs=0.05)
    assert any(f"step {LEAST_STEPS}/{LEAST_STEPS} loss" in line for line in lines)
    assert any("drawing" in line for line in lines)
    assert [p.name for p in (tmp_path / "bench").iterdir()] == ["tiny"]  # no attempt, no run left

    lines.clear()
    warm.instead_of_launching(monkeypatch)
    nf4 = bench_spec([*SMALL, "model.quantization=nf4", "launch.device=cpu"])
    found = run_bench(nf4, options | {"longest": 128, "checkpoint": True}, tmp_path, lines.append)
    assert found["stalled_seconds"] > 0 and "save_seconds" in found
    assert not any("drawing" in line for line in lines)
    assert (tmp_path / "bench" / "tiny-nf4" / "config.json").exists()
    assert {p.name for p in (tmp_path / "bench").iterdir()} == {"tiny", "tiny-nf4"}


@pytest.mark.usefixtures("forked_workers")
def test_beside_trl(tmp_path, monkeypatch):
    monkeypatch.setenv("DITTY_HOME", str(tmp_path))
    sets = [part for key in [*SMALL, "launch.device=cpu"] for part in ("--set", key)]
    done = CliRunner().invoke(app, ["bench", "tiny", "--compare", "trl", *sets])
    assert done.exit_code == 0, done.output
    assert "times as fast" in done.output
    names = [line.split()[0] for line in done.output.splitlines() if line.strip()]
    assert {"ditty", "trl"} <= set(names)


@pytest.mark.parametrize(
    ("overrides", "shape", "match"),
    [
        (["train.max_steps=5"], "tiny", "expected at least 6"),
        ([], "9b", f"no shape '9b': expected one of {', '.join(SHAPES)}"),
        (["train.micro_batch=5"], "tiny", "micro_batch"),
    ],
)
def test_mistakes(overrides, shape, match, tmp_path):
    options = {"shape": shape, "longest": None, "by": "ditty"}
    with pytest.raises(SpecError, match=match):
        run_bench(bench_spec(overrides), options, tmp_path, print)


@pytest.mark.parametrize(
    ("name", "weights"), [("135m", 134_515_008), ("1b", 1_235_814_400), ("8b", 8_030_261_248)]
)
def test_the_shapes_are_those_of_the_models_they_are_named_after(name, weights):
    shape = SHAPES[name]
    norms = (2 * shape.layers + 1) * shape.hidden
    embeddings = 0 if shape.tied else shape.vocabulary * shape.hidden
    assert shape.weights_a_token() + norms + embeddings == weights
