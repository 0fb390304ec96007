"""The `ditty` command: the outermost layer. It reads specs, runs the flow, and draws progress."""

import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ditty.config.choices import ExportDtype, ExportTo, Precision, Quantization
from ditty.config.gates import measures
from ditty.config.spec import RunSpec
from ditty.config.specfile import load_spec
from ditty.errors import Cancelled, DittyError
from ditty.planning import preflight
from ditty.runs.status import find_trained
from ditty.store.artifacts import Store, read_manifest
from flows.commands.bench_command import bench
from flows.commands.chat_command import chat
from flows.commands.compare_command import compare_command
from flows.commands.console import Overrides, StageLines, quiet_console
from flows.commands.preview_command import preview_command
from flows.commands.serve_command import deploy, serve
from flows.commands.verify_command import verify
from flows.commands.watch_commands import logs, status
from flows.events import listen

app = typer.Typer(
    help="Fine-tune Hugging Face causal language models, stage by stage.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console(highlight=False)

SpecFile = Annotated[Path, typer.Argument(help="The spec, a YAML file.")]


def main() -> None:
    """Entry point: a user's mistake is a message and exit code 1, never a traceback."""
    # Progress is ours to draw; the libraries' own bars and banners would tear it.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except DittyError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        httpx = sys.modules.get("httpx")  # below Prefect, and imported only with it
        if httpx is None or not isinstance(error, httpx.TransportError):
            raise
        _fail(
            f"Prefect's server stopped answering ({type(error).__name__}: {error}). What was made "
            "is in the store: run the same command again, with PREFECT_API_URL set or unset"
        )


def _fail(message: str) -> NoReturn:
    Console(stderr=True, highlight=False).print(f"[bold red]error[/] {escape(message)}")
    sys.exit(1)


def demo(overrides: Overrides = None) -> None:
    """Fine-tune a small real model on this Python's own docstrings, through every stage."""
    from ditty.planning.demo import demo_spec, use_it

    store = Store()
    console.print("[bold]ditty demo[/]: SmolLM2-135M-Instruct learns to write docstrings (QLoRA)")
    with console.status("looking for the base model"):
        spec = demo_spec(store, overrides or [])
    result = _call("finetune", spec)
    _print_losses(result)
    _print_samples(spec, store)
    base = str(result["model_dir"])
    console.print("\n[bold]use it[/]")
    console.print(use_it(str(result["path"]), base), soft_wrap=True)
    console.print("\n[bold]next[/]")
    console.print("  ditty demo                            again: every stage is cached")
    console.print("  ditty demo --set train.max_steps=60 --set name=longer")
    console.print("  ditty status demo")
    console.print("  your own data and model: see 'Bring your own' in the README")


def run(spec: SpecFile, overrides: Overrides = None) -> None:
    """Run a spec: every stage that is not cached, then training from the newest checkpoint."""
    _print_losses(_call("finetune", _checked(spec, overrides)))


def evaluate(spec: SpecFile, overrides: Overrides = None) -> None:
    """Measure what `run` made of a spec, and its base model: held-out loss, and tasks."""
    found = _call("evaluate", _checked(spec, overrides))
    base, trained = (measures(found[what]) for what in ("base", "trained"))
    table = Table("", "base", "trained", box=None, pad_edge=False)
    for name, value in base.items():
        table.add_row(escape(name), f"{value:.4f}", f"{trained[name]:.4f}")
    if tokens := found["trained"].get("tokens"):
        table.add_row("held-out tokens", f"{found['base']['tokens']:,}", f"{tokens:,}")
    console.print()
    console.print(table)
    samples = (found[what].get("samples", []) for what in ("base", "trained"))
    for before, after in zip(*samples, strict=True):
        _print_sample(before, {"base": before["completion"], "trained": after["completion"]})


def refresh(spec: SpecFile, overrides: Overrides = None) -> None:
    """Train on the data as they are now; the result takes the place of the last if it is better."""
    found = _call("refresh", _checked(spec, overrides))
    console.print(f"\n[bold]{escape(found['why'])}[/]", soft_wrap=True)
    place = found["in_place"] or "the base model: nothing was promoted yet"
    console.print(f"[bold]in place[/]: {escape(place)}", soft_wrap=True)


def export(
    run: Annotated[str, typer.Argument(help="The run's name.")],
    to: Annotated[
        ExportTo,
        typer.Option(
            help="adapter: as trained; merged: folded into the base, a folder; gguf: the same as "
            "one file, for llama.cpp."
        ),
    ] = ExportTo.ADAPTER,
    out: Annotated[
        str | None,
        typer.Option(help="A folder that is made, s3://bucket/prefix/name, or hub:ORG/NAME."),
    ] = None,
    dtype: Annotated[
        ExportDtype | None,
        typer.Option(
            help="Of a whole model's weights; without it, that of the base. q8_0, q4_0: a .gguf "
            "file's, quantized."
        ),
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="For the card; without it, that of a local base model.")
    ] = None,
    public: Annotated[
        bool,
        typer.Option(
            "--public", help="Make the hub's repository public; by default it is private."
        ),
    ] = False,
) -> None:
    """Copy the result of a run, an adapter or a whole model, to where it is used."""
    from ditty.planning.demo import use_gguf, use_it, use_model

    find_trained(Store(), run)  # before Prefect starts
    found = _call("export", run, to, out, dtype, license, public)
    place = found["out"] or found["path"]
    console.print(f"\n[bold]result[/]: {escape(place)}", soft_wrap=True)
    folder = _readable(out, found["path"])
    use = use_gguf if to is ExportTo.GGUF else use_model
    lines = use_it(folder, found["base"]) if found["base"] else use(folder)
    console.print(f"[bold]use it[/]\n{escape(lines)}", soft_wrap=True)


