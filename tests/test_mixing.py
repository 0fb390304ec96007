"""Several sources: against `datasets`' own interleaving and concatenation."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from ditty.config.dataspec import DataSpec
from ditty.config.specfile import load_spec
from ditty.dataset import tables
from ditty.dataset.sources import identify, load
from ditty.errors import DataError, SpecError
from ditty.planning.preview import preview
from ditty.stages import stageline
from ditty.store.artifacts import Store
from tests.test_bad_input import GOOD_ROWS, make_spec, prepare

LENGTHS = {"a": 1700, "b": 900, "c": 2}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Name -> a .jsonl file of {"text": "a 0"}, {"text": "a 1"} ..."""
    paths = {}
    for name, length in LENGTHS.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(f'{{"text": "{name} {i}"}}\n' for i in range(length)))
        paths[name] = str(path)
    return paths


def rows_of(name: str) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": [f"{name} {i}" for i in range(LENGTHS[name])]})


def loaded(tmp_path: Path, data: DataSpec) -> list[dict[str, Any]]:
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    facts = load(data, out)
    assert [p.name for p in out.iterdir()] == ["data.arrow"], "no part stays"
    rows = tables.read(out / "data.arrow").to_pylist()
    assert facts["rows"] == len(rows)
    return rows


def mixture(files: dict[str, str], weights: dict[str, float | None], **keys: Any) -> DataSpec:
    sources = [{"source": files[name], "weight": weight} for name, weight in weights.items()]
    return DataSpec.model_validate({"sources": sources, "format": "text", **keys})


@pytest.mark.parametrize("weights", [{"a": 3, "b": 1}, {"a": None, "b": None}])
def test_bad_rows_of_each_source_are_told_and_not_mixed(tmp_path, files, weights):
    good = loaded(tmp_path, mixture(files, weights, seed=1))
    for name, line in (("a", 3), ("b", 10)):
        path = Path(files[name])
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines[: line - 1], "{", *lines[line - 1 :]]))
    data, out = mixture(files, weights, seed=1), tmp_path / "out"
    facts = load(data, out)
    assert tables.read(out / "data.arrow").to_pylist() == good
    told = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [line["position"] for line in told] == ["source 1, line 3", "source 2, line 10"]
    assert (facts["read"], facts["quarantined"]) == (1700 + 900 + 2, {"not JSON": 2})
    assert facts["rows"] == len(good)
    strict = mixture(files, weights, max_bad_fraction=0.0)
    with pytest.raises(DataError, match=r"the sources: 2 of 2,602 .*/a.jsonl, line 3, .*/b.jsonl,"):
        load(strict, out)
    Path(files["b"]).write_text("{\n{")
    with pytest.raises(DataError, match="b.jsonl has no rows"):
        load(data, out)


@pytest.mark.parametrize("until", ["first_exhausted", "all_exhausted"])
@pytest.mark.parametrize(
    ("weights", "seed"),
    [({"a": 3, "b": 1}, 0), ({"a": 3, "b": 1}, 7), ({"b": 0.2, "a": 0.2}, 1),
     ({"a": 50, "c": 0.5, "b": 20}, 3)],
)  # fmt: skip
def test_weighted_sources_come_as_datasets_interleaves_them(tmp_path, files, weights, seed, until):
    rows = loaded(tmp_path, mixture(files, weights, seed=seed, stopping_strategy=until))
    total = sum(weights.values())
    theirs = datasets.interleave_datasets(
        [rows_of(name) for name in weights],
        probabilities=[weight / total for weight in weights.values()],
        seed=seed,
        stopping_strategy=until,
    )
    assert rows == theirs.to_list()
    assert len({row["text"] for row in rows}) == len(rows) or until == "all_exhausted"


def test_without_weights_all_rows_follow_each_other(tmp_path, files):
    plain = mixture(files, {"b": None, "a": None})
    theirs = datasets.concatenate_datasets([rows_of("b"), rows_of("a")])
    assert loaded(tmp_path, plain) == theirs.to_list()
    few = mixture(files, {"b": None, "a": None}, max_rows=901)
    assert loaded(tmp_path, few) == theirs.to_list()[:901]


