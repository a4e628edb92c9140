"""The emulator against planted bugs: each must be found, and the correct twin must pass."""

import os
import re
import shutil

import mlx.core as mx
import numpy as np
import pytest
from metal import compiler, errors, names
from metal.emulator import EmulatedKernel, emulated
from metal.signature import recorded_source, sign

pytestmark = pytest.mark.slow


def run(source, a=None, *, n=64, grid=None, threadgroup=None, dtype=mx.float32, **options):
    """One input `a`, one output `y` of n elements, n threads in one threadgroup."""
    a = mx.arange(n, dtype=mx.float32) if a is None else a
    call = {k: options.pop(k) for k in ("template", "init_value") if k in options}
    kernel = EmulatedKernel("planted", ["a"], ["y"], source, **options)
    (y,) = kernel(
        inputs=[a],
        grid=grid or (n, 1, 1),
        threadgroup=threadgroup or (n, 1, 1),
        output_shapes=[(n,)],
        output_dtypes=[dtype],
        **call,
    )
    return y, kernel.log.launches[-1]


I = "uint i = thread_position_in_grid.x;\n"  # noqa: E741
SHARED = I + "threadgroup float b[64];\n"

# What each kind of bug looks like, and the words that must name it.
BUGS = {
    "read behind the end": (
        I + "y[i] = a[i + 1];",
        errors.OutOfBoundsError,
        r"planted: read of 4 bytes out of bounds of a: index 64 of 64, by thread \(63, 0, 0\)",
    ),
    "write before the start": (
        I + "y[int(i) - 1] = a[i];",
        errors.OutOfBoundsError,
        r"write of 4 bytes out of bounds of y: index -1 of 64, by thread \(0, 0, 0\)",
    ),
    "far out of bounds": (
        I + "y[i] = a[i * 100000];",
        errors.OutOfBoundsError,
        "out of bounds",
    ),
    "vector that sticks out": (
        I + "float4 v = ((device float4*)(a + 64 - 4 * (i / 32)))[0]; y[i] = v.x;",
        errors.OutOfBoundsError,
        "read of 16 bytes out of bounds of a",
    ),
    "threadgroup memory out of bounds": (
        SHARED + "b[i + 1] = a[i]; threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = b[i];",
        errors.OutOfBoundsError,
        "write of 4 bytes out of bounds of b: index 64 of 64",
    ),
    "missing barrier": (
        SHARED + "b[i] = a[i]; y[i] = b[63 - i];",
        (errors.RaceError, errors.UninitializedError),
        r"b\[",
    ),
    "barrier for the other memory": (
        SHARED + "b[i] = a[i]; threadgroup_barrier(mem_flags::mem_device); y[i] = b[63 - i];",
        errors.RaceError,
        r"b\[63\] is read by thread \(0, 0, 0\).* and written by thread 63",
    ),
    "simdgroup barrier between simdgroups": (
        SHARED + "b[i] = a[i]; simdgroup_barrier(mem_flags::mem_threadgroup); y[i] = b[63 - i];",
        (errors.RaceError, errors.UninitializedError),
        r"b\[",
    ),
    "second write without a barrier": (
        SHARED
        + """b[i] = a[i]; threadgroup_barrier(mem_flags::mem_threadgroup);
        float v = b[63 - i]; b[i] = v; y[i] = v;""",
        errors.RaceError,
        "and (read|written) by",
    ),
    "two threads write different values": (
        I + "y[i / 2] = a[i]; y[32 + i / 2] = 0;",
        errors.RaceError,
        r"y\[0\] is written by .*, with another value",
    ),
    "two threads write different structs": (
        I
        + """y[i] = 0; threadgroup_barrier(mem_flags::mem_device);
        struct Ten { float v[10]; }; Ten t; for (int k = 0; k < 10; k++) t.v[k] = i * k;
        ((device Ten*)y)[i / 32] = t;""",
        errors.RaceError,
        r"y\[\d\] is written by .*, with another value",
    ),
    "one threadgroup reads what another wrote": (
        I + "y[i] = a[i]; threadgroup_barrier(mem_flags::mem_device); y[i] = y[i ^ 32] + 1;",
        (errors.RaceError, errors.UninitializedError),
        r"y\[",
    ),
    "output read before it is written": (
        I + "y[i] += a[i];",
        errors.UninitializedError,
        r"y\[0\] is read by thread \(0, 0, 0\)",
    ),
    "threadgroup memory nobody wrote": (
        SHARED
        + """if (i < 63) b[i] = a[i];
        threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = b[i];""",
        errors.UninitializedError,
        r"b\[63\] is read by thread \(63, 0, 0\)",
    ),
    "output left unwritten": (
        I + "if (i != 7) y[i] = a[i];",
        errors.UninitializedError,
        r"output y\[7\] is left unwritten",
    ),
    "variable that nobody sets": (
        I + "float v; if (a[i] > 3) v = a[i]; y[i] = v;",
        errors.NotMetalError,
        "uninitialized",
    ),
    "barrier not reached by all": (
        I + "y[i] = a[i]; if (i < 32) threadgroup_barrier(mem_flags::mem_none);",
        errors.DivergenceError,
        r"is at threadgroup_barrier in line 2, but thread \(\d+, 0, 0\) .* has returned",
    ),
    "barrier inside a branch of lanes": (
        I + "if (i & 1) threadgroup_barrier(mem_flags::mem_none); y[i] = simd_sum(a[i]);",
        errors.DivergenceError,
        "is at simd_sum in line 2, but .* is at threadgroup_barrier",
    ),
    "simd operation not reached by all lanes": (
        I + "float v = a[i]; if (i != 5) v = simd_sum(v); y[i] = v;",
        errors.DivergenceError,
        r"simd_sum .* but thread \(5, 0, 0\) .* has returned",
    ),
    "two barriers for one": (
        I
        + """if (i < 32) threadgroup_barrier(mem_flags::mem_none);
        else threadgroup_barrier(mem_flags::mem_none);
        y[i] = a[i];""",
        errors.DivergenceError,
        "line 2, but .* line 3",
    ),
    "lane that does not exist": (
        I + "y[i] = simd_shuffle(a[i], 32);",
        errors.DivergenceError,
        "a lane that does not exist",
    ),
    "write to an input": (
        I + "((device float*)a)[i] = 1; y[i] = a[i];",
        errors.ReadOnlyError,
        r"write to input a\[0\]",
    ),
    "misaligned vector": (
        I + "y[i] = ((const device float2*)(a + 1))[i / 4].x;",
        errors.MisalignedError,
        "not a multiple",
    ),
    "too much threadgroup memory": (
        I + "threadgroup float b[8193]; b[i] = a[i]; y[i] = b[i];",
        errors.ThreadgroupMemoryError,
        "32772 bytes of threadgroup memory with b",
    ),
    "too much in two arrays": (
        I + "threadgroup float b[8192], c[1]; b[i] = a[i]; c[0] = 0; y[i] = b[i] + c[0];",
        errors.ThreadgroupMemoryError,
        "with c",
    ),
    "function of another language": (
        I + "y[i] = expf(a[i]);",
        errors.NotMetalError,
        "expf",
    ),
    "function in the wrong namespace": (
        I + "y[i] = metal::sigmoid(a[i]);",
        errors.NotMetalError,
        "sigmoid",
    ),
    "builtin of clang": (
        I + "y[i] = __builtin_expf(a[i]);",
        errors.NotMetalError,
        "__builtin_expf",
    ),
    "double": (I + "double v = a[i]; y[i] = v;", errors.NotMetalError, "double"),
    "syntax": (I + "y[i] = a[i]", errors.NotMetalError, "expected ';'"),
    "max of two types": (I + "y[i] = max(a[i], 0);", errors.NotMetalError, "max"),
    "pointer without address space": (
        I + "const float* p = a; y[i] = p[i];",
        errors.AddressSpaceError,
        "2:14: error: .*device float const",
    ),
    "wrong address space": (
        SHARED + "device float* p = b; p[i] = a[i]; y[i] = p[i];",
        errors.AddressSpaceError,
        "3:15: error: cannot initialize a variable of type 'device float",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug):
    source, error, words = BUGS[bug]
    with pytest.raises(error, match=words) as caught:
        run(source, threadgroup=(32, 1, 1) if "threadgroup reads" in bug else None)
    assert str(caught.value).startswith("planted: ")


def test_float_does_not_become_bfloat_by_itself():
    with pytest.raises(errors.NotMetalError, match="bfloat"):
        run(I + "y[i] = a[i];", dtype=mx.bfloat16)
    with pytest.raises(errors.NotMetalError, match="bfloat"):
        run(I + "y[i] = T(a[i]) * a[i];", dtype=mx.bfloat16, template=[("T", mx.bfloat16)])
    y, _ = run(I + "y[i] = T(a[i]) * T(0.5f);", dtype=mx.bfloat16, template=[("T", mx.bfloat16)])
    assert mx.array_equal(y, mx.arange(64).astype(mx.bfloat16) * 0.5)


def test_a_helper_needs_the_address_space_of_its_argument():
    helper = "inline float first({} float* p) {{ return p[0]; }}\n"
    for space in ("", "thread", "threadgroup", "device"):
        with pytest.raises(errors.AddressSpaceError):
            run(I + "y[i] = first(a);", mx.arange(7.0), header=helper.format(f"const {space}"))
    y, _ = run(I + "y[i] = first(a);", mx.arange(7.0), header=helper.format("const constant"))
    assert mx.array_equal(y, mx.zeros(64))


ADD = "atomic_fetch_add_explicit(&y[{}], {}, memory_order_relaxed);"


def test_results_may_not_depend_on_the_order_of_threads():
    # Atomics are no race, but who comes first is open, and so is how sums of floats are rounded.
    turn = I + "int n = " + ADD.format(0, "1") + "if (i > 0) " + ADD.format("i", "n")
    with pytest.raises(errors.OrderError, match=r"y\[\d+\] is another number"):
        run(turn, atomic_outputs=True, dtype=mx.int32, init_value=0)
    values = mx.random.normal((64,), key=mx.random.key(1))
    with pytest.raises(errors.OrderError, match=r"y\[0\]"):
        run(I + ADD.format(0, "a[i]"), values, atomic_outputs=True, init_value=0)
    y, _ = run(I + ADD.format(0, "a[i]"), atomic_outputs=True, init_value=0)
    assert y[0].item() == 63 * 32 and y[1:].sum().item() == 0


def test_threadgroup_of_more_than_1024_threads():
    with pytest.raises(errors.ThreadgroupSizeError, match="1025 threads"):
        run(I + "y[i] = a[i];", n=1025)
    y, launch = run(I + "y[i] = a[i];", n=1024)
    assert mx.array_equal(y, mx.arange(1024)) and launch.num_threads == 1024


def test_the_correct_twins_of_the_planted_bugs_pass():
    reverse = "b[i] = a[i]; threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = b[63 - i];"
    y, launch = run(SHARED + reverse)
    assert mx.array_equal(y, mx.arange(63, -1, -1))
    assert (launch.num_barriers, launch.threadgroup_bytes) == (1, 256)
    # All lanes may write the same value, and lanes of a simdgroup may leave together.
    y, _ = run(I + "float s = simd_sum(a[i]); y[i / 2] = s; y[32 + i / 2] = s;", mx.ones(64))
    assert mx.array_equal(y, mx.full((64,), 32))
    y, _ = run(I + "y[i] = 0; if (i >= 32) return; y[i] = simd_max(a[i]);")
    assert mx.array_equal(y, mx.where(mx.arange(64) < 32, 31, 0))
    inside = "b[i] = a[i]; simdgroup_barrier(mem_flags::mem_threadgroup); y[i] = b[i ^ 31];"
    assert mx.array_equal(run(SHARED + inside)[0], mx.arange(64) ^ 31)
    two = "threadgroup float b[8190], c[2]; b[i] = a[i]; c[i % 2] = 0; y[i] = b[i];"
    assert run(I + two)[1].threadgroup_bytes == 32768


def test_a_partial_simdgroup_and_a_partial_threadgroup():
    source = (
        "uint3 n = threads_per_threadgroup; y[thread_position_in_grid.x] = simd_sum(a[0]) + n.x;"
    )
    y, launch = run(source, mx.ones(64), n=100, threadgroup=(48, 1, 1))
    widths = [32 + 48] * 32 + [16 + 48] * 16
    assert np.array(y).tolist() == [*widths, *widths, *[4 + 4] * 4]
    assert launch.num_threads == 100


def test_bytes_and_arithmetic_are_counted():
    source = I + "y[i] = fma(a[i / 2], a[0], 1.0f) * 2 + exp(a[i]);"
    _, launch = run(source, mx.ones(64))
    read, written = launch.traffic["a"], launch.traffic["y"]
    assert (read.buffer_bytes, read.unique_read_bytes, read.unique_written_bytes) == (256, 256, 0)
    assert read.read_bytes == 3 * 256
    assert (written.written_bytes, written.unique_written_bytes, written.read_bytes) == (
        256,
        256,
        0,
    )
    assert launch.num_float_ops == 64 * 5  # fma is two, exp one


SHIM_PARTS = ("math", "simd", "atomics")
EMULATOR_NAMES = {"each", "lane_exists", "gather", "reduce", "reduce_quad", "from", "atomically"}

SIGNATURES = {
    "scalars, small and large inputs": dict(
        inputs=[("a", mx.bfloat16, (64, 2)), ("b", mx.float32, (4,)), ("s", mx.int32, ())],
        outputs=[("y", mx.bfloat16), ("z", mx.float32)],
        template=[("T", mx.bfloat16), ("N", -3), ("F", True)],
        source="uint i = thread_position_in_grid.x + thread_index_in_simdgroup + a_shape[0];",
        header="inline float one() { return 1; }\n",
    ),
    "every attribute and property": dict(
        inputs=[("a", mx.uint32, (3, 3)), ("flag", mx.bool_, (7,)), ("c", mx.complex64, ())],
        outputs=[("y", mx.uint8)],
        source="""dispatch_threads_per_threadgroup threads_per_simdgroup grid_size a_ndim a_shape
            a_strides flag_ndim flag_strides c_shape simdgroups_per_threadgroup""",
    ),
    "no template, atomic": dict(
        inputs=[("a", mx.int64, (8,))], outputs=[("y", mx.float16)], source="", atomic_outputs=True
    ),
}


@pytest.mark.parametrize("case", SIGNATURES)
def test_the_source_is_what_mlx_generates(case, tmp_path):
    spec = {"template": [], "header": "", "atomic_outputs": False, **SIGNATURES[case]}
    kernel = mx.fast.metal_kernel(
        name="probe",
        input_names=[n for n, _, _ in spec["inputs"]],
        output_names=[n for n, _ in spec["outputs"]],
        **{k: spec[k] for k in ("source", "header", "atomic_outputs")},
    )

    def call(*arrays):
        return kernel(
            inputs=list(arrays),
            template=spec["template"],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[(1,) for _ in spec["outputs"]],
            output_dtypes=[d for _, d in spec["outputs"]],
        )

    file = str(tmp_path / "probe.mlxfn")
    mx.export_function(file, call, *[mx.zeros(s, d) for _, d, s in spec["inputs"]])
    assert sign("probe", **spec).source() == recorded_source(
        (tmp_path / "probe.mlxfn").read_bytes()
    )


MATRIX = """
  threadgroup T left[64 * 2];
  uint lane = thread_index_in_simdgroup;
  for (uint i = lane; i < 128; i += 32) left[i] = a[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_matrix<T, 8, 8> m, n;
  simdgroup_float8x8 sum = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  simdgroup_matrix<T, 8, 8> one(T(1));
  simdgroup_load(m, left, 16, ulong2(8, 0));
  simdgroup_load(n, a + 64, 8, ulong2(0, 0), true);
  simdgroup_multiply_accumulate(sum, m, n, sum);
  simdgroup_multiply_accumulate(sum, one, m, sum);
  sum.thread_elements() *= 2;
  simdgroup_store(sum, y, 8);
"""


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_simdgroup_matrices_load_multiply_and_store(dtype):
    a = mx.random.randint(-4, 5, (128,), key=mx.random.key(3)).astype(dtype)
    y, launch = run(MATRIX, a, grid=(32, 1, 1), threadgroup=(32, 1, 1), template=[("T", dtype)])
    a = np.array(a.astype(mx.float32))
    m, n = a.reshape(8, 16)[:, 8:], a[64:].reshape(8, 8).T
    assert np.array_equal(np.array(y).reshape(8, 8), 2 * (m @ n + m))
    assert launch.num_matrix_macs == 2 * 512
    with pytest.raises(errors.OutOfBoundsError, match="of y: index 64 of 64"):
        outside = MATRIX.replace("simdgroup_store(sum, y, 8)", "simdgroup_store(sum, y + 8, 8)")
        run(outside, mx.array(a), grid=(32, 1, 1), template=[("T", mx.float32)])
    with pytest.raises(errors.DivergenceError, match="simdgroup_multiply_accumulate"):
        run(
            MATRIX.replace("sum.thread", "if (lane > 3) sum.thread").replace(
                "simdgroup_multiply_accumulate(sum, one",
                "if (lane > 3) simdgroup_multiply_accumulate(sum, one",
            ),
            mx.array(a),
            grid=(32, 1, 1),
            template=[("T", mx.float32)],
        )


def test_the_shim_declares_only_what_metal_has():
    text = "".join((compiler.SHIM / "emu" / f"{n}.h").read_text() for n in SHIM_PARTS)
    macro = r"EMU_(?:FLOAT|ANY)\d\((\w+)|EMU_(?:\w+_)?(?:TEST|REDUCTION|SHUFFLE|SCAN|FETCH)\((\w+)"
    plain = r"^(?:EMU_LANE_OP )?(?:inline|constexpr|T|template <[^>]*> inline) .*?\b(\w+)\("
    found = {n for pair in re.findall(macro, text) for n in pair} | set(
        re.findall(plain, text, re.MULTILINE)
    )
    own = {n for n in found if n.isupper() or n.startswith(("emu_", "__")) or n in EMULATOR_NAMES}
    assert found - own - {""} - set(names.METAL) == set()
    assert len(found - own) > 100


def test_private_memory_that_nobody_wrote_is_not_a_number():
    source = I + "float b[4]; for (int k = 0; k < 3; k++) b[k] = a[i]; y[i] = b[int(a[i]) % 4];"
    y, _ = run(source)
    assert mx.array_equal(mx.isnan(y), mx.arange(64) % 4 == 3)


def test_strides_of_an_input_that_is_not_contiguous():
    source = I + "y[i] = a[(i % 8) * a_strides[0] + (i / 8) * a_strides[1]] + a_ndim * a_shape[1];"
    a = mx.arange(128.0).reshape(8, 16)[:, ::2]
    mx.eval(a)
    y, launch = run(source, a, ensure_row_contiguous=False)
    assert mx.array_equal(y.reshape(8, 8), a.T + 16)
    assert launch.traffic["a"].buffer_bytes == 127 * 4
    assert mx.array_equal(run(source, a)[0].reshape(8, 8), a.T + 16)


def test_kernels_of_a_whole_program_run_in_the_emulator():
    real = mx.fast.metal_kernel
    made = {}

    @mx.compile
    def program(x):
        return made["twice"](
            inputs=[x + 1],
            grid=(8, 1, 1),
            threadgroup=(8, 1, 1),
            output_shapes=[(8,)],
            output_dtypes=[mx.float32],
        )[0]

    with emulated() as log:
        made["twice"] = mx.fast.metal_kernel(
            name="twice", input_names=["a"], output_names=["y"], source=I + "y[i] = 2 * a[i];"
        )
        assert mx.array_equal(program(mx.arange(8.0)) * 1, 2 * mx.arange(1.0, 9.0))
    assert log.num_dispatches == 1 and log.launches[0].kernel == "twice"
    assert mx.fast.metal_kernel is real


VECTOR_CASES = {
    "float4(a[i])": 1.0,
    "float4(1, 2, float2(a[i], 4)).zxyw": 1.0,
    "float4(half4(1.5h))": 1.5,
    "static_cast<float4>(int4(7))": 7.0,
    "(float4)uint4(3) * 2": 6.0,
    "vec<float, 4>(2.5)": 2.5,
    "as_type<float4>(uint4(0x40000000))": 2.0,
    "float4(bfloat4(bfloat(1.00390625f)))": 1.0,
    "select(float4(1), float4(2), float4(a[i]) > 0.5)": 2.0,
    "float4(dot(float4(1, 2, 3, 4), float4(1)))": 10.0,
    "clamp(float4(5), 0.0f, 1.0f)": 1.0,
}


@pytest.mark.parametrize("expression", VECTOR_CASES)
def test_vectors_are_made_and_converted_as_in_metal(expression):
    y, _ = run(I + f"float4 v = {expression}; y[i] = v.x;", mx.ones(64))
    assert y[3].item() == VECTOR_CASES[expression]


def test_copies_of_the_repository_share_a_cache(monkeypatch, tmp_path):
    """Compiled text names its headers, which lie elsewhere in another copy or have other times."""
    monkeypatch.setattr(compiler, "cache_folder", lambda: tmp_path)
    there = shutil.copytree(compiler.SHIM, tmp_path / "shim")
    for factor, shim in ((2, compiler.SHIM), (3, there), (4, there)):
        monkeypatch.setattr(compiler, "SHIM", shim)
        compiler.precompiled.cache_clear()
        y, _ = run(f"{I}y[i] = {factor} * simd_sum(a[i]);", mx.ones(64))
        assert y[3].item() == 32 * factor
        for file in there.rglob("*"):
            os.utime(file, (factor, factor))
    compiler.precompiled.cache_clear()
