"""What the stages share: the recipe, the artifact store, templates, checks, the training engine, the registries."""
