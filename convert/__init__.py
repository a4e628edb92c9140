"""Converts a Hugging Face checkpoint to MLX, a slice of a tensor at a time."""

from .job import convert, verify
from .plan import Plan, plan

__all__ = ["Plan", "convert", "plan", "verify"]
