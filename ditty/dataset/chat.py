"""Conversations -> token ids and which of them the assistant wrote.

Two ways to tell: a template with `{% generation %}` marks says it itself; for any other one, the
tokens of an assistant's turn are those that rendering through the turn adds to the prompt that the
model would be given at that point.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import starmap
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ditty.dataset.prefixes import Beginning, PrefixEncoder
from ditty.errors import DataError, RowError

if TYPE_CHECKING:
    import numpy as np

Message = dict[str, Any]
T = TypeVar("T")
GENERATION_MARK = re.compile(r"\{%-?\s*generation\b")
CHUNK_CHARACTERS = 1 << 20
CHECKED_ROWS = 8
"""Rows of the first batch that are compared with transformers' own tokenization."""


class Chat(NamedTuple):
    """A conversation, and the JSON schemas of the tools that the assistant may call in it."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None

    def until(self, turn: int) -> "Chat":
        """What is said before a turn."""
        return Chat(self.messages[:turn], self.tools)


class Encoded(NamedTuple):
    """One row. `problem`: why it cannot be used, a key of the facts' `dropped`."""

    ids: "np.ndarray"  # int32 [n]
    supervised: "np.ndarray"  # bool [n]
    problem: str | None = None


class _Turn(NamedTuple):
    """One turn of an assistant: what the model is given, and that with its answer."""

    row: int
    turn: int
    place: int  # of the row in its batch
    prompt: str
    through: str


