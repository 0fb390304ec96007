"""Conversations -> token ids and which of them the assistant wrote.

Two ways to tell: a template with `{% generation %}` marks says it itself; for any other one, the
tokens of an assistant's turn are those that rendering through the turn adds to the prompt that the
model would be given at that point.
"""

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ditty.errors import DataError, RowError

if TYPE_CHECKING:
    import numpy as np

Message = dict[str, Any]
GENERATION_MARK = re.compile(r"\{%-?\s*generation\b")
CHECKED_ROWS = 8
"""Rows of the first batch that are compared with transformers' own tokenization."""


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
                f"the tokenizer in {tokenizer.name_or_path} has no chat template: use an instruct "
                "model, or data.format: prompt_completion"
            )
        self._tokenizer = tokenizer
        self._assistant_only = assistant_only
        self._marked = GENERATION_MARK.search(tokenizer.get_chat_template()) is not None
        self._special = special_tokens(tokenizer)
        self._checked = False

    def encode(self, chats: Sequence[list[Message]], first_row: int) -> list[Encoded]:
        """Encode conversations; `first_row` numbers the first of them in errors.

        A row whose turn begins or ends inside a token has the problem `split_token`: the model
        would never be given such a prompt.

        Raises:
            RowError: the template refuses a conversation.
            DataError: it does not show where the assistant's turns are, or ends them with no
                special token.
        """
        import numpy as np

        numbers = [row for row, chat in enumerate(chats, first_row) if chat]
        spoken = [chat for chat in chats if chat]
        nothing = Encoded(np.empty(0, np.int32), np.empty(0, bool), "empty")
        encoded = iter(self._encode(spoken, numbers) if spoken else [])
        return [next(encoded) if chat else nothing for chat in chats]

    def _encode(self, chats: Sequence[list[Message]], numbers: Sequence[int]) -> list[Encoded]:
        import numpy as np

        if self._assistant_only and self._marked:
            return self._encode_marked(chats, numbers)
        texts = self._render(chats, numbers)
        ids = encode_texts(self._tokenizer, texts)
        if not self._checked:
            self._check(chats[:CHECKED_ROWS], ids)
        if not self._assistant_only:
            return [Encoded(i, np.ones(len(i), dtype=bool)) for i in ids]
        return self._encode_by_prefix(self._turns(chats, texts, numbers), texts, ids)

    def _encode_marked(
        self, chats: Sequence[list[Message]], numbers: Sequence[int]
    ) -> list[Encoded]:
        import numpy as np

        try:
            out = self._tokenizer.apply_chat_template(
                list(chats), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception:
            self._render(chats, numbers)  # names the row
            raise
        rows = []
        masks = zip(numbers, out["input_ids"], out["assistant_masks"], strict=True)
        for number, ids, mask in masks:
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

        # A last turn's rendering is the whole text, whose tokens are known.
        known = {texts[turn.place]: ids[turn.place] for turn in turns}
        new = {text for t in turns for text in (t.prompt, t.through) if text not in known}
        known |= dict(zip(new, encode_texts(self._tokenizer, list(new)), strict=True))
        encoded = [Encoded(row, np.zeros(len(row), dtype=bool)) for row in ids]
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
        self, chats: Sequence[list[Message]], texts: list[str], numbers: Sequence[int]
    ) -> list[_Turn]:
        """Every turn of an assistant; `texts` are the conversations as a whole."""
        places = [
            (index, turn)
            for index, chat in enumerate(chats)
            for turn, message in enumerate(chat)
            if message["role"] == "assistant"
        ]
        rows = [numbers[index] for index, _ in places]
        prompts = self._render([chats[i][:t] for i, t in places], rows, prompt=True)
        throughs = self._render([chats[i][: t + 1] for i, t in places], rows)
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
        self, chats: Sequence[list[Message]], numbers: Sequence[int], *, prompt: bool = False
    ) -> list[str]:
        """The conversations as text; `prompt` adds what makes the assistant speak next."""
        if not chats:
            return []
        render = self._tokenizer.apply_chat_template
        try:
            return render(list(chats), tokenize=False, add_generation_prompt=prompt)
        except Exception:
            for row, chat in zip(numbers, chats, strict=True):
                try:
                    render([chat], tokenize=False, add_generation_prompt=prompt)
                except Exception as error:  # templates are programs: anything can come out of one
                    roles = ", ".join(message["role"] for message in chat)
                    reason = "the chat template refuses the conversation"
                    raise RowError(row, reason, f"({roles}): {error}") from error
            raise

    def _check(self, chats: Sequence[list[Message]], ids: "list[np.ndarray]") -> None:
        """Our shortcut must make the ids that transformers makes, and everybody's inference."""
        for chat, ours in zip(chats, ids, strict=False):
            expected = self._tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
            if ours.tolist() != list(expected):
                raise DataError(
                    "encoding a rendered chat gives other tokens than the tokenizer's own "
                    f"apply_chat_template ({self._tokenizer.name_or_path}): this tokenizer is not "
                    "supported"
                )
        self._checked = True


def encode_texts(
    tokenizer: Any, texts: Sequence[str], *, special_tokens: bool = False
) -> "list[np.ndarray]":
    """Token ids (int32) of each text, in parallel in the Rust library."""
    import numpy as np

    backend = tokenizer.backend_tokenizer
    encodings = backend.encode_batch_fast(list(texts), add_special_tokens=special_tokens)
    return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]


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
        "trained on it would never stop: use a template that adds one (eos_token)"
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
        " so the assistant's tokens cannot be told: use a template with {% generation %} marks, "
        "keep one assistant turn a row, or set data.loss_on: all"
    )
