"""An adapter folded into its unquantized base: a model like any other, which needs no peft.

Or a model that was trained whole, in another dtype. One tensor at a time, and peft does the
arithmetic: the model is built without weights, its adapter is loaded, and each layer gets its base
weight for as long as it is merged. In memory are the adapter, two shards of the result, and about
three fp32 copies of the largest tensor that changes.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from ditty.errors import ModelError
from ditty.models.model import reason
from ditty.models.shards import (
    DTYPES,
    Parts,
    Piece,
    Progress,
    copy_beside,
    tensor_of,
    weight_bytes,
    write_shards,
)
from ditty.models.skeleton import build_empty
from ditty.models.weights import CheckpointNames, kept_in_fp32, tied_groups
from ditty.pretrained.modelfolder import check_folder
from ditty.pretrained.tensorfiles import Header, headers
from ditty.store.files import read_json, write_json

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

CONFIG = "config.json"
ADAPTER = "default"  # peft's name for the only adapter
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Change = Callable[[torch.Tensor], torch.Tensor]  # from a weight of the base to that of the result


@dataclass(frozen=True)
class Weight:
    """A tensor of the result.

    Attributes:
        name: its name in the result.
        source: the tensor of the base that it comes from.
        dtype: what it is written in; None: as it is, for what is no floating-point tensor.
        change: what the adapter makes of it; None: nothing.
    """

    name: str
    source: Header
    dtype: torch.dtype | None
    change: Change | None

    @property
    def count(self) -> int:
        """How many numbers it holds."""
        return prod(self.source.shape)

    def piece(self) -> Piece:
        """It, as it is to be written."""
        source = self.source.span
        size = source.size if self.dtype is None else self.count * self.dtype.itemsize
        return Piece(self.source.name, source.size, size, self._make, source)

    def _make(self) -> Parts:
        with tensor_of(self.source.file, self.source.name) as value:
            if self.change is None:
                return {self.name: value.to(self.dtype or value.dtype, copy=True)}
            assert self.dtype is not None, f"{self.name} is trained, and {self.source.dtype}"
            made = self.change(value).to(self.dtype, copy=True).contiguous()
        if not bool(torch.isfinite(made).all()):
            raise ModelError(
                f"{self.name} is not finite with its adapter merged, in {self.dtype}: beyond that "
                "dtype, or the training has diverged. Use the adapter as it is, beside its base"
            )
        return {self.name: made}


def merge(
    base: Path,
    adapter: Path | None,
    out: Path,
    dtype: str | None = None,
    *,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write the model that `adapter` makes of `base` into the existing folder `out`.

    Merged in fp32, then rounded once. The tensors keep their names; where the adapter changes one
    of two tied weights, both are written, and config.json says that they are not tied.

    Args:
        base: the unquantized model that the adapter was trained upon: config.json, safetensors,
            tokenizer.
        adapter: as `save_trained` (ditty.models.model) writes it: LoRA, DoRA, modules_to_save;
            None: the base as it is, in `dtype`.
        dtype: "float32", "bfloat16" or "float16", of the result; None: each tensor that of the
            base.
        progress: see `write_shards`.
        trust_remote_code: build the model from the folder's own code.
    Returns:
        facts: merged_weights and other_weights (counts), bytes, shards, dtype, untied (names).
    Raises:
        ModelError: the two do not fit each other, the base is quantized, or the adapter changes
            what is not one tensor of the checkpoint (fused experts).
        StoreError: the disk has no room for the result.
    """
    _check(base, dtype)
    model = build_empty(base, torch.float32, _no_quantizer, trust_remote_code=trust_remote_code)
    names, tied = CheckpointNames(model), tied_groups(model)
    target_dtype = _target_dtype(model, dtype)
    changes = _changes(_adapted(model, adapter, base)) if adapter else {}
    weights = list(_weights(base, names, tied, changes, target_dtype))
    untied = sorted({n for name in changes for n in tied.get(name, ())})
    _write_beside(base, out, dtype, untied, trust_remote_code)
    shards = write_shards([weight.piece() for weight in weights], out, progress)
    return {
        "merged_weights": sum(w.count for w in weights if w.change),
        "other_weights": sum(w.count for w in weights if not w.change),
        "bytes": weight_bytes(out),
        "shards": shards,
        "dtype": dtype,
        "untied": untied,
    }


def _no_quantizer(config: Any) -> None:
    return None


