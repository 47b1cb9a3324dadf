"""Splitting of conversations that are longer than the model's context."""

from __future__ import annotations

from dataclasses import replace

from include.chat.chat_format import ChatFormat
from include.data.sharegpt import Conversation, Message


def split_conversation(chat: ChatFormat, conversation: Conversation, max_tokens: int) -> list[Conversation]:
    """Split a conversation before user turns into conversations of at most `max_tokens` tokens.

    Each one begins with the system message and is as long as possible. An exchange (a user turn and its answers) that
    alone is too long is left out.
    """
    messages = conversation.messages
    system = messages[:1] if messages[0]["role"] == "system" else []
    exchanges: list[list[Message]] = []
    for message in messages[len(system) :]:
        if message["role"] == "user" or not exchanges:
            exchanges.append([])
        exchanges[-1].append(message)

    def joined(turns: list[Message]) -> Conversation:
        return replace(Conversation.of([*system, *turns]), tools=conversation.tools)

    def fits(turns: list[Message]) -> bool:
        return len(chat.encode([joined(turns)]).ids) <= max_tokens

    parts: list[Conversation] = []
    current: list[Message] = []
    for exchange in exchanges:
        if current and not fits([*current, *exchange]):
            parts.append(joined(current))
            current = []
        if current or fits(exchange):
            current = [*current, *exchange]
    return [*parts, joined(current)] if current else parts
