// Math, on scalars and component by component on vectors. float is computed in float, half and
// bfloat rounded.
#pragma once

namespace emu {
template <typename T> constexpr bool floating = metal::is_floating_point_v<scalar<T>>;
template <typename T> constexpr bool number = metal::is_arithmetic_v<scalar<T>>;

// What half and bfloat compute in.
template <typename T> struct wide {
  using type = T;
};
template <> struct wide<half> {
  using type = float;
};
template <> struct wide<bfloat> {
  using type = float;
};

template <typename T, typename F, typename... A> constexpr T each(F f, A... a) {
  if constexpr (size<T> == 0) {
    using W = typename wide<__remove_cv(T)>::type;
    return T(f(W(a)...));
  } else {
    using W = typename wide<scalar<T>>::type;
    T r = {};
    for (int i = 0; i < size<T>; i++) r[i] = scalar<T>(f(W(a[i])...));
    return r;
  }
}
}  // namespace emu

// C++17 has no templates over builtins; a captureless lambda each.
#define EMU_UNARY(CONDITION, NAME, EXPRESSION)                                 \
  template <typename T> inline metal::enable_if_t<CONDITION<T>, T> NAME(T x) { \
    return emu::each<T>([](auto x) { return EXPRESSION; }, x);                 \
  }
// Next to a vector, a scalar stands for a vector of it.
#define EMU_BINARY(CONDITION, NAME, EXPRESSION)                                     \
  template <typename T> inline metal::enable_if_t<CONDITION<T>, T> NAME(T x, T y) { \
    return emu::each<T>([](auto x, auto y) { return EXPRESSION; }, x, y);           \
  }                                                                                 \
  template <typename T>                                                             \
  inline metal::enable_if_t<(emu::size<T> > 0), T> NAME(T x, emu::scalar<T> y) {    \
    return NAME(x, T(y));                                                           \
  }                                                                                 \
  template <typename T>                                                             \
  inline metal::enable_if_t<(emu::size<T> > 0), T> NAME(emu::scalar<T> x, T y) {    \
    return NAME(T(x), y);                                                           \
  }
#define EMU_TERNARY(CONDITION, NAME, EXPRESSION)                                                   \
  template <typename T> inline metal::enable_if_t<CONDITION<T>, T> NAME(T x, T y, T z) {           \
    return emu::each<T>([](auto x, auto y, auto z) { return EXPRESSION; }, x, y, z);               \
  }                                                                                                \
  template <typename T>                                                                            \
  inline metal::enable_if_t<(emu::size<T> > 0), T> NAME(T x, emu::scalar<T> y, emu::scalar<T> z) { \
    return NAME(x, T(y), T(z));                                                                    \
  }
#define EMU_FLOAT1(NAME, EXPRESSION) EMU_UNARY(emu::floating, NAME, EXPRESSION)
#define EMU_FLOAT2(NAME, EXPRESSION) EMU_BINARY(emu::floating, NAME, EXPRESSION)
#define EMU_FLOAT3(NAME, EXPRESSION) EMU_TERNARY(emu::floating, NAME, EXPRESSION)
#define EMU_ANY1(NAME, EXPRESSION) EMU_UNARY(emu::number, NAME, EXPRESSION)
#define EMU_ANY2(NAME, EXPRESSION) EMU_BINARY(emu::number, NAME, EXPRESSION)
#define EMU_ANY3(NAME, EXPRESSION) EMU_TERNARY(emu::number, NAME, EXPRESSION)

