"""The sequences of tokens that a conversation becomes: each answer behind exactly the prompt that asks for it.

The prompt for an answer is what the template writes for the turns before it, with the header of an assistant turn. If
the prompt for the next answer begins with this prompt and its answer, both answers are trained in one sequence. Where
the template rewrites earlier turns (Qwen3 removes their thoughts), the next answer begins a sequence of its own.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import orjson

from include.chat.template import (
    PLACEHOLDER,
    ChatTemplate,
    Form,
    Style,
    Unwritten,
    thoughts_of,
)
from include.data.conversation import END_THINK, THINK
from include.errors import BadData, BadRecipe

OTHER_TEMPLATE = "Choose another chat_template, or correct the rows"


@dataclass
class Sequence:
    """The text of a sequence, with placeholders as `ChatTemplate.write` writes them.

    Attributes:
        text: what the template writes.
        trained: begin and end of each stretch that the loss counts, in characters of `text`: an answer and its end.
        ends: the control tokens that end these answers.
    """

    text: str
    trained: list[tuple[int, int]] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Piece:
    """A part of a sequence: a control token, a text of the template, or a turn's content or thoughts.

    Attributes:
        token: the id of the control token, or None.
        text: the template's own text; "" for a token and for a content.
        turn: the index of the turn whose content or thoughts this is, or None.
        of_thoughts: whether it is the thoughts.
        transform: the change to the content, an index of `CONTENT_TRANSFORMS`.
        stripped: whether blanks at the begin are left out, since the token before swallows them.
        in_loss: whether the loss counts the piece.
        cut: whether the text before it is encoded apart.
    """

    token: int | None = None
    text: str = ""
    turn: int | None = None
    of_thoughts: bool = False
    transform: int = 0
    stripped: bool = False
    in_loss: bool = False
    cut: bool = False


def prompt_of(template: ChatTemplate, form: Form) -> Sequence:
    """Return the prompt that asks for an answer to all turns.

    Raises:
        BadData, BadRecipe: see `sequences`.
    """
    return _in_some_style(
        template, form, lambda style: Sequence(_written(template, form, style, len(form.roles), True))
    )


def sequences(template: ChatTemplate, form: Form, answers: Collection[int], apart: bool = False) -> list[Sequence]:
    """Return the sequences in which answers are trained, each answer once.

    Args:
        answers: the indices of the assistant turns to train on, ascending.
        apart: whether each answer has a sequence of its own.

    Raises:
        BadData: the template does not accept the order of roles, or does not write each content once and in order, or
            the thoughts and tool calls of an answer.
        BadRecipe: the template changes contents in a way that Retune does not reproduce, or writes no token at the end
            of an answer.
    """

    def made(style: Style) -> list[Sequence]:
        found: list[Sequence] = []
        for turn in answers:
            prompt, answer, rest = _answer(template, form, style, turn)
            after = len(prompt) + len(answer)
            if apart or not (found and prompt.startswith(found[-1].text[: found[-1].trained[-1][1]])):
                found.append(Sequence(""))
            found[-1].text = prompt + answer + rest
            found[-1].trained.append((len(prompt), after))
            found[-1].ends.append(template.control_tokens_in(answer)[-1])
        return found

    return _in_some_style(template, form, made)


def _in_some_style(template: ChatTemplate, form: Form, make: Any) -> Any:
    """Return what `make` makes with the first style of thoughts and calls in which the template writes all of them."""
    first: BadData | BadRecipe | None = None
    for style in template.styles(form):
        try:
            made = make(style)
        except (BadData, BadRecipe) as error:
            first = first or error
            continue
        template.keep_style(form, style)
        return made
    assert first is not None
    raise first


def _written(template: ChatTemplate, form: Form, style: Style, turns: int, generation_prompt: bool) -> str:
    """Return what `ChatTemplate.write` writes; check that it has each turn's content once and in order."""
    text = template.write(form, style, turns, generation_prompt)
    silent = {turn for turn, _, has_content in form.calls if not has_content}
    _check_contents(template, form, text, [turn for turn in range(turns) if turn not in silent])
    return text


