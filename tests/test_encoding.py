"""The formats of rows, against transformers' own tokenization of what they stand for."""

import json

import pytest

from ditty.dataset.tokenization import load_tokenizer
from ditty.errors import DataError
from tests.tokenized import messages, run, supervised
from tests.tokenizers_for_tests import CHATML, MARKED, train_tokenizer

TOOLS = "{% if tools %}{% for t in tools %}{{ '<s>' + (t | tojson) + '\n' }}{% endfor %}{% endif %}"
CALLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') }}"
    "{% for c in m['tool_calls'] or [] %}{{ c | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def chatml(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("chatml"))


def ids(rows):
    return [row["input_ids"] for row in rows]


# Conversations


def test_sharegpt_is_the_same_conversation_in_other_words(tmp_path, chatml):
    turns = [
        *[("system", "Be kind"), ("human", "Hello"), ("gpt", "Good\n\nBye"), ("tool", "a")],
        *[("user", "b"), ("assistant", "I am fine"), ("observation", "c"), ("chatgpt", "d")],
    ]
    roles = ["system", "user", "assistant", "tool", "user", "assistant", "tool", "assistant"]
    spoken = [{"from": speaker, "value": text} for speaker, text in turns]
    _, train, _ = run(
        tmp_path, [{"talk": spoken}], chatml, format="conversations",
        columns={"conversations": "talk"},
    )  # fmt: skip
    meant = messages([(role, text) for role, (_, text) in zip(roles, turns, strict=True)])
    tokenizer = load_tokenizer(chatml)
    assert train[0]["input_ids"] == tokenizer.apply_chat_template(meant, return_dict=False)
    assert supervised(tokenizer, train[0]) == (
        "Good\n\nBye<|im_end|>·I am fine<|im_end|>·d<|im_end|>"
    )


# Tools


def schema(name, **properties):
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


WEATHER, CLOCK = schema("weather", city={"type": "string"}), schema("clock", zone={"type": "int"})


@pytest.mark.parametrize("template", [TOOLS + CHATML, TOOLS + MARKED], ids=["prefix", "marks"])
@pytest.mark.parametrize("as_text", [False, True])
def test_each_row_has_its_own_tools(tmp_path, template, as_text):
    """Arrow gives `weather` a null `zone`, and `clock` a null `city`: no tool has both."""
    folder = train_tokenizer(tmp_path / "tokenizer", template)
    given = [[WEATHER], None, [CLOCK, WEATHER], [WEATHER], []]
    talks = [messages([("user", f"{i} a"), ("assistant", f"b {i}")]) for i in range(len(given))]
    rows = [
        {"messages": talk, "tools": json.dumps(tools) if as_text and tools is not None else tools}
        for talk, tools in zip(talks, given, strict=True)
    ]
    _, train, _ = run(tmp_path, rows, folder)
    tokenizer = load_tokenizer(folder)
    assert ids(train) == [
        tokenizer.apply_chat_template(talk, tools=tools or None, return_dict=False)
        for talk, tools in zip(talks, given, strict=True)
    ]
    assert "weather" in tokenizer.decode(train[0]["input_ids"])
    assert [supervised(tokenizer, row) for row in train] == [f"b {i}<|im_end|>" for i in range(5)]


def test_a_call_has_no_arguments_of_other_rows(tmp_path):
    folder = train_tokenizer(tmp_path / "tokenizer", CALLS)
    rows = []
    for name, arguments in (("weather", {"city": "Rome"}), ("clock", {"zone": 2})):
        call = {"function": {"name": name, "arguments": arguments}}
        called = {"role": "assistant", "content": None, "tool_calls": [call]}
        rows.append({"messages": [*messages([("user", "now?")]), called]})
    _, train, _ = run(tmp_path, rows, folder)
    tokenizer = load_tokenizer(folder)
    for row, parsed in zip(train, rows, strict=True):
        text = supervised(tokenizer, row).removesuffix("<|im_end|>")
        assert json.loads(text) == parsed["messages"][1]["tool_calls"][0]


