"""The demos: the invented village of `make demo`, the pretraining of its base, and the base of `make demo-real`."""
