"""Check that a chat template can write the tool calls of a conversation, before any conversation is encoded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from include.chat.sequences import sequences
from include.chat.template import ChatTemplate, Form
from include.chat.tokenizer import LIKE_CONTROL_TOKEN, AddedTokens, ChatTokenizer
from include.data.conversation import Conversation
from include.errors import RetuneError, TooCostly
from include.recipe.model import template_name

NAMED_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}  # of a shipped template: the check needs no base's own ones


def calls_template(name: str, source: str, folder: Path | None, variables: Mapping[str, Any]) -> ChatTemplate:
    """Return a chat template for `call_fault`.

    Args:
        name: the recipe's `chat_template`.
        folder: the folder with the tokenizer's files, or None for a shipped template.
        variables: the recipe's `chat_template_kwargs`.
    """
    name = template_name(name)
    if folder is None:
        return ChatTemplate(name, source, NAMED_TOKENS, AddedTokens(), variables)
    tokenizer = ChatTokenizer(folder, name)
    return ChatTemplate(name, source, tokenizer.named_tokens, tokenizer.added, variables)


def tools_fault(template: ChatTemplate, conversation: Conversation) -> str:
    """Return why a chat template cannot write the list of tools of a conversation; "" if it can."""
    found = _control_token_in(template, conversation.tools) if conversation.tools else None
    return f"the list of tools contains {found}, which would become a special token" if found else ""


def _control_token_in(template: ChatTemplate, written: str) -> str | None:
    """Return the first control token in a JSON text; without a vocabulary also a text with the form of one."""
    plain = orjson.dumps(orjson.loads(written)).decode()
    others = [] if template.added.ids else re.findall(LIKE_CONTROL_TOKEN, plain)
    return next(iter([*template.control_tokens_in(plain), *others]), None)


def call_fault(template: ChatTemplate, conversation: Conversation) -> str:
    """Return why a chat template cannot write the tool calls of a conversation; "" if it can."""
    for turn, calls in conversation.calls:
        if found := _control_token_in(template, calls):
            return f"turn {turn + 1}: the tool call contains {found}, which would become a special token"
    try:
        sequences(template, Form.of(conversation), [turn for turn, _ in conversation.calls])
    except TooCostly:  # each row would cost as much
        raise
    except RetuneError as error:
        return error.what
    return ""
