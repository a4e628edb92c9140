"""Issue slots per weight in the inner loops of the matrix kernels, counted from LLVM IR.

The source of a kernel is compiled by clang (-O2, loops of constant length unrolled, no
vectorization) and run in the emulator, where each basic block adds the cost of its instructions.
Two runs, one over twice the columns, are subtracted, so that only the loop over the columns is
left. The same is done with the source of MLX's `qmv_fast` and `qmv_wide`, from the headers in its
wheel.

COSTS is a model: it has the throughput of Apple GPUs as others have measured it
(github.com/philipturner/metal-benchmarks, M1 and M2). The sums were not measured on a Mac.
"""

import functools
import re
import sys
from collections import Counter
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from metal import compiler
from metal.emulator import EmulatedKernel, emulated, load
from metal.signature import Signature

from qwen35_mlx.kernels import metal
from qwen35_mlx.kernels.expert_step import expert_down_kernel, expert_gate_up_kernel
from qwen35_mlx.kernels.matrix import BITS, Matrix, matrix
from qwen35_mlx.kernels.projection import FEW_ROWS, project_kernel
from qwen35_mlx.kernels.router import Routing

TOKENS = (1, 2, 4, 8)
# Slots for 32 bits; instructions on 64 bits cost twice as much.
COSTS = {
    # These only rename registers, or halves of them, or make constants of an instruction.
    **dict.fromkeys("phi bitcast zext trunc freeze ret unreachable ptrtoint inttoptr".split(), 0),
    **dict.fromkeys("extractelement insertelement shufflevector alloca".split(), 0),
    **dict.fromkeys("fadd fsub fmul fneg fcmp fpext fptrunc add sub and or xor sext".split(), 1),
    **dict.fromkeys("icmp select br switch getelementptr".split(), 1),
    **dict.fromkeys("shl lshr ashr mul sitofp uitofp fptosi fptoui".split(), 4),
    **dict.fromkeys("fdiv udiv sdiv urem srem frem".split(), 16),
}
CALLS = {
    **dict.fromkeys("llvm.lifetime llvm.assume llvm.experimental llvm.dbg".split(), 0),
    **dict.fromkeys("llvm.fma llvm.smin llvm.smax llvm.umin llvm.umax llvm.fabs".split(), 1),
    **dict.fromkeys("llvm.minnum llvm.maxnum llvm.abs".split(), 1),
    **dict.fromkeys("llvm.fshl llvm.fshr".split(), 4),
}
# For simd_sum, exp and the like, which are never in a loop over columns.
OTHER_CALL = 16

UNROLLED = ["-fPIC", "-O2", "-fno-stack-protector", "-fno-vectorize", "-fno-slp-vectorize"]
UNROLLED += ["-fno-threadsafe-statics", "-Wno-everything", "-ffp-contract=fast"]
for option in ("unroll-threshold=1000000", "unroll-full-max-count=512", "inline-threshold=1000000"):
    UNROLLED += ["-mllvm", f"-{option}"]
for option in ("unroll-runtime=0", "unroll-allow-partial=0"):
    UNROLLED += ["-mllvm", f"-{option}"]

INSTRUCTION = re.compile(
    r"^\s+(?:(?P<result>%[\w.\"-]+) = )?(?:tail |notail |musttail )?(?P<op>[a-z]+)\b(?P<rest>.*)"
)
TYPE = re.compile(r"<(\d+) x (\w+)>|\b(i\d+|float|half|bfloat|double|ptr)\b")
BITS_OF = {"float": 32, "half": 16, "bfloat": 16, "double": 64, "ptr": 64}


def lanes_and_bits(text: str) -> tuple[int, int]:
    """Number of lanes, and bits of each, of the first type in the text."""
    found = TYPE.search(text)
    if not found:
        return 1, 32
    element = found[2] or found[3]
    bits = BITS_OF.get(element) or int(element[1:])
    return int(found[1] or 1), bits


def cost(op: str, rest: str) -> float:
    """Slots of one instruction; raises KeyError if it is not in the tables."""
    lanes, bits = lanes_and_bits(rest)
    if op == "load":
        return lanes * bits / 32
    if op == "store":
        return lanes * bits / 32
    if op == "call":
        called = re.search(r"@([\w.]+)", rest)
        name = called[1] if called else ""
        known = [slots for prefix, slots in CALLS.items() if name.startswith(prefix)]
        return lanes * known[0] if known else OTHER_CALL
    if op == "br":
        return 1 if rest.lstrip().startswith("i1") else 0
    if op == "getelementptr":
        # With constant indices it becomes the offset of a load.
        return 1 if re.search(r"i\d+ %", rest) else 0
    wide = 2 if bits == 64 and op in ("add", "sub", "and", "or", "xor", "mul", "shl") else 1
    return COSTS[op] * lanes * wide


