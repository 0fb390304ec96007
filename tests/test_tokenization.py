import hashlib
import json
import random

import pytest

from ditty.dataset.tokenization import load_tokenizer, row_fraction
from ditty.errors import DataError
from tests.tokenized import messages, run, run_chats, supervised
from tests.tokenizers_for_tests import CHATML, MARKED, train_tokenizer

CHATS = [
    [("user", "Hello there"), ("assistant", "I am fine")],
    [("system", "Be kind"), ("user", "Hello"), ("assistant", "Good\n\nBye"), ("user", "a"),
     ("assistant", "b\n")],
    [("user", "Hello"), ("assistant", "Good"), ("user", "and then")],
    [("assistant", "I begin"), ("user", "ok")],
]  # fmt: skip


@pytest.fixture(scope="session")
def chatml(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("chatml"))


@pytest.fixture(scope="session")
def marked(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("marked"), MARKED)


@pytest.fixture(scope="session")
def bracketed(tmp_path_factory):
    """Adds bos before and eos after each text, and both are one token, as with OPT."""
    return train_tokenizer(
        tmp_path_factory.mktemp("bracketed"),
        None,
        post="<s> $A </s>",
        bos_token="<s>",
        eos_token="</s>",
    )


# Chats


@pytest.mark.fault("tokenizer")
def test_assistant_turns_are_supervised_with_their_end(tmp_path, chatml, figure):
    tokenizer = load_tokenizer(chatml)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    facts, train, _ = run_chats(tmp_path, CHATS, chatml)
    assert [supervised(tokenizer, row) for row in train] == [
        "I am fine<|im_end|>",
        "Good\n\nBye<|im_end|>·b\n<|im_end|>",
        "Good<|im_end|>",
        "I begin<|im_end|>",
    ]
    for chat, row in zip(CHATS, train, strict=True):
        assert row["input_ids"] == tokenizer.apply_chat_template(messages(chat), return_dict=False)
    assert facts["rows"] == facts["train_rows"] == 4
    assert facts["dropped"] == {}
    turns = sum(m["role"] == "assistant" for chat in CHATS for m in messages(chat))
    learned = sum(row["labels"].count(tokenizer.eos_token_id) for row in train)
    figure(f"pad = eos: eos in labels {learned / turns:.0%} ({learned} of {turns} turns)")
    assert learned == turns


def test_masks_agree_with_transformers_where_the_template_marks_them(tmp_path, chatml, marked):
    """Two ways to the same labels, and transformers' own mask as the third."""
    tokenizer = load_tokenizer(marked)
    _, by_marks, _ = run_chats(tmp_path, CHATS, marked)
    _, by_prefix, _ = run_chats(tmp_path, CHATS, chatml)
    assert by_marks == by_prefix
    for chat, row in zip(CHATS, by_marks, strict=True):
        own = tokenizer.apply_chat_template(
            messages(chat), return_dict=True, return_assistant_tokens_mask=True
        )
        assert row["input_ids"] == own["input_ids"]
        assert [int(label != -100) for label in row["labels"]] == own["assistant_masks"]


def test_a_mark_that_stops_before_the_end_of_turn_is_extended(tmp_path):
    template = MARKED.replace(
        "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
    )
    folder = train_tokenizer(tmp_path / "tokenizer", template)
    _, train, _ = run_chats(tmp_path, CHATS[1:2], folder)
    assert supervised(load_tokenizer(folder), train[0]) == ("Good\n\nBye<|im_end|>·b\n<|im_end|>")


def test_all_of_a_chat_can_be_supervised(tmp_path, chatml):
    _, train, _ = run_chats(tmp_path, CHATS, chatml, loss_on="all")
    assert all(row["labels"] == row["input_ids"] for row in train)


def test_eos_only_after_the_last_turn_is_supervised_there(tmp_path):
    """Phi-3's way: rendering through an earlier turn ends with an eos that the whole lacks."""
    template = CHATML + "{% if not add_generation_prompt %}{{ '<|endoftext|>' }}{% endif %}"
    folder = train_tokenizer(tmp_path / "tokenizer", template, eos_token="<|endoftext|>")
    _, train, _ = run_chats(tmp_path, CHATS[1:2], folder)
    assert supervised(load_tokenizer(folder), train[0]) == (
        "Good\n\nBye<|im_end|>·b\n<|im_end|>\n<|endoftext|>"
    )


