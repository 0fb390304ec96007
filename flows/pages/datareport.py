"""What became of the rows, from the source to packed tokens: counts, reasons, lengths.

As a page (with a picture) and as `data.md` in the run directory. All of it is read from the
manifests of the stages, so it is the same whether they were made now or found.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditty.dataset.quarantine import FILE as QUARANTINE_FILE
from ditty.errors import ArtifactDamaged
from ditty.runs.curves import png
from ditty.stages.stageline import StageLine
from ditty.store.artifacts import Store, read_manifest
from flows.pages.markup import clean, code, embedded, escape, table

INCHES, DPI = (9.0, 3.0), 100
LONGEST_BAR = 40  # characters
MAX_REASONS = 20  # of a stage
LONGEST_TITLE = 120
LONGEST_REASON = 80


@dataclass(frozen=True)
class MadeStage:
    """A data stage whose artifact is there: what people call it, its facts, and where it is."""

    stage: str
    title: str
    facts: dict[str, Any]
    path: Path


def made_stages(line: StageLine, store: Store) -> list[MadeStage]:
    """The data stages of a line, all of which are made."""
    paths = [(ref, store.path(ref.stage, ref.key)) for ref in line.data()]
    return [MadeStage(r.stage, r.title, read_manifest(p).facts, p) for r, p in paths]


def data_facts(pack_dir: Path | None) -> dict[str, dict[str, Any]]:
    """{"tokenize": facts, "pack": facts} as far as the manifests are there.

    Args:
        pack_dir: the artifact of `pack`, in a store.
    """
    if pack_dir is None:
        return {}
    found: dict[str, dict[str, Any]] = {}
    try:
        found["pack"] = read_manifest(pack_dir).facts
        tokens = found["pack"].get("inputs", {}).get("tokens", "")
        found["tokenize"] = read_manifest(pack_dir.parent.parent / "tokenize" / tokens).facts
    except ArtifactDamaged:
        pass  # the report then says less
    return found


def data_section(data: dict[str, dict[str, Any]]) -> str:
    """The part of a training's report that is about its data.

    Args:
        data: see `data_facts`.
    """
    tokens = data.get("tokenize", {})
    rows = _numbers(tokens, data.get("pack", {}))
    for reason, count in _left_out(tokens):
        rows[reason] = f"{count:,}"
    return f"## Data\n\n{table(rows)}" if rows else ""


def data_markdown(name: str, made: Sequence[MadeStage], picture: bool) -> str:
    """The report; some KB, whatever the data.

    Args:
        name: of the run.
        picture: with one of the lengths; they are in a table as well.
    """
    facts = {stage.stage: stage.facts for stage in made}
    tokens = facts["tokenize"]
    parts = [f"# {escape(name)}: its data", _stage_table(made)]
    parts += ["## Tokens", table(_numbers(tokens, facts["pack"]))]
    if missing := "\n".join(_missing(made)):
        parts += ["## Rows that are not trained on", missing]
    lengths = {int(upto): count for upto, count in tokens["lengths"].items()}
    parts.append("## Tokens in a row, before any cut")
    if picture:
        parts.append(embedded("lengths", _histogram(lengths)))
    return "\n\n".join([*parts, _bars(lengths)]) + "\n"


def _stage_table(made: Sequence[MadeStage]) -> str:
    """Rows into and out of each stage; packing is about tokens."""
    lines = ["| stage | rows in | kept | left out | cannot be used |", "| --- |" + " ---: |" * 4]
    for stage in made:
        if stage.stage != "pack":
            counts = " | ".join(f"{count:,}" for count in _flow(stage))
            lines.append(f"| {escape(clean(stage.title, LONGEST_TITLE))} | {counts} |")
    return "\n".join(lines)


def _flow(stage: MadeStage) -> tuple[int, int, int, int]:
    """(rows in, kept, left out, cannot be used); a map may make more rows than it is given."""
    facts = stage.facts
    bad = sum(facts.get("quarantined", {}).values())
    if stage.stage == "tokenize":
        read, kept = facts["rows"], facts["train_rows"] + facts["eval_rows"]
        left_out = facts["eval_unused"] + sum(facts["dropped"].values())
        assert read == kept + left_out + bad, facts
        return read, kept, left_out, bad
    read = facts["read"] if stage.stage == "load" else facts["rows_in"]
    return read, facts["rows"], max(read - facts["rows"] - bad, 0), bad


def _numbers(tokens: dict[str, Any], pack: dict[str, Any]) -> dict[str, str]:
    rows: dict[str, str] = {}
    for title, facts, name in (
        ("rows", tokens, "rows"),
        ("rows to train on", tokens, "train_rows"),
        ("rows held out", tokens, "eval_rows"),
        ("tokens", tokens, "tokens"),
        ("supervised tokens", tokens, "supervised_tokens"),
        ("tokens of the longest row", tokens, "max_length"),
        ("rows cut at seq_len", tokens, "truncated"),
        ("packed rows", pack, "rows"),
        ("packed rows held out", pack, "eval_rows"),
    ):
        if isinstance(facts.get(name), int):
            rows[title] = f"{facts[name]:,}"
    if tokens.get("tokens") and "supervised_tokens" in tokens:
        share = tokens["supervised_tokens"] / tokens["tokens"]
        rows["supervised tokens"] += f" ({share:.1%})"
    if isinstance(pack.get("fill_rate"), float):
        rows["filled with tokens"] = f"{pack['fill_rate']:.1%}"
    return rows


def _left_out(facts: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """(why, rows) of one stage."""
    for word, name in (("dropped", "dropped"), ("cannot be used", "quarantined")):
        for reason, count in sorted(facts.get(name, {}).items())[:MAX_REASONS]:
            yield f"{word}: {escape(clean(reason, LONGEST_REASON))}", count


def _missing(made: Sequence[MadeStage]) -> Iterator[str]:
    for stage in made:
        for reason, count in _left_out(stage.facts):
            yield f"- {stage.stage}, {reason}: {count:,}"
        if unused := stage.facts.get("eval_unused"):
            yield f"- {stage.stage}, held out beyond eval\\_max\\_rows: {unused:,}"
        if stage.facts.get("quarantined"):
            yield f"  - listed in {code(str(stage.path / QUARANTINE_FILE))}"


def _bars(lengths: dict[int, int]) -> str:
    most = max(lengths.values(), default=0)
    lines = ["| at most | rows | |", "| ---: | ---: | --- |"]
    for upto, count in sorted(lengths.items()):
        lines.append(f"| {upto:,} | {count:,} | {'█' * -(-count * LONGEST_BAR // most)} |")
    return "\n".join(lines)


def _histogram(lengths: dict[int, int]) -> bytes:
    """A PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, dpi=DPI, layout="constrained")
    axes = figure.subplots()
    upto = sorted(lengths)
    axes.bar([f"{n:,}" for n in upto], [lengths[n] for n in upto], color="tab:blue")
    axes.set_xlabel("tokens, at most")
    axes.set_ylabel("rows")
    return png(figure)
