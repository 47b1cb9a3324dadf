"""Rules that no single module can hold: who imports whom, how long files are, and what reading the DAG file loads."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = ("include", "tasks", "plugins", "dags", "cluster", "retune")
ORDER = (  # a room imports only rooms of the rows above its own
    ("include.errors", "include.paths"),
    ("include.storage",),
    ("include.data",),
    ("include.recipe",),
    ("include.chat", "include.registry", "include.base_model"),
    ("include.engine", "include.evaluation"),
    ("include.pipeline",),
    ("include.reporting", "include.demo"),
    ("tasks",),
    ("plugins",),
    ("dags",),
    ("cluster",),
    ("retune",),
)
RANK = {room: rank for rank, row in enumerate(ORDER) for room in row}
NO_AIRFLOW = ("include", "tasks")
READ_BY_AIRFLOW = {"dags", "plugins"}  # folders of files, and no packages
HEAVY = {
    "bitsandbytes", "datasets", "great_expectations", "matplotlib", "pandas", "peft", "torch", "transformers", "trl",
}  # fmt: skip
# made of classes and operations of heavy libraries: themselves imported in functions only, or by one another
HEAVY_MODULES = {f"include.engine.{name}" for name in ("callback", "kernels", "fused_lora", "joined_trainer", "graphs")}
MAX_LINES = 400
SOURCES = {".py", ".html", ".jinja", ".yaml"}
LONGER_FILES = {
    "tests/services/hub.py": "one server: the Hub's HTTP interface, with Git's and its own quirks",
    "tests/include/chat/families.py": "one table of all families, with their tokens",
}

PARSE = """
import json, sys, time
began = time.process_time()
import airflow.sdk
sdk = time.process_time()
import dags.finetune
cost, modules = (time.process_time() - sdk) / (sdk - began), sorted({name.partition(".")[0] for name in sys.modules})
found = [value for value in vars(dags.finetune).values() if isinstance(value, airflow.sdk.DAG)]
print(json.dumps({
    "cost": cost,
    "modules": modules,
    "dags": sorted(dag.dag_id for dag in found),
    "forms": [len(dag.params) for dag in found],
    "copies": sum(len(task.params) for dag in found for task in dag.tasks),
}))
"""


def modules() -> dict[str, Path]:
    """The product's modules by their dotted names; a package is named without `__init__`."""
    paths = [path for package in PACKAGES for path in (PROJECT / package).rglob("*.py")]
    paths += [path for package in PACKAGES if (path := PROJECT / f"{package}.py").is_file()]
    return {".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the full name of each import, also of those in functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}:{node.lineno} is a relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            name = re.match(r"[a-z_.]+", ast.unparse(node.args[0]).lstrip("f").strip("'\""))
            if name:
                yield node.lineno, name[0].rstrip(".")


def room(name: str) -> str:
    """Return the room of a module: the package or module below `include`, else the top package."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "include" else parts[0]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of names that reach each other."""

    def reachable(name: str) -> set[str]:
        found: set[str] = set()
        new = {name}
        while new:
            new = {target for one in new for target in graph.get(one, ())} - found
            found |= new
        return found

    reach = {name: reachable(name) for name in graph}
    groups = {
        tuple(sorted(other for other in reach[name] if name in reach.get(other, ())))
        for name in graph
        if name in reach[name]
    }
    return [list(group) for group in sorted(groups)]


def test_imports_point_down_and_form_no_circle() -> None:
    known, graph, wrong = modules(), defaultdict(set), []
    assert len(known) > 50
    wrong += [f"{room(name)} has no place in ORDER" for name in known if room(name) not in {*RANK, "include"}]
    for name, path in known.items():
        for line, full in imports(path):
            place, top = f"{path.relative_to(PROJECT)}:{line}", full.partition(".")[0]
            target = full if full in known else full.rpartition(".")[0]
            if top == "airflow" and name.partition(".")[0] in NO_AIRFLOW:
                wrong.append(f"{place} imports Airflow")
            elif top in ("bench", "tests"):
                wrong.append(f"{place} imports {full}, which is not part of the product")
            elif top in PACKAGES:
                graph[name].add(target)
                if room(target) != room(name) and RANK[room(name)] <= RANK.get(room(target), len(ORDER)):
                    wrong.append(f"{place} imports {full}: {room(name)} stands below or beside {room(target)}")
    wrong += [f"import circle: {' - '.join(group)}" for group in circles(graph)]
    assert not wrong, "\n".join(sorted(wrong))


def test_the_import_rules_see_every_form_of_import(tmp_path: Path) -> None:
    source = """
from typing import TYPE_CHECKING
import tasks.train
if TYPE_CHECKING:
    from include.recipe import Recipe
def late():
    from plugins import alerts
    importlib.import_module(f"tasks.{name}")
"""
    (tmp_path / "module.py").write_text(source)
    found = dict(imports(tmp_path / "module.py"))
    assert found == {
        2: "typing.TYPE_CHECKING", 3: "tasks.train", 5: "include.recipe.Recipe", 7: "plugins.alerts", 8: "tasks",
    }  # fmt: skip
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"e"}}) == [["a", "b", "c"], ["e"]]