THINKING = CHATML.replace(
    "m['content'] + '<|im_end|>'",
    "('<think>' if m['role'] == 'assistant' and loop.last else '') + m['content'] + '<|im_end|>'",
)
OTHER_END = CHATML.replace(
    "+ '<|im_end|>' + '\n'", "+ ('<|endoftext|>' if loop.last else '<|im_end|>') + '\n'"
)


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (None, 0, "has no chat template"),
        (THINKING, 1, r"row 0, turn 2: .*renders .* differently.*'<think>Go.*generation %} marks"),
        (OTHER_END, 1, r"row 0, turn 2: .*differently.*'endoftext.* becomes 'im_end"),
        (OTHER_END.replace("+ m['content']", "+ '<s>' + m['content']"), 1,
         r"row 0, turn 2: .*differently.*'endoftext.* becomes 'im_end"),
        (CHATML.replace("'<|im_end|>'", "''").replace("m['content']", "'<s>' + m['content']"), 0,
         "row 0: .*no special token.*never stop"),
        (CHATML.replace("'<|im_end|>'", "''"), 0, "row 0: .*no special token.*never stop"),
        (MARKED.replace("'<|im_end|>'", "''"), 0, "row 0: .*no special token.*never stop"),
        ("{{ raise_exception('alternate!') }}", 0, r"row 0 \(\(user, assistant\): alternate!"),
        (MARKED + "{{ raise_exception('no') }}", 0, r"refuses the conversation, at row 0 "),
    ],
)  # fmt: skip
def test_templates_that_do_not_show_the_assistant_are_refused(tmp_path, template, chat, message):
    folder = train_tokenizer(tmp_path / "tokenizer", template)
    with pytest.raises(DataError, match=message):
        run_chats(tmp_path, [CHATS[chat]], folder)


def test_a_conversation_that_the_template_refuses_is_set_aside(tmp_path):
    template = "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('no') }}{% endif %}"
    folder = train_tokenizer(tmp_path / "tokenizer", template + CHATML)
    chats = [CHATS[0]] * 1200 + [[("user", "bad"), ("assistant", "x")], CHATS[1], []]
    facts, train, _ = run_chats(tmp_path, chats, folder)
    assert len(train) == 1201 and train[-1] == run_chats(tmp_path, CHATS[1:2], folder)[1][0]
    assert facts["quarantined"] == {"the chat template refuses the conversation": 1}
    assert facts["dropped"] == {"empty": 1}
    with pytest.raises(DataError, match=r"1 of 1,203 .* at row 1200 \(\(user, assistant\): no\)"):
        run_chats(tmp_path, chats, folder, max_bad_fraction=0)


def test_a_turn_that_begins_inside_a_token_is_dropped_and_counted(tmp_path, chatml):
    """`assistant\\n` + `\\n\\nBye` has the token `\\n\\n\\n`, which no prompt ends in."""
    chats = [[("user", "Hello"), ("assistant", "\n\nBye")], CHATS[0]]
    facts, train, _ = run_chats(tmp_path, chats, chatml)
    assert facts["dropped"] == {"split_token": 1}
    assert len(train) == 1


def test_keys_that_only_other_rows_have_do_not_reach_the_template(tmp_path):
    template = "{% for m in messages %}{% if 'name' in m %}{{ m['name'] }}{% endif %}{% endfor %}"
    folder = train_tokenizer(tmp_path / "tokenizer", template + CHATML)
    named = [{"role": "user", "content": "Hello", "name": "Bo"}, *messages([("assistant", "I")])]
    _, train, _ = run(tmp_path, [{"messages": messages(CHATS[0])}, {"messages": named}], folder)
    texts = [load_tokenizer(folder).decode(row["input_ids"]) for row in train]
    assert texts[0].startswith("<|im_start|>")
    assert texts[1].startswith("Bo<|im_start|>")


# Pairs and texts


