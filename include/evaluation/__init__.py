"""Evaluation: checks of generated answers, the gate, the shuffled-prompt control. Models run in `include.engine`."""
