"""The chat template: its jinja source, and what it writes for one form of conversation.

A template is rendered with placeholders as contents. The text between the placeholders is the template's own, and is
the same for every conversation of this form, so that it is rendered and encoded once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from include.chat.rendering import Refused, render, render_limited
from include.chat.tokenizer import LIKE_CONTROL_TOKEN, AddedTokens, tokenizer_config
from include.data.conversation import END_THINK, THINK, Conversation, Message
from include.errors import BadData, BadRecipe, NotFound
from include.paths import PROJECT
from include.recipe.model import SHIPPED_TEMPLATES, TOKENIZER, is_inline

TEMPLATE_FOLDER = PROJECT / "include" / "templates"
# private-use characters, which no template and no ordinary text contains, around the number of a turn, `c` for its
# content or `t` for its thoughts, and in `ChatTemplate.write` the number of the change to it
PLACEHOLDER = re.compile("\ue000(\\d+)([ct])(\\d*)\ue001")
PROBE = '\n\n "&<\\{}>" \n\n'  # around a placeholder: shows how a template changes contents

# the changes to a content that Retune reproduces
STRIPS: tuple[Callable[[str], str], ...] = (
    lambda text: text, str.strip, lambda text: text.strip("\n"), str.lstrip, str.rstrip,
    lambda text: text.lstrip("\n"), lambda text: text.rstrip("\n"),
)  # fmt: skip
CONTENT_TRANSFORMS = (*STRIPS, lambda text: json.dumps(text, ensure_ascii=False)[1:-1])  # as `tojson` of transformers

# under which names templates read thoughts; None: they stand before the content, as text
THOUGHT_KEYS = (("reasoning_content", "reasoning", "thinking"), ("reasoning_content",), ("thinking",), None)
TEXT_METHODS = ("split", "startswith", "endswith", "replace")


class Form(NamedTuple):
    """What conversations have in common for which a template writes the same text around their contents.

    Attributes:
        roles: the role of each turn.
        tools: JSON list of the tools that the assistant may call, or None.
        calls: of each turn that calls tools its index, its `tool_calls` as JSON, and whether it has a content, too.
        thoughts: the indices of the turns with thoughts.
    """

    roles: tuple[str, ...]
    tools: str | None = None
    calls: tuple[tuple[int, str, bool], ...] = ()
    thoughts: tuple[int, ...] = ()

    @classmethod
    def of(cls, conversation: Conversation) -> Form:
        """Return the form of a conversation."""
        calls = tuple((turn, made, bool(conversation.contents[turn])) for turn, made in conversation.calls)
        return cls(conversation.roles, conversation.tools, calls, tuple(turn for turn, _ in conversation.thoughts))

    def results_of(self, turn: int) -> list[int]:
        """Return the indices of the tool turns that directly follow a turn."""
        return [i for i in range(turn + 1, len(self.roles)) if {*self.roles[turn + 1 : i + 1]} == {"tool"}]


class Style(NamedTuple):
    """How thoughts and tool calls are handed to a template.

    Attributes:
        thought_keys: an entry of `THOUGHT_KEYS`.
        arguments_as_text: whether the arguments of a call are JSON text, as in the API of OpenAI, or an object.
        absent_content: the content of a turn that only calls tools.
    """

    thought_keys: tuple[str, ...] | None
    arguments_as_text: bool
    absent_content: str | None


class Unwritten(BadData):
    """The template does not write a part of a conversation."""


@dataclass
class ChatTemplate:
    """A chat template together with the added tokens of one tokenizer.

    Args:
        name: the template's name in messages.
        source: the jinja source.
        named_tokens: texts of `bos_token`, `eos_token` and so on, which the template may write.
        added: the tokenizer's added tokens.
        variables: values for variables of the template, such as `enable_thinking`.
    """

    name: str
    source: str
    named_tokens: Mapping[str, Any]
    added: AddedTokens
    variables: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._style: dict[tuple[bool, bool], Style] = {}  # the last one that worked

    def render(self, messages: list[Message], generation_prompt: bool = False, tools: str | None = None) -> str:
        """Return the conversation as text, rendered by transformers.

        Args:
            messages: the turns, as role and content.
            generation_prompt: whether the header of an assistant turn follows the last turn.
            tools: the tools that the assistant may call, as a JSON list.

        Raises:
            BadData: the template does not accept this order of roles.
        """
        arguments = {
            **self.named_tokens, **self.variables,
            "conversations": [messages], "tools": orjson.loads(tools) if tools else None,
            "add_generation_prompt": generation_prompt,
        }  # fmt: skip
        try:
            return (render if self.name in SHIPPED_TEMPLATES else render_limited)(self.name, self.source, arguments)
        except Refused as error:
            roles = ", ".join(message["role"] for message in messages)
            raise Unwritten(
                f"the chat template {self.name} does not accept a conversation with the roles {roles} ({error})",
                "Choose another chat_template, or correct the rows",
            ) from error

    @cached_property
    def missing(self) -> list[str]:
        """Return the control tokens that the template writes and the vocabulary does not have, sorted.

        Only their form shows them, since no vocabulary lists them.
        """
        text = self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        return sorted({token for token in re.findall(LIKE_CONTROL_TOKEN, text) if token not in self.added.ids})

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """Return the texts that are control tokens in this template: special tokens, and added ones that it names."""
        named = (token for token in self.added.ids if token in self.added.special or self._names(token))
        return (*named, *self.missing)

    def _names(self, token: str) -> bool:
        return not token.isspace() and token in self.source

    def control_tokens_in(self, text: str) -> list[str]:
        """Return the control tokens in a text, in their order."""
        found = [token for token in self.control_tokens if token in text]
        return re.findall("|".join(map(re.escape, sorted(found, key=len, reverse=True))), text) if found else []

    @cached_property
    def _tree(self) -> Any:
        """The template as jinja reads it; None if it cannot, which the first rendering tells."""
        from jinja2 import Environment, TemplateError

        environment = Environment(extensions=["jinja2.ext.loopcontrols"])
        try:
            return environment.parse(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", self.source))
        except (TemplateError, RecursionError):
            return None

    @cached_property
    def unread_variables(self) -> list[str]:
        """Return the names in `chat_template_kwargs` that the template does not read."""
        from jinja2.meta import find_undeclared_variables

        return [] if self._tree is None else sorted({*self.variables} - find_undeclared_variables(self._tree))

    @cached_property
    def markup(self) -> tuple[str, ...]:
        """Return the texts that the template looks for in contents, such as `</think>`: it changes these contents."""
        from jinja2 import nodes

        found: set[str] = set()
        if (tree := self._tree) is None:
            return ()
        for compare in tree.find_all(nodes.Compare):
            if any(operand.op in ("in", "notin") for operand in compare.ops) and isinstance(compare.expr, nodes.Const):
                found.add(compare.expr.value)
        for call in tree.find_all(nodes.Call):
            if isinstance(call.node, nodes.Getattr) and call.node.attr in (
                "split",
                "startswith",
                "endswith",
                "replace",
            ):
                found |= {constant.value for constant in call.args if isinstance(constant, nodes.Const)}
        return tuple(sorted(text for text in found if isinstance(text, str) and re.search(r"[<>\[\]|]", text)))

    def styles(self, form: Form) -> list[Style]:
        """Return the styles in which thoughts and calls of a form can be handed over, the most probable one first."""
        known = self._style.get((bool(form.thoughts), bool(form.calls)))
        all_styles = [
            Style(*style)
            for style in product(
                THOUGHT_KEYS if form.thoughts else THOUGHT_KEYS[:1],
                (False, True) if form.calls else (False,),
                ("", None) if form.calls else ("",),
            )
        ]
        return all_styles if known is None else [known, *(style for style in all_styles if style != known)]

    def keep_style(self, form: Form, style: Style) -> None:
        """Try this style first from now on."""
        self._style[bool(form.thoughts), bool(form.calls)] = style

    def messages(
        self, form: Form, style: Style, contents: Callable[[int], str], thoughts: Callable[[int], str]
    ) -> list[Message]:
        """Return messages of a form, as the template takes them.

        Args:
            contents, thoughts: return the text of a turn.
        """
        made: list[Message] = [{"role": role, "content": contents(turn)} for turn, role in enumerate(form.roles)]
        for turn, calls, has_content in form.calls:
            made[turn]["tool_calls"] = orjson.loads(calls)
            for result, call in zip(form.results_of(turn), made[turn]["tool_calls"], strict=False):
                made[result].update(name=call.get("function", call)["name"], tool_call_id=call.get("id", ""))
            if style.arguments_as_text:
                for call in made[turn]["tool_calls"]:
                    function = call.get("function", call)
                    function["arguments"] = json.dumps(function.get("arguments"), ensure_ascii=False)
            if not has_content:
                made[turn]["content"] = style.absent_content
        for turn in form.thoughts:
            if style.thought_keys is None:
                made[turn]["content"] = with_thoughts(thoughts(turn), made[turn]["content"] or "")
            else:
                made[turn].update(dict.fromkeys(style.thought_keys, thoughts(turn)))
        return made

    def messages_of(self, conversation: Conversation) -> list[Message]:
        """Return a conversation's messages in the style in which the template writes it."""
        form, thoughts = Form.of(conversation), dict(conversation.thoughts)
        return self.messages(form, self.styles(form)[0], conversation.contents.__getitem__, thoughts.__getitem__)

    def write(self, form: Form, style: Style, turns: int, generation_prompt: bool) -> str:
        """Return what the template writes for the first turns, with a placeholder where a content or thought stands.

        The last number of a placeholder says how the template changes the content (index in `CONTENT_TRANSFORMS`).

        Raises:
            BadData: the template does not accept the turns.
            BadRecipe: it changes contents in another way.
        """

        def rendered(text: str) -> str:
            messages = self.messages(
                form, style, lambda turn: text.replace("{}", f"\ue000{turn}c\ue001"),
                lambda turn: text.replace("{}", f"\ue000{turn}t\ue001"),
            )  # fmt: skip
            return self.render(messages[:turns], generation_prompt, form.tools)

        plain, probed, parts, at = rendered("{}"), rendered(PROBE), list[str](), 0
        pieces = re.split("(\ue000\\d+[ct]\ue001)", plain)
        for number in range(1, len(pieces), 2):
            before, placeholder, after = pieces[number - 1 : number + 2]
            at += len(before) if number == 1 else 0
            probe = PROBE.replace("{}", placeholder)
            for index, change in enumerate(CONTENT_TRANSFORMS):
                if probed.startswith(change(probe) + after, at):
                    parts += [before if number == 1 else "", f"{placeholder[:-1]}{index}\ue001", after]
                    at += len(change(probe) + after)
                    break
            else:
                at = -1
                break
        if len(pieces) == 1:
            parts, at = [plain], len(plain)
        if at != len(probed) or not probed.startswith(pieces[0]):
            raise BadRecipe(
                f"field 'chat_template': the template {self.name} drops or changes parts of the turns' contents",
                "Choose a template that writes the contents unchanged",
            )
        return "".join(parts)


