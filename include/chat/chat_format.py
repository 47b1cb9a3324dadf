"""The chat format of a run: one tokenizer and one chat template, which turn conversations into token ids.

This is the only place where a conversation is rendered. The ids are equal to those of
`apply_chat_template(tokenize=True)`; `include.chat.verification` checks this on sampled rows of every run.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from include.chat.conversation_encoder import ConversationEncoder
from include.chat.encoder import Encoder, TokenizersEncoder, fast_encoder
from include.chat.sequences import Sequence, sequences
from include.chat.template import ChatTemplate, Form, renders_calls, template_source
from include.chat.tokenized import Encoded
from include.chat.tokenizer import ChatTokenizer
from include.data.conversation import Conversation, Message
from include.errors import BadData, BadRecipe
from include.recipe.model import template_name

# a conversation in which the assistant calls a tool
CALL = '[{"id": "call00000", "type": "function", "function": {"name": "look_up", "arguments": {"word": "kite"}}}]'
TOOL = '[{"type": "function", "function": {"name": "look_up", "description": "", "parameters": {"type": "object"}}}]'
CALLING = Form(("user", "assistant"), TOOL, ((1, CALL, False),))


class ChatFields(Protocol):
    """The recipe fields that decide on the chat format."""

    @property
    def base_model(self) -> str: ...
    @property
    def chat_template(self) -> str: ...
    @property
    def missing_special_tokens(self) -> str: ...
    @property
    def special_tokens_in_text(self) -> str: ...
    @property
    def chat_template_kwargs(self) -> Mapping[str, Any]: ...


class ChatFormat:
    """A tokenizer and a chat template.

    Args:
        folder: the folder with the tokenizer's files.
        chat_template: the name of a shipped template, jinja text, or "tokenizer" for the tokenizer's own.
        missing_special_tokens: for special tokens that the template writes and the vocabulary does not have: "refuse"
            the template, "split" the tokens into ordinary ones, or "add" them to the vocabulary.
        special_tokens_in_text: for special tokens in a turn's content: "literal" text, or "parse" them into their ids.
        chat_template_kwargs: values for variables of the template, such as `enable_thinking`.
        base_name: the base model's name in messages.

    Attributes:
        tokenizer, template: the two.
        missing: the special tokens that the template writes and the vocabulary does not have.
        new_tokens: the ids of those that were added, by their texts.

    Raises:
        NotFound: the folder has no tokenizer.json, or `chat_template` is "tokenizer" and the tokenizer has none.
        BadRecipe: the vocabulary does not have a special token of the template, and `missing_special_tokens` is
            "refuse".
    """

    def __init__(
        self,
        folder: Path,
        *,
        chat_template: str,
        missing_special_tokens: str = "refuse",
        special_tokens_in_text: str = "literal",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        base_name: str = "the base model",
    ):
        self.tokenizer = tokenizer = ChatTokenizer(folder, base_name)
        source = template_source(folder, chat_template, base_name)
        name = template_name(chat_template)
        variables = dict(chat_template_kwargs or {})
        self.template = ChatTemplate(name, source, tokenizer.named_tokens, tokenizer.added, variables)
        if unread := self.template.unread_variables:
            raise BadRecipe(
                f"field 'chat_template_kwargs': the chat template {name} does not read {', '.join(unread)}",
                "Correct the name, or leave it out",
            )
        self.new_tokens: dict[str, int] = {}
        if self.template.missing and missing_special_tokens == "add":
            self.new_tokens = tokenizer.add(self.template.missing)
            self.template = ChatTemplate(name, source, tokenizer.named_tokens, tokenizer.added, variables)
        self.missing = self.template.missing
        if self.missing and missing_special_tokens == "refuse":
            raise BadRecipe(
                f"field 'chat_template': {name} writes {', '.join(self.missing)}, which the vocabulary of "
                f"{base_name} lacks",
                "Choose a template made for this base (vicuna and alpaca need only its end-of-text token), or set "
                "missing_special_tokens: add (new tokens are trained) or split (ordinary tokens in their place)",
            )
        tokenizer.keep_as_text(self.template.control_tokens)
        self._conversations = ConversationEncoder(
            self.template,
            fast_encoder(tokenizer.backend, tokenizer.content, self.template.control_tokens),
            parsed_tokens=tokenizer.added.ids if special_tokens_in_text == "parse" else {},
        )

    @classmethod
    def from_recipe(cls, folder: Path, recipe: ChatFields) -> ChatFormat:
        """Return the chat format of a recipe.

        Args:
            folder: the folder with the tokenizer's files.
            recipe: gives `base_model` (for messages), `chat_template`, `chat_template_kwargs`,
                `missing_special_tokens` and `special_tokens_in_text`.

        Raises:
            NotFound, BadRecipe: see the class.
        """
        return cls(
            folder,
            chat_template=recipe.chat_template,
            missing_special_tokens=recipe.missing_special_tokens,
            special_tokens_in_text=recipe.special_tokens_in_text,
            chat_template_kwargs=recipe.chat_template_kwargs,
            base_name=recipe.base_model,
        )

    def encode(self, conversations: list[Conversation]) -> Encoded:
        """Return the token ids and the loss masks of conversations: assistant turns and the tokens that end them.

        The loss counts no token of a conversation's masked turns.

        Raises:
            BadData: the template does not accept a conversation's order of roles.
            BadRecipe: the template changes contents, or writes no end of an assistant turn.
        """
        return self._conversations.encode(conversations)

    def encode_prompts(self, conversations: list[Conversation]) -> Encoded:
        """Return the token ids of conversations that the assistant continues: with the header of its next turn.

        Raises:
            BadData, BadRecipe: see `encode`.
        """
        return self._conversations.encode_prompts(conversations)

    def prompt(self, messages: list[Message]) -> list[int]:
        """Return the token ids of one conversation that the assistant continues; see `encode_prompts`."""
        return self.encode_prompts([Conversation.of(messages)]).ids.tolist()

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, with special tokens."""
        return self.tokenizer.decode(ids)

    def special_in(self, ids: list[int]) -> list[str]:
        """Return the special tokens among ids, and texts that have the form of special tokens, each once."""
        return self.tokenizer.special_in(ids)

    def parsed_tokens_in(self, text: str) -> list[str]:
        """Return the special tokens in a turn's text that become ids; empty unless special tokens are parsed."""
        return self._conversations.parsed_tokens_in(text)

    def changed_text(self, conversation: Conversation) -> tuple[int, str] | None:
        """Return the first turn whose text the template changes, and the part of the text that it looks for."""
        last = len(conversation.contents) - 1
        texts = [*enumerate(conversation.contents), *conversation.thoughts, (last, conversation.rejected or "")]
        for turn, content in texts if self.template.markup else ():
            for text in self.template.markup:
                if text in content:
                    return turn, text
        return None

    def id_of(self, name: str) -> int | None:
        """Return the id of the tokenizer's `bos_token`, `eos_token` or `pad_token`, or None."""
        return self.tokenizer.id_of(name)

    @cached_property
    def stop_tokens(self) -> list[int]:
        """Return the ids that end an answer: the template's end of turn and the tokenizer's end of text, sorted."""
        ends = {self.template.added.ids.get(end) for sequence in self._examples for end in sequence.ends}
        return sorted(id for id in {*ends, self.id_of("eos_token")} if id is not None)

    @property
    def written_tokens(self) -> dict[str, int]:
        """Return the ids of the control tokens that the template writes, and of the end of text, by their texts."""
        text = "".join(sequence.text for sequence in self._examples)
        eos = self.tokenizer.named_tokens.get("eos_token")
        return {
            token: self.template.added.ids[token]
            for token in self.template.added.ids
            if token == eos or (token in text and token in self.template.control_tokens)
        }

    @cached_property
    def _examples(self) -> list[Sequence]:
        """The sequences of the plainest conversation, and of one that calls a tool if the template writes calls."""
        found = sequences(self.template, Form(("user", "assistant")), (1,))
        if renders_calls(self.template.source):
            try:
                found += sequences(self.template, CALLING, (1,))
            except (BadData, BadRecipe):
                pass  # rows with calls are refused with the reason
        return found

    def save(self, folder: Path) -> None:
        """Write the tokenizer with the chat template, so that transformers loads exactly these two."""
        self.tokenizer.save(folder, self.template.source)

    @property
    def encoder(self) -> Encoder:
        """Return the encoder of the texts between special tokens."""
        return self._conversations.text_encoder

    def use_encoder(self, encoder: Encoder) -> None:
        """Encode texts with another encoder from now on."""
        self._conversations.use(encoder)

    def use_tokenizer_encoder(self) -> None:
        """Encode texts with the tokenizer itself from now on, not with the fast encoder."""
        self.use_encoder(TokenizersEncoder(self.tokenizer.backend))