def test_a_limit_cuts_the_mixture_not_its_order(tmp_path, files):
    whole = loaded(tmp_path, mixture(files, {"a": 1, "b": 1}))
    assert loaded(tmp_path, mixture(files, {"a": 1, "b": 1}, max_rows=40)) == whole[:40]
    parts = [{"source": files["a"], "max_rows": 3}, {"source": files["b"], "max_rows": 2}]
    rows = loaded(tmp_path, DataSpec.model_validate({"sources": parts}))
    assert [row["text"] for row in rows] == ["a 0", "a 1", "a 2", "b 0", "b 1"]


def test_sources_of_other_columns_and_kinds_go_together(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"n": 1, "m": [{"x": 1}]}\n')
    (tmp_path / "y.csv").write_text("n,z\n2.5,b\n")
    (tmp_path / "z.jsonl").write_text('{"n": "text"}\n')
    sources = [{"source": str(tmp_path / name)} for name in ("x.jsonl", "y.csv")]
    rows = loaded(tmp_path, DataSpec.model_validate({"sources": sources}))
    assert rows == [{"n": 1.0, "m": [{"x": 1}], "z": None}, {"n": 2.5, "m": None, "z": "b"}]
    sources.append({"source": str(tmp_path / "z.jsonl")})
    with pytest.raises(DataError, match="from .*z.jsonl on, a column has another type"):
        loaded(tmp_path, DataSpec.model_validate({"sources": sources}))


def test_the_identity_is_all_that_decides_the_order(files, tmp_path, monkeypatch):
    weights = {"a": 3.0, "b": 1.0}
    one = identify(mixture(files, weights))
    assert one == identify(mixture(files, weights, seq_len=99))
    others = [
        mixture(files, weights, seed=1),
        mixture(files, weights, stopping_strategy="all_exhausted"),
        mixture(files, weights, max_rows=5),
        mixture(files, {"a": 2.0, "b": 1.0}),
        mixture(files, {"b": 1.0, "a": 3.0}),
        mixture(files, {"a": None, "b": None}),
    ]
    found = [one, *map(identify, others)]
    Path(files["b"]).write_text('{"text": "new"}\n')
    found.append(identify(mixture(files, weights)))
    assert len({json.dumps(identity) for identity in found}) == len(found)
    # Without weights nothing is drawn.
    plain = {"a": None, "b": None}
    undrawn = identify(mixture(files, plain))
    assert identify(mixture(files, plain, seed=1)) == undrawn
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"another {name}")
    assert identify(mixture(files, weights)) != found[-1], "numpy draws"
    assert identify(mixture(files, plain)) == undrawn


def test_a_mixture_goes_through_the_stages(tmp_path, monkeypatch):
    """From a spec file, whose relative paths are those of its folder."""
    for name, rows in (("x", GOOD_ROWS[:12]), ("y", GOOD_ROWS[12:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    values = make_spec(tmp_path, data__eval_fraction=0.0).model_dump(mode="json")
    values["data"] |= {"source": None, "sources": [{"source": "x.jsonl"}, {"source": "y.jsonl"}]}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir("/")
    spec = load_spec(tmp_path / "spec.yaml")
    assert prepare(spec)["tokenize"]["rows"] == len(GOOD_ROWS)
    shown = preview(spec, Store(), 100)
    assert len(shown) == len(GOOD_ROWS)
    ref = stageline.resolve(spec, Store()).refs[0]
    assert ref.title == "load 2 sources"
    manifest = Store().find("load", ref.key)
    assert manifest.facts["source"] == f"{tmp_path}/x.jsonl, {tmp_path}/y.jsonl"
    one = make_spec(tmp_path, data__eval_fraction=0.0)
    assert [t.id for row in preview(one, Store(), 100) for t in row.tokens] == [
        t.id for row in shown for t in row.tokens
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "expected source, or sources for several; got neither"),
        ({"source": "a", "sources": [{"source": "b"}]}, "expected source, or sources .* got both"),
        ({"sources": [{"source": "a", "weight": 1}, {"source": "b"}]},
         r"of 2 sources 1 have a weight \(a\); expected all, or none"),
        ({"sources": [{"source": "a"}], "split": "test"}, "split, revision, .* go into each of"),
        ({"sources": [{"source": "a", "weight": 0}]}, "data.sources.0.weight: .*a number above 0"),
        ({"sources": [{"source": "a", "wieght": 1}]}, "did you mean data.sources.0.weight"),
    ],
)  # fmt: skip
def test_what_is_no_mixture(tmp_path, data, message):
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump({"model": {"base_model": "org/name"}, "data": data}))
    with pytest.raises(SpecError, match=message):
        load_spec(path)