def thoughts_of(turn: int) -> str:
    """Return the placeholder for a turn's thoughts, unchanged."""
    return f"\ue000{turn}t0\ue001"


def with_thoughts(thoughts: str, content: str) -> str:
    """Return a content with its thoughts before it, as DeepSeek R1 writes them."""
    return f"{THINK}\n{thoughts}\n{END_THINK}\n\n{content}"


def template_source(folder: Path, chat_template: str, base_name: str) -> str:
    """Return the jinja source of a chat template.

    Args:
        folder: the folder with the tokenizer's files; read only for `chat_template="tokenizer"`.
        chat_template: the name of a shipped template, jinja text, or "tokenizer" for the tokenizer's own.
        base_name: the base model's name in messages.

    Raises:
        NotFound: the tokenizer has no chat template.
    """
    if is_inline(chat_template):
        return chat_template
    if chat_template != TOKENIZER:
        return (TEMPLATE_FOLDER / f"{chat_template}.jinja").read_text("utf-8")
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text("utf-8")
    source = tokenizer_config(folder).get("chat_template")
    if isinstance(source, list):  # several templates, by name
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if not source:
        raise NotFound(
            f"field 'chat_template': the tokenizer of {base_name} has no chat template",
            f"Choose a shipped template: {', '.join(sorted(SHIPPED_TEMPLATES))}",
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
