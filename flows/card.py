"""The card of a result, for whoever finds it: what it is, what of, how good, and how to use it.

It goes where others read it, so of paths it keeps the last part, and nothing of how and where the
run was launched and uploaded.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ditty.config.choices import Adapter, ExportTo
from ditty.config.spec import RunSpec
from ditty.errors import scrub
from ditty.planning.demo import use_gguf, use_it, use_model
from ditty.results.lineage import Node, lineage
from ditty.runs import curves
from ditty.runs.rundir import RunDir
from ditty.stages.stageline import DATA_STAGES
from ditty.store.artifacts import Store, read_manifest
from ditty.version import __version__
from flows.pages.markup import clean, code, escape, fenced, table
from flows.pages.report import History

CARD, PICTURE = "README.md", "loss.png"
LIBRARIES = {ExportTo.ADAPTER: "peft", ExportTo.MERGED: "transformers"}


def card_files(
    spec: RunSpec, store: Store, train: str, to: ExportTo, license: str | None
) -> dict[str, bytes]:
    """The card, and the picture in it, by file name.

    Args:
        train: key of the training; its artifact is in the store.
        to: what is exported.
        license: an identifier of the hub's, e.g. apache-2.0; None: that in the README of the base
            model's folder, if there is one.
    """
    history = History(RunDir.named(spec.name, store.home))
    history.read()
    image = curves.picture(history.train, history.evaluated) if history.train.steps else None
    node = lineage(str(store.path("train", train)), store)
    facts = read_manifest(store.path("train", train)).facts
    whole = spec.model.adapter is Adapter.NONE
    to = ExportTo.MERGED if whole and to is ExportTo.ADAPTER else to
    sections = [
        _front(spec, to, license or base_license(spec.model.base_model)),
        f"# {spec.name}\n\n{_sentence(spec, to)}",
        f"## Use\n\n```python\n{_use(spec, to)}\n```",
        "## Results\n\n" + table(_results(facts)),
        f"![loss]({PICTURE})" if image else "",
        "## Data\n\n" + "\n".join(_data(node)),
        "## Spec\n\n" + fenced(_spec_text(spec)),
        f"Training {code(train)}, made by ditty {__version__}; `ditty lineage` on this folder says "
        "what of.",
    ]
    text = "\n\n".join(section for section in sections if section) + "\n"
    return {CARD: text.encode()} | ({PICTURE: image} if image else {})


def base_license(base_model: str) -> str | None:
    """What the README of a local base model's folder says of its licence."""
    file = Path(base_model).expanduser() / "README.md"
    if not file.is_file():
        return None
    parts = file.read_text(errors="replace").split("---")
    try:
        front = yaml.safe_load(parts[1]) if len(parts) > 2 and not parts[0].strip() else None
    except yaml.YAMLError:
        return None
    found = front.get("license") if isinstance(front, dict) else None
    return found if isinstance(found, str) else None


def _hub_name(base_model: str) -> str | None:
    """The hub's id of a base model that is there; the hub shows a link."""
    local = Path(base_model).expanduser()
    return None if local.exists() or local.suffix == ".gguf" or local.is_absolute() else base_model


def _front(spec: RunSpec, to: ExportTo, license: str | None) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=_hub_name(spec.model.base_model),
        library_name=LIBRARIES.get(to),
        license=license,
        pipeline_tag="text-generation",
        tags=["ditty", spec.model.adapter.value if to is ExportTo.ADAPTER else to.value],
    )
    return f"---\n{data.to_yaml()}\n---"


def _sentence(spec: RunSpec, to: ExportTo) -> str:
    base = code(_public(spec.model.base_model))
    what = {
        ExportTo.ADAPTER: f"A {spec.model.adapter} adapter of {base}, in peft's layout",
        ExportTo.MERGED: f"{base}, fine-tuned",
        ExportTo.GGUF: f"{base}, fine-tuned, as a .gguf file",
    }[to]
    quantized = spec.model.quantization
    beside = f" It was trained beside the base in {quantized}." if quantized != "none" else ""
    return f"{what}. Made with ditty.{beside}"


def _use(spec: RunSpec, to: ExportTo) -> str:
    if to is ExportTo.GGUF:
        return use_gguf("this-folder")
    if to is ExportTo.MERGED:
        return use_model("this-folder")
    return use_it("this-folder", _public(spec.model.base_model))


def _results(facts: dict[str, Any]) -> dict[str, str]:
    losses = [evaluation["loss"] for evaluation in facts.get("eval", [])]
    rows = {"steps": f"{facts['steps']:,}"} if "steps" in facts else {}
    if losses:
        rows["held-out loss before, in nats a token"] = f"{losses[0]:.4f}"
        rows["held-out loss after"] = f"{losses[-1]:.4f}"
    if facts.get("loss") is not None:
        rows["training loss of the last step"] = f"{facts['loss']:.4f}"
    if "best_step" in facts:
        rows["step of the weights (the best held-out loss)"] = f"{facts['best_step']:,}"
    return rows or {"not known": ""}


# What an artifact calls those it was made from, where they are no longer here.
GONE = ("data", "rows")


def _data(node: Node) -> Iterator[str]:
    """A line for each data stage, sources first."""
    for parent in node.parents:
        yield from _data(parent)
    if node.kind in (*DATA_STAGES, *GONE):
        source = escape(clean(_public(node.names.get("source", "")), 200))
        function = code(_public(node.names["function"])) if "function" in node.names else ""
        counts = ", ".join(f"{count:,} {name}" for name, count in node.counts.items())
        words = " ".join(word for word in (node.kind, source or function) if word)
        yield f"- {words}: {counts or 'no longer here'}; SHA-256 {code(node.digest or node.key)}"


def _public(name: str) -> str:
    """A reference without the folders of the machine that it was on."""
    parts = name.split(", ")
    return ", ".join(Path(part).name if part.startswith("/") else scrub(part) for part in parts)


def _spec_text(spec: RunSpec) -> str:
    values = spec.model_dump(mode="json", include={"data", "model", "train"}, exclude_defaults=True)
    return yaml.safe_dump(_without_folders(values), sort_keys=False).strip()


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_without_folders(v) for v in value]
    return _public(value) if isinstance(value, str) else value
