"""The documents: links, commands, recipes, names of files and tests, and the parts that are generated."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from include.engine.arguments import check_arguments
from include.recipe import validate_recipe
from retune.cli import app
from retune.generated_docs import check_docs, describe_type, documents
from tests.conftest import PROJECT

DOCUMENTS = sorted([*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md")])
ROOMS = ("include", "tasks", "dags", "plugins", "retune", "cluster", "bench", "tests", "docs")
GLOSSARY = (
    "artifact", "fingerprint", "lineage", "contract", "lock, lease", "holdout", "candidate", "live", "base", "adapter",
    "template", "loss mask", "checkpoint", "plan", "gate", "verdict", "version", "alias", "revision", "run",
)  # fmt: skip
CHANGES = (
    "Add a stage", "Add a data check", "Change the handling of empty content", "Add a chat template",
    "Add a training argument", "Change the default optimizer on a GPU", "Raise a stage's timeout", "Add a smoke check",
    "Add a registry", "Change the report page", "Add an alert channel",
)  # fmt: skip


@cache
def blocks(path: Path) -> list[tuple[str, str]]:
    """Return the fenced blocks of a document as (language, text)."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@cache
def prose(path: Path) -> str:
    """Return a document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def code_spans(path: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(path))


def slug(heading: str) -> str:
    """Return the anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@cache
def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub makes of a document's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE):
        found.add(slug(heading))
    return found


def command_lines(path: Path) -> Iterator[str]:
    """Yield the lines of shell blocks without comments, and the code spans, of a document."""
    for language, text in blocks(path):
        if language == "":
            for line in text.replace("\\\n", " ").splitlines():
                for command in re.split(r" && |;", line.partition(" #")[0]):
                    yield command.strip()
    yield from code_spans(path)


def commands(pattern: str) -> list[tuple[str, str]]:
    """Return (document, first group of the pattern) for every documented command that matches the pattern."""
    lines = [(path.name, line) for path in DOCUMENTS for line in command_lines(path)]
    return sorted({(name, match[1]) for name, line in lines if (match := re.match(pattern, line))})


