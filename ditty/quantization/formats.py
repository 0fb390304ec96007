"""How the weight of a linear layer is stored quantized: the formats, and their arithmetic.

The arithmetic is plain PyTorch, in the order of operations of bitsandbytes' CPU kernels: bit for
bit theirs, and on a GPU the same bits as on a CPU, which bitsandbytes' own kernels do not promise.
So a content key names one content, wherever it was made.

Source: arXiv:2208.07339 (LLM.int8), arXiv:2305.14314 (NF4 and double quantization).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ditty.config.choices import Quantization
from ditty.models.shards import Parts
from ditty.quantization.quantplan import Size

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig
    from transformers.utils.quantization_config import QuantizationConfigMixin

CHUNK = 1 << 21  # weights quantized in one call, which needs about 24 bytes for each
BLOCK = 64  # NF4: weights that share a scale
NESTED_BLOCK = 256  # NF4: scales that share a scale
EXTRA_BYTES = 2048  # NF4, of a tensor at most: two code books and its shape and dtype
SMALLEST = 1e-38  # in place of the scale of a block of zeros

Pack = Callable[[torch.Tensor], Parts]


@dataclass(frozen=True)
class Format:
    """How a quantized layer is stored.

    Attributes:
        title: for people.
        settings: what asks transformers for it, by the dtype to compute in.
        pack: from a weight [out, in] on any device to the layer's entries in a checkpoint, without
            its name, on the CPU.
        size: their bytes, exact or slightly too large, by `out` and `in`.
        leaves_stacks: whether experts that are stacked in one parameter may stay as they are.
    """

    title: str
    settings: Callable[[torch.dtype], "QuantizationConfigMixin"]
    pack: Pack
    size: Size
    leaves_stacks: bool = True


def _int8_settings(dtype: torch.dtype) -> "BitsAndBytesConfig":
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)  # layers compute in the dtype of their input


def _int8_size(rows: int, columns: int) -> int:
    return rows * columns + 4 * rows + 1


def int8(weight: torch.Tensor) -> Parts:
    """What `bitsandbytes.nn.Int8Params` makes of a weight, in less memory.

    In chunks of whole rows, which do not depend on each other. Rounded to fp16 first, from any
    dtype, as bitsandbytes does.
    """
    packed = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight), dtype=torch.float32)  # a row's maximum
    _fill_by_rows(packed, scales, weight, _int8_rows)
    return {
        "weight": packed,
        "SCB": scales,
        "weight_format": torch.tensor(0, dtype=torch.uint8),  # row by row, the only one there is
    }


Round = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def _fill_by_rows(
    packed: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, rounds: Round
) -> None:
    """Round some rows at a time. One allocation a result: small ones that stay between large ones
    that go would keep the heap from shrinking."""
    step = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        packed[rows], scales[rows] = rounds(weight[rows])


def _int8_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows = rows.to(torch.float16)
    scales = rows.abs().amax(dim=1).float()
    # A row of zeros: 0 x inf, which bitsandbytes' CPU kernel turns into 0.
    scaled = torch.nan_to_num(rows * (127.0 / scales.unsqueeze(-1)), nan=0.0)
    return torch.round(scaled).to(torch.int8), scales


def _nf4_settings(dtype: torch.dtype) -> "BitsAndBytesConfig":
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=torch.uint8,
    )


def _nf4_size(rows: int, columns: int) -> int:
    blocks = math.ceil(rows * columns / BLOCK)
    nested = 4 * math.ceil(blocks / NESTED_BLOCK)
    return math.ceil(rows * columns / 2) + blocks + nested + EXTRA_BYTES


def nf4(weight: torch.Tensor) -> Parts:
    """`bitsandbytes.functional.quantize_4bit(weight, compress_statistics=True)` in less memory.

    In chunks of whole blocks, which do not depend on each other. The mean of the scales does, on
    the number of threads that add them up (measured: the last bit, from 2.1 million weights on),
    so that one thread does it: then it equals transformers' result in a process of one thread.
    """
    import bitsandbytes.functional as bnb

    code = bnb.get_4bit_type("nf4", device="cpu")
    flat = weight.reshape(-1)
    packed = torch.empty(math.ceil(len(flat) / 2), 1, dtype=torch.uint8)
    scales = torch.empty(math.ceil(len(flat) / BLOCK), dtype=torch.float32)
    for start in range(0, len(flat), CHUNK):
        pairs, maxima = _nf4_blocks(flat[start : start + CHUNK], code)
        packed[start // 2 :][: len(pairs)] = pairs
        scales[start // BLOCK :][: len(maxima)] = maxima
    mean = _mean_in_one_thread(scales)
    nested_scales, nested = bnb.quantize_blockwise(scales - mean, blocksize=NESTED_BLOCK)
    state = bnb.QuantState(
        absmax=nested_scales,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=BLOCK,
        code=code,
        quant_type="nf4",
        offset=mean,
        state2=nested,
    )
    beside = {f"weight.{key}": part.clone() for key, part in state.as_dict(packed=True).items()}
    return {"weight": packed, **beside}


def _nf4_blocks(flat: torch.Tensor, code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(two weights a byte [n/2, 1], a scale for each block), of n weights; the last block is short.

    A short block is divided by its scale, a whole one multiplied with its inverse: bitsandbytes
    does so.
    """
    values = flat.float()
    whole = values.numel() // BLOCK * BLOCK
    blocks, rest = values[:whole].view(-1, BLOCK), values[whole:]
    scales = blocks.abs().amax(dim=-1)
    scaled = (blocks * (1.0 / scales.clamp(min=SMALLEST).unsqueeze(-1))).view(-1)
    if rest.numel():
        scale = rest.abs().amax().clamp(min=SMALLEST)
        scales = torch.cat([scales, scale.unsqueeze(0)])
        scaled = torch.cat([scaled, rest / scale])
        if rest.numel() % 2:
            scaled = torch.nn.functional.pad(scaled, (0, 1))
    code = code.to(values.device)
    nearest = torch.bucketize(scaled.clamp_(-1, 1), (code[:-1] + code[1:]) / 2, out_int32=True)
    nibbles = nearest.to(torch.uint8)
    return ((nibbles[::2] << 4) | nibbles[1::2]).unsqueeze(1), scales


