"""Conversations -> token ids and which of them the assistant wrote.

Two ways to tell: a template with `{% generation %}` marks says it itself; for any other one, the
tokens of an assistant's turn are those that rendering through the turn adds to the prompt that the
model would be given at that point.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ditty.errors import DataError

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

    def encode(self, chats: Sequence[list[Message]], first_row: int) -> list[Encoded]:
        """Encode conversations; `first_row` numbers the first of them in errors.

        A row whose turn begins or ends inside a token has the problem `split_token`: the model
        would never be given such a prompt.

        Raises:
            DataError: the template refuses a conversation, does not show where the assistant's
                turns are, or ends them with no special token.
        """
        import numpy as np

        if not chats:
            return []
        if self._assistant_only and self._marked:
            return self._encode_marked(chats, first_row)
        texts = self._render(chats, first_row)
        ids = encode_texts(self._tokenizer, texts)
        if first_row == 0:
            self._check_texts(chats[:CHECKED_ROWS], ids)
        if not self._assistant_only:
            return [Encoded(i, np.ones(len(i), dtype=bool)) for i in ids]
        return self._encode_by_prefix(chats, texts, ids, first_row)

    def _encode_marked(self, chats: Sequence[list[Message]], first_row: int) -> list[Encoded]:
        import numpy as np

        try:
            out = self._tokenizer.apply_chat_template(
                list(chats), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception:
            self._render(chats, first_row)  # names the row
            raise
        rows = []
        for number, (ids, mask) in enumerate(
            zip(out["input_ids"], out["assistant_masks"], strict=True), first_row
        ):
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
            ended = after is not None and not self._tokenizer.decode(after).strip()
            if not ended and stop < len(row.ids) and self._special[row.ids[stop]]:
                row.supervised[stop] = ended = True
        if not ended:
            raise DataError(_no_end(number))

    def _encode_by_prefix(
        self,
        chats: Sequence[list[Message]],
        texts: list[str],
        ids: "list[np.ndarray]",
        first_row: int,
    ) -> list[Encoded]:
        import numpy as np

        turns = [
            (row, turn)
            for row, chat in enumerate(chats)
            for turn, message in enumerate(chat)
            if message["role"] == "assistant"
        ]
        prompts = self._render([chats[r][:t] for r, t in turns], first_row, prompt=True)
        throughs = self._render([chats[r][: t + 1] for r, t in turns], first_row)
        for (row, turn), prompt, through in zip(turns, prompts, throughs, strict=True):
            if not (through.startswith(prompt) and texts[row].startswith(through)):
                raise DataError(_no_prefix(first_row + row, turn, prompt, through, texts[row]))
        # A last turn's rendering is the whole text, whose tokens are known.
        known = {texts[row]: ids[row] for row, _ in turns}
        new = list({text for text in (*prompts, *throughs) if text not in known})
        known |= dict(zip(new, encode_texts(self._tokenizer, new), strict=True))
        supervised = [np.zeros(len(i), dtype=bool) for i in ids]
        problems: list[str | None] = [None] * len(ids)
        for (row, _), prompt, through in zip(turns, prompts, throughs, strict=True):
            before, after = known[prompt], known[through]
            if not (_starts_with(ids[row], before) and _starts_with(ids[row], after)):
                problems[row] = "split_token"
                continue
            start = len(before)
            specials = np.flatnonzero(self._special[ids[row][start : len(after)]])
            if not len(specials):
                raise DataError(_no_end(first_row + row))
            # What the template puts after the end of the turn, a newline, is not the assistant's.
            supervised[row][start : start + specials[-1] + 1] = True
        return [Encoded(*row) for row in zip(ids, supervised, problems, strict=True)]

    def _render(
        self, chats: Sequence[list[Message]], first_row: int, *, prompt: bool = False
    ) -> list[str]:
        """The conversations as text; `prompt` adds what makes the assistant speak next."""
        if not chats:
            return []
        render = self._tokenizer.apply_chat_template
        try:
            return render(list(chats), tokenize=False, add_generation_prompt=prompt)
        except Exception:
            for row, chat in enumerate(chats, first_row):
                try:
                    render(chat, tokenize=False, add_generation_prompt=prompt)
                except Exception as error:  # templates are programs: anything can come out of one
                    roles = ", ".join(message["role"] for message in chat)
                    raise DataError(
                        f"row {row}: the chat template refuses the roles ({roles}): {error}"
                    ) from error
            raise

    def _check_texts(self, chats: Sequence[list[Message]], ids: "list[np.ndarray]") -> None:
        """Our shortcut must make the ids that transformers makes, and everybody's inference."""
        for row, chat in enumerate(chats):
            expected = self._tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
            if ids[row].tolist() != list(expected):
                raise DataError(
                    f"row {row}: encoding the rendered chat gives other tokens than the "
                    f"tokenizer's apply_chat_template ({self._tokenizer.name_or_path}); "
                    "this tokenizer is not supported"
                )


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


def _starts_with(ids: "np.ndarray", prefix: "np.ndarray") -> bool:
    import numpy as np

    return np.array_equal(ids[: len(prefix)], prefix)


def _no_end(row: int) -> str:
    return (
        f"row {row}: the chat template ends the assistant's turn with no special token, so a model "
        "trained on it would never stop: use a template that adds one (eos_token)"
    )


def _no_prefix(row: int, turn: int, prompt: str, through: str, full: str) -> str:
    longer, shorter = (through, prompt) if not through.startswith(prompt) else (full, through)
    at = next(
        (i for i, (a, b) in enumerate(zip(longer, shorter, strict=False)) if a != b),
        min(len(longer), len(shorter)),
    )
    return (
        f"row {row}, turn {turn}: the chat template renders the conversation so far differently "
        f"once it goes on ({shorter[at : at + 30]!r} becomes {longer[at : at + 30]!r}), so the "
        "assistant's tokens cannot be told: use a template with {% generation %} marks, keep one "
        "assistant turn a row, or set data.loss_on: all"
    )
