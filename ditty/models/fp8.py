"""A frozen linear layer in float8: its weight, its input and its gradient in e4m3, a scale a row.

    y  = (q(x) * s_x) (W * s_W)^T          q rounds each row to e4m3, so that its largest is 448
    dx = (q(dy * s_W) * s_d) W             of the same W: the gradient is that of what was computed

The tensor cores (of GPUs from compute capability 8.9 on) want the second product's weight
transposed. Where a process holds the whole model it is kept so as well (`keep_transposed`): a
second byte a number, and no pass over all weights in each step; elsewhere it is transposed when it
is needed. On a CPU the same rounding, multiplied in fp32.
Importing this module registers the format with transformers; nothing else.

On disk: the layout of compressed-tensors, a scale a channel (`weight` e4m3 [out, in],
`weight_scale` fp32 [out, 1]), which vLLM and, with the package compressed-tensors, plain
transformers load.

Source: arXiv:2209.05433 (FP8 formats for deep learning).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ditty.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
SMALLEST_SCALE = 1e-12  # of a row of zeros
MULTIPLE = 16  # what the tensor cores' products want of both sides of a weight
CAPABILITY = (8, 9)

METHOD = "ditty_fp8"  # the name by which transformers finds `Fp8Quantizer`, from this import on


def on_disk(ignored: list[str]) -> dict[str, Any]:
    """The layout's description in config.json, as compressed-tensors has it.

    Args:
        ignored: names of linear layers that are as they were.
    """
    weights: dict[str, Any] = {
        "num_bits": 8,
        "type": "float",
        "strategy": "channel",
        "symmetric": True,
        "dynamic": False,
    }
    inputs: dict[str, Any] = weights | {"strategy": "token", "dynamic": True}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored,
    }


@register_quantization_config(METHOD)
class Fp8Config(QuantizationConfigMixin):
    """What asks transformers for `Fp8Quantizer`."""

    def __init__(self, **_: Any) -> None:
        self.quant_method = METHOD
        self.ignored: list[str] = []  # the quantizer says

    def to_dict(self) -> dict[str, Any]:
        """What config.json says of it."""
        return on_disk(self.ignored)


def round_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 [rows, columns], fp32 scale [rows, 1]) of a matrix; their product is nearest to it."""
    values = values.float()
    # Not `/ LARGEST`, which GPUs compute as this product, and CPUs to another last bit.
    scale = (values.abs().amax(dim=-1, keepdim=True) * (1 / LARGEST)).clamp(min=SMALLEST_SCALE)
    return (values / scale).to(E4M3), scale


def restore(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The fp32 values that an e4m3 matrix and its scales stand for."""
    return weight.float() * scale


def _product(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor
) -> torch.Tensor:
    """(a * a_scale) (b * b_scale)^T, of e4m3 [m, k] and [n, k] with a scale a row; bf16 or fp32."""
    if not a.is_cuda:
        return restore(a, a_scale) @ restore(b, b_scale).T
    return torch._scaled_mm(
        a,
        b.t(),
        scale_a=a_scale,
        scale_b=b_scale.t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


class _Frozen(torch.autograd.Function):
    """x W^T with a W that gets no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        transposed: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(weight if transposed is None else transposed, scale)
        ctx.is_transposed = transposed is not None
        rounded, row_scale = round_rows(x.reshape(-1, x.shape[-1]))
        y = _product(rounded, row_scale, weight, scale)
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (dy,) = gradients
        weight, scale = ctx.saved_tensors
        transposed = weight if ctx.is_transposed else weight.t().contiguous()
        rows = dy.reshape(-1, dy.shape[-1]).float() * scale.T
        rounded, row_scale = round_rows(rows)
        ones = torch.ones(transposed.shape[0], 1, device=weight.device)
        dx = _product(rounded, row_scale, transposed, ones)
        return dx.to(dy.dtype).view(*dy.shape[:-1], -1), None, None, None


class Fp8Linear(torch.nn.Linear):
    """A linear layer whose frozen weight is e4m3 [out, in], `weight_scale` fp32 [out, 1].

    Attributes:
        transposed: the weight as [in, out], where it is kept twice.
    """

    transposed: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype):
        super().__init__(in_features, out_features, bias, device="meta", dtype=dtype)
        weight = torch.empty(out_features, in_features, dtype=E4M3, device="meta")
        scale = torch.empty(out_features, 1, dtype=torch.float32, device="meta")
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
        self.register_buffer("transposed", None, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out], in the dtype of autocast, or of x."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        y: torch.Tensor = _Frozen.apply(
            x.to(dtype), self.weight, self.weight_scale, self.transposed
        )
        return y if self.bias is None else y + self.bias.to(dtype)


def keep_transposed(model: torch.nn.Module) -> None:
    """Keep the weights of all float8 layers transposed as well; for a model that trains, whole."""
    for layer in model.modules():
        if isinstance(layer, Fp8Linear):
            layer.transposed = layer.weight.detach().t().contiguous()


@register_quantizer(METHOD)
class Fp8Quantizer(HfQuantizer):
    """Puts `Fp8Linear` in the place of a model's linear layers, the head's apart."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        kept = self.get_modules_to_not_convert(model)
        ignored = self.quantization_config.ignored
        for name, layer in list(model.named_modules()):
            if type(layer) is not torch.nn.Linear:
                continue
            if any(name == k or name.endswith(f".{k}") for k in kept):
                ignored.append(name)
                continue
            _check_sides(name, layer)
            ours = Fp8Linear(
                layer.in_features, layer.out_features, layer.bias is not None, layer.weight.dtype
            )
            model.set_submodule(name, ours)

    def param_needs_quantization(
        self, model: "PreTrainedModel", param_name: str, **kwargs: Any
    ) -> bool:
        """Whether a weight of an unquantized checkpoint becomes e4m3."""
        owner, _, key = param_name.rpartition(".")
        ours = isinstance(model.get_submodule(owner), Fp8Linear)
        return ours and key == "weight" and not self.pre_quantized

    def is_serializable(self) -> bool:
        """The layout has a name and a description: see `on_disk`."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Beside it: LoRA."""
        return True


def _check_sides(name: str, layer: torch.nn.Linear) -> None:
    sides = (layer.out_features, layer.in_features)
    if any(side % MULTIPLE for side in sides):
        raise ModelError(
            f"{name} has a weight of {list(sides)}: float8 products want multiples of {MULTIPLE} "
            "on both sides. Use model.quantization: nf4, int8 or none"
        )


def loading_config(folder: Path, trust_remote_code: bool) -> Any:
    """The config of a folder in float8, by which `from_pretrained` uses `Fp8Linear`."""
    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    config.quantization_config = {"quant_method": METHOD}
    return config


def check_device(device: torch.device) -> None:
    """Raise ModelError on a GPU without float8 products."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        raise ModelError(
            f"{torch.cuda.get_device_name(device)} has no float8 arithmetic, which came with "
            "compute capability 8.9: use model.quantization: nf4, int8 or none"
        )
