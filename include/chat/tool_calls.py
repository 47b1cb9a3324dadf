"""Check that a chat template can write the tool calls of a conversation, before any conversation is encoded."""

from __future__ import annotations

import re
from pathlib import Path

import orjson

from include.chat.conversation_encoder import calls_of
from include.chat.template import ChatTemplate
from include.chat.tokenizer import CONTROL_TOKEN, named_tokens
from include.data.conversation import Conversation
from include.errors import RetuneError

NAMED_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}  # of a shipped template: the check needs no base's own ones


def calls_template(name: str, source: str, folder: Path | None) -> ChatTemplate:
    """Return a chat template for `call_fault`.

    Args:
        folder: the folder with the tokenizer's files, or None for a shipped template.
    """
    return ChatTemplate(name, source, named_tokens(folder) if folder else NAMED_TOKENS, {})


def call_fault(template: ChatTemplate, conversation: Conversation) -> str:
    """Return why a chat template cannot write the tool calls of a conversation; "" if it can."""
    for turn, calls in conversation.calls:
        if found := re.search(CONTROL_TOKEN, orjson.dumps(orjson.loads(calls)).decode()):
            return f"turn {turn + 1}: the tool call contains {found.group()}, which would become a special token"
    try:
        template.pieces(conversation.roles, conversation.tools, calls=calls_of(conversation))
    except RetuneError as error:
        return error.what
    return ""
