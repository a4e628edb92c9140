"""Evaluation of a model: its speed on this machine, and its quality."""