def block_costs(function: list[str]) -> dict[int, float]:
    """Slots by line of a function; a product that only a sum uses is fused with it."""
    found = {i: m for i, line in enumerate(function) if (m := INSTRUCTION.match(line))}
    uses = Counter(name for m in found.values() for name in re.findall(r"%[\w.\"-]+", m["rest"]))
    products = {
        m["result"]: i
        for i, m in found.items()
        if m["op"] == "fmul" and "contract" in m["rest"] and uses[m["result"]] == 1
    }
    costs = {i: cost(m["op"], m["rest"]) for i, m in found.items()}
    for m in found.values():
        if m["op"] in ("fadd", "fsub") and "contract" in m["rest"]:
            factors = [n for n in re.findall(r"%[\w.\"-]+", m["rest"]) if n in products]
            if factors:
                costs[products[factors[0]]] = 0
    return costs


def count_slots(ir: str) -> str:
    """The module with code in each basic block that adds 32 times its slots to the counter."""
    out: list[str] = []
    function: list[str] = []
    serial = 0
    for line in ir.splitlines():
        function.append(line)
        if not line.startswith("}"):
            if not function[0].startswith("define"):
                out.append(function.pop())
            continue
        costs = block_costs(function)
        starts = [i for i, text in enumerate(function) if re.match(r"[\w.$\"-]+:|define", text)]
        for start, end in reversed(list(zip(starts, [*starts[1:], len(function)], strict=True))):
            total = sum(costs.get(i, 0) for i in range(start + 1, end))
            first = next((i for i in range(start + 1, end) if i in costs), None)
            while first is not None and INSTRUCTION.match(function[first])["op"] == "phi":
                first += 1
            if first is None or not total:
                continue
            serial += 1
            function[first:first] = [
                f"  %emu.a{serial} = load i64, ptr @emu_float_ops, align 8",
                f"  %emu.b{serial} = add i64 %emu.a{serial}, {round(32 * total)}",
                f"  store i64 %emu.b{serial}, ptr @emu_float_ops, align 8",
            ]
        out += function
        function = []
    return "\n".join([*out, "@emu_float_ops = global i64 0, align 8", ""])


class CountedKernel(EmulatedKernel):
    """An emulated kernel that counts slots in place of float operations, without memory checks."""

    def _library(self, signature: Signature):
        return load(compiler.compiled(signature, UNROLLED, count_slots))

    def _run(self, *arguments):
        # Skip the check of what is written.
        return super()._run(*arguments[:-1], True)


@functools.cache
def quantized(out: int, width: int, bits: int, group_size: int, experts: int = 0) -> Matrix:
    """A matrix, or a stack of them, with bf16 scales."""
    layer = nn.QuantizedLinear(width, out, False, group_size, bits)
    layer.set_dtype(mx.bfloat16)
    if experts:
        for name in ("weight", "scales", "biases"):
            setattr(layer, name, mx.repeat(getattr(layer, name)[None], experts, 0))
    made = matrix(layer)
    assert made is not None
    return made


def ones(*shape: int) -> mx.array:
    """Activations."""
    return mx.ones(shape, mx.bfloat16)


def per_weight(run, rows: int, width: int) -> float:
    """Slots per weight of `run(width)` over `rows` rows, in the loop over the columns alone."""
    with emulated(CountedKernel) as log:
        metal.clear()
        run(width), run(2 * width)
    metal.clear()
    short, long = (launch.num_float_ops / 32 for launch in log.launches)
    return (long - short) / (rows * width)


def ours(bits: int, num_tokens: int, *, norm: bool = False, group_size: int = 64) -> float:
    """Slots of `projection` with one matrix, of x or of the RMS norm of x."""
    rows, width = FEW_ROWS, 1024

    def run(columns: int) -> None:
        before = nn.RMSNorm(columns) if norm else None
        weights = [quantized(rows, columns, bits, group_size)]
        project_kernel(ones(num_tokens, columns), weights, mx.bfloat16, before)

    return per_weight(run, rows, width)