class ChatEncoder:
    """Encodes batches of conversations with one tokenizer's chat template."""

    def __init__(self, tokenizer: Any, *, assistant_only: bool):
        """
        Args:
            tokenizer: of transformers, backed by the tokenizers library.
            assistant_only: supervise what the assistant wrote with its end of turn, else all.

        Raises:
            DataError: the tokenizer has no chat template.
        """
        if not tokenizer.chat_template:
            raise DataError(
                f"the tokenizer in {tokenizer.name_or_path} has no chat template: name one in "
                "data.chat_template, use an instruct model, or data.format: prompt_completion"
            )
        self._tokenizer = tokenizer
        self._assistant_only = assistant_only
        self._special = special_tokens(tokenizer)
        self._prefixes = PrefixEncoder(tokenizer, self._special, partial(encode_texts, tokenizer))
        self._checked = False
        self._tools_checked = False

    def encode(self, chats: Sequence[Chat], first_row: int) -> list[Encoded]:
        """Encode conversations; `first_row` numbers the first of them in errors.

        A row whose turn begins or ends inside a token has the problem `split_token`: the model
        would never be given such a prompt.

        Raises:
            RowError: the template refuses a conversation.
            DataError: it ignores its tools, does not show where the assistant's turns are, or ends
                them with no special token.
        """
        import numpy as np

        nothing = Encoded(np.empty(0, np.int32), np.empty(0, bool), "empty")
        encoded = [nothing] * len(chats)
        for tools in (False, True):
            places = [i for i, c in enumerate(chats) if c.messages and bool(c.tools) is tools]
            if not places:
                continue
            part, numbers = [chats[i] for i in places], [first_row + i for i in places]
            encode = self._encode_marked if self._is_marked(part[0]) else self._encode_plain
            for place, row in zip(places, encode(part, numbers), strict=True):
                encoded[place] = row
        return encoded

    def _is_marked(self, chat: Chat) -> bool:
        """Whether marks tell the assistant's part; some tokenizers have a template for tools."""
        template = self._tokenizer.get_chat_template(tools=chat.tools)
        return self._assistant_only and GENERATION_MARK.search(template) is not None

    def _encode_plain(self, chats: Sequence[Chat], numbers: Sequence[int]) -> list[Encoded]:
        import numpy as np

        self._check_tools(chats, numbers)
        texts = self._render(chats, numbers)
        ids = encode_texts(self._tokenizer, texts)
        if not self._checked:
            self._check(chats[:CHECKED_ROWS], ids)
        if not self._assistant_only:
            return [Encoded(i, np.ones(len(i), dtype=bool)) for i in ids]
        return self._encode_by_prefix(self._turns(chats, texts, numbers), texts, ids)

    def _encode_marked(self, chats: Sequence[Chat], numbers: Sequence[int]) -> list[Encoded]:
        import numpy as np

        self._check_tools(chats, numbers)

        def encode(messages: list[list[Message]], tools: Any) -> Iterable[tuple[Any, Any]]:
            out = self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            return zip(out["input_ids"], out["assistant_masks"], strict=True)

        try:
            encoded = _by_tools(chats, encode)
        except Exception:
            self._render(chats, numbers)  # names the row
            raise
        rows = []
        for number, (ids, mask) in zip(numbers, encoded, strict=True):
            row = Encoded(np.asarray(ids, np.int32), np.asarray(mask, bool))
            self._supervise_ends(row, number)
            rows.append(row)
        return rows

    def _supervise_ends(self, row: Encoded, number: int) -> None:
        """Add the end-of-turn token where a template's mark stops before it."""
        import numpy as np

        edges = np.flatnonzero(np.diff(row.supervised.astype(np.int8), prepend=0, append=0))
        ended = True
        for start, stop in edges.reshape(-1, 2):
            specials = np.flatnonzero(self._special[row.ids[start:stop]])
            after = row.ids[start + specials[-1] + 1 : stop] if len(specials) else None
            ended = after is not None and self._blank(after)
            if not ended and stop < len(row.ids) and self._special[row.ids[stop]]:
                row.supervised[stop] = ended = True
        if not ended:
            raise DataError(_no_end(number))

    def _encode_by_prefix(
        self, turns: Sequence[_Turn], texts: list[str], ids: "list[np.ndarray]"
    ) -> list[Encoded]:
        import numpy as np

        encoded = [Encoded(row, np.zeros(len(row), dtype=bool)) for row in ids]
        # A last turn's rendering is the whole text, whose tokens are known.
        known = {texts[turn.place]: ids[turn.place] for turn in turns}
        new = {text: turn.place for turn in turns for text in turn[-2:] if text not in known}
        beginnings = list(starmap(Beginning, new.items()))
        known |= dict(zip(new, self._prefixes.encode(beginnings, texts, ids), strict=True))
        for turn in turns:
            span = self._span(ids[turn.place], known[turn.prompt], known[turn.through])
            if span is None and not texts[turn.place].startswith(turn.through):
                raise DataError(_no_prefix(turn, texts[turn.place]))
            if span is None:
                encoded[turn.place] = encoded[turn.place]._replace(problem="split_token")
            elif span.start == span.stop:
                raise DataError(_no_end(turn.row))
            else:
                encoded[turn.place].supervised[span] = True
        return encoded

    def _span(
        self, whole: "np.ndarray", prompt: "np.ndarray", through: "np.ndarray"
    ) -> slice | None:
        """The assistant's tokens in `whole`, up to and with the token that ends its turn.

        An empty slice: no token ends it. None: the tokens of the prompt or of the turn are not
        those at the same place in the whole conversation.
        """
        import numpy as np

        if min(_common(whole, prompt), _common(through, prompt)) < len(prompt):
            return None
        stop = _common(whole, through)
        tail = through[stop:]  # some templates put eos after the last turn only
        if not self._blank(tail[~self._special[tail]]):
            return None
        start = len(prompt)
        ends = np.flatnonzero(self._special[whole[start:stop]])
        # What a template puts after the end of the turn, a newline, is not the assistant's.
        if len(ends) and self._blank(whole[start + ends[-1] + 1 : stop]):
            return slice(start, start + ends[-1] + 1)
        return None if len(tail) else slice(start, start)

    def _blank(self, ids: "np.ndarray") -> bool:
        return len(ids) == 0 or not self._tokenizer.decode(ids).strip()

    def _turns(
        self, chats: Sequence[Chat], texts: list[str], numbers: Sequence[int]
    ) -> list[_Turn]:
        """Every turn of an assistant; `texts` are the conversations as a whole."""
        places = [
            (index, turn)
            for index, chat in enumerate(chats)
            for turn, message in enumerate(chat.messages)
            if message["role"] == "assistant"
        ]
        rows = [numbers[index] for index, _ in places]
        prompts = self._render([chats[i].until(t) for i, t in places], rows, prompt=True)
        inner = [p for p in places if p[1] + 1 < len(chats[p[0]].messages)]
        within = [numbers[index] for index, _ in inner]
        rendered = self._render([chats[i].until(t + 1) for i, t in inner], within)
        known = dict(zip(inner, rendered, strict=True))
        throughs = [known.get(place, texts[place[0]]) for place in places]
        turns = []
        for row, (index, number), prompt, through in zip(
            rows, places, prompts, throughs, strict=True
        ):
            turn = _Turn(row, number, index, prompt, through)
            if not (through.startswith(prompt) and texts[index].startswith(prompt)):
                raise DataError(_no_prefix(turn, texts[index]))
            turns.append(turn)
        return turns

    def _render(
        self, chats: Sequence[Chat], numbers: Sequence[int], *, prompt: bool = False
    ) -> list[str]:
        """The conversations as text; `prompt` adds what makes the assistant speak next."""
        if not chats:
            return []

        def render(messages: list[list[Message]], tools: Any) -> Iterable[str]:
            rendered: list[str] = self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt
            )
            return rendered

        try:
            return _by_tools(chats, render)
        except Exception:
            for row, chat in zip(numbers, chats, strict=True):
                try:
                    render([chat.messages], chat.tools)
                except Exception as error:  # templates are programs: anything can come out of one
                    roles = ", ".join(message["role"] for message in chat.messages)
                    reason = "the chat template refuses the conversation"
                    raise RowError(row, reason, f"({roles}): {error}") from error
            raise

    def _check(self, chats: Sequence[Chat], ids: "list[np.ndarray]") -> None:
        """Our shortcut must make the ids that transformers makes, and everybody's inference."""
        for chat, ours in zip(chats, ids, strict=False):
            expected = self._tokenizer.apply_chat_template(
                chat.messages, tools=chat.tools, tokenize=True, return_dict=False
            )
            if ours.tolist() != list(expected):
                raise DataError(
                    "encoding a rendered chat gives other tokens than the tokenizer's own "
                    f"apply_chat_template ({self._tokenizer.name_or_path}): this tokenizer is not "
                    "supported"
                )
        self._checked = True

    def _check_tools(self, chats: Sequence[Chat], numbers: Sequence[int]) -> None:
        """A template that ignores tools would teach calls of functions that nobody has named."""
        with_tools = [(row, chat) for row, chat in zip(numbers, chats, strict=True) if chat.tools]
        if self._tools_checked or not with_tools:
            return
        row, chat = with_tools[0]
        shown, without = self._render([chat, Chat(chat.messages)], [row, row])
        if shown == without:
            raise DataError(
                f"row {row} has tools, which the chat template ignores: use a template that shows "
                "them (data.chat_template), or drop that column (remove_columns of a `map`)"
            )
        self._tools_checked = True