def _check_contents(template: ChatTemplate, form: Form, text: str, expected: list[int], from_turn: int = 0) -> None:
    """Check that a text has the contents of these turns once each, in order; a system text may stand anywhere."""
    found = [int(turn) for turn, kind, _ in PLACEHOLDER.findall(text) if kind == "c" and int(turn) >= from_turn]
    if sorted(found) != expected or [i for i in found if form.roles[i] != "system"] != [
        i for i in expected if form.roles[i] != "system"
    ]:
        raise Unwritten(
            f"the chat template {template.name} does not write the turns {', '.join(form.roles)} once each and in "
            "order",
            OTHER_TEMPLATE,
        )


def _after(text: str, turn: int) -> int:
    """Return where the last placeholder of the turns before `turn` ends."""
    return max((found.end() for found in PLACEHOLDER.finditer(text) if int(found[1]) < turn), default=0)


def _answer(template: ChatTemplate, form: Form, style: Style, turn: int) -> tuple[str, str, str]:
    """Return the prompt for an answer, the answer with its end, and what the template writes behind it."""
    prompt = _written(template, form, style, turn, True)
    whole = template.write(form, style, turn + 1, False)
    silent = any(of == turn and not has_content for of, _, has_content in form.calls)
    _check_contents(template, form, whole, [turn] if not silent else [], from_turn=turn)
    asked, told = prompt[_after(prompt, turn) :], whole[_after(whole, turn) :]
    thinks = turn in form.thoughts
    if told.startswith(asked):
        answer = told[len(asked) :]
    else:
        shared = next(i for i in range(len(asked)) if asked[i : i + 1] != told[i : i + 1])
        opened, answer = asked[shared:], told[shared:]
        if asked.rstrip().endswith(THINK) and answer.startswith(END_THINK):
            pass  # the template writes an empty thought without the line break of its prompt
        elif asked.rstrip().endswith(THINK) and opened.startswith(THINK):
            # the template leaves out thoughts, but its prompt begins one, which the answer has to end
            answer = f"{thoughts_of(turn) if thinks else ''}\n{END_THINK}\n\n{answer}"
        else:
            raise Unwritten(
                f"the chat template {template.name} asks for an answer with {asked[-60:]!r}, and writes the answer "
                f"behind {told[:shared][-60:]!r}",
                "Set chat_template_kwargs so that both agree (for example enable_thinking), or reasoning: drop"
                if thinks
                else OTHER_TEMPLATE,
            )
    if thinks and len(re.findall(f"\ue000{turn}t\\d\ue001", answer)) != 1:
        raise Unwritten(
            f"the chat template {template.name} does not write the thoughts of an answer",
            "Choose another chat_template, or set reasoning: drop",
        )
    calls = next((made for of, made, _ in form.calls if of == turn), None)
    if calls is not None:
        _check_calls(template, orjson.loads(calls), answer)
    end = _end(template, answer, calls is not None)
    if end is None and (token := _next_turn(template, form, style, turn, whole, "tool" if calls else "user")):
        answer = answer.rstrip() + token
        end = len(answer)
    if end is None:
        raise BadRecipe(
            f"field 'chat_template': {template.name} writes no token at the end of an assistant turn; a model trained "
            "with it would not learn to stop",
            "Choose another chat_template",
        )
    return prompt, answer[:end], answer[end:]


def _end(template: ChatTemplate, answer: str, calls: bool) -> int | None:
    """Return where the control tokens end that directly follow the content, or with calls the last ones; or None."""
    begin = max((found.end() for found in PLACEHOLDER.finditer(answer)), default=0)
    behind = answer[begin:]
    tokens = sorted({re.escape(token) for token in template.control_tokens_in(behind)}, key=len, reverse=True)
    if not tokens:
        return None
    runs = [*re.finditer(f"(?:{'|'.join(tokens)})+", behind)]
    if not calls:
        between = behind[: runs[0].start()].strip().strip('"')  # quotes: some templates write contents as JSON
        return begin + runs[0].end() if not between else None
    if behind[runs[-1].end() :].strip():
        return None
    last = template.control_tokens_in(runs[-1][0])[-1]
    known = last in template.added.special or last in template.missing or last == template.named_tokens.get("eos_token")
    return begin + runs[-1].end() if known else None


