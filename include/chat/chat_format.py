"""Conversations to token ids and loss masks: the only place where a conversation is rendered.

A chat template is rendered once per order of roles, with marks in place of the contents; the text between the marks
is the template's own. Special tokens are then looked up only in the template's text, so that a text inside a user's
turn that looks like one stays text. The ids are those of `apply_chat_template(tokenize=True)`; `prove` checks that on
real rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from include.chat.encoder import Spans, TokenizersEncoder, fast_encoder, places
from include.chat.tokenized import IGNORED
from include.data.sharegpt import Conversation, Message
from include.errors import BadData, BadRecipe, NotFound
from include.paths import PROJECT
from include.recipe import Recipe

CONTROL = r"<\|[^|<>\s]+\|>|</?s>"  # how special tokens are written in the families of templates that Retune ships
MARK = "\ue000{}\ue001"  # private use: in no template and in no sane text
PADDED, THINKING = ' "\n{}\n ', "<think>\n{}</think>\n{}"  # contents that some templates trim, quote or rewrite
TODAY = date(2024, 7, 26)  # what a template is told that asks for the date: ids must not depend on the day of a run
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

# what templates do to a turn's content
WRITTEN: dict[str, Callable[[str], str]] = {
    "as it is": lambda text: text,
    "trimmed": str.strip,
    "as JSON": lambda text: json.dumps(text, ensure_ascii=False),  # as transformers' own `tojson`
}


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
        return np.concatenate([[0], self.ends])[:-1].astype(np.int64)

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
        recipe: gives `chat_template`, `missing_special_tokens` and `special_tokens_in_text`.

    Attributes:
        template: the jinja source.
        encoder: turns texts into ids; `prove` may put the slower one in its place.
        missing: special tokens that the template writes and the vocabulary lacks.

    Raises:
        NotFound: the folder has no fast tokenizer, or the tokenizer no template although the recipe counts on it.
        BadRecipe: the template writes special tokens that the vocabulary lacks and the recipe refuses that.
    """

    def __init__(self, folder: Path, recipe: Recipe):
        from tokenizers import Tokenizer

        if not (folder / "tokenizer.json").is_file():
            raise NotFound(
                f"field 'base_model': {recipe.base_model} has no tokenizer.json", "Choose a base that has one"
            )
        self._folder, self.name = folder, recipe.chat_template
        self.template = template_source(folder, recipe)
        self._backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._backend.no_padding()
        self._backend.no_truncation()
        self._special = {str(token.content): id for id, token in self._backend.get_added_tokens_decoder().items()}
        self._named = _named_tokens(folder)
        if self.id_of("pad_token") is None:
            spare = next((token for token in self._special if "finetune_right_pad" in token), None)
            self._named["pad_token"] = spare or self._named["eos_token"]
        self._backend.encode_special_tokens = True  # what looks like a special token in a text stays text
        self.encoder = fast_encoder(self._backend, folder / "tokenizer.json")
        self._in_text = None
        if recipe.special_tokens_in_text == "parse":
            self._in_text = re.compile("(" + "|".join(map(re.escape, self._special)) + ")")
        self._shapes: dict[tuple[tuple[str, ...], str | None, bool], list[Any]] = {}
        self._written: dict[str, str] = {}
        self.missing = self._missing_tokens()
        if self.missing and recipe.missing_special_tokens == "refuse":
            raise BadRecipe(
                f"field 'chat_template': {self.name} writes {', '.join(self.missing)}, which the vocabulary of "
                f"{recipe.base_model} lacks",
                "Choose a template made for this base (vicuna and alpaca need only its end-of-text token), or accept "
                "ordinary tokens in their place with missing_special_tokens: split",
            )

    def _missing_tokens(self) -> list[str]:
        text = self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        return sorted({token for token in re.findall(CONTROL, text) if token not in self._special})

    def id_of(self, name: str) -> int | None:
        """The id of the tokenizer's `bos_token`, `eos_token` or `pad_token`; None where it has none."""
        return self._backend.token_to_id(self._named[name]) if self._named.get(name) else None

    @property
    def stop_tokens(self) -> list[int]:
        """Ids that end an answer: the template's end of turn and the tokenizer's end of text."""
        ends = [piece.token for piece in self._pieces(("user", "assistant"), None, False) if piece.ends_turn]
        return sorted({id for id in (*ends, self.id_of("eos_token")) if id is not None})

    @property
    def bos_count(self) -> int:
        """How many beginning-of-text tokens the template writes (0 or 1; more is a template written twice)."""
        bos = self.id_of("bos_token")
        return sum(p.token == bos for p in self._pieces(("user", "assistant"), None, False) if p.token is not None)

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens included."""
        return str(self._backend.decode(ids, skip_special_tokens=False))

    def special_in(self, ids: list[int]) -> list[str]:
        """The special tokens among ids, and what is written like one, each once."""
        known = self._backend.get_added_tokens_decoder()
        tokens = [str(known[id].content) for id in ids if id in known and known[id].special]
        return list(dict.fromkeys([*tokens, *re.findall(CONTROL, self.decode(ids))]))

    def save(self, folder: Path) -> None:
        """Write the tokenizer and the template so that transformers loads what was used here, and nothing else."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_bytes((self._folder / "tokenizer.json").read_bytes())
        (folder / "chat_template.jinja").write_text(self.template, encoding="utf-8")
        config = {k: v for k, v in _config(self._folder).items() if k not in ("chat_template", "auto_map", *SPECIAL)}
        # the class that takes tokenizer.json as it stands; some model's own classes build another one from it
        config.update(tokenizer_class="PreTrainedTokenizerFast", **self._named)
        (folder / "tokenizer_config.json").write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2))

    def render(self, messages: list[Message], generation_prompt: bool = False, tools: str | None = None) -> str:
        """The conversation as text, by transformers' own rendering of the template.

        Args:
            tools: a JSON list of what the assistant may call.

        Raises:
            BadData: the template does not take the conversation's order of roles.
        """
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered = render_jinja_template(
                conversations=[messages],
                chat_template=self.template,
                tools=orjson.loads(tools) if tools else None,
                add_generation_prompt=generation_prompt,
                strftime_now=TODAY.strftime,
                **self._named,
            )
        except TemplateError as error:
            raise BadData(
                f"the chat template {self.name} does not take the turns {', '.join(m['role'] for m in messages)}"
                f" ({error})",
                "Choose another chat_template, or correct the rows",
            ) from error
        return str(rendered[0][0])

    def encode(self, conversations: list[Conversation]) -> Encoded:
        """Token ids of conversations, and which of them are trained: assistant turns and their ends.

        Raises:
            BadData: the template does not take a conversation's order of roles.
        """
        return self._encode(conversations, generation_prompt=False)

    def prompt(self, messages: list[Message]) -> list[int]:
        """Token ids of a conversation that the assistant is to continue."""
        return self._encode([Conversation.of(messages)], generation_prompt=True).ids.tolist()

    def _encode(self, conversations: list[Conversation], generation_prompt: bool) -> Encoded:
        """Fixed stretches are looked up, the texts between them encoded in one go, and all put in order at the end."""
        fixed = _Pool()
        slots: list[int] = []  # a fixed stretch by its number, or the text number n as -1 - n
        texts: list[str] = []
        spans: list[Spans] = []
        counts: list[int] = []  # slots of each conversation

        def put(text: str, trained: Spans) -> None:
            slots.append(-1 - len(texts))
            texts.append(text)
            spans.append(trained)

        for conversation in conversations:
            before = len(slots)
            for part in self._shape(conversation.roles, conversation.tools, generation_prompt):
                if isinstance(part, tuple):
                    slots.append(fixed.number(part))
                    continue
                text, trained = "", list[tuple[int, int]]()
                for piece in part:
                    said = self._said(piece, conversation)
                    # the odd ones of a text that is cut at special tokens are those tokens
                    for number, bit in enumerate(self._in_text.split(said) if self._in_text else (said,)):
                        if number % 2:
                            if text:
                                put(text, trained)
                            slots.append(fixed.number(((self._special[bit],), (piece.trained,))))
                            text, trained = "", []
                            continue
                        if piece.trained:
                            trained.append((len(text), len(text) + len(bit)))
                        text = text + bit if text else bit
                if text:
                    put(text, trained)
            counts.append(len(slots) - before)
        tokens = self.encoder.encode(texts, spans)
        ids, marked = fixed.arrays()
        order = np.array(slots, np.int64)
        of_text = order < 0
        starts, lengths = np.empty_like(order), np.empty_like(order)
        text_numbers = -1 - order[of_text]
        starts[of_text] = len(ids) + tokens.starts[text_numbers]
        lengths[of_text] = tokens.starts[text_numbers + 1] - tokens.starts[text_numbers]
        starts[~of_text], lengths[~of_text] = fixed.places(order[~of_text])
        ends = np.concatenate([[0], lengths.cumsum()])[np.cumsum(counts, dtype=np.int64)]
        where = places(starts, lengths)
        return Encoded(np.concatenate([ids, tokens.ids])[where], np.concatenate([marked, tokens.marked])[where], ends)

    def _said(self, piece: Piece, conversation: Conversation) -> str:
        """The template's own text, or the turn's content as the template writes it."""
        if piece.turn is None:
            return piece.text
        content, how = conversation.contents[piece.turn], self._written[conversation.roles[piece.turn]]
        return content if how == "as it is" else WRITTEN[how](content)

    def _shape(self, roles: tuple[str, ...], tools: str | None, generation_prompt: bool) -> list[Any]:
        """The template for one order of roles: fixed stretches as (ids, trained), and lists of pieces to be encoded.

        Text that the template writes and text of a turn may share a token, so they are encoded together.
        """
        key = (roles, tools, generation_prompt)
        if key not in self._shapes:
            if len(self._shapes) > 10_000:  # rows with ever other tools
                self._shapes.clear()
            self._shapes[key] = self._stretches(self._pieces(*key))
        return self._shapes[key]

    def _stretches(self, pieces: list[Piece]) -> list[Any]:
        found: list[Any] = []
        between: list[Piece] = []

        def fix(ids: tuple[int, ...], trained: tuple[bool, ...]) -> None:
            if found and isinstance(found[-1], tuple):
                found[-1] = (found[-1][0] + ids, found[-1][1] + trained)
            else:
                found.append((ids, trained))

        def close() -> None:
            if any(piece.turn is not None for piece in between):
                found.append(list(between))
            elif between:
                text, spans = "", []
                for piece in between:
                    spans += [(len(text), len(text) + len(piece.text))] if piece.trained else []
                    text += piece.text
                tokens = self.encoder.encode([text], [spans])
                fix(tuple(tokens.ids.tolist()), tuple(tokens.marked.tolist()))
            between.clear()

        for piece in pieces:
            if piece.token is None:
                between.append(piece)
                continue
            close()
            fix((piece.token,), (piece.trained,))
        close()
        return found

    def _pieces(self, roles: tuple[str, ...], tools: str | None, generation_prompt: bool) -> list[Piece]:
        marks = [MARK.format(i) for i in range(len(roles))]
        plain = self._probe(roles, tools, generation_prompt, "{}")
        rendered = self._learn_writing(roles, tools, generation_prompt, plain)
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

    def _probe(self, roles: tuple[str, ...], tools: str | None, generation_prompt: bool, form: str) -> str:
        contents = [form.replace("{}", MARK.format(i)) for i in range(len(roles))]
        messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
        return self.render(messages, generation_prompt, tools)

    def _learn_writing(self, roles: tuple[str, ...], tools: str | None, generation_prompt: bool, plain: str) -> str:
        """Find out how the template writes each role's contents, and refuse one that rewrites them otherwise.

        Returns:
            `plain` (rendered with a mark as each content), with the mark in place of what is written for it.
        """
        padded = self._probe(roles, tools, generation_prompt, PADDED)
        for i, role in enumerate(roles):
            content = PADDED.replace("{}", MARK.format(i))
            self._written[role] = next((how for how, write in WRITTEN.items() if write(content) in padded), "")
        bare = plain
        for i, role in enumerate(roles):
            if self._written[role]:
                bare = bare.replace(WRITTEN[self._written[role]](MARK.format(i)), MARK.format(i))
        for form in (PADDED, THINKING):
            expected = bare
            for i, role in enumerate(roles):
                if self._written[role]:
                    content = form.replace("{}", MARK.format(i))
                    expected = expected.replace(MARK.format(i), WRITTEN[self._written[role]](content))
            if expected != self._probe(roles, tools, generation_prompt, form):
                raise BadRecipe(
                    f"field 'chat_template': the template {self.name} rewrites what turns say (it drops parts of them)",
                    "Choose a template that keeps the turns as they are",
                )
        return bare

    def prove(self, conversations: list[Conversation]) -> int:
        """Compare ids with those of the whole text as `apply_chat_template(tokenize=True)` makes them, row by row, and
        the trained tokens' text with what the assistant says; returns how many rows were compared.

        Rows whose text looks like a special token are passed over: there the two differ on purpose. Where the fast
        encoder differs, the tokenizer itself takes its place from then on.

        Raises:
            BadRecipe: the tokenizer's own encoder differs, too, or the masks are not those of the assistant's turns.
        """
        plain = [c for c in conversations if not any(re.search(CONTROL, content) for content in c.contents)]
        self._backend.encode_special_tokens = False
        try:
            theirs = [
                self._backend.encode(self.render(c.messages, tools=c.tools), add_special_tokens=False).ids
                for c in plain
            ]
        finally:
            self._backend.encode_special_tokens = True
        if self._first_difference(plain, theirs) is not None and self.encoder.name != TokenizersEncoder.name:
            self.encode_by_tokenizer()
        row = self._first_difference(plain, theirs)
        if row is not None:
            raise BadRecipe(
                f"field 'chat_template': the ids of {self.name} differ from the tokenizer's own for a conversation "
                f"that begins {plain[row].contents[0][:60]!r}",
                "Report this base and template; until then choose another template",
            )
        if self._backend.normalizer is None:  # otherwise ids do not give back the text as it was
            for conversation, (_, labels) in zip(plain, self.encode(plain).rows(), strict=True):
                self._prove_trained(conversation, self.decode([label for label in labels if label != IGNORED]))
        return len(plain)

    def encode_by_tokenizer(self) -> None:
        """From now on, the tokenizer itself takes the place of the fast encoder."""
        self.encoder = TokenizersEncoder(self._backend)
        self._shapes.clear()

    def asked_otherwise(self, conversations: list[Conversation]) -> int:
        """How many of the conversations have other ids before their last answer than the prompt of its turns has, or do
        not train the answer's first id.

        Tokenizers that join a line break with what follows it make such ones; the loss does not show it, and answers
        may be bad.
        """
        plain = [c for c in conversations if c.tools is None and c.roles[-2:] == ("user", "assistant")]
        asked = self._encode([Conversation.of(c.messages[:-1]) for c in plain], generation_prompt=True)
        found = 0
        for (ids, labels), (prompt, _) in zip(self.encode(plain).rows(), asked.rows(), strict=True):
            found += ids[: len(prompt)] != prompt or labels[len(prompt)] == IGNORED
        return found

    def _prove_trained(self, conversation: Conversation, trained: str) -> None:
        at = 0
        for role, content in zip(conversation.roles, conversation.contents, strict=True):
            if role == "assistant":
                at = trained.find(content.strip(), at)
                if at < 0:
                    raise BadRecipe(
                        f"field 'chat_template': with {self.name} the loss does not count all of an answer that begins "
                        f"{content[:60]!r}",
                        "Report this base and template; until then choose another template",
                    )
                at += len(content.strip())

    def _first_difference(self, conversations: list[Conversation], theirs: list[list[int]]) -> int | None:
        ours = [ids for ids, _ in self.encode(conversations).rows()]
        return next((row for row, ids in enumerate(theirs) if ids != ours[row]), None)


