"""The emulator against kernels that are known to work on GPUs: mlx-lm's and MLX's own."""

import mlx.core as mx
import mlx_lm.models.gated_delta as gated_delta
import numpy as np
import pytest
from metal import errors
from metal.compiler import MLX_INCLUDE, without_comments
from metal.emulator import EmulatedKernel, Log, emulated
from metal.signature import recorded_source, sign

pytestmark = pytest.mark.slow

REAL_METAL_KERNEL = mx.fast.metal_kernel
HEADERS = ("steel/gemm/gemm.h", "quantized_utils.h", "quantized.h")
QUANTIZED = "".join(f'#include "mlx/backend/metal/kernels/{h}"\n' for h in HEADERS)
TOLERANCE = {mx.float32: 2e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}


def relative_error(got: mx.array, want: mx.array) -> float:
    got, want = np.array(got.astype(mx.float32)), np.array(want.astype(mx.float32))
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


@pytest.fixture(scope="module")
def gated_delta_kernels():
    make = gated_delta._make_gated_delta_kernel
    with emulated(metal_available=True), pytest.MonkeyPatch.context() as patch:
        kernels = {
            "_gated_delta_kernel": make(),
            "_gated_delta_kernel_masked": make(has_mask=True),
            "_gated_delta_kernel_vec": make(vectorized=True),
            "_gated_delta_kernel_vec_masked": make(has_mask=True, vectorized=True),
            "_gated_delta_kernel_packed": gated_delta._make_gated_delta_packed_kernel(),
            "_gated_delta_kernel_xtree": gated_delta._make_gated_delta_kernel_xtree(),
        }
        for name, kernel in kernels.items():
            patch.setattr(gated_delta, name, kernel)
        yield kernels


def gated_delta_inputs(B, T, Hk, Hv, Dk, Dv, dtype, vectorized=False):
    mx.random.seed(B * 1000 + T * 100 + Dk)
    scale = Dk**-0.5
    q, k = (scale * mx.random.normal((B, T, Hk, Dk)) for _ in range(2))
    v = mx.random.normal((B, T, Hv, Dv))
    decay = mx.random.uniform(0.7, 1.0, (B, T, Hv, Dk) if vectorized else (B, T, Hv))
    beta = mx.random.uniform(0.0, 1.0, (B, T, Hv))
    state = 0.1 * mx.random.normal((B, Hv, Dv, Dk))
    q, k, v, beta = (x.astype(dtype) for x in (q, k, v, beta))
    return q, k, v, decay, beta, state