def test_the_template_for_tools_is_taken_where_a_tokenizer_has_one(tmp_path):
    """One way to tell the assistant's part with tools, the other without."""
    folder = train_tokenizer(
        tmp_path / "tokenizer", {"default": MARKED, "tool_use": TOOLS + CHATML}
    )
    talk = messages([("user", "a"), ("assistant", "Good")])
    rows = [{"messages": talk, "tools": tools} for tools in (None, [WEATHER], None)]
    _, train, _ = run(tmp_path, rows, folder)
    tokenizer = load_tokenizer(folder)
    assert ids(train) == [
        tokenizer.apply_chat_template(talk, tools=row["tools"], return_dict=False) for row in rows
    ]
    assert {supervised(tokenizer, row) for row in train} == {"Good<|im_end|>"}


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_template_that_ignores_tools_is_refused(tmp_path, template):
    folder = train_tokenizer(tmp_path / "tokenizer", template)
    talk = messages([("user", "a"), ("assistant", "b")])
    rows = [{"messages": talk, "tools": tools} for tools in (None, [WEATHER])]
    with pytest.raises(DataError, match="row 1 has tools, which the chat template ignores"):
        run(tmp_path, rows, folder)


# Instructions


def test_instructions_become_alpacas_prompt(tmp_path, chatml):
    rows = [
        {"instruction": "Add {a}", "input": "1 2", "output": "3"},
        {"instruction": "Say hello", "input": "", "output": "Hello"},
        {"instruction": "Say bye", "input": None, "output": "Bye"},
    ]
    _, train, _ = run(tmp_path, rows, chatml, format="instruction")
    _, bare, _ = run(tmp_path, [{"instruction": "Say bye", "output": "Bye"}], chatml,
                     format="instruction")  # fmt: skip
    prompts = [
        """Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.

### Instruction:
Add {a}

### Input:
1 2

### Response:
""",  # noqa: E501
        """Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
Say hello

### Response:
""",  # noqa: E501
    ]
    tokenizer = load_tokenizer(chatml)
    assert ids(train)[:2] == [
        tokenizer(prompt)["input_ids"] + tokenizer(f"{row['output']}<|im_end|>")["input_ids"]
        for prompt, row in zip(prompts, rows, strict=False)
    ]
    assert train[2] == bare[0], "a null input is none"
    assert [supervised(tokenizer, row) for row in train] == [
        "3<|im_end|>", "Hello<|im_end|>", "Bye<|im_end|>",
    ]  # fmt: skip
    _, train, _ = run(tmp_path, rows, chatml, format="instruction", loss_on="all")
    assert all(row["labels"] == row["input_ids"] for row in train)


# Tokens


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_tokenized_rows_is_no_part_of_them(tmp_path, chatml, side):
    """Also where the padding is eos: told by the mask, so that the end of the text stays."""
    tokenizer = load_tokenizer(chatml)
    tokenizer.padding_side = side
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    texts = ["Hello there<|im_end|>", "a<|im_end|>", "Good to hear that<|im_end|>"]
    padded = tokenizer(texts, padding=True)
    rows = [
        {"input_ids": row, "attention_mask": mask}
        for row, mask in zip(padded["input_ids"], padded["attention_mask"], strict=True)
    ]
    assert len({len(row["input_ids"]) for row in rows}) == 1
    _, train, _ = run(tmp_path, rows, chatml, format="tokens")
    assert ids(train) == tokenizer(texts)["input_ids"]
    assert all(row["labels"] == row["input_ids"] for row in train)
    assert all(row["input_ids"][-1] == tokenizer.eos_token_id for row in train)


def test_labels_say_what_is_supervised(tmp_path, chatml):
    rows = [
        {"input_ids": [9, 8, 7, 6], "labels": [-100, 8, -100, 6], "attention_mask": [1, 1, 1, 1]},
        {"input_ids": [0, 5, 4, 0], "labels": [-100, 5, 4, -100], "attention_mask": [0, 1, 1, 0]},
    ]
    _, train, _ = run(tmp_path, rows, chatml, format="tokens")
    assert train == [
        {"input_ids": [9, 8, 7, 6], "labels": [-100, 8, -100, 6]},
        {"input_ids": [5, 4], "labels": [5, 4]},
    ]
    _, train, _ = run(tmp_path, rows, chatml, format="tokens", loss_on="all")
    assert [row["labels"] for row in train] == [[9, 8, 7, 6], [5, 4]]
    facts, _, _ = run(
        tmp_path, [*rows, {"input_ids": [], "labels": [], "attention_mask": []}], chatml,
        format="tokens",
    )  # fmt: skip
    assert facts["dropped"] == {"empty": 1}


# What does not fit


