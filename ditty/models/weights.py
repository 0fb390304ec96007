"""Where each of a model's weights lies in a folder of safetensors, and how to read a part of it.

A process that holds a part of each weight reads that part and nothing else: a range of the
flattened tensor. transformers decides what the checkpoint's names mean (its conversion mapping);
a weight that it computes from several tensors (a stack of experts) is computed whole, one at a
time, and cut.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from ditty.errors import ModelError
from ditty.models.shards import tensor_of
from ditty.pretrained.tensorfiles import headers

ROWS_AT_ONCE = 4096  # of a large embedding: 100 MB
MADE_HERE = ".weight_scale"  # of a float8 layer: no checkpoint has it before


@dataclass
class Source:
    """What one weight is made of.

    Attributes:
        tensors: (file, name, the converter's pattern) of each tensor of the checkpoint.
        converter: transformers' recipe where the weight is not one tensor as it stands.
        target: the converter's name of its result.
    """

    tensors: list[tuple[Path, str, str]] = field(default_factory=list)
    converter: WeightConverter | None = None
    target: str = ""


class CheckpointNames:
    """What the names in a checkpoint mean to `model`, by transformers' rules for it."""

    def __init__(self, model: PreTrainedModel):
        quantizer = getattr(model, "hf_quantizer", None)
        self.rules = get_model_conversion_mapping(model, None, quantizer)
        self.renamings = [rule for rule in self.rules if isinstance(rule, WeightRenaming)]
        self.converters = [rule for rule in self.rules if isinstance(rule, WeightConverter)]
        self.prefix, self.known = model.base_model_prefix, model.state_dict()

    def target(self, name: str) -> tuple[str, str | None]:
        """(the model's name for a tensor, the pattern of the converter that makes one of it)"""
        found, pattern = rename_source_key(
            name, self.renamings, self.converters, self.prefix, self.known
        )
        if found not in self.known and name in self.known:
            return name, None  # a checkpoint in the new layout already
        return found, pattern


def kept_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], torch.dtype | None]:
    """From a weight's name to what `model` wants it in whatever `dtype`, or None: as it comes."""
    exceptions = model._get_dtype_plan(dtype)
    if not exceptions:
        return lambda name: None
    pattern, groups, _ = build_glob_alternation(list(exceptions))

    def kept(name: str) -> torch.dtype | None:
        match = pattern.search(name)
        return None if match is None else exceptions[groups[str(match.lastgroup)]]

    return kept


def tied_groups(model: PreTrainedModel) -> dict[str, list[str]]:
    """Each name of a tied weight -> all names of it."""
    groups: dict[str, list[str]] = {}
    for name, root in model.all_tied_weights_keys.items():
        groups.setdefault(root, [root]).append(name)
    return {name: group for group in groups.values() for name in group}


def check_complete(model: PreTrainedModel, seen: set[str], source: Path) -> None:
    """Raise for a parameter that no tensor fills: from_pretrained would make it up at random."""
    tied = tied_groups(model)
    for name, _ in model.named_parameters(remove_duplicate=False):
        if name.endswith(MADE_HERE):
            continue
        if seen.isdisjoint(tied.get(name, [name])):
            raise ModelError(
                f"{source} has no tensor for {name}: the checkpoint is incomplete, "
                "or its config.json is of another model"
            )