# B, T, Hk, Hv, Dk, Dv
SHAPES = [(1, 1, 1, 2, 32, 8), (2, 5, 2, 4, 64, 12), (1, 9, 1, 3, 96, 8), (1, 3, 2, 2, 128, 16)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).split(".")[-1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_delta_of_mlx_lm(gated_delta_kernels, shape, vectorized, masked, dtype):
    inputs = gated_delta_inputs(*shape, dtype, vectorized)
    B, T = shape[:2]
    mask = mx.random.uniform(shape=(B, T)) > 0.4 if masked else None
    y, state = gated_delta.gated_delta_kernel(*inputs, mask)
    wanted_y, wanted_state = gated_delta.gated_delta_ops(*inputs, mask)
    if masked:
        wanted_y = mx.where(mask[..., None, None], wanted_y, 0)
    assert relative_error(y, wanted_y) <= TOLERANCE[dtype]
    assert relative_error(state, wanted_state) <= 2e-6


def test_three_forms_of_the_gated_delta_kernel_agree_to_the_last_bit(gated_delta_kernels):
    # What mlx-lm observed on GPUs: simd_sum adds in the order of the explicit tree.
    inputs = gated_delta_inputs(2, 4, 1, 2, 128, 16, mx.bfloat16)
    packed = gated_delta.gated_delta_kernel(*inputs)
    for other in (gated_delta.gated_delta_kernel_xtree, gated_delta.gated_delta_kernel_unpacked):
        for a, b in zip(packed, other(*inputs), strict=True):
            assert mx.array_equal(a, b)


def test_the_source_of_gated_delta_is_what_mlx_generates(gated_delta_kernels, tmp_path):
    kernel = gated_delta_kernels["_gated_delta_kernel"]
    inputs = [*gated_delta_inputs(1, 2, 1, 2, 64, 8, mx.bfloat16), mx.array(2)]
    template = dict(InT=mx.bfloat16, StT=mx.float32, Dk=64, Dv=8, Hk=1, Hv=2)
    outputs = [mx.bfloat16, mx.float32]
    real = REAL_METAL_KERNEL(
        name=kernel.name,
        input_names=kernel.input_names,
        output_names=kernel.output_names,
        source=kernel.source,
    )

    def call(*arrays):
        return real(
            inputs=list(arrays),
            template=list(template.items()),
            grid=(32, 8, 2),
            threadgroup=(32, 4, 1),
            output_shapes=[(1, 2, 2, 8), (1, 2, 8, 64)],
            output_dtypes=outputs,
        )

    file = tmp_path / "kernel.mlxfn"
    mx.export_function(str(file), call, *inputs)
    signature = sign(
        kernel.name,
        [(n, a.dtype, a.shape) for n, a in zip(kernel.input_names, inputs, strict=True)],
        list(zip(kernel.output_names, outputs, strict=True)),
        list(template.items()),
        header="",
        source=kernel.source,
        atomic_outputs=False,
    )
    assert signature.source() == recorded_source(file.read_bytes())


def test_gated_delta_reads_its_state_once(gated_delta_kernels):
    kernel = gated_delta_kernels["_gated_delta_kernel"]
    q, k, v, decay, beta, state = gated_delta_inputs(1, 2, 2, 4, 64, 32, mx.bfloat16)
    gated_delta.gated_delta_kernel(q, k, v, decay, beta, state)
    traffic = kernel.log.launches[-1].traffic
    assert traffic["state_in"].read_bytes == traffic["state_in"].unique_read_bytes == state.nbytes
    assert traffic["state_out"].written_bytes == state.nbytes
    # 32 lanes share a value; each of the 32 rows of a head reads q again.
    assert traffic["q"].unique_read_bytes == q.nbytes
    assert traffic["q"].read_bytes == q.nbytes * 32 * 2


def test_a_gated_delta_kernel_with_a_wrong_stride_is_found(gated_delta_kernels):
    right = gated_delta_kernels["_gated_delta_kernel"]
    wrong = right.source.replace("v_ += Hv * Dv;", "v_ += Hv * Dk;")
    kernel = EmulatedKernel(right.name, right.input_names, right.output_names, wrong)
    inputs = gated_delta_inputs(1, 3, 1, 2, 32, 8, mx.float32)
    with pytest.raises(errors.OutOfBoundsError, match="out of bounds of v"):
        kernel(
            inputs=[*inputs, 3],
            template=list(dict(InT=mx.float32, StT=mx.float32, Dk=32, Dv=8, Hk=1, Hv=2).items()),
            grid=(32, 8, 2),
            threadgroup=(32, 4, 1),
            output_shapes=[(1, 3, 2, 8), (1, 2, 8, 32)],
            output_dtypes=[mx.float32, mx.float32],
        )


class Quantized:
    """Random weights in MLX's affine layout, and what they give on the CPU in float32."""

    def __init__(self, rows, out, width, bits, group_size, dtype):
        mx.random.seed(bits)
        self.x = mx.random.normal((rows, width)).astype(dtype)
        weight = (width**-0.5 * mx.random.normal((out, width))).astype(dtype)
        self.parts = mx.quantize(weight, group_size=group_size, bits=bits)
        w, scales, biases = self.parts
        self.wanted = mx.quantized_matmul(
            self.x.astype(mx.float32),
            w,
            scales.astype(mx.float32),
            biases.astype(mx.float32),
            group_size=group_size,
            bits=bits,
        )
        self.template = [("T", dtype), ("group_size", group_size), ("bits", bits)]

    def run(self, call: str, grid, threadgroup, shared="") -> tuple[mx.array, Log]:
        kernel = EmulatedKernel(
            call.split("<")[0],
            ["w", "scales", "biases", "x", "width", "out", "rows"],
            ["y"],
            f"{shared}\n{call};",
            header=QUANTIZED,
        )
        rows, out = self.wanted.shape
        (y,) = kernel(
            inputs=[*self.parts, self.x, self.x.shape[1], out, rows],
            template=self.template,
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=[self.wanted.shape],
            output_dtypes=[self.x.dtype],
        )
        return y, kernel.log


PLACE = "threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup"


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize(
    ("group_size", "dtype"), [(32, mx.float16), (64, mx.bfloat16), (128, mx.float32)]
)
def test_qmv_fast_of_mlx(bits, group_size, dtype):
    case = Quantized(2, 16, 1024, bits, group_size, dtype)
    call = f"qmv_fast_impl<T, group_size, bits>(w, scales, biases, x, y, width, out, {PLACE})"
    y, log = case.run(call, grid=(64, 4, 1), threadgroup=(32, 2, 1))
    assert relative_error(y, case.wanted) <= TOLERANCE[dtype]
    # Each of the two rows of x reads every weight once.
    weights = log.launches[0].traffic["w"]
    assert weights.unique_read_bytes == case.parts[0].nbytes
    assert weights.read_bytes == 2 * case.parts[0].nbytes


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("width", [96, 544])
def test_qmv_of_mlx_with_odd_sizes(bits, width):
    case = Quantized(1, 13, width, bits, 32, mx.bfloat16)
    call = f"qmv_impl<T, group_size, bits>(w, scales, biases, x, y, width, out, {PLACE})"
    y, _ = case.run(call, grid=(32, 4, 1), threadgroup=(32, 2, 1))
    assert relative_error(y, case.wanted) <= TOLERANCE[mx.bfloat16]


@pytest.mark.parametrize(("bits", "dtype"), [(4, mx.float16), (6, mx.float32), (8, mx.bfloat16)])
def test_qmm_of_mlx_multiplies_with_simdgroup_matrices(bits, dtype):
    rows, out, width = 37, 64, 128
    case = Quantized(rows, out, width, bits, 64, dtype)
    shared = """
      constexpr int padded = 32 + 16 / sizeof(T);
      threadgroup T Xs[32 * padded];
      threadgroup T Ws[32 * padded];"""
    call = (
        "qmm_t_impl<T, group_size, bits, true>"
        "(w, scales, biases, x, y, Xs, Ws, width, out, rows, width, threadgroup_position_in_grid, "
        "thread_index_in_threadgroup, simdgroup_index_in_threadgroup, thread_index_in_simdgroup)"
    )
    y, log = case.run(call, grid=(out // 32 * 32, 2 * 2, 2), threadgroup=(32, 2, 2), shared=shared)
    assert relative_error(y, case.wanted) <= TOLERANCE[dtype]
    assert log.launches[0].num_matrix_macs == 64 * out * width


def softmax(x: mx.array, threads: int, header: str) -> tuple[mx.array, Log]:
    kernel = EmulatedKernel(
        "softmax",
        ["x", "width"],
        ["y"],
        "softmax_single_row<T, float>(x, y, width, threadgroup_position_in_grid.x, "
        "thread_position_in_threadgroup.x, thread_index_in_simdgroup, "
        "simdgroup_index_in_threadgroup);",
        header=header,
    )
    (y,) = kernel(
        inputs=[x, x.shape[-1]],
        template=[("T", x.dtype)],
        grid=(x.shape[0] * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )
    return y, kernel.log


def attention(q: mx.array, k: mx.array, v: mx.array, header: str) -> mx.array:
    _, query_heads, _, dim = q.shape
    _, heads, length, _ = k.shape
    kernel = EmulatedKernel(
        "sdpa_vector",
        ["q", "k", "v", "group", "length", "head_stride", "stride", "scale"],
        ["y"],
        "auto none = (const device bool*)k;"
        "sdpa_vector<T, D>(q, k, v, y, group, length, head_stride, stride, head_stride, stride, "
        "scale, none, k, length, length, length, k, length, threadgroup_position_in_grid, "
        "threadgroups_per_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);",
        header=header,
    )
    strides = [mx.array(n, mx.uint64) for n in (length * dim, dim)]
    return kernel(
        inputs=[q, k, v, query_heads // heads, length, *strides, dim**-0.5],
        template=[("T", q.dtype), ("D", dim)],
        grid=(1024 * query_heads, 1, 1),
        threadgroup=(1024, 1, 1),
        output_shapes=[q.shape],
        output_dtypes=[q.dtype],
    )[0]


def random_attention(query_heads, heads, dim, length, dtype):
    keys = mx.random.split(mx.random.key(dim + length), 3)
    shapes = [(1, query_heads, 1, dim), *[(1, heads, length, dim)] * 2]
    return [mx.random.normal(s, key=k).astype(dtype) for s, k in zip(shapes, keys, strict=True)]


def include(name: str) -> str:
    return f'#include "mlx/backend/metal/kernels/{name}"\n'


@pytest.mark.parametrize(("width", "threads"), [(1000, 256), (128, 32), (65, 64)])
def test_softmax_of_mlx_with_its_barriers(width, threads):
    x = (4 * mx.random.normal((3, width), key=mx.random.key(width))).astype(mx.bfloat16)
    y, log = softmax(x, threads, include("softmax.h"))
    wanted = mx.softmax(x.astype(mx.float32), axis=-1)
    assert relative_error(y, wanted) <= TOLERANCE[mx.bfloat16]
    assert log.launches[0].num_barriers == 3 * 5


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("heads", [(4, 2, 64), (3, 1, 128)], ids=str)
def test_attention_vector_of_mlx_with_1024_threads(heads, length):
    q, k, v = random_attention(*heads, length, mx.float16)
    y = attention(q, k, v, include("sdpa_vector.h"))
    q, k, v = (a.astype(mx.float32) for a in (q, k, v))
    wanted = mx.fast.scaled_dot_product_attention(q, k, v, scale=heads[2] ** -0.5)
    assert relative_error(y, wanted) <= TOLERANCE[mx.float16]


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


@pytest.mark.parametrize(
    ("file", "behind", "barrier"),
    [("softmax.h", "softmax_looped", n) for n in range(5)]
    + [("sdpa_vector.h", "sdpa_vector_2pass_1", n) for n in range(3)],
)
def test_each_barrier_of_mlx_is_missed_when_it_is_gone(file, behind, barrier):
    # The copyright sign in a comment is not ASCII.
    text = without_comments((MLX_INCLUDE / "mlx/backend/metal/kernels" / file).read_text())
    text = text[: text.rindex("template", 0, text.index(f"void {behind}("))]
    parts = text.split(BARRIER)
    header = BARRIER.join([*parts[:barrier], parts[barrier] + parts[barrier + 1]])
    header = BARRIER.join([header, *parts[barrier + 2 :]])
    with pytest.raises((errors.RaceError, errors.UninitializedError), match=r"(local_|score|outp)"):
        if file == "softmax.h":
            softmax(mx.random.normal((1, 1000), key=mx.random.key(0)), 256, header)
        else:
            attention(*random_attention(2, 1, 64, 40, mx.float32), header)
