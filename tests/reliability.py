"""The fault matrix as a table, with the figure that a test run has for each row.

    python -m tests.reliability                  run the tests of all rows, then print the table
    python -m tests.reliability FIGURES          print it from what runs of pytest have left
    pytest --figures=FIGURES ...                 leave the figures of these tests in a file

The S3 rows have figures of moto, and where `weed` is installed (tests/seaweed.py) of SeaweedFS too.

A test of a row has the mark `fault("row")`, and says its figure to the fixture `figure`. A row that
no test gave a figure is said to have none, and the exit code is 1.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NONE = "**no figure**"

# row: (the fault, what is required)
ROWS = {
    "sigkill": (
        "SIGKILL of a rank, anywhere, also inside a checkpoint",
        "steps lost <= interval; 0 samples twice or never; weights bitwise equal; "
        "seconds to detection",
    ),
    "sigterm": (
        "SIGTERM with N seconds of grace (0, 2, 30)",
        "steps lost <= 1, or <= interval where a save does not fit",
    ),
    "disk full": ("disk full inside a checkpoint", "bad commits 0"),
    "damaged checkpoint": ("truncated or bit-flipped shard, each file in turn", "100% detected"),
    "s3 faults": (
        "S3 5xx, timeouts, slow, half a multipart",
        "bounded retries: seconds stalled; orphan parts 0",
    ),
    "s3 credentials": (
        "S3 credentials wrong or expired, at start and midway",
        "false fresh starts 0",
    ),
    "upload killed": ("upload killed between any two objects", "partial ones accepted 0"),
    "racers": ("two runs of one name at once (20 racers)", "winners 1"),
    "prefect down": (
        "Prefect server down for 5 minutes, or restarted",
        "steps lost 0; states agree afterwards",
    ),
    "flow killed": ("flow process SIGKILLed", "orphans after T: 0"),
    "damaged cache": ("cached artifact deleted, truncated or flipped", "false hits 0"),
    "out of memory": ("out of memory (GPU or host)", "retries <= 1; what to lower is named"),
    "not finite": ("NaN or a loss spike", "NaN commits 0"),
    "hung rank": ("hung rank (SIGSTOP)", "seconds to detection"),
    "bad rows": (
        "bad row: bad UTF-8, missing column, empty, 10 MB",
        "counts reconcile with the input",
    ),
    "tokenizer": ("tokenizer without pad, eos or chat template", "eos in labels 100%"),
    "world size": (
        "other world size at resume",
        "same ids, same learning rates; weights within 1e-4",
    ),
    "changed spec": ("spec or code changed before resume", "undetected 0"),
    "cancelled": ("cancelled in the UI", "processes left 0"),
}


def note(item: Any, report: Any, path: Path) -> None:
    """Append what a test that has run says of its rows to `path`: one JSON line each."""
    with open(path, "a") as file:
        for mark in item.iter_markers("fault"):
            (row,) = mark.args
            assert row in ROWS, f"{item.nodeid}: the fault matrix has no row {row!r}"
            names = ("figure", f"figure {row}")
            said = [text for name, text in report.user_properties if name in names]
            of = {"row": row, "test": item.nodeid, "passed": report.outcome == "passed"}
            file.write(json.dumps({**of, "figure": "; ".join(said)}) + "\n")


def table(records: list[dict[str, Any]]) -> str:
    """The matrix in Markdown; of each test the last record counts."""
    newest = {(record["row"], record["test"]): record for record in records}
    lines = ["| fault | required | figure | by |", "| --- | --- | --- | --- |"]
    for row, (fault, required) in ROWS.items():
        found: dict[str, list[str]] = {}
        for record in (r for r in newest.values() if r["row"] == row):
            test = record["test"].partition("::")[2].partition("[")[0]
            figure = (record["figure"] or NONE) if record["passed"] else "**failed**"
            found.setdefault(test, []).append(figure)
        figures = "<br>".join("; ".join(dict.fromkeys(texts)) for texts in found.values())
        tests = "<br>".join(f"`{test}`" for test in found)
        lines.append(f"| {fault} | {required} | {figures or NONE} | {tests or 'no test has run'} |")
    return "\n".join(lines)


def complete(text: str) -> bool:
    """Whether each row of a table has its figure, and no test of one has failed."""
    return NONE not in text and "**failed**" not in text


def main(arguments: list[str]) -> int:
    """Print the table; 0 if it is complete."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(arguments[0]) if arguments else Path(scratch) / "figures.jsonl"
        if not arguments:
            options = ["-o", "addopts=", "-m", "fault and not gpu", f"--figures={path}"]
            subprocess.run([sys.executable, "-m", "pytest", "-q", *options], cwd=ROOT)
        lines = path.read_text().splitlines() if path.exists() else []
    text = table([json.loads(line) for line in lines])
    print(text)
    return 0 if complete(text) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