def _next_turn(template: ChatTemplate, form: Form, style: Style, turn: int, whole: str, follower: str) -> str | None:
    """Return the control token that begins the next turn and no answer, and so ends this turn (GLM-4); or None.

    Args:
        whole: what the template writes up to this turn.
        follower: the role of the next turn, if this one is the last.
    """
    roles = (*form.roles[: turn + 1], *(form.roles[turn + 1 : turn + 2] or (follower,)))
    shorter = Form(
        roles, form.tools, tuple(c for c in form.calls if c[0] <= turn), tuple(t for t in form.thoughts if t <= turn)
    )
    try:
        text = template.write(shorter, style, turn + 2, generation_prompt=False)
    except (BadData, BadRecipe):
        return None
    content = re.search(f"\ue000{turn}c\\d\ue001", text)
    if content:
        behind = text[content.end() :].lstrip()
    else:
        behind = text[len(whole.rstrip()) :].lstrip() if text.startswith(whole.rstrip()) else ""
    token = next((token for token in template.control_tokens_in(behind) if behind.startswith(token)), None)
    header = template.write(form, style, turn, generation_prompt=True)[_after(whole, turn) :]
    special = token in template.added.special
    return token if special and token not in template.control_tokens_in(header) else None


def _check_calls(template: ChatTemplate, calls: list[dict[str, Any]], answer: str) -> None:
    """Check that an answer has the names and the arguments of all calls."""
    words: list[str] = []
    for call in calls:
        function = call.get("function", call)
        words += [function["name"], *_leaves(function.get("arguments"))]
    for word in set(words):
        written = answer.count(word) or answer.count(orjson.dumps(word).decode()[1:-1])
        if written < words.count(word):
            raise Unwritten(
                f"the chat template {template.name} does not write the tool calls in the place of an answer",
                OTHER_TEMPLATE,
            )


def _leaves(value: Any) -> list[str]:
    """Return the texts and names in the arguments of a call."""
    if isinstance(value, dict):
        return [word for name, entry in value.items() for word in (name, *_leaves(entry))]
    if isinstance(value, list):
        return [word for entry in value for word in _leaves(entry)]
    return [value] if isinstance(value, str) else []


def pieces(template: ChatTemplate, sequence: Sequence, apart: bool = False) -> list[Piece]:
    """Return the pieces of a sequence, in their order.

    Args:
        apart: whether each answer is encoded apart from the text before it.
    """
    found: list[Piece] = []
    borders = sorted({0, len(sequence.text), *(border for span in sequence.trained for border in span)})
    for begin, end in pairwise(borders):
        in_loss = any(span[0] <= begin < span[1] for span in sequence.trained)
        part = [replace(piece, in_loss=in_loss) for piece in _parse(template, sequence.text[begin:end])]
        if apart and in_loss:
            part[0] = replace(part[0], cut=True)
        found += part
    return _swallow_blanks(template, found)


def _parse(template: ChatTemplate, text: str) -> list[Piece]:
    """Split a text at placeholders and control tokens."""
    found: list[Piece] = []
    at = 0
    for place in [*PLACEHOLDER.finditer(text), None]:
        own = text[at : place.start() if place else len(text)]
        tokens = sorted({re.escape(token) for token in template.control_tokens_in(own)}, key=len, reverse=True)
        for number, section in enumerate(re.split(f"({'|'.join(tokens)})", own) if tokens else [own]):
            token = template.added.ids.get(section) if number % 2 else None
            if section:
                found.append(Piece(token, "" if token is not None else section))
        if place:
            found.append(Piece(turn=int(place[1]), of_thoughts=place[2] == "t", transform=int(place[3])))
            at = place.end()
    return found


def _swallow_blanks(template: ChatTemplate, parts: list[Piece]) -> list[Piece]:
    """Leave out the blanks that tokens swallow (`lstrip` and `rstrip` of added tokens), as the tokenizer does."""
    if not template.added.left and not template.added.right:
        return parts
    names = {id: text for text, id in template.added.ids.items()}
    for step, swallowing in ((1, template.added.right), (-1, template.added.left)):
        found: list[Piece] = []
        active = False
        for piece in parts[::step]:
            if piece.token is not None:
                active = names[piece.token] in swallowing
            elif active and piece.turn is None:
                piece = replace(piece, text=piece.text.lstrip() if step == 1 else piece.text.rstrip())
                active = not piece.text
            elif active:
                piece = replace(piece, stripped=True) if step == 1 else piece
                active = False
            if piece.token is not None or piece.turn is not None or piece.text:
                found.append(piece)
        parts = found[::step]
    return parts