class _Pool:
    """Fixed stretches of tokens, each kept once."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[tuple[int, ...], tuple[bool, ...]], int] = {}

    def number(self, stretch: tuple[tuple[int, ...], tuple[bool, ...]]) -> int:
        return self._numbers.setdefault(stretch, len(self._numbers))

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids and marks of all stretches, flat."""
        ids = [id for stretch, _ in self._numbers for id in stretch]
        return np.array(ids, np.int32), np.array([mark for _, marks in self._numbers for mark in marks], bool)

    def places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the stretches begin in the arrays, and their lengths."""
        lengths = np.array([len(stretch) for stretch, _ in self._numbers], np.int64)
        return (lengths.cumsum() - lengths)[numbers], lengths[numbers]


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return orjson.loads(file.read_bytes()) if file.is_file() else {}


def _named_tokens(folder: Path) -> dict[str, Any]:
    """The texts of bos_token, eos_token and so on, from either of the two files in which they stand."""
    older = folder / "special_tokens_map.json"
    settings = {**(orjson.loads(older.read_bytes()) if older.is_file() else {}), **_config(folder)}
    found = {name: settings[name] for name in SPECIAL if settings.get(name)}
    return {name: token["content"] if isinstance(token, dict) else token for name, token in found.items()}


def template_source(folder: Path, recipe: Recipe) -> str:
    """The jinja source of the recipe's chat template.

    Args:
        folder: where the tokenizer's files are; looked at only for `chat_template: tokenizer`.

    Raises:
        NotFound: the tokenizer has no chat template.
    """
    if recipe.chat_template != "tokenizer":
        return (PROJECT / "include" / "templates" / f"{recipe.chat_template}.jinja").read_text("utf-8")
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text("utf-8")
    source = _config(folder).get("chat_template")
    if isinstance(source, list):  # several, by name
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if not source:
        raise NotFound(
            f"field 'chat_template': the tokenizer of {recipe.base_model} has no chat template",
            "Name one: llama-3.1, llama-3, chatml, alpaca or vicuna",
        )
    return str(source)


def renders_tools(template: str) -> bool:
    """Whether a template writes both the tools that may be called and what they answered."""
    names_tools, names_role = re.search(r"\btools\b", template), re.search(r"""['"](tool|ipython)['"]""", template)
    return names_tools is not None and names_role is not None