def test_the_completion_and_eos_are_supervised(tmp_path, bracketed):
    tokenizer = load_tokenizer(bracketed)
    rows = [{"q": "Hello there", "a": " I am fine"}, {"q": "", "a": "Good</s>"}]
    spec = {"format": "prompt_completion", "columns": {"prompt": "q", "completion": "a"}}
    _, train, _ = run(tmp_path, rows, bracketed, **spec)
    assert [tokenizer.decode(row["input_ids"]) for row in train] == [
        "<s>Hello there I am fine</s>",
        "<s>Good</s>",
    ]
    assert [supervised(tokenizer, row) for row in train] == [" I am fine</s>", "Good</s>"]
    prompt = tokenizer("Hello there")["input_ids"][:-1]
    assert train[0]["input_ids"][: len(prompt)] == prompt
    _, train, _ = run(tmp_path, rows, bracketed, **spec, loss_on="all")
    assert train[0]["labels"] == train[0]["input_ids"]


def test_bos_that_is_eos_is_not_taken_for_the_end(tmp_path):
    folder = train_tokenizer(tmp_path / "t", post="</s> $A", bos_token="</s>", eos_token="</s>")
    rows = [{"prompt": "", "completion": "Good"}]
    _, train, _ = run(tmp_path, rows, folder, format="prompt_completion")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(train[0]["input_ids"]) == "</s>Good</s>"


@pytest.mark.parametrize("post", ["<s> $A </s>", "<s> $A", None])
def test_a_text_ends_with_one_eos(tmp_path, post):
    folder = train_tokenizer(tmp_path / "t", None, post=post, bos_token="<s>", eos_token="</s>")
    _, train, _ = run(tmp_path, [{"text": "Hello there"}], folder, format="text")
    bos = "<s>" if post else ""
    assert load_tokenizer(folder).decode(train[0]["input_ids"]) == f"{bos}Hello there</s>"
    assert train[0]["labels"] == train[0]["input_ids"]


def test_truncation_and_padding_in_a_tokenizer_file_are_ignored(tmp_path):
    from tokenizers import Tokenizer

    folder = train_tokenizer(tmp_path / "t", None)
    inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.enable_truncation(2)
    inner.enable_padding(length=50)
    inner.save(str(folder / "tokenizer.json"))
    _, train, _ = run(tmp_path, [{"text": "Hello there, how"}], folder, format="text")
    assert load_tokenizer(folder).decode(train[0]["input_ids"]) == "Hello there, how<|im_end|>"


# Lengths and counts


@pytest.fixture
def texts():
    rng = random.Random(0)
    return [{"text": "a b c d "[: 2 * rng.randint(1, 4)] * rng.randint(1, 20)} for _ in range(2300)]


@pytest.mark.parametrize("overlong", ["truncate", "drop"])
@pytest.mark.parametrize("eval_max_rows", [None, 20, 100_000])
def test_counts_reconcile(tmp_path, chatml, texts, overlong, eval_max_rows):
    rows = [{"text": ""}, {"text": " \n"}, {"text": "<|im_end|>"}, *texts]
    facts, train, held_out = run(
        tmp_path, rows, chatml, format="text", seq_len=64, overlong=overlong,
        eval_fraction=0.1, eval_max_rows=eval_max_rows,
    )  # fmt: skip
    encoded = load_tokenizer(chatml)([row["text"] for row in texts])["input_ids"]
    lengths = [len(ids) + 1 for ids in encoded]
    overlong_rows = sum(n > 64 for n in lengths)
    assert overlong_rows > 100
    dropped = {"empty": 2, "no_supervised_token": 1} | (
        {"overlong": overlong_rows} if overlong == "drop" else {}
    )
    assert facts["dropped"] == dropped
    assert facts["truncated"] == (overlong_rows if overlong == "truncate" else 0)
    assert facts["max_length"] == max(lengths)
    assert max(len(row["input_ids"]) for row in train) <= 64
    assert (
        facts["rows"]
        == len(rows)
        == sum(dropped.values()) + (facts["train_rows"] + facts["eval_rows"] + facts["eval_unused"])
    )
    assert (facts["train_rows"], facts["eval_rows"]) == (len(train), len(held_out))
    for name, found in (("", train), ("eval_", held_out)):
        assert facts[f"{name}tokens"] == sum(len(row["input_ids"]) for row in found)
        targets = sum(label != -100 for row in found for label in row["labels"][1:])
        assert facts[f"{name}supervised_tokens"] == targets


