"""The chat template: its jinja source, its rendering, and its pieces for one order of roles.

The pieces come from one rendering with placeholders as contents: the text between the placeholders is the template's
own, and is the same for every conversation with this order of roles.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import Any

import orjson

from include.chat.tokenizer import CONTROL_TOKEN, NAMED_TOKENS, tokenizer_config
from include.data.conversation import Conversation, Message
from include.errors import BadData, BadRecipe, NotFound
from include.paths import PROJECT

Calls = tuple[tuple[int, str], ...]  # see `Conversation.calls`
SHIPPED_TEMPLATES = PROJECT / "include" / "templates"
PLACEHOLDER = "\ue000{}\ue001"  # private-use characters, which no template and no ordinary text contains
# contents with placeholders that show how a template changes contents: by trimming, by quoting, by dropping thoughts
PADDED_PROBE, THINKING_PROBE = ' "\n{}\n ', "<think>\n{}</think>\n{}"
RENDERING_DATE = date(2024, 7, 26)  # for templates that write the date: ids must not depend on the day of the run

# the changes to a turn's content that Retune reproduces, by name
CONTENT_TRANSFORMS: dict[str, Callable[[str], str]] = {
    "unchanged": lambda text: text,
    "trimmed": str.strip,
    "json": lambda text: json.dumps(text, ensure_ascii=False),  # as `tojson` of transformers
}


@dataclass(frozen=True)
class Piece:
    """A part of a rendered conversation: a special token, a text of the template, or a turn's content.

    Attributes:
        token: the id of the special token, or None.
        text: the template's own text, or that of calls; "" for a special token and for a content.
        turn: the index of the turn whose content this is, or None. With a token or a text, it is a part of the turn's
            calls of tools, as the template writes them.
        transform: the change to the content, a key of `CONTENT_TRANSFORMS`.
        in_loss: whether the loss counts the piece: an assistant turn's content, or the token that ends the turn.
        ends_turn: whether this token ends an assistant turn.
    """

    token: int | None = None
    text: str = ""
    turn: int | None = None
    transform: str = "unchanged"
    in_loss: bool = False
    ends_turn: bool = False


class ChatTemplate:
    """A chat template together with the special tokens of one tokenizer.

    Args:
        name: the template's name in messages.
        source: the jinja source.
        named_tokens: texts of `bos_token`, `eos_token` and so on, which the template may write.
        special_ids: ids of the tokenizer's special tokens, by their texts.
    """

    def __init__(self, name: str, source: str, named_tokens: Mapping[str, Any], special_ids: Mapping[str, int]):
        self.name, self.source = name, source
        self._named_tokens, self._special_ids = named_tokens, special_ids

    def render(self, messages: list[Message], generation_prompt: bool = False, tools: str | None = None) -> str:
        """Return the conversation as text, rendered by transformers.

        Args:
            messages: the turns, as role and content.
            generation_prompt: whether the header of an assistant turn follows the last turn.
            tools: the tools that the assistant may call, as a JSON list.

        Raises:
            BadData: the template does not accept this order of roles, or these calls of tools.
        """
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered = render_jinja_template(
                conversations=[messages],
                chat_template=self.source,
                tools=orjson.loads(tools) if tools else None,
                add_generation_prompt=generation_prompt,
                strftime_now=RENDERING_DATE.strftime,
                **self._named_tokens,
            )
        except (TemplateError, TypeError) as error:  # TypeError: of a template that takes arguments as text only
            roles = ", ".join(message["role"] for message in messages)
            raise BadData(
                f"the chat template {self.name} does not accept a conversation with the roles {roles} ({error})",
                "Choose another chat_template, or correct the rows",
            ) from error
        return str(rendered[0][0])

    def missing_tokens(self) -> list[str]:
        """Return the special tokens that the template writes and the vocabulary does not have, sorted."""
        text = self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        return sorted({token for token in re.findall(CONTROL_TOKEN, text) if token not in self._special_ids})

    def pieces(
        self,
        roles: tuple[str, ...],
        tools: str | None = None,
        generation_prompt: bool = False,
        calls: Calls = (),
        silent: tuple[int, ...] = (),
    ) -> list[Piece]:
        """Return the template's pieces for one order of roles, in the order of the rendered text.

        Args:
            calls: the calls of tools, see `Conversation.calls`.
            silent: the indices of the turns that have calls and no text.

        Raises:
            BadData: the template does not accept the order of roles, does not write each turn once and in order, or
                does not write the calls in the place of a turn's text.
            BadRecipe: the template changes contents in another way than `CONTENT_TRANSFORMS`, or writes no token at
                the end of an assistant turn.
        """
        rendered, transforms = self._render_placeholders(roles, tools, generation_prompt, calls, silent)
        placeholders = [PLACEHOLDER.format(i) for i in range(len(roles))]
        pieces: list[Piece] = []
        called: dict[int, str] = {}
        if calls:
            plain = self._render_placeholders(roles, tools, generation_prompt)[0]
            called = self._written_calls(rendered, plain, calls, silent)
            rendered = plain
        after_assistant = False
        any_placeholder = PLACEHOLDER.format(r"\d+")
        for part in re.split(f"({any_placeholder})", rendered):
            if part in placeholders:
                turn = placeholders.index(part)
                after_assistant = roles[turn] == "assistant"
                if turn in called:
                    pieces += self._call_pieces(called[turn], turn, dict(calls)[turn], transforms.get("assistant", ""))
                    continue
                pieces.append(Piece(turn=turn, transform=transforms[roles[turn]], in_loss=after_assistant))
                continue
            pieces += self._template_text(part, after_assistant)
            after_assistant = False
        if [turn for turn, _ in groupby(p.turn for p in pieces if p.turn is not None)] != list(range(len(roles))):
            raise BadData(
                f"the chat template {self.name} does not write the turns {', '.join(roles)} once each and in order",
                "Choose another chat_template, or correct the rows",
            )
        if sum(piece.ends_turn for piece in pieces) < roles.count("assistant"):
            raise BadRecipe(
                f"field 'chat_template': {self.name} writes no token at the end of an assistant turn; a model trained "
                "with it would not learn to stop",
                "Choose another chat_template",
            )
        return pieces

    def _written_calls(self, rendered: str, plain: str, calls: Calls, silent: tuple[int, ...]) -> dict[int, str]:
        """Return what the template writes in each turn with calls, where it writes the text of a turn without calls.

        Args:
            rendered: the conversation with placeholders and the calls.
            plain: the same conversation without the calls.
        """
        form = re.escape(plain)
        for turn, _ in calls:
            form = form.replace(re.escape(PLACEHOLDER.format(turn)), f"(?P<turn{turn}>.+?)")
        found = re.fullmatch(form, rendered, re.DOTALL)
        written = {turn: found[f"turn{turn}"] for turn, _ in calls} if found else {}
        for turn, made in calls:
            names = [call["function"]["name"] for call in orjson.loads(made)]
            text = written.get(turn, "")
            says_text = text.count(PLACEHOLDER.format(turn)) == (turn not in silent)
            if not found or not says_text or not all(name in text for name in names):
                raise BadData(
                    f"the chat template {self.name} does not write the tool calls of turn {turn + 1}"
                    + ("" if turn in silent else ", or not the text beside them"),
                    "Choose another chat_template, or write the calls as the text of function_call turns",
                )
        return written

    def _call_pieces(self, written: str, turn: int, calls: str, transform: str) -> list[Piece]:
        """Return the pieces of a turn with calls, all in the loss; special tokens that the calls contain are text."""
        pieces = []
        placeholder = PLACEHOLDER.format(turn)
        for part in re.split(f"({re.escape(placeholder)}|{CONTROL_TOKEN})", written):
            if part == placeholder:
                pieces.append(Piece(turn=turn, transform=transform, in_loss=True))
            elif part:
                token = self._special_ids.get(part) if part not in calls else None
                pieces.append(Piece(token, "" if token is not None else part, turn, in_loss=True))
        return pieces

    def _template_text(self, text: str, after_assistant: bool) -> list[Piece]:
        """Split the template's own text at special tokens. The first one after an assistant's content ends its turn."""
        pieces: list[Piece] = []
        turn_is_open = after_assistant
        for part in re.split(f"({CONTROL_TOKEN})", text):
            if not part:
                continue
            control = re.fullmatch(CONTROL_TOKEN, part) is not None
            ends = control and turn_is_open and not "".join(piece.text for piece in pieces).strip()
            token = self._special_ids.get(part)
            pieces.append(Piece(token, "" if token is not None else part, in_loss=ends, ends_turn=ends))
            turn_is_open = turn_is_open and not control
        return pieces

    def _render_placeholders(
        self,
        roles: tuple[str, ...],
        tools: str | None,
        generation_prompt: bool,
        calls: Calls = (),
        silent: tuple[int, ...] = (),
    ) -> tuple[str, dict[str, str]]:
        """Render with a placeholder as each content, and find out how the template changes each role's contents.

        Returns:
            The rendered text with only the placeholder where a content stands, without the change; and for each role
            the key of its change in `CONTENT_TRANSFORMS`, or "" if the template does not write the role's contents.
        """

        def probe(form: str) -> str:
            contents = ["" if i in silent else form.replace("{}", PLACEHOLDER.format(i)) for i in range(len(roles))]
            return self.render(Conversation(roles, contents, calls=calls).messages, generation_prompt, tools)

        rendered, padded = probe("{}"), probe(PADDED_PROBE)
        transforms: dict[str, str] = {}
        turns = [(i, role) for i, role in enumerate(roles) if i not in silent]
        for i, role in turns:
            content = PADDED_PROBE.replace("{}", PLACEHOLDER.format(i))
            transforms[role] = next((n for n, change in CONTENT_TRANSFORMS.items() if change(content) in padded), "")
        written = [(PLACEHOLDER.format(i), transforms[role]) for i, role in turns if transforms[role]]
        for placeholder, transform in written:
            rendered = rendered.replace(CONTENT_TRANSFORMS[transform](placeholder), placeholder)
        for form in (PADDED_PROBE, THINKING_PROBE):
            expected = rendered
            for placeholder, transform in written:
                content = form.replace("{}", placeholder)
                expected = expected.replace(placeholder, CONTENT_TRANSFORMS[transform](content))
            if expected != probe(form):
                raise BadRecipe(
                    f"field 'chat_template': the template {self.name} drops or changes parts of the turns' contents",
                    "Choose a template that writes the contents unchanged",
                )
        return rendered, transforms


def template_source(folder: Path, chat_template: str, base_name: str) -> str:
    """Return the jinja source of a chat template.

    Args:
        folder: the folder with the tokenizer's files; read only for `chat_template="tokenizer"`.
        chat_template: the name of a shipped template, or "tokenizer" for the tokenizer's own.
        base_name: the base model's name in messages.

    Raises:
        NotFound: the tokenizer has no chat template.
    """
    if chat_template != "tokenizer":
        return (SHIPPED_TEMPLATES / f"{chat_template}.jinja").read_text("utf-8")
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text("utf-8")
    source = tokenizer_config(folder).get("chat_template")
    if isinstance(source, list):  # several templates, by name
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if not source:
        shipped = ", ".join(sorted(file.stem for file in SHIPPED_TEMPLATES.glob("*.jinja")))
        raise NotFound(
            f"field 'chat_template': the tokenizer of {base_name} has no chat template",
            f"Choose a shipped template: {shipped}",
        )
    return str(source)


def renders_calls(source: str) -> bool:
    """Return whether a template reads calls of tools.

    Args:
        source: the jinja source.
    """
    return re.search(r"\btool_calls\b", source) is not None


def call_problem(source: str, name: str, conversation: Conversation) -> str | None:
    """Return why a template does not render a conversation's calls of tools, as a sentence; None if it does.

    Args:
        source: the jinja source.
        name: the template's name in messages.
        conversation: has calls.
    """
    named = {token: f"<|{token}|>" for token in NAMED_TOKENS}  # the ids do not matter here
    template, roles, tools = ChatTemplate(name, source, named, {}), conversation.roles, conversation.tools
    try:
        template.pieces(roles, tools, calls=conversation.calls, silent=conversation.silent)
    except (BadData, BadRecipe) as error:
        try:
            template.pieces(roles, tools)
        except (BadData, BadRecipe):
            return None  # it is not about the calls; the stage `template` says what it is
        return error.what
    return None


def renders_tools(source: str) -> bool:
    """Return whether a template writes both the tools that may be called and the tools' answers.

    Args:
        source: the jinja source.
    """
    names_tools, names_role = re.search(r"\btools\b", source), re.search(r"""['"](tool|ipython)['"]""", source)
    return names_tools is not None and names_role is not None
