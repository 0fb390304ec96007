"""What only a GPU can show: the kernels for packed documents, NCCL, bf16. Mark `gpu`.

python -m pytest -m gpu -o addopts= tests/test_gpu.py
"""

import time

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from ditty.config.choices import Precision, Quantization
from ditty.config.spec import ModelSpec
from ditty.models.attention import packed_attention
from ditty.models.batches import collate, to_device
from ditty.models.model import load_base, prepare_model
from ditty.models.skeleton import blocks
from ditty.quantization.quantize import quantize
from ditty.runs.rundir import Status
from ditty.training.evaluate import autocast
from ditty.training.loss import token_loss_sum
from ditty.training.recompute import recompute_blocks
from ditty.training.rng import choose_kernels
from tests.test_distributed import adapter, inputs, losses, run_training  # noqa: F401
from tests.tiny import make_model_folder, random_rows, tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("window", [None, 7])
def test_varlen_kernel_keeps_documents_apart_and_equals_one_by_one(tmp_path, window):
    """bf16 through varlen_attn against fp32 eager attention of each document alone."""
    from transformers import MistralConfig

    config = tiny_config(num_attention_heads=2, num_key_value_heads=1, head_dim=64)
    if window:
        values = {**config.to_dict(), "model_type": "mistral", "sliding_window": window}
        config = MistralConfig(**values)
    folder = make_model_folder(tmp_path / "model", config)
    rows = random_rows(6)
    batch = to_device(collate(rows), GPU)
    spec = ModelSpec(base_model=str(folder))
    packed = load_base(folder, spec, Precision.BF16, GPU).eval()
    alone = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).to(GPU)
    logits = packed(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        cu_seq_lens_q=batch["cu_seqlens"],
        cu_seq_lens_k=batch["cu_seqlens"],
        max_length_q=batch["max_seqlen"],
        max_length_k=batch["max_seqlen"],
        use_cache=False,
    ).logits[0]
    ends = batch["cu_seqlens"].tolist()
    for start, end in zip(ends, ends[1:], strict=False):
        with torch.no_grad():
            expected = alone(batch["input_ids"][:, start:end], use_cache=False).logits[0]
        assert torch.allclose(logits[start:end].float(), expected, atol=0.02), (start, end)


def test_quantized_training_step_equals_the_cpus(tmp_path):
    """NF4 from the same file: loss and adapter gradients on GPU (fp32) and CPU."""
    folder = make_model_folder(tmp_path / "model")
    (tmp_path / "nf4").mkdir()
    quantize(folder, tmp_path / "nf4", Quantization.NF4, "float32")
    spec = ModelSpec(base_model=str(folder), quantization="nf4")
    found = []
    for device in (torch.device("cpu"), GPU):
        base = load_base(tmp_path / "nf4", spec, Precision.FP32, device)
        module = prepare_model(base, spec, seed=0)
        loss = token_loss_sum(module, base, to_device(collate(random_rows(4)), device))
        loss.backward()
        norms = [float(p.grad.norm()) for p in module.parameters() if p.grad is not None]
        found.append((float(loss.detach()), norms))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-2, abs=1e-4)


def assert_same_gradients(attention, tensors):
    """Of query, key and value, 30 times over."""

    def gradients():
        q, k, v = (x.detach().clone().requires_grad_() for x in tensors)
        out = attention(q, k, v)
        out.backward(torch.ones_like(out))
        return torch.stack([q.grad, k.grad, v.grad])

    try:
        choose_kernels(deterministic=True)
        first = gradients()
        assert all(torch.equal(gradients(), first) for _ in range(30))
    finally:
        choose_kernels(deterministic=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_has_the_same_gradients_each_time(dtype):
    """Memory-efficient attention adds up the queries' gradient as its blocks end."""
    torch.manual_seed(0)
    tensors = torch.randn(3, 1, 16, 2000, 64, device=GPU, dtype=dtype)
    mask = None if dtype is torch.float32 else torch.ones(2000, 2000, device=GPU).bool().tril()

    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)

    assert_same_gradients(attention, tensors)


def test_packed_attention_has_the_same_gradients_each_time():
    """Flash attention adds up the queries' gradient as its blocks end, unless it is forbidden."""
    torch.manual_seed(0)
    tensors = torch.randn(3, 1, 16, 8192, 64, device=GPU, dtype=torch.bfloat16)
    ends = torch.arange(0, 8193, 2048, device=GPU, dtype=torch.int32)

    def attention(q, k, v):
        options = {"cu_seq_lens_q": ends, "max_length_q": 2048}
        return packed_attention(torch.nn.Module(), q, k, v, None, **options)[0]

    assert_same_gradients(attention, tensors)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_on_gpus_resumes_bitwise(inputs, tmp_path, processes, precision):  # noqa: F811
    if torch.cuda.device_count() < processes:
        pytest.skip(f"{torch.cuda.device_count()} GPU(s)")
    options = {"device": "cuda", "precision": precision, "lora_dropout": 0.1, "max_steps": 100}
    result, whole, attempt = run_training(inputs, tmp_path / "whole", processes, **options)
    assert (result.status, result.step) == (Status.OK, 100)
    assert len(list((attempt / "heartbeat").glob("*.json"))) == processes
    home = tmp_path / "cut"
    result, cut, _ = run_training(inputs, home, processes, stop_at=5, **options)
    assert result.status is Status.PREEMPTED and 5 <= result.step < 100
    result, _, _ = run_training(inputs, home, processes, **options)
    assert (result.status, result.step) == (Status.OK, 100)
    assert losses(cut) == losses(whole)
    expected, got = adapter(tmp_path / "whole"), adapter(home)
    assert all(torch.equal(expected[k], got[k]) for k in expected)


def test_print_speed_of_1b_lora(tmp_path, capsys):
    """Not a bar, a figure: random Llama-3.2-1B, 8 rows of 2,048 tokens, LoRA r=16, bf16."""
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    with GPU:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    del model
    spec = ModelSpec(base_model=str(tmp_path / "model"))
    base = load_base(tmp_path / "model", spec, Precision.BF16, GPU)
    module = prepare_model(base, spec, seed=0)
    recompute_blocks(base, len(blocks(base)))
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], fused=True)
    ids = torch.randint(0, 128_256, (2048,)).tolist()
    batch = collate([{"input_ids": ids, "labels": ids, "lengths": [2048]}] * 8)
    for step in range(14):
        if step == 4:
            torch.cuda.synchronize()
            started = time.perf_counter()
        moved = to_device(batch, GPU)
        with autocast(GPU, Precision.BF16):
            loss = token_loss_sum(module, base, moved)
        (loss / 16_376).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    rate = 10 * 8 * 2048 / (time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 2**30
    with capsys.disabled():
        print(f"\n1B LoRA, blocks checkpointed: {rate:,.0f} tok/s, {peak:.1f} GiB")
