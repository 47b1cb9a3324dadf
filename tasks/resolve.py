"""resolve: combine the recipe file and the values given for this run into one recipe with every revision pinned."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from include.base_model import fetch_config, pin_base
from include.chat.own_template import pin_template
from include.data.sources import absolute_dataset, absolute_source, pin_dataset, short_name
from include.engine.arguments import check_arguments
from include.engine.compatibility import check_base
from include.errors import UpToDate
from include.paths import var
from include.pipeline.contracts import ResolveOutput
from include.pipeline.outcomes import find_outcome, record_outcome
from include.pipeline.records import Lineage, log, recorded
from include.recipe import Recipe, dataset_ref, eval_ref, find_recipe, load_recipe
from include.registry import merged_uri, open_registry, registry_uri
from include.storage.artifacts import Artifact, Store
from include.storage.files import atomic_write, fingerprint, to_json
from tasks.stages import longest_try


def resolve(
    recipe_file: str,
    values: dict[str, Any],
    run_id: str,
    to_publish: bool = True,
    revision: str | None = None,
    force: bool = True,
) -> Lineage:
    """Check the recipe, pin the dataset and the base model to their revisions, and store the result.

    Args:
        recipe_file: name or path of the recipe.
        values: fields given at trigger time, in place of the file's.
        run_id: the run's name; its records and report are kept under it.
        to_publish: whether the run may publish; then the access to its registry is checked, too.
        revision: revision of the dataset that started the run; None: the newest that the recipe allows.
        force: run even if a run with the same recipe, data and base was finished.

    Raises:
        UpToDate: a run of the same recipe on the same data and base was published or refused.
        Conflict: the dataset is a file that has changed since the revision that started the run.
        BadRecipe: a field is unknown, of the wrong type or out of range, or does not fit the base; it is named.
        TooCostly: see `pin_template`.
        NotFound, NoPermission, Unreachable: the dataset or the base model does not exist or cannot be read.
        NoPermission: the store or the registry cannot be written.
    """
    store, name = Store(), Path(recipe_file).stem
    with recorded(store, name, run_id, "resolve") as record:
        recipe = load_recipe(find_recipe(recipe_file), values)
        template = pin_template(recipe)
        check_arguments(recipe)
        longest_try(recipe)  # refuses stages in timeout_hours that do not exist
        dataset, base = pin_dataset(dataset_ref(recipe), revision), pin_base(recipe)
        evaluation = _pin_evaluation(recipe)
        pinned = recipe.model_copy(
            update={
                "dataset": absolute_dataset(recipe.dataset),
                "dataset_revision": dataset,
                **evaluation,
                "base_model": absolute_source(recipe.base_model),
                "base_revision": base,
                "chat_template": template,
                "registry": registry_uri(recipe.name, recipe.registry),
            }
        )
        from_recipe_file = recipe == load_recipe(find_recipe(recipe_file))
        earlier = find_outcome(store, pinned)
        # what a run has trained on this base fits it; the check imports PyTorch, for some seconds
        if not earlier and (folder := fetch_config(pinned)):
            check_base(pinned, folder)
        if earlier and not force:
            if from_recipe_file and not earlier["from_recipe_file"]:
                # an earlier run had these values from the form; now the file has them, and the watch need not run
                record_outcome(store, pinned, **{**earlier, "from_recipe_file": True})
            raise _up_to_date(pinned, earlier)
        if to_publish:
            uri = str(pinned.registry)
            for place in (uri, merged_uri(uri)) if pinned.merged_16bit else (uri,):
                open_registry(place).check()  # find a missing permission before hours of training
        summary = f"dataset {short_name(recipe.dataset)}@{dataset[:8]}, base {short_name(recipe.base_model)}@{base[:8]}"
        if recipe.eval_dataset:
            summary += f", evaluated on {short_name(recipe.eval_dataset)}@{evaluation['eval_revision'][:8]}"
        artifact, reused = pin(store, pinned, summary)
        record.close(
            "done",
            reused=reused,
            summary=summary,
            fingerprint=artifact.fingerprint,
            folder=str(artifact.folder),
            from_recipe_file=from_recipe_file,
        )
        log.info("resolve done: %s", summary)
    return {"recipe": name, "run": run_id, "resolve": artifact.fingerprint}


def _pin_evaluation(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of the evaluation dataset with its revision pinned; {} if the recipe names none.

    Raises:
        BadRecipe: a list names a Hub dataset.
        NotFound, NoPermission, Unreachable: the dataset does not exist or cannot be read.
    """
    evaluation = eval_ref(recipe)
    if not recipe.eval_dataset or evaluation is None:
        return {}
    return {"eval_dataset": absolute_dataset(recipe.eval_dataset), "eval_revision": pin_dataset(evaluation)}


def pin(store: Store, recipe: Recipe, summary: str) -> tuple[Artifact, bool]:
    """Store a recipe with every revision pinned; return the artifact and whether it was there already."""
    content = recipe.to_json()
    key = fingerprint(content)
    if artifact := store.find(recipe.name, "resolve", key):
        return artifact, True
    out = var() / "work" / recipe.name / "resolve" / key
    shutil.rmtree(out, ignore_errors=True)
    with store.write_errors():
        atomic_write(out / ResolveOutput.RECIPE, to_json(content))
    return store.commit(
        out, recipe.name, "resolve", key, summary=summary, metadata=ResolveOutput().to_json(), inputs={}
    ), False


def _up_to_date(pinned: Recipe, earlier: dict[str, Any]) -> UpToDate:
    became = f"published as {earlier['version']}" if earlier["version"] else earlier["verdict"]
    data = f"{short_name(pinned.dataset)}@{str(pinned.dataset_revision)[:8]}"
    return UpToDate(
        f"nothing is new: {data}, base and recipe are those of the run {earlier['run']}, whose candidate was {became}",
        "Switch on force in the form to run all the same",
    )
