"""The recipe's own chat template: a file or text, checked and read before anything is downloaded."""

from __future__ import annotations

import re
from pathlib import Path

from include.chat.rendering import Refused, render_limited
from include.chat.tool_calls import NAMED_TOKENS
from include.data.sources import absolute_path
from include.errors import BadRecipe, NotFound
from include.recipe import Recipe
from include.recipe.model import TEMPLATE_FILE, is_inline

LARGEST_TEMPLATE = 2**18  # bytes; the largest templates of the Hub have 30 kB
TRIAL = [{"role": "user", "content": "Is it open?"}, {"role": "assistant", "content": "It is."}]


def pin_template(recipe: Recipe) -> str:
    """Return the recipe's `chat_template` with the content of the file in place of its path.

    Raises:
        NotFound: the file cannot be read.
        BadRecipe: it holds no chat template; the message names the line of an error.
        TooCostly: it needs too much time or memory for a short conversation, or writes too much.
    """
    source, name = recipe.chat_template, "the text"
    if not is_inline(source):
        if not re.fullmatch(TEMPLATE_FILE, source):
            return source
        path = Path(absolute_path(source))
        source, name = _read(path), str(path)
    if not re.search(r"\bmessages\b", source) or not is_inline(source):
        raise BadRecipe(
            f"field 'chat_template': {name} is not a chat template: it does not read the variable messages",
            "Write a template that renders the list `messages`, see docs/data.md",
        )
    variables = {**NAMED_TOKENS, **recipe.chat_template_kwargs}
    for messages, generation_prompt in ((TRIAL, False), (TRIAL[:1], True)):
        arguments = {**variables, "conversations": [messages], "add_generation_prompt": generation_prompt}
        try:
            render_limited(name, source, arguments)
        except Refused:  # perhaps for lack of the base's special tokens; `template` renders with them
            pass
    return source


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise NotFound(
            f"field 'chat_template': the file {path} cannot be read ({error.strerror})",
            "Correct the path; a relative path begins in the checkout",
        ) from None
    if len(content) > LARGEST_TEMPLATE:
        raise BadRecipe(
            f"field 'chat_template': {path} has {len(content):,} bytes, and a template may have {LARGEST_TEMPLATE:,}",
            "Name the file of the template",
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise BadRecipe(f"field 'chat_template': {path} is not a text file (UTF-8)", "Name the file of the template")
    return text
