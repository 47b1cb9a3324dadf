"""Reporting: the run page, the approval page, the model card and plots, made from recorded metadata only."""