def quantize(
    model: Annotated[
        str, typer.Argument(help="A hub id, a folder with safetensors or .bin files, or .gguf.")
    ],
    to: Annotated[Quantization, typer.Option(help="The format.")] = Quantization.NF4,
    out: Annotated[
        str | None,
        typer.Option(help="A folder that is made, s3://bucket/prefix/name, or hub:ORG/NAME."),
    ] = None,
    precision: Annotated[
        Precision, typer.Option(help="What its layers compute in, and the other weights are in.")
    ] = Precision.BF16,
    revision: Annotated[
        str | None, typer.Option(help="Commit, branch or tag of a hub model.")
    ] = None,
) -> None:
    """Quantize a model once, shard by shard; trainings with the same format load the result."""
    from ditty.planning.demo import use_model

    found = _call("quantize", model, to, out, precision, revision)
    place = found["out"] or found["path"]
    size = found["bytes"] / 1e9
    console.print(f"\n[bold]result[/]: {escape(place)}, {size:.2f} GB", soft_wrap=True)
    folder = _readable(out, found["path"])
    console.print(f"[bold]use it[/]\n{escape(use_model(folder))}", soft_wrap=True)


def _readable(out: str | None, path: str) -> str:
    """What transformers can read of the two: a folder, a repository of the hub."""
    return path if out is None or "://" in out else out.removeprefix("hub:")


def plan(
    spec: SpecFile,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which stages are cached, which will run and why. Starts nothing."""
    from ditty.planning.plan import make_plan

    made = make_plan(load_spec(spec, overrides or []), Store())
    if as_json:
        print(json.dumps(made.to_json(), indent=2))
        return
    table = Table("stage", "", "why", "counts", box=None, pad_edge=False)
    for line in made.stages:
        color = "green" if line.state == "cached" else "yellow"
        counts = ", ".join(f"{k} {_number(v)}" for k, v in line.facts.items())
        table.add_row(escape(line.title), f"[{color}]{line.state}[/]", escape(line.why), counts)
    console.print(table)
    steps = "not known before the rows are packed" if made.steps is None else str(made.steps)
    epochs = "" if made.epochs is None else f" ({made.epochs:.2f} epochs)"
    console.print(f"steps: {steps}{epochs}, {made.global_batch_size} rows each")
    console.print(f"training: {made.strategy}; on {made.device}, {made.place}")
    if made.memory:
        console.print(f"memory: {made.memory}")


def lineage(
    where: Annotated[str, typer.Argument(help="A committed directory, or the URI of a copy.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what an artifact or a checkpoint was made from, by which version and flow run."""
    from ditty.results.lineage import lineage as chain
    from flows.commands.views import lineage_tree

    node = chain(where, Store())
    if as_json:
        print(json.dumps(node.to_json(), indent=2))
    else:
        # Paths are for copying: never cut.
        Console(highlight=False, width=1000).print(lineage_tree(node))


def _checked(spec: Path, overrides: list[str] | None) -> RunSpec:
    """The spec, with what its flow refuses first of all refused before Prefect starts."""
    loaded = load_spec(spec, overrides or [])
    preflight.check_machine(loaded, Store())
    return loaded


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _call(flow: str, *arguments: Any) -> dict[str, Any]:
    """Run a flow with progress on the terminal; returns its result."""
    with ExitStack() as stack:
        with console.status("starting Prefect"):
            called = getattr(import_module(f"flows.{flow}"), flow)
            from flows.serving.server import local_server

            stack.enter_context(local_server())
        stack.enter_context(quiet_console())
        stack.enter_context(listen(stack.enter_context(StageLines(console))))
        return _returned(called, *arguments)


def _returned(flow: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    from prefect.exceptions import CancelledRun

    try:
        return flow(*arguments)
    except CancelledRun as error:  # what Prefect makes of a state, and its message
        raise Cancelled(str(error)) from error


def _print_losses(result: dict[str, Any]) -> None:
    """The held-out loss before and after, from the result's own manifest."""
    facts = read_manifest(Path(result["path"])).facts
    losses = [e["loss"] for e in facts["eval"]]
    if losses:
        console.print(
            f"\n[bold]held-out loss[/]: {losses[0]:.2f} before, {losses[-1]:.2f} after "
            f"{facts['steps']} steps"
        )
    console.print(f"[bold]result[/]: {result['path']}", soft_wrap=True)


def _print_samples(spec: RunSpec, store: Store) -> None:
    from ditty.runs.rundir import RunDir

    samples = list(RunDir.named(spec.name, store.home).samples())
    if not samples:
        return
    first, last = samples[0], samples[-1]
    console.print("\n[bold]one held-out function[/]")
    texts = {"before": first["completion"], "after": last["completion"]}
    _print_sample(first, texts | {"the author's": first["reference"]})


def _print_sample(sample: dict[str, str], texts: dict[str, str]) -> None:
    """A prompt, and what was written for it, by whom."""
    console.print(escape(sample["prompt"].strip()), style="dim")
    for title, text in texts.items():
        console.print(f"[bold]{title}[/]: {escape(text.strip())}")


# As `ditty --help` lists them.
COMMANDS = (
    demo,
    run,
    plan,
    preview_command,
    status,
    logs,
    compare_command,
    chat,
    evaluate,
    refresh,
    export,
    quantize,
    bench,
    lineage,
    verify,
    serve,
    deploy,
)
for command in COMMANDS:
    app.command(command.__name__.removesuffix("_command"))(command)