class WeightFiles:
    """The weights in `folder`, by the names that `model` has for them.

    Args:
        folder: config.json and safetensors.
        model: the model, on the meta device; its layers as the folder has them (quantized ones
            replaced). It learns how its weights were named, for save_pretrained.
    Raises:
        ModelError: no safetensors, damaged ones, or two weights in them that config.json makes one.
    """

    def __init__(self, folder: Path, model: PreTrainedModel):
        self.folder, self.model, self._tied = folder, model, tied_groups(model)
        self.bytes_read = 0
        self._lock = Lock()
        self.sources: dict[str, Source] = {}
        self.statistics: dict[str, list[tuple[Path, str]]] = {}
        self._find()
        self._check_tied()

    def _find(self) -> None:
        model = self.model
        names = CheckpointNames(model)
        by_pattern = {p: c for c in names.converters for p in c.source_patterns}
        # In the order in which transformers converts them: layer 2 before layer 10.
        for header in sorted(headers(self.folder), key=lambda h: dot_natural_key(h.name)):
            file, name = header.file, header.name
            owner, dot, statistic = name.partition(".weight.")
            if dot and statistic:  # bitsandbytes' "x.weight.absmax": goes with x.weight
                found = names.target(f"{owner}.weight")[0]
                self.statistics.setdefault(found, []).append((file, name))
                continue
            target, pattern = names.target(name)
            source = self.sources.setdefault(target, Source(target=target))
            source.tensors.append((file, name, pattern or name))
            if pattern is not None and source.converter is None:
                source.converter = deepcopy(by_pattern[pattern])
        for source in list(self.sources.values()):
            if source.converter is not None:
                first = source.converter.target_patterns[0]
                for other in source.converter.target_patterns[1:]:
                    self.sources.setdefault(source.target.replace(first, other), source)
        # As from_pretrained: save_pretrained turns these back, and without them goes by the class's
        # name, which is another once FSDP2 has cut the model.
        model._weight_conversions = [rule for rule in names.rules if rule.was_used()]

    def _check_tied(self) -> None:
        """Raise for tied weights that differ: from_pretrained unties those, after a warning."""
        for name, root in self.model.all_tied_weights_keys.items():
            one, other = self.sources.get(name), self.sources.get(root)
            if one is not None and other is not None and not _same(one, other):
                raise ModelError(
                    f"{self.folder} holds {name} and {root} with different values, and its "
                    "config.json says that they are one: which is to be trained? Set "
                    "tie_word_embeddings to false there to train both"
                )

    def source(self, name: str) -> Source:
        """Where the weight `name` comes from; a tied one from any of its names.

        Raises:
            ModelError: it is not there: from_pretrained would make it up at random.
        """
        for alias in (name, *self._tied.get(name, ())):
            if alias in self.sources:
                return self.sources[alias]
        raise ModelError(
            f"{self.folder} has no tensor for {name}: the checkpoint is incomplete, "
            "or its config.json is of another model"
        )

    def read(self, name: str, start: int, stop: int, shape: Iterable[int]) -> torch.Tensor:
        """Elements [start, stop) of the flattened weight `name`, in the file's dtype.

        Args:
            shape: what the model expects the whole weight to be.
        Raises:
            ModelError: the file has another shape.
        """
        source = self.source(name)
        expected = list(shape)
        if source.converter is not None:
            whole = self._convert(source)[name]
            _check_shape(name, list(whole.shape), expected, self.folder)
            return whole.reshape(-1)[start:stop].clone()
        file, key, _ = source.tensors[0]
        # Opened for each read, as in tensor_of.
        with safe_open(file, framework="pt") as opened:
            part = opened.get_slice(key)
            found = list(part.get_shape())
            _check_shape(name, found, expected, self.folder)
            if not found:
                return opened.get_tensor(key).reshape(-1)[start:stop].clone()
            row = max(1, torch.Size(found[1:]).numel())
            first, last = start // row, -(-stop // row)
            rows = part[first:last].reshape(-1)
            self._count(rows.nbytes)
            return rows[start - first * row : stop - first * row].clone()

    def read_statistics(self, name: str) -> dict[str, torch.Tensor]:
        """The scales and code books of the quantized weight `name`, by their own names."""
        found = {}
        for file, key in self.statistics.get(name, ()):
            with tensor_of(file, key) as view:
                value = view.clone()
            self._count(value.nbytes)
            found[key.partition(".weight.")[2]] = value
        return found

    def _count(self, size: int) -> None:
        with self._lock:
            self.bytes_read += size

    def _convert(self, source: Source) -> dict[str, torch.Tensor]:
        converter: Any = deepcopy(source.converter)
        for file, key, pattern in source.tensors:
            with tensor_of(file, key) as view:
                value = view.clone()
            self._count(value.nbytes)
            converter.add_tensor(source.target, key, pattern, value)
        config = self.model.config
        made = converter.convert(source.target, model=self.model, config=config)
        return {name: v[0] if isinstance(v, list) else v for name, v in made.items()}


def _same(one: Source, other: Source) -> bool:
    """Whether two weights of a checkpoint hold the same values; compared piece by piece."""
    (file, key, _), (other_file, other_key, _) = one.tensors[0], other.tensors[0]
    with (
        safe_open(file, framework="pt") as a,
        safe_open(other_file, framework="pt") as b,
    ):
        first, second = a.get_slice(key), b.get_slice(other_key)
        shape = first.get_shape()
        if shape != second.get_shape():
            return False
        steps = range(0, shape[0], ROWS_AT_ONCE)
        return all(
            torch.equal(first[i : i + ROWS_AT_ONCE], second[i : i + ROWS_AT_ONCE]) for i in steps
        )


def _check_shape(name: str, found: list[int], expected: list[int], folder: Path) -> None:
    if found != expected:
        raise ModelError(
            f"{name} in {folder} has shape {found}, config.json makes it {expected}: "
            "weights and config are of different models"
        )
