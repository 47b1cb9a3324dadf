"""The chat template: its jinja source, its rendering, and its pieces for one order of roles.

The pieces come from one rendering with placeholders as contents: the text between the placeholders is the template's
own, and is the same for every conversation with this order of roles.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import orjson

from include.chat.tokenizer import CONTROL_TOKEN, tokenizer_config
from include.data.conversation import Message
from include.errors import BadData, BadRecipe, NotFound
from include.paths import PROJECT

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
        text: the template's own text; "" for a special token and for a content.
        turn: the index of the turn whose content this is, or None.
        calls_of: the index of the turn whose tool calls this is a part of, or None.
        transform: the change to the content, a key of `CONTENT_TRANSFORMS`.
        in_loss: whether the loss counts the piece: an assistant turn's content and tool calls, and the token that ends
            the turn.
        ends_turn: whether this token ends an assistant turn.
    """

    token: int | None = None
    text: str = ""
    turn: int | None = None
    calls_of: int | None = None
    transform: str = "unchanged"
    in_loss: bool = False
    ends_turn: bool = False


Calls = tuple[tuple[int, str, bool], ...]  # the turn, its tool calls as JSON, whether the turn has a text, too


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
            BadData: the template does not accept this order of roles.
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
        except TemplateError as error:
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
        self, roles: tuple[str, ...], tools: str | None = None, generation_prompt: bool = False, calls: Calls = ()
    ) -> list[Piece]:
        """Return the template's pieces for one order of roles, in the order of the rendered text.

        Args:
            calls: the tool calls of turns.

        Raises:
            BadData: the template does not accept the order of roles, or does not write each turn once and in order, or
                does not write the tool calls in the place of an answer.
            BadRecipe: the template changes contents in another way than `CONTENT_TRANSFORMS`, or writes no token at
                the end of an assistant turn.
        """
        rendered, transforms = self._render_placeholders(roles, tools, generation_prompt)
        texts = self._split(rendered, roles, range(len(roles)))
        called: dict[int, str] = {}
        if calls:
            texts, called = self._split_calls(texts, roles, tools, generation_prompt, calls)
        silent = {turn for turn, _, has_text in calls if not has_text}
        pieces = self._template_text(texts[0], False)
        for turn, role in enumerate(roles):
            answers = role == "assistant"
            if turn not in silent:
                pieces.append(Piece(turn=turn, transform=transforms[role], in_loss=answers))
            if turn in called:
                made = self._template_text(called[turn], False)
                pieces += [replace(piece, calls_of=turn, in_loss=True) for piece in made]
            pieces += self._template_text(texts[turn + 1], answers)
        if sum(piece.ends_turn for piece in pieces) < roles.count("assistant"):
            raise BadRecipe(
                f"field 'chat_template': {self.name} writes no token at the end of an assistant turn; a model trained "
                "with it would not learn to stop",
                "Choose another chat_template",
            )
        return pieces

    def _split(self, rendered: str, roles: tuple[str, ...], turns: Sequence[int]) -> list[str]:
        """Return the texts before, between and after the placeholders of turns, which must be there in this order."""
        parts = re.split("(" + PLACEHOLDER.format(r"\d+") + ")", rendered)
        if parts[1::2] != [PLACEHOLDER.format(turn) for turn in turns]:
            raise BadData(
                f"the chat template {self.name} does not write the turns {', '.join(roles)} once each and in order",
                "Choose another chat_template, or correct the rows",
            )
        return parts[::2]

    def _split_calls(
        self, texts: list[str], roles: tuple[str, ...], tools: str | None, generation_prompt: bool, calls: Calls
    ) -> tuple[list[str], dict[int, str]]:
        """Find the tool calls in the rendered conversation: what the template writes in the place of an answer.

        Args:
            texts: the template's texts around the contents of the same roles without tool calls.

        Returns:
            The texts around contents and calls, and the text of the calls by turn.
        """
        rendered, _ = self._render_placeholders(roles, tools, generation_prompt, calls)
        silent = {turn for turn, _, has_text in calls if not has_text}
        written = [turn for turn in range(len(roles)) if turn not in silent]
        around = dict(zip([-1, *written], self._split(rendered, roles, written), strict=True))  # by the turn before
        found, called = list(texts), {}
        for turn, _, has_text in calls:
            text, header, footer = (
                around[turn if has_text else turn - 1],
                "" if has_text else texts[turn],
                texts[turn + 1],
            )
            # some templates write a space before an answer, and none before a call
            header = header if text.startswith(header) else header.rstrip(" ")
            called[turn] = text[len(header) : len(text) - len(footer)]
            if not has_text:
                found[turn] = header
        contents = ["" if turn in silent else PLACEHOLDER.format(turn) for turn in range(len(roles))]
        parts = [f"{content}{called.get(turn, '')}{found[turn + 1]}" for turn, content in enumerate(contents)]
        if not all(called.values()) or rendered != found[0] + "".join(parts):
            raise BadData(
                f"the chat template {self.name} does not write the tool calls in the place of an answer",
                "Choose another chat_template, or correct the rows",
            )
        return found, called

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
        self, roles: tuple[str, ...], tools: str | None, generation_prompt: bool, calls: Calls = ()
    ) -> tuple[str, dict[str, str]]:
        """Render with a placeholder as each content, and find out how the template changes each role's contents.

        Returns:
            The rendered text with only the placeholder where a content stands, without the change; and for each role
            the key of its change in `CONTENT_TRANSFORMS`, or "" if the template does not write the role's contents.
        """

        def probe(form: str) -> str:
            contents = [form.replace("{}", PLACEHOLDER.format(i)) for i in range(len(roles))]
            messages: list[Message] = [
                {"role": role, "content": content} for role, content in zip(roles, contents, strict=True)
            ]
            for turn, made, has_text in calls:
                messages[turn].update({} if has_text else {"content": ""}, tool_calls=orjson.loads(made))
            return self.render(messages, generation_prompt, tools)

        rendered, padded = probe("{}"), probe(PADDED_PROBE)
        transforms: dict[str, str] = {}
        silent = {turn for turn, _, has_text in calls if not has_text}
        for i, role in enumerate(roles):
            if i in silent:
                transforms.setdefault(role, "")
                continue
            content = PADDED_PROBE.replace("{}", PLACEHOLDER.format(i))
            transforms[role] = next((n for n, change in CONTENT_TRANSFORMS.items() if change(content) in padded), "")
        written = [
            (PLACEHOLDER.format(i), transforms[role])
            for i, role in enumerate(roles)
            if transforms[role] and i not in silent
        ]
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


def renders_tools(source: str) -> bool:
    """Return whether a template writes both the tools that may be called and the tools' answers.

    Args:
        source: the jinja source.
    """
    names_tools, names_role = re.search(r"\btools\b", source), re.search(r"""['"](tool|ipython)['"]""", source)
    return names_tools is not None and names_role is not None


def renders_calls(source: str) -> bool:
    """Return whether a template writes tools, their answers and the `tool_calls` of turns.

    Args:
        source: the jinja source.
    """
    return renders_tools(source) and "tool_calls" in source