def _check(base: Path, dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ModelError(f"cannot write a model in dtype {dtype!r}, expected {', '.join(DTYPES)}")
    check_folder(base)
    if (read_json(base / CONFIG) or {}).get("quantization_config"):
        raise ModelError(
            f"{base} is quantized, and an adapter is merged into unquantized weights only: use the "
            "adapter as it is, beside this base"
        )


def _target_dtype(
    model: "PreTrainedModel", dtype: str | None
) -> Callable[[str, Header], torch.dtype | None]:
    """From a weight's name and source to its dtype in the result, as in `Weight`."""
    wanted = None if dtype is None else DTYPES[dtype]
    kept = None if wanted is None else kept_in_fp32(model, wanted)

    def target(name: str, source: Header) -> torch.dtype | None:
        own = FLOATS.get(source.dtype)
        if own is None or kept is None:
            return own
        return kept(name) or wanted

    return target


def _adapted(model: "PreTrainedModel", adapter: Path, base: Path) -> "PeftModel":
    """The model without weights, with the adapter's in place.

    Raises:
        ModelError: the adapter is of another model.
    """
    from peft import LoraConfig, PeftConfig, PeftModel
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    try:
        config = PeftConfig.from_pretrained(str(adapter))
        if not isinstance(config, LoraConfig) or config.bias != "none" or config.lora_bias:
            raise ValueError("it is none of ditty's (LoRA or DoRA, without biases)")
        config.inference_mode = True
        adapted = PeftModel(model, config, ADAPTER, low_cpu_mem_usage=True)
        values = load_file(adapter / SAFETENSORS_WEIGHTS_NAME)
        names = _names_in_file(adapted)
        if names.keys() != values.keys():
            odd = min(names.keys() ^ values.keys())
            raise ValueError(f"it has {'no' if odd in names else 'a needless'} {odd}")
        # Not load_adapter, which moves them to where the base's weights are: nowhere.
        state = {names[key]: value.to(torch.float32) for key, value in values.items()}
        adapted.load_state_dict(state, strict=False, assign=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"the adapter in {adapter} does not fit the model in {base}: {reason(error)}. "
            "Expected the model that it was trained upon"
        ) from error
    return adapted


def _names_in_file(adapted: "PeftModel") -> dict[str, str]:
    """What peft calls each of the adapter's parameters in a file -> its name in the model."""
    from peft import get_peft_model_state_dict

    parameters = dict(adapted.named_parameters(remove_duplicate=False))
    names = {id(parameter): name for name, parameter in parameters.items()}
    saved = get_peft_model_state_dict(adapted, parameters, save_embedding_layers=False)
    return {key: names[id(parameter)] for key, parameter in saved.items()}


def _changes(adapted: "PeftModel") -> dict[str, Change]:
    """What the adapter makes of the model's weights, by their names in the bare model."""
    from peft.tuners.lora import LoraLayer, ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    changes: dict[str, Change] = {}
    for path, module in adapted.get_base_model().named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for key, value in module.modules_to_save[ADAPTER].named_parameters():
                changes[f"{path}.{key}"] = partial(_saved, value.data)
        elif isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper):
            changes[f"{path}.weight"] = partial(_merged, module)
        elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            what = getattr(module, "parameter_name", type(module).__name__)
            raise ModelError(
                f"the adapter changes {what} of {path.removesuffix('.base_layer')}, which is not "
                "a layer (experts fused in one tensor): that cannot be merged here. Use the "
                "adapter as it is, or peft's merge_and_unload on the whole model"
            )
    return changes


def _saved(trained: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    return trained


@torch.no_grad()
def _merged(layer: Any, base: torch.Tensor) -> torch.Tensor:
    """The weight of one layer with its adapter in it, fp32."""
    owner = layer.get_base_layer()
    empty = owner.weight
    owner.weight = torch.nn.Parameter(base.to(torch.float32, copy=True), requires_grad=False)
    try:
        layer.merge()
        merged: torch.Tensor = owner.weight.data
        return merged
    finally:
        owner.weight = empty


def _weights(
    base: Path,
    names: CheckpointNames,
    tied: Mapping[str, list[str]],
    changes: Mapping[str, Change],
    target_dtype: Callable[[str, Header], torch.dtype | None],
) -> Iterator[Weight]:
    """The tensors of the result: those of the base, then those that are not tied any more."""
    sources: dict[str, Header] = {}
    for header in headers(base):
        name, pattern = names.target(header.name)
        if pattern is None:
            sources[name] = header
        # What transformers computes others from, or does not load, stays as it is.
        change = changes.get(name) if pattern is None else None
        yield Weight(header.name, header, target_dtype(name, header), change)
    wanted = [n for name in changes for n in tied.get(name, (name,))]
    for name in dict.fromkeys(wanted):
        if name in sources:
            continue
        source = next((sources[n] for n in tied.get(name, ()) if n in sources), None)
        if source is None or names.target(name) != (name, None):
            raise ModelError(
                f"the adapter changes {name}, which is no tensor of {base}: transformers makes it "
                "of several (fused experts, say), and that is not undone here. Use the adapter as "
                "it is, or peft's merge_and_unload on the whole model"
            )
        yield Weight(name, source, target_dtype(name, source), changes.get(name))


def _write_beside(
    base: Path, out: Path, dtype: str | None, untied: list[str], trust_remote_code: bool
) -> None:
    """Config, tokenizer and code.

    Raises:
        ModelError: this model ties its weights whatever its config says.
    """
    copy_beside(base, out)
    config = read_json(base / CONFIG)
    assert config is not None, f"{base} was checked"
    if dtype is not None:
        config.pop("torch_dtype", None)  # its old name
        config["dtype"] = dtype
    if untied:
        config["tie_word_embeddings"] = False
    write_json(out / CONFIG, config)
    if not untied:
        return
    model = build_empty(out, torch.float32, _no_quantizer, trust_remote_code=trust_remote_code)
    if still := sorted(set(untied) & set(tied_groups(model))):
        raise ModelError(
            f"the adapter changes one of {', '.join(still)}, which are one weight in the model of "
            f"{base}, and its config.json cannot say otherwise: use the adapter as it is"
        )
