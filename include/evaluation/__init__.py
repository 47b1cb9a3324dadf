"""Evaluation: answer checks, the gate, the shuffled-prompt control."""
