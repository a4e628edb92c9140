"""Quantization of arrays to the affine layout of MLX."""

from .affine import dequantize, quantize

__all__ = ["dequantize", "quantize"]
