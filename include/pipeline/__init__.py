"""The pipeline's frame: stages, sharding, outcomes."""
