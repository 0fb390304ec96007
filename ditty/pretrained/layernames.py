"""Whether the layers that a spec names are there, by the names in the model's files.

peft trains what it finds of a list of names and says nothing of the rest, and it looks when the
model is loaded: after the data, and after the base was quantized. Imports no torch.
"""

import difflib
import re
from collections.abc import Collection, Iterable

from ditty.errors import SpecError

ALL_LINEAR = "all-linear"  # peft's name
# What a tensor may be of without being in a file: a head that is tied to the embedding.
HEADS = ("lm_head", "embed_out")
# Classes call their body so, and files that were saved of the body alone leave it out.
BODIES = ("", "model.", "transformer.", "gpt_neox.")
EXPERTS = ".experts."


def of_tensors(names: Iterable[str]) -> set[str]:
    """The layers, and what holds layers, that tensors of these names belong to."""
    layers = set(HEADS)
    for name in names:
        # Beside a quantized weight are its scales, `x.weight.absmax`.
        path = name.partition(".weight")[0] if ".weight" in name else name.rpartition(".")[0]
        parts = path.split(".")
        layers.update(".".join(parts[:n]) for n in range(1, len(parts) + 1) if path)
    return layers


def check_layers(
    layers: Collection[str], target_modules: str | list[str], modules_to_save: list[str]
) -> None:
    """Raise SpecError where a name is of no layer.

    Experts have other names in files than in a model, which holds them in one tensor: where there
    are any, names that are not found are left to peft.

    Args:
        layers: whole names, `model.layers.0.self_attn.q_proj` for one.
        target_modules, modules_to_save: of the spec (`model`).
    """
    if any(EXPERTS in f"{layer}." for layer in layers):
        return
    targets = target_modules if isinstance(target_modules, list) else []
    for key, names in (("target_modules", targets), ("modules_to_save", modules_to_save)):
        for name in names:
            if not any(_is_called(layer, name) for layer in layers):
                raise SpecError(
                    f"model.{key}: this model has no layer {name!r}{_near(name, layers)}"
                )
    if isinstance(target_modules, str) and target_modules.lower() != ALL_LINEAR:
        _check_pattern(target_modules, layers)


def _is_called(layer: str, name: str) -> bool:
    """Whether one of the two ends as the other: peft takes the ends of names."""
    return f".{layer}".endswith(f".{name}") or f".{name}".endswith(f".{layer}")


def _check_pattern(pattern: str, layers: Collection[str]) -> None:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise SpecError(
            f"model.target_modules: {pattern!r} is no regular expression ({error}); expected "
            f"{ALL_LINEAR}, a list of names, or a pattern"
        ) from error
    if any(compiled.fullmatch(f"{body}{layer}") for layer in layers for body in BODIES):
        return
    like = max(layers, key=len)
    raise SpecError(
        f"model.target_modules: {pattern!r} is a pattern for the whole name of a layer ({like}, "
        "for one), and matches none; for the layers that are called so write a list, "
        f"[{pattern}]"
    )


def _near(name: str, layers: Collection[str]) -> str:
    """What the message adds: the nearest names, or all."""
    ends = {layer.rpartition(".")[2] for layer in layers}
    known = sorted(end for end in ends if not end.isdigit())
    close = difflib.get_close_matches(name.rpartition(".")[2], known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else f"; it has {', '.join(known)}"