def test_an_overlong_row_is_cut_at_its_end(tmp_path, chatml):
    whole = {"messages": messages([("user", "a"), ("assistant", "Good to hear " * 20)])}
    _, full, _ = run(tmp_path, [whole], chatml)
    facts, cut, _ = run(tmp_path, [whole], chatml, seq_len=32)
    assert cut == [{name: values[:32] for name, values in full[0].items()}]
    assert facts["truncated"] == 1


def test_what_a_cut_leaves_without_a_target_is_dropped(tmp_path, chatml):
    chats = [[("user", "Hello " * 50), ("assistant", "I")], [("user", "only me")], CHATS[0], []]
    facts, train, _ = run_chats(tmp_path, chats, chatml, seq_len=32)
    assert facts["dropped"] == {"empty": 1, "no_supervised_token": 1, "truncated_supervision": 1}
    assert len(train) == facts["train_rows"] == 1


def test_rows_are_numbered_past_empty_ones(tmp_path, chatml):
    chats = [[], CHATS[0], [], [("nobody", "x"), ("assistant", "x")]]
    template = "{% for m in messages %}{% if m['role'] == 'nobody' %}{{ raise_exception('no') }}"
    folder = train_tokenizer(tmp_path / "t", template + "{% endif %}{% endfor %}" + CHATML)
    with pytest.raises(DataError, match=r"at row 3 \(\(nobody, assistant\)"):
        run_chats(tmp_path, chats, folder)


def test_overlong_rows_can_be_an_error(tmp_path, chatml):
    rows = [{"text": "a"}, {"text": "a b c d " * 10}]
    with pytest.raises(DataError, match=r"row 1 has \d+ tokens, data.seq_len is 8"):
        run(tmp_path, rows, chatml, format="text", overlong="error", seq_len=8)


def test_no_row_left_to_train_on_is_an_error(tmp_path, chatml):
    with pytest.raises(DataError, match="no row is left to train on.*'no_supervised_token': 1"):
        run_chats(tmp_path, [[("user", "only me")]], chatml)


# Held-out rows


