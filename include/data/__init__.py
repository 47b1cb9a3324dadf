"""Data: sources of rows, reading ShareGPT, expectations, deduplication, profile."""