def _mean_in_one_thread(values: torch.Tensor) -> torch.Tensor:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return values.mean()
    finally:
        torch.set_num_threads(threads)


def _fp8_settings(dtype: torch.dtype) -> "QuantizationConfigMixin":
    from ditty.models.fp8 import Fp8Config

    return Fp8Config()


def _fp8_size(rows: int, columns: int) -> int:
    return rows * columns + 4 * rows


def fp8(weight: torch.Tensor) -> Parts:
    """e4m3 with a scale a row: see ditty.models.fp8."""
    from ditty.models.fp8 import E4M3, round_rows

    packed = torch.empty(weight.shape, dtype=E4M3)
    scales = torch.empty(len(weight), 1, dtype=torch.float32)
    _fill_by_rows(packed, scales, weight, round_rows)
    return {"weight": packed, "weight_scale": scales}


FORMATS = {
    Quantization.INT8: Format(
        "LLM.int8 (arXiv:2208.07339), one scale a row", _int8_settings, int8, _int8_size
    ),
    Quantization.NF4: Format(
        f"NF4 (arXiv:2305.14314) in blocks of {BLOCK}, with double quantization",
        _nf4_settings,
        nf4,
        _nf4_size,
    ),
    Quantization.FP8: Format("float8 e4m3, one scale a row", _fp8_settings, fp8, _fp8_size, False),
}

CARD = """---
library_name: transformers
tags: [{to}, {package}]
---
# {architecture} in {to}

The linear layers of its blocks are stored as {title}; everything else is {dtype}.

- quantized weights: {quantized:,}
- other weights: {other:,}
{experts}- size: {size:.2f} GB in {shards} file(s); `shards.json` says what each was made of

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder")  # needs {package}
tokenizer = AutoTokenizer.from_pretrained("this folder")
```

{exactness}
Made by `ditty quantize`; `ditty lineage` on this folder says from what.
"""

EXPERTS = "- of these, experts in stacks, as transformers leaves them: {expert_weights:,}\n"
EXACT = """The weights are those that transformers and bitsandbytes make of the original when they
quantize it at load, on a CPU."""
NEAREST = (
    "Each weight is the nearest one of e4m3 to the original's, in fp32 and divided by its scale."
)


def model_card(architecture: str, to: Quantization, facts: dict[str, Any]) -> str:
    """The README.md of a quantized model: of the same content, the same text.

    Args:
        architecture: transformers' class.
        facts: what `ditty.quantization.quantize.quantize` has counted.
    """
    made_by_us = to is Quantization.FP8
    return CARD.format(
        package="compressed-tensors" if made_by_us else "bitsandbytes",
        exactness=NEAREST if made_by_us else EXACT,
        architecture=architecture,
        to=to.value,
        title=FORMATS[to].title,
        dtype=facts["dtype"],
        quantized=facts["quantized_weights"],
        other=facts["other_weights"],
        experts=EXPERTS.format(**facts) if "expert_weights" in facts else "",
        size=facts["bytes"] / 1e9,
        shards=facts["shards"],
    )
