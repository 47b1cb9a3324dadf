"""Contents that are lists of parts, as OpenAI's and other interfaces write them: text, images, thoughts."""

from __future__ import annotations

from typing import Any

from include.data.conversation import ParsedRow, is_absent, kind_of

TEXT_TYPES = {"text", "input_text", "output_text"}
REASONING = {
    "reasoning_content",
    "reasoning",
    "reasoning_details",
    "thinking",
    "thinking_blocks",
    "thought",
    "thoughts",
}
MEDIA_WORDS = ("image", "video", "audio")  # in a part's type or key: image_url, input_audio, video ...


def is_media(name: str) -> bool:
    """Return whether a part's type or key names an image, audio or video."""
    return any(word in name for word in MEDIA_WORDS)


def join_parts(parts: list[Any], parsed: ParsedRow, number: int) -> str | None:
    """Return the text of a list of text parts, joined without a separator, as chat templates do.

    Args:
        number: the turn's number in messages.

    Returns:
        None if the content cannot be read; the fault is counted then.
    """
    texts: list[str] = []
    unused: list[str] = []
    if not parts:
        parsed.add_fault("non_text_values", f"turn {number}: the value is an empty list")
        return None
    for part in parts:
        if not isinstance(part, dict):
            parsed.add_fault("non_text_values", f"turn {number}: the value is a list with {kind_of(part)} in it")
            return None
        keys = {key: value for key, value in part.items() if value is not None}  # Parquet fills absent keys with null
        kind = str(keys.pop("type", "text"))
        if media := next((name for name in (kind, *keys) if is_media(name)), None):
            parsed.add_fault("media", f"turn {number}: a part {media[:60]}")
            return None
        if thought := next(
            (name for name in (kind, *keys) if name in REASONING and not is_absent(keys.get(name, 1))), ""
        ):
            parsed.add_fault("reasoning", f"turn {number}: a part {thought}")
            return None
        text = keys.pop("text", None)
        if kind not in TEXT_TYPES or not isinstance(text, str):
            problem = f"of the type {kind[:60]!r}" if kind not in TEXT_TYPES else f"whose text is {kind_of(text)}"
            parsed.add_fault("non_text_values", f"turn {number}: a part {problem}")
            return None
        texts.append(text)
        unused += [f"key {key[:60]} of a part" for key in keys]
    parsed.unused += unused
    return "".join(texts)
