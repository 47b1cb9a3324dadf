"""The DAG `rollback`: a version that was published before becomes live again."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from airflow.sdk import DAG, Param, task

from include.errors import RetuneError
from include.paths import recipe_files
from include.pipeline.records import log
from include.recipe import load_recipe
from include.registry import open_registry, registry_uri
from plugins.credentials import hub_account
from plugins.retry_policy import RETRIES
from tasks.rollback import rollback

DOC = """### Rollback

Press **Trigger**, choose the recipe and the version, and say why. That version becomes live again: on the Hub as one
new commit with that version's files, in a folder by switching `live`. The reason stays in the registry's history.

It may be triggered while a training runs. A run that was compared with what was live before does not publish over it:
it ends, and its `evaluate` has to be cleared. The version that was taken back does not go live again by itself, also
not when a run makes it again.
"""


def _choices() -> tuple[list[str], list[str]]:
    """The recipes that can be read, and the versions of those that publish into a folder; parsing asks no network."""
    names, versions = [], set()
    for file in recipe_files():
        with suppress(RetuneError):
            recipe = load_recipe(file)
            names.append(file.stem)
            uri = registry_uri(recipe.name, recipe.registry)
            if uri.startswith("file://"):
                versions |= {version.name for version in open_registry(uri).versions()}
    return names, sorted(versions, key=lambda name: int(name[1:]))


_recipes, _versions = _choices()

with DAG(
    "rollback",
    description="make a version that was published before live again",
    doc_md=DOC,
    params={
        "recipe": Param(
            _recipes[0], enum=_recipes, title="recipe", type="string",
            description_md="The model whose live version is to change.",
        ),
        "version": Param(
            None, type="string", minLength=1, examples=_versions, title="version",
            description_md="v1, v2 ... A version that is not there is refused, and the log lists those that are.",
        ),
        "reason": Param(
            None, type="string", minLength=1, title="reason", description_md="Why. It stays in the history."
        ),
    },
    schedule=None,
    catchup=False,
    tags=["retune"],
    default_args=RETRIES,
):  # fmt: skip

    @task(task_id="rollback", doc_md=rollback.__doc__)
    def _rollback(params: Any = None) -> str:
        with hub_account():
            line = rollback(params["recipe"], params["version"], params["reason"])
        log.info("%s", line)
        return line

    _rollback()
