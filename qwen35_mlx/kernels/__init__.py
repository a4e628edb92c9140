"""The hot operations, each on plain MLX, as a Metal kernel, and as the truth in fp32.

`<op>.py` holds the operation, whose argument `kernels` says which run as kernels, and beside it
`<op>_kernel`, which launches `<op>.metal`. Begin with attention_heads.py. Kernels for one to eight
tokens keep their sums in registers; prefill has its own. What is the same for all: metal.py builds
kernels, matrix.py tells them of weights, common.metal stands before each of them, naive.py is what
they are held against, checks.py and choice.py decide on a Mac which of them run.
"""

import os

# MLX reads it once, at the first matrix product. With it, GPUs that have matrix units round the
# factors of a float32 product to 11 bits: those of the delta rule, and the truth of a comparison.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
