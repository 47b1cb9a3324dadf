"""Datasets: sources of rows, ShareGPT parsing, data checks, deduplication, profile. It does not know recipes."""
