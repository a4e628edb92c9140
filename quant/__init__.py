"""Arrays in, arrays out: affine quantization in the layout of mlx."""

from .affine import dequantize, quantize

__all__ = ["dequantize", "quantize"]
