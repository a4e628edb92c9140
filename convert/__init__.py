"""Hugging Face checkpoint to MLX shards, a slice of a tensor at a time."""

from .job import convert, verify
from .plan import Plan, plan

__all__ = ["Plan", "convert", "plan", "verify"]
