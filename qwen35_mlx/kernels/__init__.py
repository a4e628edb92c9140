"""The hot operations, each with MLX operations, as a Metal kernel, and as a reference in fp32.

`<op>.py` has the operation, whose argument `kernels` says which operations run as kernels, and
`<op>_kernel`, which launches `<op>.metal`. attention_heads.py is a good start. Kernels for one to
eight tokens keep their sums in registers; prefill has its own kernels. Shared parts: metal.py
builds kernels, matrix.py describes weights to them, common.metal precedes the source of each,
naive.py has the references, checks.py and choice.py decide on a Mac which kernels run.
"""

import os

# MLX reads it once, at the first matrix product. With TF32, GPUs that have matrix units round the
# factors of float32 products to 11 bits: in the delta rule, and in the reference of a comparison.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
