"""Which tokens are learned: against TRL's masks, and against a plain loop over the documents."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from ditty.config.dataspec import DataSpec
from ditty.data import read_rows
from ditty.dataset.chat import Chat, ChatEncoder
from ditty.dataset.packing import pack_tables
from ditty.models.batches import collate
from ditty.training.loss import token_loss_sum
from tests.tiny import tiny_config
from tests.tokenized import messages, run
from tests.tokenizers_for_tests import train_tokenizer

CHATS = [
    [("user", "Hello there"), ("assistant", "Good\n\nBye"), ("user", "a + b"), ("assistant", "c")],
    [("user", "def"), ("assistant", "return a - b")],
]

# TRL

MARKED = {  # TRL's name of a template: its bos and eos
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "qwen2_5": (None, "<|im_end|>"),
    "qwen3": (None, "<|im_end|>"),
    "qwen3_instruct_2507": (None, "<|im_end|>"),
    "phi3": ("<s>", "<|endoftext|>"),
    "gemma3": ("<bos>", "<end_of_turn>"),
    "cohere2": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "lfm2": ("<|startoftext|>", "<|im_end|>"),
    "deepseekv3": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "glm4moe": (None, "<|endoftext|>"),
    "gptoss": ("<|startoftext|>", "<|return|>"),
}
TOLD_BY_PREFIX = ["llama3", "qwen2_5", "qwen3_instruct_2507", "phi3", "gemma3", "cohere2", "lfm2"]
"""Those that render a conversation the same however it goes on."""

CONTROL = r"<[|｜][^<>|｜'\" ]+[|｜]>|<start_of_turn>|<end_of_turn>"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""As these models split text: newlines after a header are no part of what follows."""


def template(name: str) -> str:
    import trl

    return (Path(trl.__file__).parent / f"chat_templates/{name}.jinja").read_text()


def make_tokenizer(folder: Path, name: str) -> Any:
    """A small tokenizer with a model family's template and control tokens; it pads with eos."""
    bos, eos = MARKED[name]
    plain = template(name)
    train_tokenizer(folder, plain, bos_token=bos, eos_token=eos, pad_token=eos)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": sorted(set(re.findall(CONTROL, plain)))}
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    return tokenizer


def by_trl(tokenizer: Any, folder: Path) -> list[tuple[list[int], list[bool]]]:
    """(ids, supervised) of each chat as SFTTrainer would train on them."""
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(folder),
        assistant_only_loss=True,
        max_length=None,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_config(tiny_config(vocab_size=len(tokenizer)))
    rows = Dataset.from_list([{"messages": messages(chat)} for chat in CHATS])
    trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    return [
        (row["input_ids"], [label != -100 for label in row["labels"]])
        for row in trainer.train_dataset
    ]


def by_ditty(tokenizer: Any, chat_template: str) -> list[tuple[list[int], list[bool]]]:
    tokenizer.chat_template = chat_template
    encoder = ChatEncoder(tokenizer, assistant_only=True)
    encoded = encoder.encode([Chat(messages(chat)) for chat in CHATS], 0)
    assert [row.problem for row in encoded] == [None] * len(CHATS)
    return [(row.ids.tolist(), row.supervised.tolist()) for row in encoded]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", MARKED)
def test_masks_are_trls(tmp_path, monkeypatch, name):
    """By marks the same; by prefix but for the blanks around a turn, which are not learned."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    tokenizer = make_tokenizer(tmp_path / "tokenizer", name)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    theirs = by_trl(tokenizer, tmp_path / "trl")
    assert all(any(mask) and not all(mask) for _, mask in theirs)
    assert by_ditty(tokenizer, template(f"{name}_training")) == theirs
    if name not in TOLD_BY_PREFIX:
        return
    for (ids, ours), (their_ids, mask) in zip(
        by_ditty(tokenizer, template(name)), theirs, strict=True
    ):
        assert ids == their_ids
        other = [token for token, a, b in zip(ids, ours, mask, strict=True) if a != b]
        assert all(not tokenizer.decode([token]).strip() for token in other)
        assert not any(a and not b for a, b in zip(ours, mask, strict=True))


# A plain loop

Plain = Callable[[Any, dict[str, Any]], tuple[list[int], list[bool]]]


def plain_chat(tokenizer: Any, row: dict[str, Any]) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    mask: list[bool] = []
    for message in row["messages"]:
        head = tokenizer(f"<|im_start|>{message['role']}\n")["input_ids"]
        body = tokenizer(f"{message['content']}<|im_end|>")["input_ids"]
        tail = tokenizer("\n")["input_ids"]
        ids += head + body + tail
        learned = message["role"] == "assistant"
        mask += [False] * len(head) + [learned] * len(body) + [False] * len(tail)
    return ids, mask


def plain_pair(tokenizer: Any, row: dict[str, Any]) -> tuple[list[int], list[bool]]:
    prompt = tokenizer(row["prompt"])["input_ids"]
    completion = tokenizer(row["completion"] + "<|im_end|>")["input_ids"]
    return prompt + completion, [False] * len(prompt) + [True] * len(completion)


def plain_text(tokenizer: Any, row: dict[str, Any]) -> tuple[list[int], list[bool]]:
    ids = tokenizer(row["text"] + "<|im_end|>")["input_ids"]
    return ids, [True] * len(ids)


def plain_tokens(tokenizer: Any, row: dict[str, Any]) -> tuple[list[int], list[bool]]:
    return row["input_ids"], [True] * len(row["input_ids"])


SHAPES: dict[str, tuple[Plain, list[dict[str, Any]]]] = {
    "messages": (plain_chat, [{"messages": messages(chat)} for chat in CHATS * 2]),
    "prompt_completion": (
        plain_pair,
        [{"prompt": f"add {i}\n", "completion": f"return {i}"} for i in range(5)],
    ),
    "text": (plain_text, [{"text": f"Hello there {i}"} for i in range(5)]),
    "tokens": (plain_tokens, [{"input_ids": [50 + i, 60, 2]} for i in range(5)]),
}


@pytest.mark.parametrize("form", SHAPES)
def test_packed_documents_learn_what_a_plain_loop_learns(tmp_path, form):
    """Each document alone, by transformers: the same targets and the same loss, ends included."""
    folder = train_tokenizer(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == end
    plain, rows = SHAPES[form]
    run(tmp_path, rows, folder, format=form)
    packed = tmp_path / "packed"
    packed.mkdir()
    facts = pack_tables(DataSpec(source="x", format=form, seq_len=128), tmp_path / "out", packed)
    assert facts["documents"] == len(rows) > facts["rows"], "several documents share a row"
    batch = collate(list(read_rows(packed / "train.arrow")))

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(vocab_size=len(tokenizer)))
    targets, loss, ends = [], 0.0, 0
    for row in rows:
        ids, mask = plain(tokenizer, row)
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for place in range(1, len(ids)):
            if mask[place]:
                targets.append(ids[place])
                loss -= float(scores[place - 1, ids[place]])
                ends += ids[place] == end
    assert ends >= len(rows), "every document teaches its end"
    assert sorted(batch["targets"].tolist()) == sorted(targets)
    with torch.no_grad():
        ours = float(token_loss_sum(model, model, batch))
    assert ours == pytest.approx(loss, rel=1e-5)
