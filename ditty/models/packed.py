"""A 4-bit layer whose bytes are stored as floats: those FSDP2 and ZeRO-3 can cut."""

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.nn import Linear4bit


class PackedLinear4bit(Linear4bit):
    """bitsandbytes' layer on bytes, whatever they are stored as; see `skeleton.pack_quantized`.

    Its own `forward` puts another parameter in the place of the sharding's, repacks weights on some
    CPUs, and takes another kernel, which rounds otherwise, for weights not stored as bytes.

    A class and not a function for each layer: torch.compile would make a program for each.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out], in the dtype of x."""
        assert self.quant_state is not None, "pack_quantized sets it"
        weight = self.weight.view(torch.uint8).view(-1, 1)
        inside = x.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return matmul_4bit(inside, weight, bias=bias, quant_state=self.quant_state).to(x.dtype)