#define EMU_FAST_AND_PRECISE                                      \
  EMU_FLOAT1(acos, __builtin_acosf(x))                            \
  EMU_FLOAT1(acosh, __builtin_acoshf(x))                          \
  EMU_FLOAT1(asin, __builtin_asinf(x))                            \
  EMU_FLOAT1(asinh, __builtin_asinhf(x))                          \
  EMU_FLOAT1(atan, __builtin_atanf(x))                            \
  EMU_FLOAT1(atanh, __builtin_atanhf(x))                          \
  EMU_FLOAT1(ceil, __builtin_ceilf(x))                            \
  EMU_FLOAT1(cos, __builtin_cosf(x))                              \
  EMU_FLOAT1(cosh, __builtin_coshf(x))                            \
  EMU_FLOAT1(cospi, __builtin_cosf(x* M_PI_F))                    \
  EMU_FLOAT1(exp, __builtin_expf(x))                              \
  EMU_FLOAT1(exp2, __builtin_exp2f(x))                            \
  EMU_FLOAT1(exp10, __builtin_powf(10.0f, x))                     \
  EMU_FLOAT1(fabs, __builtin_fabsf(x))                            \
  EMU_FLOAT1(floor, __builtin_floorf(x))                          \
  EMU_FLOAT1(fract, x - __builtin_floorf(x))                      \
  EMU_FLOAT1(log, __builtin_logf(x))                              \
  EMU_FLOAT1(log2, __builtin_log2f(x))                            \
  EMU_FLOAT1(log10, __builtin_log10f(x))                          \
  EMU_FLOAT1(rint, __builtin_rintf(x))                            \
  EMU_FLOAT1(round, __builtin_roundf(x))                          \
  EMU_FLOAT1(rsqrt, 1.0f / __builtin_sqrtf(x))                    \
  EMU_FLOAT1(saturate, __builtin_fminf(__builtin_fmaxf(x, 0), 1)) \
  EMU_FLOAT1(sign, x > 0 ? 1.0f : x < 0 ? -1.0f : x)              \
  EMU_FLOAT1(sin, __builtin_sinf(x))                              \
  EMU_FLOAT1(sinh, __builtin_sinhf(x))                            \
  EMU_FLOAT1(sinpi, __builtin_sinf(x* M_PI_F))                    \
  EMU_FLOAT1(sqrt, __builtin_sqrtf(x))                            \
  EMU_FLOAT1(tan, __builtin_tanf(x))                              \
  EMU_FLOAT1(tanh, __builtin_tanhf(x))                            \
  EMU_FLOAT1(trunc, __builtin_truncf(x))                          \
  EMU_FLOAT2(atan2, __builtin_atan2f(x, y))                       \
  EMU_FLOAT2(copysign, __builtin_copysignf(x, y))                 \
  EMU_FLOAT2(divide, x / y)                                       \
  EMU_FLOAT2(fdim, __builtin_fdimf(x, y))                         \
  EMU_FLOAT2(fmax, __builtin_fmaxf(x, y))                         \
  EMU_FLOAT2(fmin, __builtin_fminf(x, y))                         \
  EMU_FLOAT2(fmod, __builtin_fmodf(x, y))                         \
  EMU_FLOAT2(pow, __builtin_powf(x, y))                           \
  EMU_FLOAT2(powr, __builtin_powf(x, y))                          \
  EMU_FLOAT2(step, y < x ? 0.0f : 1.0f)                           \
  EMU_FLOAT3(fma, __builtin_fmaf(x, y, z))                        \
  EMU_FLOAT3(mix, x + (y - x) * z)                                \
  EMU_ANY1(abs, x < 0 ? -x : x)                                   \
  EMU_ANY2(max, x < y ? y : x)                                    \
  EMU_ANY2(min, y < x ? y : x)                                    \
  EMU_ANY3(clamp, x < y ? y : z < x ? z : x)

namespace metal {

EMU_FAST_AND_PRECISE
namespace fast {
EMU_FAST_AND_PRECISE
}
namespace precise {
EMU_FAST_AND_PRECISE
}

EMU_ANY2(absdiff, x < y ? y - x : x - y)
EMU_ANY2(rotate, T((x << y) | (x >> (sizeof(x) * 8 - y))))
EMU_ANY1(popcount, __builtin_popcountll((unsigned long long)(x) & (~0ull >> (64 - sizeof(x) * 8))))
EMU_ANY1(clz, x ? __builtin_clzll((unsigned long long)(x) & (~0ull >> (64 - sizeof(x) * 8))) -
                      int(64 - sizeof(x) * 8)
                : sizeof(x) * 8)
EMU_ANY1(ctz, x ? __builtin_ctzll((unsigned long long)(x)) : sizeof(x) * 8)
inline uint mulhi(uint x, uint y) { return uint((ulong(x) * y) >> 32); }
inline int mulhi(int x, int y) { return int((long(x) * y) >> 32); }
template <typename T> inline T reverse_bits(T x) {
  T r = 0;
  for (uint i = 0; i < sizeof(T) * 8; i++) r |= T(T(x >> i) & 1) << (sizeof(T) * 8 - 1 - i);
  return r;
}
template <typename T> inline T extract_bits(T x, uint offset, uint bits) {
  return bits == 0 ? T(0) : T(T(x << (sizeof(T) * 8 - bits - offset)) >> (sizeof(T) * 8 - bits));
}

#define EMU_TEST(NAME, EXPRESSION)                                                        \
  template <typename T> inline metal::enable_if_t<emu::floating<T>, bool> NAME(T value) { \
    float x = float(value);                                                               \
    return EXPRESSION;                                                                    \
  }
EMU_TEST(isnan, __builtin_isnan(x))
EMU_TEST(isinf, __builtin_isinf(x))
EMU_TEST(isfinite, __builtin_isfinite(x))
EMU_TEST(signbit, __builtin_signbit(x))

template <typename T> inline T select(T a, T b, bool c) { return c ? b : a; }
template <typename T, typename C>
inline metal::enable_if_t<(emu::size<C> > 0), T> select(T a, T b, C c) {
  for (int i = 0; i < emu::size<T>; i++) a[i] = c[i] ? b[i] : a[i];
  return a;
}
template <typename V> inline emu::scalar<V> dot(V a, V b) {
  emu::scalar<V> sum = a[0] * b[0];
  for (int i = 1; i < emu::size<V>; i++) sum += a[i] * b[i];
  return sum;
}
template <typename V> inline emu::scalar<V> length(V a) { return sqrt(dot(a, a)); }
template <typename V> inline emu::scalar<V> length_squared(V a) { return dot(a, a); }
template <typename V> inline V normalize(V a) { return a * rsqrt(dot(a, a)); }
template <typename V> inline bool any(V a) {
  bool r = false;
  for (int i = 0; i < emu::size<V>; i++) r |= bool(a[i]);
  return r;
}
template <typename V> inline bool all(V a) {
  bool r = true;
  for (int i = 0; i < emu::size<V>; i++) r &= bool(a[i]);
  return r;
}

}  // namespace metal