def test_heavy_libraries_are_imported_inside_functions() -> None:
    wrong = []
    for name, path in modules().items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            heavy = [full for full in names if full.partition(".")[0] in HEAVY and name not in HEAVY_MODULES]
            heavy += [full for full in names if full in HEAVY_MODULES and name not in HEAVY_MODULES]
            wrong += [f"{path.relative_to(PROJECT)}:{node.lineno} imports {full}" for full in heavy]
    assert not wrong, "\n".join(wrong)


def test_every_package_says_in_one_line_what_belongs_there() -> None:
    packages = {path.parent for path in modules().values()} - {PROJECT, PROJECT / "include"}
    wrong = []
    for folder in sorted(packages):
        name, file = str(folder.relative_to(PROJECT)), folder / "__init__.py"
        if name in READ_BY_AIRFLOW:
            continue
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) if file.is_file() else None
        if not docstring:
            wrong.append(f"{name}/__init__.py has no docstring")
        elif "\n" in docstring:
            wrong.append(f"{name}/__init__.py: its docstring has more than one line")
    assert not wrong, "\n".join(wrong)


def test_no_file_is_long_without_a_reason() -> None:
    folders = [PROJECT / name for name in (*PACKAGES, "tests", "bench")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in SOURCES]
    assert len(files) > 100
    files += PROJECT.glob("*.py")
    lines = {str(path.relative_to(PROJECT)): len(path.read_bytes().splitlines()) for path in files}
    long = {name for name, count in lines.items() if count > MAX_LINES}
    wrong = [f"{name} has {lines[name]} lines, more than {MAX_LINES}" for name in long - LONGER_FILES.keys()]
    wrong += [f"{name} needs no exception any more" for name in LONGER_FILES.keys() - long]
    assert not wrong, "\n".join(sorted(wrong))


def test_every_recipe_of_the_project_is_tested() -> None:
    tests = {path: path.read_text(encoding="utf-8") for path in (PROJECT / "tests").rglob("test_*.py")}
    text = "\n".join(content for path, content in tests.items() if path != Path(__file__).resolve())
    recipes = [path.stem for path in (PROJECT / "include" / "recipes").glob("*.yaml")]
    assert "demo" in recipes
    unnamed = [name for name in recipes if not re.search(rf"\b{name}\b", text)]
    assert not unnamed, f"no test names the recipes {unnamed}"


def test_the_dag_file_is_parsed_fast_and_without_the_heavy_libraries(tmp_path: Path) -> None:
    environment = {**os.environ, "AIRFLOW_HOME": str(tmp_path), "PYTHONPATH": str(PROJECT)}

    def parse() -> dict:
        done = subprocess.run(
            [sys.executable, "-c", PARSE], cwd=PROJECT, env=environment, capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout.splitlines()[-1])

    parsed = min((parse() for _ in range(2)), key=lambda result: result["cost"])  # the first may compile the sources
    assert not HEAVY & set(parsed["modules"])
    assert parsed["cost"] < 1, "the DAG file costs no more CPU time than Airflow's SDK, on any machine"
    assert parsed["dags"] == sorted(path.stem for path in (PROJECT / "include" / "recipes").glob("*.yaml"))
    assert min(parsed["forms"]) > 50
    assert parsed["copies"] == 0, "a form belongs to its DAG: copies in each task make Airflow ten times slower to read"


def test_the_demos_dataset_is_what_its_generator_writes(tmp_path: Path) -> None:
    from include.demo.village import write_dataset

    write_dataset(tmp_path / "demo.jsonl")
    assert (tmp_path / "demo.jsonl").read_bytes() == (PROJECT / "include" / "recipes" / "demo.jsonl").read_bytes()


def test_every_target_of_the_makefile_is_there_once() -> None:
    makefile = (PROJECT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert targets
    assert sorted(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)) == sorted(targets[1].split())


@pytest.mark.parametrize("target", ["test-fast", "test", "test-cluster"])
def test_there_are_three_tiers_of_tests(target: str) -> None:
    assert re.search(rf"^{target}: .*## ", (PROJECT / "Makefile").read_text(), re.MULTILINE)
