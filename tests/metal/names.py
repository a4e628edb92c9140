"""Holds the names a kernel uses against the Metal Shading Language."""

from __future__ import annotations

import functools
import re

from metal.compiler import flatten, prelude, without_comments
from metal.errors import NotMetalError
from metal.signature import ATTRIBUTES, Signature

# Functions and types of the Metal specification, 3.1, that compute kernels can call by name.
METAL = """
    acos acosh asin asinh atan atan2 atanh ceil copysign cos cosh cospi divide exp exp10 exp2
    fabs abs fdim floor fma fmax fmin fmod fract frexp ilogb ldexp log log10 log2 modf pow powr
    rint round rsqrt saturate sign sin sincos sinh sinpi sqrt tan tanh tanpi trunc mix
    smoothstep step clamp max min max3 median3 min3 select absdiff addsat clz ctz extract_bits
    hadd insert_bits mad24 madhi madsat mul24 mulhi popcount reverse_bits rhadd rotate subsat
    all any isfinite isinf isnan isnormal isordered isunordered signbit cross distance
    distance_squared dot faceforward length length_squared normalize reflect refract
    threadgroup_barrier simdgroup_barrier simd_is_helper_thread simd_vote simd_all simd_and
    simd_any simd_ballot simd_broadcast simd_broadcast_first simd_is_first simd_max simd_min
    simd_or simd_prefix_exclusive_product simd_prefix_exclusive_sum
    simd_prefix_inclusive_product simd_prefix_inclusive_sum simd_product simd_shuffle
    simd_shuffle_and_fill_down simd_shuffle_and_fill_up simd_shuffle_down
    simd_shuffle_rotate_down simd_shuffle_rotate_up simd_shuffle_up simd_shuffle_xor simd_sum
    simd_xor quad_all quad_and quad_any quad_ballot quad_broadcast quad_max quad_min quad_or
    quad_product quad_shuffle quad_shuffle_down quad_shuffle_up quad_shuffle_xor quad_sum
    quad_xor simdgroup_load simdgroup_store simdgroup_multiply simdgroup_multiply_accumulate
    make_filled_simdgroup_matrix simdgroup_matrix simdgroup_float8x8 simdgroup_half8x8
    simdgroup_bfloat8x8 thread_elements atomic atomic_int atomic_uint atomic_float atomic_bool
    atomic_compare_exchange_weak_explicit atomic_exchange_explicit atomic_fetch_add_explicit
    atomic_fetch_and_explicit atomic_fetch_max_explicit atomic_fetch_min_explicit
    atomic_fetch_or_explicit atomic_fetch_sub_explicit atomic_fetch_xor_explicit
    atomic_load_explicit atomic_store_explicit memory_order_relaxed mem_flags mem_none
    mem_device mem_threadgroup as_type vec numeric_limits infinity quiet_NaN epsilon lowest
    precise fast metal enable_if enable_if_t conditional conditional_t is_same is_same_v
    is_convertible is_convertible_v is_integral is_integral_v is_floating_point
    is_floating_point_v is_signed is_signed_v is_unsigned is_unsigned_v is_arithmetic
    is_arithmetic_v integral_constant bool_constant true_type false_type remove_cv remove_cv_t
    remove_reference remove_reference_t bool char uchar short ushort int uint long ulong half
    float bfloat size_t ptrdiff_t int8_t int16_t int32_t int64_t uint8_t uint16_t uint32_t
    uint64_t
""".split()
VECTORS = [
    f"{t}{n}"
    for t in "bool char uchar short ushort int uint long ulong half float bfloat".split()
    for n in (2, 3, 4)
]
KEYWORDS = """
    if for while switch do else return case default break continue sizeof alignof alignas
    decltype static_assert static_cast reinterpret_cast const_cast operator template typename
    struct class enum union using namespace constexpr const volatile inline static void auto
    signed unsigned true false noexcept device constant threadgroup thread kernel public private
    defined pragma METAL_FUNC
""".split()
# C++ that Metal leaves out, and doors out of the emulator.
FORBIDDEN = """
    double virtual new delete try catch throw goto dynamic_cast typeid asm thread_local wchar_t
    std co_await malloc free printf
""".split()
ALLOWED = frozenset([*METAL, *VECTORS, *KEYWORDS, *ATTRIBUTES])
# Clang instruments accesses of up to 16 bytes; these take 32.
UNCHECKED = ("long3", "long4", "ulong3", "ulong4")
STATEMENTS = ("return", "else", "case", "do")
WORD = re.compile(r"[A-Za-z_]\w*")


@functools.cache
def _mlx_names(header: str) -> frozenset[str]:
    """Every word in MLX's own headers, as far as the header includes them."""
    text, seen = prelude()
    included = flatten("\n".join(re.findall(r'#include\s+"mlx/[^"]+"', header)), set(seen))
    return frozenset(WORD.findall(text)) | frozenset(WORD.findall(included))


def _defined(text: str) -> set[str]:
    """Names that the text declares: functions, variables, types, macros."""
    pointer = r"\b(?:device|thread|threadgroup|constant)\b[^;(){}]*[*&]\s*(\w+)\("
    names = set(re.findall(r"#define\s+(\w+)", text)) | set(re.findall(pointer, text))
    names |= set(re.findall(r"\b(?:struct|class|typename|using|enum|auto)\s+(\w+)", text))
    names |= set(re.findall(r"<[\w\s,:]*>\s+(\w+)\s*\(", text))
    pairs = re.findall(r"\b(\w+)\s+(\w+)\s*\(", text)
    return names | {name for before, name in pairs if before not in STATEMENTS}


def check_names(signature: Signature) -> None:
    """Raises NotMetalError for a name that is neither the kernel's own, nor MLX's, nor Metal's."""
    text = signature.header + signature.body
    if not text.isascii():
        # MLX makes an ASCII string of it, comments included.
        raise NotMetalError(f"not ASCII: {', '.join(sorted({c for c in text if c > '~'}))}")
    own = without_comments(text)
    own = re.sub(r'#include[^\n]*|"[^"\n]*"|\[\[[^\]]*\]\]', "", own)
    words = set(WORD.findall(own))
    outlaws = sorted(
        w for w in words if w in FORBIDDEN or w.startswith("__") or w.lower().startswith("emu_")
    )
    outlaws += ["emu"] if "emu" in words else []
    if outlaws:
        raise NotMetalError(f"not Metal: {', '.join(outlaws)}")
    if wide := sorted(words & set(UNCHECKED)):
        raise NotImplementedError(f"too wide to be checked: {', '.join(wide)}")
    called = set(re.findall(r"(?<![\w.>])(?:metal::(?:\w+::)*)?(\w+)\s*(?:<[\w:, ]*>\s*)?\(", own))
    called |= set(re.findall(r"\bmetal::(?:\w+::)*(\w+)", own))
    known = ALLOWED | _mlx_names(signature.header) | _defined(own)
    known |= {name for name, _ in signature.template} | {a.name for a in signature.arguments}
    unknown = sorted(w for w in called - known if not w[0].isdigit())
    if unknown:
        raise NotMetalError(f"neither in Metal nor in the kernel: {', '.join(unknown)}")
