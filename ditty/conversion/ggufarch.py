"""The architectures that a .gguf file can be of here, and what such a file says of a model's shape.

llama.cpp decides by the architecture's name how it computes; what a model does otherwise, and no
key of the file can say, is refused.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import GGUFWriter

from ditty.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SILU, GELU = ("silu", "swish"), ("gelu_pytorch_tanh",)
GEMMA_3_LOCAL_THETA = 10_000.0  # of layers whose attention slides; llama.cpp has it as a constant


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp calls it, and how its tensors and its arithmetic differ from transformers'.

    Attributes:
        interleaved: rows of query and key are in another order.
        norm_offset: added to the norms' weights, which are kept as a difference from it.
        activations: those that it has.
        slides: every so many layers one attends to all, the others to a window; 0: all to all.
        write: what else the file says.
    """

    name: str
    interleaved: bool = False
    norm_offset: int = 0
    activations: tuple[str, ...] = SILU
    slides: int = 0
    write: Callable[[GGUFWriter, Any], None] = lambda writer, config: None


def _write_gemma2(writer: GGUFWriter, config: Any) -> None:
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def _write_gemma3(writer: GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)


def _write_phi3(writer: GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(0)  # else llama.cpp takes one for granted


# transformers' class -> llama.cpp's
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", interleaved=True),
    "MistralForCausalLM": Architecture("llama", interleaved=True),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "Phi3ForCausalLM": Architecture("phi3", write=_write_phi3),
    "Gemma2ForCausalLM": Architecture(
        "gemma2", norm_offset=1, activations=GELU, slides=2, write=_write_gemma2
    ),
    "Gemma3ForCausalLM": Architecture(
        "gemma3", norm_offset=1, activations=GELU, slides=6, write=_write_gemma3
    ),
}


def architecture_of(config: "PretrainedConfig", folder: Path) -> Architecture:
    """The architecture of the model in `folder`.

    Raises:
        ModelError: it is not known here, or the model does what a file of it cannot say.
    """
    name = (config.architectures or [type(config).__name__])[0]
    if name not in ARCHITECTURES:
        raise ModelError(
            f"ditty does not write {name} as .gguf, expected {', '.join(ARCHITECTURES)}. Use "
            f"`--to merged`, and llama.cpp's own convert_hf_to_gguf.py on it ({folder})"
        )
    found = ARCHITECTURES[name]
    problem = next(_unsaid(found, config), None)
    if problem:
        raise ModelError(
            f"a .gguf file of architecture {found.name} cannot say that {problem} "
            f"({folder / 'config.json'}): llama.cpp would compute something else. Use `--to merged`"
        )
    return found


def _unsaid(found: Architecture, config: Any) -> Iterator[str]:
    """What the model does otherwise than llama.cpp would."""
    if getattr(config, "quantization_config", None):
        yield "its weights are quantized"
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in found.activations:
        yield f"hidden_act is {activation}"
    if found.slides:
        yield from _unsaid_of_gemma(found, config)
    elif getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None):
        yield f"attention slides over {config.sliding_window} tokens (sliding_window)"
    rope = rope_of(config)
    if rope["rope_type"] not in ("default", "llama3"):
        yield f"rope_type is {rope['rope_type']}"


def _unsaid_of_gemma(found: Architecture, config: Any) -> Iterator[str]:
    if config.query_pre_attn_scalar != config.head_dim:
        yield f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, not {config.head_dim}"
    if config.layer_types != layer_types(config.num_hidden_layers, found.slides):
        yield f"layer_types are {config.layer_types}"
    if found.name == "gemma2":
        if not (config.attn_logit_softcapping and config.final_logit_softcapping):
            yield "the logits are not capped (attn_logit_softcapping, final_logit_softcapping)"
        return
    if config.attn_logit_softcapping or config.final_logit_softcapping:
        yield "the logits are capped (attn_logit_softcapping, final_logit_softcapping)"
    local = config.rope_parameters["sliding_attention"]
    if (local["rope_type"], local["rope_theta"]) != ("default", GEMMA_3_LOCAL_THETA):
        yield f"the layers with sliding attention have rope_parameters {local}"


def layer_types(layers: int, slides: int) -> list[str]:
    """transformers' names of the kinds of attention, where one of `slides` layers sees all."""
    kinds = ["sliding_attention"] * (slides - 1) + ["full_attention"]
    return [kinds[i % slides] for i in range(layers)]


def rope_of(config: Any) -> dict[str, Any]:
    """The rotary embedding's parameters; of the layers that attend to all, where kinds differ."""
    rope: dict[str, Any] = config.rope_parameters
    return rope.get("full_attention", rope)


def write_shape(writer: GGUFWriter, found: Architecture, config: Any) -> None:
    """Put what llama.cpp has to know of the model's shape into `writer`."""
    rope = rope_of(config)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    found.write(writer, config)


def rope_factors(config: Any) -> np.ndarray | None:
    """By what each frequency of the rotary embedding is divided, fp32; None: by nothing."""
    rope = rope_of(config)
    if rope["rope_type"] == "default":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    plain = rope["rope_theta"] ** -(torch.arange(len(scaled)) / len(scaled))
    factors: np.ndarray = (plain / scaled).to(torch.float32).numpy()
    return factors