def _by_tools(
    chats: Sequence[Chat], call: Callable[[list[list[Message]], Any], Iterable[T]]
) -> list[T]:
    """The results of `call` in the order of `chats`; one call for all that have the same tools."""
    groups: dict[str, list[int]] = {}
    for place, chat in enumerate(chats):
        groups.setdefault(json.dumps(chat.tools), []).append(place)
    found: dict[int, T] = {}
    for places in groups.values():
        results = call([chats[i].messages for i in places], chats[places[0]].tools)
        found.update(zip(places, results, strict=True))
    return [found[place] for place in range(len(chats))]


def encode_texts(
    tokenizer: Any, texts: Sequence[str], *, special_tokens: bool = False
) -> "list[np.ndarray]":
    """Token ids (int32) of each text, in parallel in the Rust library.

    Two chunks at a time: while one's ids become arrays, in this interpreter and so on one core,
    the library has another to encode. Memory holds what it says of two chunks, not of all texts.
    """
    import numpy as np

    backend = tokenizer.backend_tokenizer

    def encode(chunk: list[str]) -> "list[np.ndarray]":
        encodings = backend.encode_batch_fast(chunk, add_special_tokens=special_tokens)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    chunks = list(_chunks(texts))
    if len(chunks) == 1:
        return encode(chunks[0])
    with ThreadPoolExecutor(2, thread_name_prefix="ditty ids") as threads:
        return [ids for part in threads.map(encode, chunks) for ids in part]


def _chunks(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in lists of about CHUNK_CHARACTERS."""
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def special_tokens(tokenizer: Any) -> "np.ndarray":
    """bool [vocabulary]: whether an id is a control token, which text is never split into."""
    import numpy as np

    ids = set(tokenizer.all_special_ids)
    ids |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    table = np.zeros(max([len(tokenizer), *(i + 1 for i in ids)]), dtype=bool)
    table[sorted(ids)] = True
    return table


def _common(a: "np.ndarray", b: "np.ndarray") -> int:
    """How many leading tokens are equal."""
    import numpy as np

    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def _no_end(row: int) -> str:
    return (
        f"row {row}: the chat template ends the assistant's turn with no special token, so a model "
        "trained on it would never stop: name a template in data.chat_template that adds one "
        "(eos_token)"
    )


def _no_prefix(turn: _Turn, whole: str) -> str:
    shorter, longer = (
        (turn.through, whole)
        if turn.through.startswith(turn.prompt)
        else (turn.prompt, turn.through)
    )
    at = len(os.path.commonprefix([shorter, longer]))
    return (
        f"row {turn.row}, turn {turn.turn}: the chat template renders the conversation so far "
        f"differently once it goes on ({shorter[at : at + 30]!r} becomes {longer[at : at + 30]!r}),"
        " so the assistant's tokens cannot be told: name a template with {% generation %} marks in "
        "data.chat_template, keep one assistant turn a row, or set data.loss_on: all"
    )
