"""Talk to a base model and what became of it, side by side.

    python -m ditty.evaluation.talk RUN MAX_TOKENS TEMPERATURE

Each line of standard input is a message; both answer, each with its own answers as its history.
/reset begins anew, /quit or the end of the input ends it.
"""

import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ditty.config.choices import Adapter, Device, Where
from ditty.config.spec import RunSpec
from ditty.conversion.modelstages import base_folder, quantized_folder
from ditty.errors import DittyError, RunError
from ditty.models.model import base_model
from ditty.pretrained import basemodel
from ditty.processes.environment import resolve_device
from ditty.results.package import taught_ends
from ditty.runs.status import find_trained
from ditty.stages import stageline
from ditty.store.artifacts import Store, read_manifest

RESET, QUIT = "/reset", "/quit"


@dataclass
class Speaker:
    """One who answers.

    Attributes:
        module: the model.
        aside: a context within which it is this speaker: the adapter off, for the base.
        ends: tokens at which it ends an answer, beside those of the model and the tokenizer.
        history: messages so far.
    """

    name: str
    module: Any
    aside: Callable[[], AbstractContextManager[Any]] = nullcontext
    ends: tuple[int, ...] = ()
    history: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Manner:
    """How answers are made: `temperature` 0 is greedy."""

    spec: RunSpec
    tokenizer: Any
    max_tokens: int
    temperature: float


def load(run: str, store: Store) -> tuple[list[Speaker], RunSpec, Path]:
    """(the base model and the result, the spec, the folder with the tokenizer) of a finished run.

    Raises:
        RunError: there is no such run, or its result or its base are not what they were.
        DittyError: the base model cannot be had.
    """
    # Not above: bitsandbytes, below it, speaks as it is imported, and `main` tells it not to.
    from ditty.distributed.load import load_trained
    from ditty.distributed.world import single

    spec, trained = _result(run, store)
    base = basemodel.identify(spec.model.base_model, spec.model.revision)
    key = stageline.model_key(stageline.resolve_model(spec, store))
    if key != trained_on(trained):
        raise RunError(
            f"{spec.model.base_model} is not the model that run {run} was trained upon: its files "
            "have changed since. Put the earlier ones back, or run the spec with another name"
        )
    # It may have been trained on GPUs that are not here, in several processes.
    here: dict[str, Any] = {"backend": Where.LOCAL}
    if spec.launch.device is Device.CUDA:
        here["device"] = Device.AUTO
    device = resolve_device(spec.launch.alone().model_copy(update=here))
    folder = base_folder(base, spec, store)
    if stageline.prequantizes(spec):
        folder = quantized_folder(folder, spec, store, device)
    args = (spec.model, spec.train, single(device).device)
    module = load_trained(folder, trained, *args)
    result = Speaker(run, module, ends=tuple(taught_ends(trained)))
    if spec.model.adapter is Adapter.NONE:
        base_speaker = Speaker("base", load_trained(folder, None, *args))
    else:
        base_speaker = Speaker("base", module, module.disable_adapter)
    return [base_speaker, result], spec, trained


def trained_on(trained: Path) -> str:
    """The content key of the model beneath a training's artifact."""
    return str(read_manifest(trained).facts["inputs"]["model"])


def _result(run: str, store: Store) -> tuple[RunSpec, Path]:
    found = find_trained(store, run)
    trained = store.path("train", found.key)
    if not trained.is_dir():
        raise RunError(
            f"the result of run {run} is not in {store.home}: `ditty run` its spec again (what is "
            "there is not made again)"
        )
    return found.spec, trained


def talk(
    speakers: list[Speaker], manner: Manner, lines: Iterable[str]
) -> Iterator[tuple[str, str]]:
    """(name, answer) of each speaker to each line."""
    for line in lines:
        text = line.strip()
        if text == QUIT:
            return
        if text == RESET:
            for speaker in speakers:
                speaker.history.clear()
        elif text:
            for speaker in speakers:
                yield speaker.name, answer(speaker, manner, text)


def answer(speaker: Speaker, manner: Manner, text: str) -> str:
    """What a speaker says next; without a chat template, how it goes on with the text."""
    from ditty.training.evaluate import autocast, generate

    speaker.history.append({"role": "user", "content": text})
    tokenizer, model = manner.tokenizer, base_model(speaker.module)
    if tokenizer.chat_template:
        prompt = tokenizer.apply_chat_template(speaker.history, add_generation_prompt=True)
    else:
        prompt = tokenizer("".join(turn["content"] for turn in speaker.history))
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    ends |= set(speaker.ends)
    options = {"max_new_tokens": manner.max_tokens, **sampling(manner.temperature)}
    ids = torch.tensor([list(prompt["input_ids"])], device=model.device)
    with speaker.aside(), autocast(model.device, manner.spec.train.precision):
        found = generate(model, ids, tokenizer, sorted(ends), **options)
    said = tokenizer.decode(found, skip_special_tokens=True)
    speaker.history.append({"role": "assistant", "content": said})
    return str(said)


def sampling(temperature: float) -> dict[str, Any]:
    """The arguments of `generate`: greedy at 0."""
    return {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}


def main(arguments: list[str]) -> int:
    """Load, and answer each line; a user's mistake is a message and exit code 1."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)  # libraries to their callers, not to users
    run, max_tokens, temperature = arguments
    try:
        speakers, spec, folder = load(run, Store())
    except DittyError as error:
        print(f"error {error}", file=sys.stderr)  # noqa: T201
        return 1
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    manner = Manner(spec, tokenizer, int(max_tokens), float(temperature))
    print(f"{spec.model.base_model} and {run}; {RESET} begins anew, {QUIT} ends", flush=True)  # noqa: T201
    for name, said in talk(speakers, manner, _lines()):
        print(f"{name}: {said.strip()}", flush=True)  # noqa: T201
    return 0


def _lines() -> Iterator[str]:
    """Standard input's; with a prompt where a person types."""
    while True:
        try:
            yield input("\n> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