DEEP = '[{"a": ' + "[" * 600 + "]" * 600 + "}]"
"""That Python's parser takes, and a walk through it in Python does not."""


def row_of(value, speaker="human"):
    return {"conversations": [{"from": speaker, "value": value}]}


@pytest.mark.parametrize(
    ("form", "rows", "message"),
    [
        ("conversations", [row_of("a"), row_of("b", "Bob")],
         "'conversations' has a speaker that is not one of human, .* at row 1 .'Bob' at turn 0"),
        ("conversations", [row_of("a"), row_of(None)], "a turn whose value is null, .* at row 1 "),
        ("conversations", [{"conversations": messages([("user", "x")])}],
         r"expected a list of \{from, value\}. Turns of \{role, content\} are .*: messages, with"),
        ("messages", [{"messages": row_of("x")["conversations"]}],
         r"expected a list of \{role, content\}. Turns of \{from, value\} are .* conversations"),
        ("messages", [{"messages": messages([("user", "x")]), "tools": "[{]"}],
         "column 'tools' holds text that is no JSON, expected a list of JSON schemas.* at row 0 "),
        ("messages", [{"messages": messages([("user", "x")]), "tools": ["weather"]}],
         "column 'tools' holds list, expected a list of JSON schemas.* at row 0 .list .'weather"),
        ("messages", [{"messages": messages([("user", "x")]), "tools": "[" * 5000 + "]" * 5000}],
         "column 'tools' is nested deeper than 64 levels, at row 0 "),
        ("messages", [{"messages": messages([("user", "x")]), "tools": DEEP}],
         "column 'tools' is nested deeper than 64 levels, at row 0 "),
        ("instruction", [{"instruction": "a", "input": 3, "output": "b"}],
         "column 'input' holds int, expected a string, at row 0 .int 3"),
        ("instruction", [{"instruction": "a", "output": None}], "'output' is null, at row 0"),
        ("tokens", [{"input_ids": "abc"}], "'input_ids' holds str, expected a list of integers"),
        ("tokens", [{"input_ids": [1.5]}], "expected a list of integers"),
        ("tokens", [{"input_ids": [1]}, {"input_ids": [1, 400]}],
         r"input_ids are not all 0 to \d+, the vocabulary of .* at row 1 \(has 400\)"),
        ("tokens", [{"input_ids": [1, -1]}], r"input_ids are not all .* at row 0 \(has -1\)"),
        ("tokens", [{"input_ids": [1, 2], "labels": [1]}],
         r"labels has not as many values as input_ids, at row 0 \(1 for 2\)"),
        ("tokens", [{"input_ids": [1, 2], "labels": [2, -100]}],
         "labels are not those of input_ids .* at row 0 .has 2 where input_ids has 1"),
        ("tokens", [{"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}],
         r"attention_mask has a 0 between its 1s.* at row 0 \(at 1\)"),
        ("tokens", [{"input_ids": [1, 2, 3, 4, 5], "attention_mask": [0, 0, 1, 0, 1]}],
         r"attention_mask has a 0 between its 1s.* at row 0 \(at 3\)"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_are_refused(tmp_path, chatml, form, rows, message):
    with pytest.raises(DataError, match=message):
        run(tmp_path, rows, chatml, format=form)


@pytest.mark.parametrize(
    ("spec", "row", "message"),
    [
        ({}, row_of("x"), "the data has conversations: set data.format: conversations, which"),
        ({"format": "text"}, {"prompt": "a", "completion": "b"}, "data.format: prompt_completion,"),
        ({}, {"instruction": "a", "output": "b", "id": 1}, "set data.format: instruction,"),
        ({}, {"input_ids": [1], "text": "a"}, "set data.format: text or tokens, which"),
        ({"format": "text", "columns": {"text": "txt"}}, {"text": "a"}, "did you mean text"),
        ({"format": "tokens", "loss_on": "labels"}, {"input_ids": [1, 2]},
         "loss_on: labels needs a column 'labels', the data has input_ids"),
        ({"columns": {"tools": "functions"}}, {"messages": []},
         r"data.columns: \{tools: functions\} names no column, the data has messages"),
    ],
)  # fmt: skip
def test_columns_that_do_not_fit_name_the_format_that_does(tmp_path, chatml, spec, row, message):
    with pytest.raises(DataError, match=message):
        run(tmp_path, [row], chatml, **spec)