MAKE_COMMANDS = commands(r"^(?:[A-Z_]+=\S+ )?(make(?: .*)?)$")
RETUNE_COMMANDS = commands(r"^(?:\.venv/bin/)?python -m retune ?(.*)$")
RECIPES = [
    (path, number, text)
    for path in DOCUMENTS
    for number, (language, text) in enumerate(blocks(path))
    if language == "yaml"
]
CHEAP = [arguments for _, arguments in RETUNE_COMMANDS if arguments.endswith(("--help", "--check", "--dry-run"))]
TARGETS = re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_to_a_file_and_a_heading(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"\w+://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.is_relative_to(PROJECT) and file.exists(), f"{path.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{path.name}: {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_and_test_that_is_named_exists(path: Path) -> None:
    for span in code_spans(path):
        match = re.fullmatch(rf"((?:{'|'.join(ROOMS)})/[\w./-]+)(?:::(\w+))?", span)
        if match:
            file = PROJECT / match[1]
            assert file.exists(), f"{path.name}: {span}"
            if match[2]:
                assert f"def {match[2]}(" in file.read_text(encoding="utf-8"), f"{path.name}: {span}"


def test_the_documents_have_commands_and_recipes() -> None:
    """The tests below would pass on nothing if a pattern no longer matched."""
    assert len(MAKE_COMMANDS) > 15
    assert len(RETUNE_COMMANDS) >= 4
    assert len(RECIPES) > 12


@pytest.mark.parametrize(("name", "command"), MAKE_COMMANDS)
def test_every_make_command_can_be_made(name: str, command: str) -> None:
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    words = shlex.split(command.replace("...", "x"))[1:]
    assert {word for word in words if "=" not in word} <= set(TARGETS), name
    dry = subprocess.run(["make", "--dry-run", *words], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert dry.returncode == 0, dry.stderr
    for variable in (word.partition("=")[0] for word in words if "=" in word):
        assert f"$({variable})" in makefile, f"{name}: {command}"


@pytest.mark.parametrize(("name", "arguments"), RETUNE_COMMANDS)
def test_every_retune_command_can_be_parsed(name: str, arguments: str) -> None:
    group = get_command(app)
    words = shlex.split(arguments)
    if words[:1] in ([], ["--help"]):
        return
    command = group.commands[words[0]]  # type: ignore[attr-defined]
    with command.make_context(words[0], words[1:]):
        pass


@pytest.mark.parametrize("arguments", sorted(set(CHEAP)))
def test_every_documented_command_that_is_cheap_runs(arguments: str, retune: Callable) -> None:
    done = retune(*shlex.split(arguments))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("target", [target for target in TARGETS if target != "help"])
def test_every_target_of_the_makefile_is_documented(target: str) -> None:
    assert any(f"make {target}" in path.read_text(encoding="utf-8") for path in DOCUMENTS)


@pytest.mark.parametrize(("path", "number", "text"), RECIPES, ids=lambda value: getattr(value, "name", None))
def test_every_recipe_is_valid(path: Path, number: int, text: str) -> None:
    values = yaml.safe_load(text)
    recipe = validate_recipe({"name": "example", **values}, f"{path.name}, block {number}")
    check_arguments(recipe)
    if path.name == "cookbook.md":
        assert {"description", "dataset", "base_model"} <= set(values), "a whole recipe"
        assert recipe.prompts


def test_every_recipe_of_the_cookbook_says_where_it_was_run() -> None:
    text = (PROJECT / "docs" / "cookbook.md").read_text(encoding="utf-8")
    for section in text.split("\n## ")[1:]:
        assert re.search(r"^\*Run:\*.*", section, re.MULTILINE), section.partition("\n")[0]
        assert "tests/" in section or "make bench" in section, section.partition("\n")[0]


def test_the_generated_documents_are_current() -> None:
    check_docs()


def test_the_reference_has_every_field_of_the_recipe() -> None:
    from include.recipe import Recipe

    (reference,) = [content for path, content in documents().items() if path.name == "recipe.md"]
    for name, field in Recipe.model_fields.items():
        (line,) = re.findall(rf"^\| `{name}` \|.*$", reference, re.MULTILINE)
        assert field.description
        assert " ".join(field.description.split()[:3]).replace("|", "\\|") in line
    assert "| `r` | whole number, 1 to 1,024 | `16` |" in reference
    assert "| `learning_rate` | number, greater than 0, at most 1 | `0.0002` |" in reference


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer", "minimum": -1}, "whole number, at least -1"),
        ({"type": "number", "minimum": 0, "maximum": 1, "exclusiveMaximum": 1}, "number, at least 0, less than 1"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 10}, "number, greater than 0, at most 10"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "text; or empty"),
        ({"type": "array", "items": {"enum": ["a", "b"]}}, "list of `a`, `b`"),
        ({"type": "object", "additionalProperties": {"type": "number"}}, "`name: value` pairs; value: number"),
        ({"type": "boolean"}, "`true` or `false`"),
    ],
)
def test_types_and_ranges_are_in_words(schema: dict, words: str) -> None:
    assert describe_type(schema) == words


@cache
def messages() -> str:
    """Return every text in the product's code, one per line; a value in a text is a tab."""
    texts = []
    for room in ("include", "tasks", "plugins", "dags", "retune"):
        for path in (PROJECT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    texts.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\t" for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return "\n".join(texts)


def test_every_message_in_troubles_is_a_message_of_the_code() -> None:
    """A message may have values: in the document they are numbers, versions or three dots."""
    text = (PROJECT / "docs" / "troubles.md").read_text(encoding="utf-8").partition("## Where")[0]
    found = [
        span for cell in re.findall(r"^\| ([^|].*?) \| ", text, re.MULTILINE) for span in re.findall(r"`([^`]+)`", cell)
    ]
    assert len(found) > 15
    for message in found:
        parts = [part for part in re.split(r"\.\.\.|v?\d[\d.,]*%?", message) if re.search(r"\w", part)]
        pattern = "[^\n]*?".join(re.escape(part) for part in parts)
        assert re.search(pattern, messages()), message


def test_the_readme_is_short() -> None:
    assert len((PROJECT / "README.md").read_text(encoding="utf-8").splitlines()) < 160


def test_the_glossary_has_every_term() -> None:
    glossary = (PROJECT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Glossary")[2]
    terms = re.findall(r"^\| ([^|]+?) \|", glossary, re.MULTILINE)
    assert set(GLOSSARY) <= set(terms)


def test_contributing_names_the_file_where_each_change_begins() -> None:
    text = (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[[^\]]+\]\(#([\w-]+)\).* \| `([^`]+)` \| `(\w+)` \|$", text, re.MULTILINE)
    assert sorted(anchor for anchor, _, _ in rows) == sorted(slug(change) for change in CHANGES)
    sections = {slug(part.partition("\n")[0]): part for part in text.split("\n## ")[1:]}
    for anchor, file, symbol in rows:
        assert re.search(rf"\b{symbol}\b", (PROJECT / file).read_text(encoding="utf-8")), f"{file}: {symbol}"
        first = next(line for line in sections[anchor].splitlines() if f"`{file}`" in line)
        assert first.startswith(("1. ", "- ")), f"{anchor}: a step begins in {file}"
        assert len(sections[anchor].splitlines()) < 25, "one screen"
