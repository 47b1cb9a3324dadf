"""The demo: the invented village that `make demo` trains on, and the pretraining of its base model."""
