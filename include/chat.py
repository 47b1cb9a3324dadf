"""Conversations to token ids and loss masks: the only place where a conversation is rendered.

A chat template is rendered by jinja once per order of roles, with marks in place of the contents; the text between
the marks is the template's own. Special tokens are then looked up only in the template's text, so that a text inside
a user's turn that looks like one stays text. The ids are those of `apply_chat_template(tokenize=True)`; `prove`
checks that on real rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from include.encoder import Spans, TokenizersEncoder, fast_encoder
from include.errors import BadData, BadRecipe, Missing
from include.recipe import Recipe
from include.settings import PROJECT
from include.sharegpt import Message

IGNORED = -100  # the label that PyTorch's cross entropy leaves out
CONTROL = r"<\|[^|<>\s]+\|>|</?s>"  # how special tokens are written in the families of templates that Retune ships
MARK = "\ue000{}\ue001"  # private use: in no template and in no sane text
PADDED, THINKING = " \n{}\n ", "<think>\n{}</think>\n{}"  # contents that some templates trim or rewrite


@dataclass(frozen=True)
class Piece:
    """A part of a rendered conversation: a special token, or a place in the text between two of them.

    Attributes:
        token: id of a special token, or None.
        text: the template's own text, or "" where a turn's content stands.
        turn: the turn whose content stands here, or None.
        trained: whether the loss counts it: the contents of assistant turns and the end of each.
        ends_turn: whether this is the token that ends an assistant's turn.
    """

    token: int | None = None
    text: str = ""
    turn: int | None = None
    trained: bool = False
    ends_turn: bool = False


@dataclass(frozen=True)
class Encoded:
    """Conversations as the trainer sees them, one after another in flat arrays.

    Attributes:
        ids: token ids (int32).
        trained: whether the loss counts a token (bool, same length).
        ends: where each conversation ends in the two (int64, one for each conversation).
    """

    ids: np.ndarray
    trained: np.ndarray
    ends: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """The ids where the loss counts, else -100 (int32)."""
        return np.where(self.trained, self.ids, np.int32(IGNORED))

    @property
    def starts(self) -> np.ndarray:
        """Where each conversation begins."""
        return np.concatenate([[0], self.ends[:-1]]).astype(np.int64)

    def cut(self, longest: int) -> Encoded:
        """The first so many tokens of each conversation."""
        lengths = self.ends - self.starts
        kept = np.arange(len(self.ids)) - np.repeat(self.starts, lengths) < longest
        return Encoded(self.ids[kept], self.trained[kept], np.minimum(lengths, longest).cumsum())

    def rows(self) -> Iterator[tuple[list[int], list[int]]]:
        """Ids and labels of each conversation, as lists."""
        labels = self.labels
        for start, end in zip(self.starts, self.ends, strict=True):
            yield self.ids[start:end].tolist(), labels[start:end].tolist()


class ChatFormat:
    """A tokenizer and a chat template.

    Args:
        folder: where the tokenizer's files are.
        recipe: gives `chat_template` and `missing_special_tokens`.

    Raises:
        Missing: the folder has no fast tokenizer, or the tokenizer no template although the recipe counts on it.
        BadRecipe: the template writes special tokens that the vocabulary lacks and the recipe refuses that.
    """

    def __init__(self, folder: Path, recipe: Recipe):
        from transformers import PreTrainedTokenizerFast

        if not (folder / "tokenizer.json").is_file():
            raise Missing(
                f"field 'base_model': {recipe.base_model} has no tokenizer.json", "Choose a base that has one"
            )
        self.tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
        self.name = recipe.chat_template
        if self.name != "tokenizer":
            self.tokenizer.chat_template = (PROJECT / "include" / "templates" / f"{self.name}.jinja").read_text("utf-8")
        elif not self.tokenizer.chat_template:
            raise Missing(
                f"field 'chat_template': the tokenizer of {recipe.base_model} has no chat template",
                "Name one: llama-3.1, llama-3, chatml, alpaca or vicuna",
            )
        if self.tokenizer.pad_token is None:
            spare = (t for t in self.tokenizer.get_vocab() if "finetune_right_pad" in t)
            self.tokenizer.pad_token = next(spare, self.tokenizer.eos_token)
        self._backend = self.tokenizer.backend_tokenizer
        self._backend.encode_special_tokens = True  # what looks like a special token in a text stays text
        self.encoder = fast_encoder(self._backend)
        self._special = {token.content: id for id, token in self.tokenizer.added_tokens_decoder.items()}
        self._token_arrays = {id: np.array([id], np.int32) for id in self._special.values()}
        self._shapes: dict[tuple[tuple[str, ...], bool], list[Piece]] = {}
        self._trimmed: dict[str, bool] = {}
        self.missing = self._missing_tokens()
        if self.missing and recipe.missing_special_tokens == "refuse":
            raise BadRecipe(
                f"field 'chat_template': {self.name} writes {', '.join(self.missing)}, which the vocabulary of "
                f"{recipe.base_model} lacks",
                "Choose a template made for this base (vicuna and alpaca need only its end-of-text token), or accept "
                "ordinary tokens in their place with missing_special_tokens: split",
            )

    def _missing_tokens(self) -> list[str]:
        text = self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], False)
        return sorted({token for token in re.findall(CONTROL, text) if token not in self._special})

    @property
    def stop_tokens(self) -> list[int]:
        """Ids that end an answer: the template's end of turn and the tokenizer's end of text."""
        pieces = self._shape(("user", "assistant"), False)
        ends = [piece.token for piece in pieces if piece.ends_turn and piece.token is not None]
        return sorted({*ends, self.tokenizer.eos_token_id} - {None})

    @property
    def bos_count(self) -> int:
        """How many beginning-of-text tokens the template writes (0 or 1; more is a template written twice)."""
        bos = self.tokenizer.bos_token_id
        return sum(p.token == bos for p in self._shape(("user", "assistant"), False) if p.token is not None)

    def render(self, messages: list[Message], generation_prompt: bool = False) -> str:
        """The conversation as text, by the template.

        Raises:
            BadData: the template does not take the conversation's order of roles.
        """
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
            )
        except TemplateError as error:
            raise BadData(
                f"the chat template {self.name} does not take the turns {', '.join(m['role'] for m in messages)}"
                f" ({error})",
                "Choose another chat_template, or correct the rows",
            ) from error

    def encode(self, conversations: list[list[Message]]) -> Encoded:
        """Token ids of conversations, and which of them are trained: assistant turns and their ends.

        Raises:
            BadData: the template does not take a conversation's order of roles.
        """
        return self._encode(conversations, generation_prompt=False)

    def prompt(self, messages: list[Message]) -> list[int]:
        """Token ids of a conversation that the assistant is to continue."""
        return self._encode([messages], generation_prompt=True).ids.tolist()

    def _encode(self, conversations: list[list[Message]], generation_prompt: bool) -> Encoded:
        rows = [self._runs(messages, generation_prompt) for messages in conversations]
        encodings = iter(self.encoder.encode([run for row in rows for run in row if not isinstance(run, Piece)]))
        parts: list[np.ndarray] = []
        spans: Spans = []
        ends: list[int] = []
        length = 0
        for row in rows:
            for run in row:
                if isinstance(run, Piece):
                    ids, ranges = self._token_arrays[run.token], [(0, 1)] if run.trained else []
                else:
                    ids, ranges = next(encodings)
                spans += [(length + begin, length + end) for begin, end in ranges]
                parts.append(ids)
                length += len(ids)
            ends.append(length)
        change = np.zeros(length + 1, np.int8)  # +1 where a trained stretch begins, -1 where it ends
        if spans:
            begins, stops = np.array(spans).T
            np.add.at(change, begins, 1)
            np.add.at(change, stops, -1)
        ids = np.concatenate(parts) if parts else np.zeros(0, np.int32)
        return Encoded(ids, change[:-1].cumsum() > 0, np.array(ends, np.int64))

    def _runs(self, messages: list[Message], generation_prompt: bool) -> list[Any]:
        """The conversation cut at special tokens: Pieces, and (text, trained spans in characters) between them.

        Text that the template writes and text of a turn may share a token, so they are encoded together.
        """
        runs: list[Any] = []
        text = ""
        spans: Spans = []
        for piece in self._shape(tuple(m["role"] for m in messages), generation_prompt):
            if piece.token is not None:
                if text:
                    runs.append((text, spans))
                runs.append(piece)
                text, spans = "", []
                continue
            part = piece.text
            if piece.turn is not None:
                message = messages[piece.turn]
                part = message["content"].strip() if self._trimmed[message["role"]] else message["content"]
            if piece.trained:
                spans.append((len(text), len(text) + len(part)))
            text += part
        if text:
            runs.append((text, spans))
        return runs

    def _shape(self, roles: tuple[str, ...], generation_prompt: bool) -> list[Piece]:
        """The template for one order of roles, as pieces."""
        key = (roles, generation_prompt)
        if key not in self._shapes:
            self._shapes[key] = self._cut(roles, generation_prompt)
        return self._shapes[key]

    def _cut(self, roles: tuple[str, ...], generation_prompt: bool) -> list[Piece]:
        marks = [MARK.format(i) for i in range(len(roles))]
        rendered = self._probe(roles, generation_prompt, "{}")
        self._learn_trimming(roles, generation_prompt, rendered)
        pieces: list[Piece] = []
        after_assistant = False
        for part in re.split("(\ue000\\d+\ue001)", rendered):
            if part in marks:
                turn = marks.index(part)
                after_assistant = roles[turn] == "assistant"
                pieces.append(Piece(turn=turn, trained=after_assistant))
                continue
            pieces += self._own_text(part, after_assistant)
            after_assistant = False
        turns = [piece.turn for piece in pieces if piece.turn is not None]
        if turns != list(range(len(roles))):
            raise BadData(
                f"the chat template {self.name} does not write the turns {', '.join(roles)} once each and in order",
                "Choose another chat_template, or correct the rows",
            )
        if sum(piece.ends_turn for piece in pieces) < roles.count("assistant"):
            raise BadRecipe(
                f"field 'chat_template': {self.name} writes no token that ends an assistant's turn, so that the model "
                "could never learn to stop",
                "Choose another chat_template",
            )
        return pieces

    def _own_text(self, text: str, after_assistant: bool) -> list[Piece]:
        """The template's own text, cut at special tokens; the first one after an assistant's content ends its turn."""
        pieces: list[Piece] = []
        ending = after_assistant
        for part in re.split(f"({CONTROL})", text):
            if not part:
                continue
            control = re.fullmatch(CONTROL, part) is not None
            ends = control and ending and not "".join(p.text for p in pieces).strip()
            pieces.append(Piece(self._special.get(part), "" if part in self._special else part, None, ends, ends))
            ending = ending and not control
        return pieces

    def _probe(self, roles: tuple[str, ...], generation_prompt: bool, form: str) -> str:
        contents = [form.replace("{}", MARK.format(i)) for i in range(len(roles))]
        return self.render([{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)], generation_prompt)

    def _learn_trimming(self, roles: tuple[str, ...], generation_prompt: bool, plain: str) -> None:
        """Find out which roles' contents the template trims, and refuse a template that rewrites contents otherwise."""
        padded = self._probe(roles, generation_prompt, PADDED)
        for i, role in enumerate(roles):
            self._trimmed[role] = PADDED.replace("{}", MARK.format(i)) not in padded
        for form in (PADDED, THINKING):
            expected = plain
            for i, role in enumerate(roles):
                content = form.replace("{}", MARK.format(i))
                expected = expected.replace(MARK.format(i), content.strip() if self._trimmed[role] else content)
            if expected != self._probe(roles, generation_prompt, form):
                raise BadRecipe(
                    f"field 'chat_template': the template {self.name} rewrites what turns say (it drops parts of them)",
                    "Choose a template that keeps the turns as they are",
                )

    def prove(self, conversations: list[list[Message]]) -> int:
        """Compare ids with `apply_chat_template(tokenize=True)`, row by row; returns how many rows were compared.

        Rows whose text looks like a special token are passed over: there the two differ on purpose. Where the fast
        encoder differs, the tokenizer itself takes its place from then on.

        Raises:
            BadRecipe: the tokenizer's own encoder differs, too.
        """
        self._backend.encode_special_tokens = False
        try:
            plain = [m for m in conversations if not any(re.search(CONTROL, turn["content"]) for turn in m)]
            theirs = [
                list(self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
                for messages in plain
            ]
        finally:
            self._backend.encode_special_tokens = True
        if self._first_difference(plain, theirs) is not None and self.encoder.name != TokenizersEncoder.name:
            self.encoder = TokenizersEncoder(self._backend)
        row = self._first_difference(plain, theirs)
        if row is not None:
            raise BadRecipe(
                f"field 'chat_template': the ids of {self.name} differ from the tokenizer's own for a conversation "
                f"that begins {plain[row][0]['content'][:60]!r}",
                "Report this base and template; until then choose another template",
            )
        return len(plain)

    def _first_difference(self, conversations: list[list[Message]], theirs: list[list[int]]) -> int | None:
        ours = [ids for ids, _ in self.encode(conversations).rows()]
        return next((row for row, ids in enumerate(theirs) if ids != ours[row]), None)
