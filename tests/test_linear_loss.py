"""The loss in the place of the head against PyTorch's own, on models that allow it and not."""

import logging

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    PreTrainedModel,
)

from ditty.config.spec import ModelSpec
from ditty.dataset.encoding import IGNORED
from ditty.models.attention import forward_kwargs
from ditty.models.batches import Batch, collate
from ditty.models.model import attention_name
from ditty.training import linear_loss, loss
from ditty.training.linear_loss import linear_cross_entropy
from ditty.training.loss import token_loss_sum
from tests.architectures import GROUPED, HEADS, OLDER, SMALL
from tests.tiny import VOCABULARY, random_rows, tiny_config

PLAIN = {
    "llama": tiny_config(),
    "llama_untied": tiny_config(tie_word_embeddings=False),
    "gpt_neox": GPTNeoXConfig(**SMALL),
    "gpt2": GPT2Config(
        **OLDER,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
}
# They scale their logits, or cap them.
MORE = {
    "cohere": CohereConfig(**GROUPED, pad_token_id=2, logit_scale=0.5),
    "gemma2": Gemma2Config(**HEADS, final_logit_softcapping=5.0, attn_logit_softcapping=None),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks, the last one short."""
    monkeypatch.setitem(linear_loss.CHUNK_ELEMENTS, "cpu", 7 * VOCABULARY)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 7, 40])
def test_loss_and_gradients_are_those_of_pytorch(rows, bias):
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, 16), (VOCABULARY, 16), (VOCABULARY,)][: 2 + bias]
    ours = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    targets = torch.randint(0, VOCABULARY, (rows,), generator=generator)
    found = linear_cross_entropy(ours[0], ours[1], ours[2] if bias else None, targets)
    expected = F.cross_entropy(F.linear(*theirs), targets, reduction="sum")
    (3.0 * found).backward()
    (3.0 * expected).backward()
    torch.testing.assert_close(found, expected)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_frozen_head_gets_no_gradient_and_no_memory_for_one():
    hidden = torch.randn(9, 16, requires_grad=True)
    weight = torch.randn(VOCABULARY, 16)
    found = linear_cross_entropy(hidden, weight, None, torch.arange(9))
    assert found.grad_fn is not None
    assert [t is None for t in found.grad_fn.saved_tensors] == [False, True, True]
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, None, torch.arange(9)).grad_fn is None


def test_under_autocast_the_products_are_in_bf16_and_the_softmax_in_fp32():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(s, generator=generator) for s in ((30, 16), (VOCABULARY, 16)))
    targets = torch.randint(0, VOCABULARY, (30,), generator=generator)
    ours, theirs = (hidden.clone().requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(ours, weight, None, targets)
        logits = F.linear(theirs, weight)
        expected = F.cross_entropy(logits.float(), targets, reduction="sum")
    assert logits.dtype is torch.bfloat16 and found.dtype is torch.float32
    found.backward()
    expected.backward()
    torch.testing.assert_close(found, expected)
    assert ours.grad.dtype is torch.float32
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-2, atol=1e-2)


def build(config) -> PreTrainedModel:
    torch.manual_seed(0)
    name = attention_name(ModelSpec(base_model="x"))
    return AutoModelForCausalLM.from_config(config, attn_implementation=name).train()


def plain_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    logits = model(**forward_kwargs(model, batch)).logits[0, :-1]
    labels = batch["labels"][0, 1:]
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")


def gradients(model: PreTrainedModel, value: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    value.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_equal(model: PreTrainedModel) -> None:
    batch = collate(random_rows(3))
    found, expected = token_loss_sum(model, model, batch), plain_loss(model, batch)
    torch.testing.assert_close(found, expected)
    ours, theirs = gradients(model, found), gradients(model, expected)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_logits_never_exist_where_the_head_is_plain(name, monkeypatch):
    model, sizes = build(PLAIN[name]), []
    made = linear_loss._chunk_loss

    def spy(logits, targets):
        sizes.append(tuple(logits.shape))
        return made(logits, targets)

    monkeypatch.setattr(linear_loss, "_chunk_loss", spy)
    check_equal(model)
    assert model not in loss._with_logits
    assert len(sizes) > 1 and max(rows for rows, _ in sizes) <= 7
    assert "forward" not in vars(model.get_output_embeddings())  # the head is as it was


@pytest.mark.parametrize("name", MORE)
def test_what_a_model_does_with_its_logits_is_not_lost(name, caplog):
    model = build(MORE[name])
    with caplog.at_level(logging.WARNING):
        check_equal(model)
    assert model in loss._with_logits
    assert "logits of" in caplog.text and "are held in memory" in caplog.text


def test_a_batch_without_supervised_tokens_still_has_a_gradient():
    model = build(PLAIN["llama"])
    rows = random_rows(1)
    rows[0]["labels"] = [IGNORED] * len(rows[0]["labels"])
    value = token_loss_sum(model, model, collate(rows))
    assert float(value.detach()) == 0.0
    assert all(not g.any() for g in gradients(model, value).values())