def expected_fraction(content):
    """The rule as it is documented, written again."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64


def test_rows_are_held_out_by_their_content(tmp_path, chatml, texts):
    tokenizer = load_tokenizer(chatml)
    facts, train, held_out = run(
        tmp_path, [{"id": i, **row} for i, row in enumerate(texts)], chatml,
        format="text", eval_fraction=0.2, seq_len=4096,
    )  # fmt: skip
    expected = [row for row in texts if expected_fraction(row) < 0.2]
    decoded = [tokenizer.decode(row["input_ids"]).removesuffix("<|im_end|>") for row in held_out]
    assert decoded == [row["text"] for row in expected], "in the order of the source"
    assert 0 < facts["eval_rows"] < facts["train_rows"]
    apart = [{json.dumps(row["input_ids"]) for row in found} for found in (train, held_out)]
    assert apart[0].isdisjoint(apart[1]), "equal rows, whatever their ids, are on one side"


def test_the_smallest_hashes_are_held_out(tmp_path, chatml):
    rows = [{"text": f"text {i}"} for i in range(2500)]
    facts, _, held_out = run(
        tmp_path, rows, chatml, format="text", eval_fraction=0.1, eval_max_rows=5
    )
    smallest = sorted(rows, key=expected_fraction)[:5]
    tokenizer = load_tokenizer(chatml)
    decoded = [tokenizer.decode(row["input_ids"]).removesuffix("<|im_end|>") for row in held_out]
    assert decoded == [row["text"] for row in rows if row in smallest]
    assert facts["eval_unused"] == sum(expected_fraction(row) < 0.1 for row in rows) - 5


def test_null_keys_are_no_content():
    chat = messages(CHATS[0])
    padded = [{**message, "name": None} for message in chat]
    assert row_fraction({"messages": padded}) == row_fraction({"messages": chat})


# What does not fit


@pytest.mark.parametrize(
    ("spec", "value", "message"),
    [
        ({"format": "text"}, 7, "column 'text' holds int, expected a string, at row 0 "),
        ({"format": "text"}, None, r"column 'text' is null, at row 0 \(.*null"),
        ({}, "hi", r"column 'messages' holds str, expected a list of \{role, content\}"),
        ({}, ["hi"], "'messages' has a turn of another kind, .* at row 0 .str 'hi' at turn 0"),
        ({}, [{"role": "user", "text": "x"}], "has a turn of another kind, expected a list of"),
        ({}, [{"role": "user", "content": None}], "has a turn whose content is null, expected"),
        ({}, [{"role": 3, "content": "x"}], "has a turn whose role is int"),
        ({}, [{"role": "user", "content": ["x"]}], "has a turn whose content is list"),
    ],
)  # fmt: skip
def test_values_of_another_type_are_refused(tmp_path, chatml, spec, value, message):
    column = "text" if spec else "messages"
    with pytest.raises(DataError, match=f"1 of 1 rows .* cannot be used.*{message}"):
        run(tmp_path, [{column: value}], chatml, **spec)


def test_a_few_bad_rows_are_set_aside(tmp_path, chatml):
    """The others become what they become without them, and no row is lost without a count."""
    good = [{"prompt": f"q {i}", "completion": f"a {i}"} for i in range(1300)]
    bad = {3: ("prompt", None), 700: ("completion", None), 1100: ("prompt", None)}
    rows = [dict(row) for row in good]
    for index, (name, value) in bad.items():
        rows[index][name] = value
    spec = {"format": "prompt_completion", "eval_fraction": 0.1}
    others = [row for index, row in enumerate(good) if index not in bad]
    _, train, held_out = run(tmp_path, others, chatml, **spec)
    facts, *with_bad = run(tmp_path, rows, chatml, **spec)
    assert with_bad == [train, held_out]
    assert facts["quarantined"] == {"column 'completion' is null": 1, "column 'prompt' is null": 2}
    assert facts["rows"] == 1300 == len(train) + len(held_out) + len(bad)
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            "position": f"row {index}",
            "reason": f"column {name!r} is null",
            "detail": "",
            "excerpt": json.dumps(rows[index]),
        }
        for index, (name, _) in bad.items()
    ]
    with pytest.raises(
        DataError, match=r"3 of 1,300 rows \(0.23%\).*2 x .*at row 3, row 1100 .*; 1 x"
    ):
        run(tmp_path, rows, chatml, **spec, max_bad_fraction=0.002)


@pytest.mark.fault("bad rows")
def test_a_row_of_10_mb_is_as_any_other(tmp_path, chatml, figure):
    rows = [{"text": "a" + " " * (10 << 20)}, {"text": "Hello there"}]  # one word, to BPE
    facts, train, _ = run(tmp_path, rows, chatml, format="text", seq_len=64)
    assert facts["max_length"] > 10_000
    assert len(train) == 2 and len(train[0]["input_ids"]) == 64
    assert (facts["truncated"], facts["quarantined"]) == (1, {})
    figure(f"10 MB: {facts['rows']} rows in, {len(train)} out, 1 of them cut")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"format": "text"}, "needs a column 'text', the data has txt, prompt: did you mean txt"),
        ({"format": "prompt_completion"}, "needs a column 'completion'"),
        ({}, r"needs a column 'messages'.*Set data.columns: \{messages: <its name>\}"),
        (
            {"format": "text", "columns": {"text": "body"}},
            "data.columns maps text to 'body', and the rows have txt, prompt: name one of these$",
        ),
    ],
)
def test_a_missing_column_is_named(tmp_path, chatml, spec, message):
    with pytest.raises(DataError, match=message):
        run(tmp_path, [{"txt": "a", "prompt": "b"}], chatml, **spec)


@pytest.mark.fault("tokenizer")
def test_tokenizers_that_cannot_be_used(tmp_path, figure):
    with pytest.raises(DataError, match="there is no tokenizer folder"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no tokenizer that transformers can load"):
        load_tokenizer(tmp_path / "empty")
    folder = train_tokenizer(tmp_path / "t", eos_token=None, pad_token=None)
    with pytest.raises(DataError, match="has no eos_token"):
        load_tokenizer(folder)
    figure("without eos: refused, by name")


def test_the_same_rows_make_the_same_files(tmp_path, chatml, texts):
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        run(tmp_path / name, texts, chatml, format="text", eval_fraction=0.1)
        files.append(
            [(tmp_path / name / "out" / f).read_bytes() for f in ("train.arrow", "eval.arrow")]
        )
    assert files[0] == files[1]
