"""pretrain: make the demo's base model, once. Recipes with a real base do not have this stage."""

from __future__ import annotations

from include.pipeline.contracts import PretrainOutput
from include.pipeline.stage import Result, StageContext, stage


@stage(
    version=1,
    recipe_fields=("base_model", "base_revision"),
    fingerprint_fn=lambda context: str(context.recipe.base_revision),
)
def pretrain(context: StageContext) -> Result[PretrainOutput]:
    """Pretrain the small Llama of `include/demo` and keep it in the store under its revision."""
    from include.demo.village import pretrain as train_little_llama

    made = PretrainOutput(**train_little_llama(context.out, context.progress))
    summary = f"{made.parameters / 1e6:.1f} M parameters, loss {made.first_loss:.2f} -> {made.last_loss:.2f}"
    return Result(summary, made)
