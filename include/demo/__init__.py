"""The demo: the invented village that `make demo` trains on."""