def ours_experts(bits: int, group_size: int = 64) -> dict[str, float]:
    """Slots of both expert kernels for one token with one routed expert."""
    rows, width = 16, 2048
    routing = Routing(mx.zeros((1, 1), mx.uint32), mx.ones((1, 1)), mx.ones((1, 1)))

    def gate_up(columns: int) -> None:
        shared, routed = (quantized(rows, columns, bits, group_size, n) for n in (0, 1))
        expert_gate_up_kernel(ones(1, columns), [shared] * 2, routing, [routed] * 2)

    def down(columns: int) -> None:
        shared, routed = (quantized(rows, columns, bits, group_size, n) for n in (0, 1))
        hidden = [ones(1, columns), ones(1, 1, columns)]
        expert_down_kernel(hidden, ones(1, rows), shared, routing, [routed])

    return {
        "expert_gate_up": per_weight(gate_up, 4 * rows, width),
        "expert_down": per_weight(down, 2 * rows, width),
    }


QMV = "qmv_fast_impl<T, GROUP, BITS>(w, scales, biases, x, y, in, out, {place});"
QMV_WIDE = (
    "qmv_wide_impl<T, GROUP, BITS, VECTORS, 8>(w, scales, biases, x, y, in, out, m, {place});"
)
PLACE = "threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup"
HEADERS = "".join(
    f'#include "mlx/backend/metal/kernels/{name}.h"\n'
    for name in ("steel/gemm/gemm", "quantized_utils", "quantized")
)


def mlx_kernel(name: str, bits: int, vectors: int, group_size: int = 64) -> float:
    """Slots of `qmv_fast` run once per vector, or of `qmv_wide` for all vectors at once."""
    rows, width = 64, 2048
    wide = name == "qmv_wide"
    call = (QMV_WIDE if wide else QMV).format(place=PLACE)

    def run(columns: int) -> None:
        kernel = mx.fast.metal_kernel(
            name=name,
            input_names=["w", "scales", "biases", "x", "in", "out", "m"],
            output_names=["y"],
            header=HEADERS,
            source=call,
        )
        kernel(
            inputs=[
                *quantized(rows, columns, bits, group_size).arrays,
                *(ones(vectors, columns), columns, rows, vectors),
            ],
            template=[
                *(("T", mx.bfloat16), ("GROUP", group_size), ("BITS", bits)),
                ("VECTORS", vectors),
            ],
            grid=(32 if wide else 32 * vectors, 2 * rows // 8, 1),
            threadgroup=(32, 2, 1),
            output_shapes=[(vectors, rows)],
            output_dtypes=[mx.bfloat16],
        )

    return per_weight(run, rows, width)


@functools.cache
def mlx(bits: int, num_tokens: int) -> float:
    """The cheaper of MLX's two: `qmv` for each row or, from M3 on, `qmv_wide` in tiles.

    A tile has up to five rows, and reads and unpacks all weights.
    """
    rows = num_tokens * mlx_kernel("qmv_fast", bits, 1)
    if num_tokens == 1:
        return rows
    num_tiles = -(-num_tokens // 5)
    vectors = -(-num_tokens // num_tiles)
    return min(rows, num_tiles * mlx_kernel("qmv_wide", bits, vectors))


def slots_per_weight(*, norm: bool = False) -> dict[str, dict[str, list[float]]]:
    """bits -> rows of activations -> [ours, MLX's], for all rows together, bf16, groups of 64.

    With `norm` ours includes the RMS norm before the matrix, for which MLX has another dispatch.
    """
    return {
        str(bits): {
            str(t): [round(ours(bits, t, norm=norm), 2), round(mlx(bits, t), 2)] for t in TOKENS
        }
        for bits in BITS
    }


def print_slots(table: dict[str, dict[str, list[float]]]) -> None:
    """Print ours, MLX's and their ratio."""
    print(f"{'bits':>4}" + "".join(f"{f'slots, T = {t}':>24}" for t in TOKENS))
    for bits, row in table.items():
        cells = (f"{a:6.2f} / {b:5.2f} = {a / b:.2f}" for a, b in row.values())
        print(f"{bits:>4}" + "".join(f"{cell:>24}" for cell in cells))


def main() -> None:
    """Print the tables."""
    print_slots(slots_per_weight())
    print("With the norm before it in ours:")
    print_slots(slots_per_weight(norm=True))
    print("One routed expert, T = 1:")
    for bits in BITS:
        print(bits, {name: round(slots, 2) for name, slots in ours_experts(bits).items()})


if __name__ == "__main__":
    main()
