"""NF4 quantization of a checkpoint that need not fit in memory: one tensor at a time.

The result is what transformers' own quantization gives, bit for bit, in the memory of one tensor
and one output shard; `from_pretrained` loads it and quantizes nothing.

On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights in place in an eval-mode forward, which
spoils later gradients. That concerns who loads the result (ditty.model.keep_4bit_weights turns it
off), not the quantization, which runs no layer.

Source: arXiv:2305.14314 (NF4 and double quantization).
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ditty.errors import ModelError, StoreError
from ditty.files import write_json
from ditty.modelfolder import INDEX, WEIGHTS, check_folder, tokenizer_files
from ditty.quantplan import BLOCK, NESTED_BLOCK, Tensor, plan, skeleton

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CHUNK = 1 << 22  # weights quantized in one call: bitsandbytes needs about 24 bytes for each
SPARE_BYTES = 64 << 20  # of disk, beyond the result
COPIED = ("generation_config.json", "*.py")

Progress = Callable[[int, int, str], None]


def quantize_nf4(
    source: Path,
    out: Path,
    dtype: str,
    *,
    max_shard_bytes: int = 512 << 20,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Quantize the model in `source` into the existing folder `out`, with double quantization.

    The same source gives the same bytes, whatever the number of threads.

    Args:
        source: config.json, safetensors, tokenizer.
        out: gets config.json with a quantization_config, shards and their index, and copies of
            the tokenizer and generation files.
        dtype: "float32" or "bfloat16": what weights are cast to first, what those that are not
            quantized are kept in, and what the quantized layers compute in.
        max_shard_bytes: of one output file; a larger tensor gets a file of its own.
        progress: called after each tensor with source bytes done, source bytes in all, and name.
        trust_remote_code: build the model from the folder's own code.
    Returns:
        facts: quantized_weights and other_weights (counts), bytes, shards, dtype, ignored (names
        in the checkpoint that transformers does not load either).
    Raises:
        ModelError: the checkpoint does not fit its config, is quantized already, or has weights
            where bitsandbytes cannot reach them (fused experts).
        StoreError: the disk has no room for the result.
    """
    if dtype not in DTYPES:
        raise ModelError(f"cannot quantize from dtype {dtype!r}, expected {' or '.join(DTYPES)}")
    check_folder(source, quantize=True)
    settings = _settings(DTYPES[dtype])
    model = skeleton(source, settings, DTYPES[dtype], trust_remote_code)
    tensors, ignored = plan(model, source, DTYPES[dtype])
    _check_disk(out, sum(tensor.result_bytes for tensor in tensors))
    shards = _split(tensors, max_shard_bytes)
    _write(shards, out, progress)
    _write_config(model, settings, source, out)
    return {
        "quantized_weights": sum(tensor.count for tensor in tensors if tensor.quantized),
        "other_weights": sum(tensor.count for tensor in tensors if not tensor.quantized),
        "bytes": sum(path.stat().st_size for path in out.glob("*.safetensors")),
        "shards": len(shards),
        "dtype": dtype,
        "ignored": ignored,
    }


def _settings(dtype: torch.dtype) -> "BitsAndBytesConfig":
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=torch.uint8,
    )


def _check_disk(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if free < needed + SPARE_BYTES:
        raise StoreError(
            f"{out} has {free / 1e9:.1f} GB free, the quantized model needs "
            f"{(needed + SPARE_BYTES) / 1e9:.1f} GB: free some, or set DITTY_HOME to another disk"
        )


def _split(tensors: list[Tensor], max_shard_bytes: int) -> list[list[Tensor]]:
    """Consecutive tensors of at most `max_shard_bytes` together, or a single larger one."""
    shards: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.result_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.result_bytes
    return shards


def _write(shards: list[list[Tensor]], out: Path, progress: Progress | None) -> None:
    """Write the shards, and an index if there are several."""
    total = sum(tensor.source_bytes for shard in shards for tensor in shard)
    done = size = 0
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        several = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = WEIGHTS if len(shards) == 1 else several
        content: dict[str, torch.Tensor] = {}
        for tensor in shard:
            content.update(_convert(tensor))
            done += tensor.source_bytes
            if progress is not None:
                progress(done, total, tensor.name)
        save_file(content, out / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(content, file))
        size += sum(value.nbytes for value in content.values())
    if len(shards) > 1:
        write_json(out / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _convert(tensor: Tensor) -> dict[str, torch.Tensor]:
    """What the output holds in place of one tensor of the source, by name."""
    # Opened for each tensor: the pages of a mapping count as ours for as long as it is open.
    with safe_open(tensor.file, framework="pt") as file:
        value = file.get_tensor(tensor.name).to(tensor.dtype)
        if not tensor.quantized:
            return {tensor.name: value.clone()}
        if tensor.transposed:
            value = value.T
        packed, state = _nf4(value.contiguous())
    return {tensor.name: packed, **{f"{tensor.name}.{key}": part for key, part in state.items()}}


def _nf4(weight: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`bitsandbytes.functional.quantize_4bit(weight, compress_statistics=True)` in less memory.

    In chunks of whole blocks, which do not depend on each other. The mean of the scales does, on
    the number of threads that add them up (measured: the last bit, from 2.1 million weights on),
    so that one thread does it: then it equals transformers' result in a process of one thread.

    Returns:
        packed [ceil(numel / 2), 1] uint8, and the state that a checkpoint holds beside it.
    """
    import bitsandbytes.functional as bnb

    parts = [
        bnb.quantize_4bit(chunk, blocksize=BLOCK, quant_type="nf4")
        for chunk in weight.reshape(-1).split(CHUNK)
    ]
    packed = torch.cat([part for part, _ in parts])
    scales = torch.cat([state.absmax for _, state in parts])
    mean = _mean_in_one_thread(scales)
    nested_scales, nested = bnb.quantize_blockwise(scales - mean, blocksize=NESTED_BLOCK)
    state = bnb.QuantState(
        absmax=nested_scales,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=BLOCK,
        code=parts[0][1].code,
        quant_type="nf4",
        offset=mean,
        state2=nested,
    )
    return packed, {key: part.clone() for key, part in state.as_dict(packed=True).items()}


def _mean_in_one_thread(values: torch.Tensor) -> torch.Tensor:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return values.mean()
    finally:
        torch.set_num_threads(threads)


def _write_config(
    model: "PreTrainedModel", settings: "BitsAndBytesConfig", source: Path, out: Path
) -> None:
    """Everything beside the weights, so that `from_pretrained(out)` needs nothing else."""
    model.config.quantization_config = settings.to_dict()
    model.config.save_pretrained(out)
    for path in [*tokenizer_files(source), *_existing(source, COPIED)]:
        shutil.copyfile(path, out / path.name)


def _existing(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    for pattern in patterns:
        yield from sorted(folder.glob(pattern))
