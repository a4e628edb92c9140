// Types and qualifiers. EMU_ADDRESS_SPACES and EMU_STRICT_BFLOAT are for the compile that only
// checks.
#pragma once

#if defined(EMU_ADDRESS_SPACES)
#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#else
#define device
#define constant const
#define threadgroup
#endif
#define thread
#define METAL_FUNC inline __attribute__((always_inline))
#define __METAL_VERSION__ 310
#define __METAL__ 1

// Threadgroup memory is declared inside a kernel: `threadgroup float a[32];`
#define EMU_SHARED static threadgroup
#define EMU_LANE_OP __attribute__((no_sanitize("thread"), noinline, convergent))

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
typedef uint64_t uintptr_t;
typedef _Float16 half;

#if defined(EMU_STRICT_BFLOAT)
// To float it converts by itself, from anything only on demand.
struct bfloat {
  ushort bits;
  bfloat() = default;
  template <typename T> explicit constexpr bfloat(T) : bits(0) {}
  constexpr operator float() const { return 0; }
  constexpr bfloat operator-() const { return *this; }
};
#define EMU_INTEGRAL template <typename I, int (*)[__is_integral(I) ? 1 : -1] = nullptr>
#define EMU_BFLOAT_OPERATOR(OP, ASSIGN)                              \
  constexpr bfloat operator OP(bfloat a, bfloat) { return a; }       \
  EMU_INTEGRAL constexpr bfloat operator OP(bfloat a, I) { return a; } \
  EMU_INTEGRAL constexpr bfloat operator OP(I, bfloat a) { return a; } \
  constexpr bfloat& operator ASSIGN(bfloat& a, bfloat) { return a; } \
  EMU_INTEGRAL constexpr bfloat& operator ASSIGN(bfloat& a, I) { return a; }
EMU_BFLOAT_OPERATOR(+, +=)
EMU_BFLOAT_OPERATOR(-, -=)
EMU_BFLOAT_OPERATOR(*, *=)
EMU_BFLOAT_OPERATOR(/, /=)
#else
typedef __bf16 bfloat;
#endif

#define INFINITY __builtin_inff()
#define HUGE_VALF __builtin_huge_valf()
#define NAN __builtin_nanf("")
#define MAXFLOAT __FLT_MAX__
#define FLT_MAX __FLT_MAX__
#define FLT_MIN __FLT_MIN__
#define FLT_EPSILON __FLT_EPSILON__
#define INT_MAX __INT_MAX__
#define INT_MIN (-__INT_MAX__ - 1)
#define UINT_MAX (2u * __INT_MAX__ + 1)
#define M_PI_F 3.14159274101257324219f
#define M_LOG2E_F 1.44269502162933349609f
#define M_LN2_F 0.693147182464599609375f
#define M_SQRT2_F 1.41421353816986083984f

namespace metal {}
