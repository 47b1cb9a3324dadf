"""Reporting: model card, pages, plots."""
