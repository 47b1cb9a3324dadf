"""pretrain: makes the demo's own base model, once; recipes that name a real base have no such task."""

from __future__ import annotations

from include.pipeline.stage import Result, StageContext, stage


@stage(
    version=1,
    recipe_fields=("base_model", "base_revision"),
    fingerprint_fn=lambda context: str(context.recipe.base_revision),
)
def pretrain(context: StageContext) -> Result:
    """Pretrain the base model of the demo and keep it in the store under its revision."""
    from include.demo.pretraining import pretrain as train_little_llama

    facts = train_little_llama(context.out, context.say)
    line = f"{facts['parameters'] / 1e6:.1f} M parameters, loss {facts['first_loss']:.2f} -> {facts['last_loss']:.2f}"
    return Result(line, facts)
