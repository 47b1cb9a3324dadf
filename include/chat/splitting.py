"""Loss masks by the recipe, and splitting of conversations that are longer than the model's context."""

from __future__ import annotations

from dataclasses import replace

from include.chat.chat_format import ChatFormat
from include.data.conversation import Conversation


def mask_all_but_last(conversation: Conversation) -> Conversation:
    """Return a conversation whose last assistant turn alone is trained on, unless it is masked already."""
    answers = [turn for turn, role in enumerate(conversation.roles) if role == "assistant"]
    return replace(conversation, masked=tuple(sorted({*conversation.masked, *answers[:-1]})))


def trained_turns(conversation: Conversation) -> list[int]:
    """Return the indices of the assistant turns that are not masked."""
    masked = set(conversation.masked)
    return [turn for turn, role in enumerate(conversation.roles) if role == "assistant" and turn not in masked]


def split_conversation(
    chat: ChatFormat, conversation: Conversation, max_tokens: int
) -> tuple[list[Conversation], list[int]]:
    """Split a conversation before user turns into conversations of at most `max_tokens` tokens.

    Each one begins with the system message and is as long as possible. An exchange (a user turn and its answers) that
    alone is too long is left out, and so is a piece whose answers are all masked. If only the last exchange is trained
    on, it gets as much of the conversation before it as fits.

    Returns:
        The pieces, and the indices of the trained turns that are in none of them.
    """
    system = [0] if conversation.roles[:1] == ("system",) else []
    exchanges: list[list[int]] = []
    for turn, role in enumerate(conversation.roles[len(system) :], len(system)):
        if role == "user" or not exchanges:
            exchanges.append([])
        exchanges[-1].append(turn)

    def joined(turns: list[int]) -> Conversation:
        chosen = [*system, *turns]
        return Conversation(
            tuple(conversation.roles[turn] for turn in chosen),
            [conversation.contents[turn] for turn in chosen],
            conversation.tools,
            masked=tuple(place for place, turn in enumerate(chosen) if turn in conversation.masked),
            calls=tuple((chosen.index(turn), made) for turn, made in conversation.calls if turn in chosen),
            thoughts=tuple((chosen.index(turn), text) for turn, text in conversation.thoughts if turn in chosen),
        )

    def fits(turns: list[int]) -> bool:
        return int(chat.encode([joined(turns)]).lengths.max(initial=0)) <= max_tokens

    trained, parts = set(trained_turns(conversation)), list[list[int]]()
    if trained <= set(exchanges[-1]):
        while len(exchanges) > 1 and not fits([turn for exchange in exchanges for turn in exchange]):
            del exchanges[0]
    for exchange in exchanges:
        if parts and parts[-1] and fits([*parts[-1], *exchange]):
            parts[-1] += exchange
        else:
            parts.append(exchange if fits(exchange) else [])
    used = [turns for turns in parts if trained & set(turns)]
    return [joined(turns) for turns in used], sorted(trained - {turn for turns in used for turn in turns})
