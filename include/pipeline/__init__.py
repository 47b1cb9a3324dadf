"""The pipeline's frame: stages and their contracts, records of runs, sharding, outcomes, retention."""
