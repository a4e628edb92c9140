// Compile-time facts about types.
#pragma once

namespace metal {

template <typename T, T v> struct integral_constant {
  static constexpr T value = v;
  using value_type = T;
  using type = integral_constant;
  constexpr operator T() const { return v; }
};
template <bool b> using bool_constant = integral_constant<bool, b>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <bool b, typename T = void> struct enable_if {};
template <typename T> struct enable_if<true, T> {
  using type = T;
};
template <bool b, typename T = void> using enable_if_t = typename enable_if<b, T>::type;

template <bool b, typename T, typename U> struct conditional {
  using type = T;
};
template <typename T, typename U> struct conditional<false, T, U> {
  using type = U;
};
template <bool b, typename T, typename U> using conditional_t = typename conditional<b, T, U>::type;

template <typename T, typename U> struct is_same : false_type {};
template <typename T> struct is_same<T, T> : true_type {};
template <typename T, typename U> constexpr bool is_same_v = is_same<T, U>::value;

#define EMU_REMOVE(NAME, PATTERN)              \
  template <typename T> struct NAME {          \
    using type = T;                            \
  };                                           \
  template <typename T> struct NAME<PATTERN> { \
    using type = T;                            \
  };                                           \
  template <typename T> using NAME##_t = typename NAME<T>::type;
EMU_REMOVE(remove_const, const T)
EMU_REMOVE(remove_volatile, volatile T)
EMU_REMOVE(remove_reference, T&)
EMU_REMOVE(remove_pointer, T*)
template <typename T> struct remove_cv {
  using type = __remove_cv(T);
};
template <typename T> using remove_cv_t = __remove_cv(T);
template <typename T> struct remove_addrspace {
  using type = T;
};
template <typename T> using remove_addrspace_t = T;

template <typename From, typename To> constexpr bool is_convertible_v = __is_convertible(From, To);
template <typename From, typename To>
struct is_convertible : bool_constant<is_convertible_v<From, To>> {};

template <typename T>
constexpr bool is_floating_point_v =
    is_same_v<remove_cv_t<T>, float> || is_same_v<remove_cv_t<T>, half> ||
    is_same_v<remove_cv_t<T>, bfloat>;
template <typename T> constexpr bool is_integral_v = __is_integral(T);
template <typename T> constexpr bool is_signed_v = is_floating_point_v<T> || __is_signed(T);
template <typename T> constexpr bool is_unsigned_v = __is_unsigned(T);
template <typename T> constexpr bool is_arithmetic_v = is_floating_point_v<T> || is_integral_v<T>;
#define EMU_STRUCT_OF(NAME) \
  template <typename T> struct NAME : bool_constant<NAME##_v<T>> {};
EMU_STRUCT_OF(is_floating_point)
EMU_STRUCT_OF(is_integral)
EMU_STRUCT_OF(is_signed)
EMU_STRUCT_OF(is_unsigned)
EMU_STRUCT_OF(is_arithmetic)

template <typename T> struct numeric_limits {
  static constexpr T max() { return is_signed_v<T> ? T(~(T(1) << (sizeof(T) * 8 - 1))) : T(~T(0)); }
  static constexpr T min() { return is_signed_v<T> ? T(T(1) << (sizeof(T) * 8 - 1)) : T(0); }
  static constexpr T lowest() { return min(); }
};
#define EMU_FLOAT_LIMITS(T, MAX, MIN, EPSILON)                       \
  template <> struct numeric_limits<T> {                             \
    static constexpr T max() { return T(MAX); }                      \
    static constexpr T min() { return T(MIN); }                      \
    static constexpr T lowest() { return T(-MAX); }                  \
    static constexpr T epsilon() { return T(EPSILON); }              \
    static constexpr T infinity() { return T(__builtin_inff()); }    \
    static constexpr T quiet_NaN() { return T(__builtin_nanf("")); } \
  };
EMU_FLOAT_LIMITS(float, __FLT_MAX__, __FLT_MIN__, __FLT_EPSILON__)
EMU_FLOAT_LIMITS(half, 65504.0f, 6.103515625e-5f, 9.765625e-4f)
EMU_FLOAT_LIMITS(bfloat, 3.38953139e38f, __FLT_MIN__, 7.8125e-3f)

}  // namespace metal

template <typename To, typename From> constexpr To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type between types of different size");
  return __builtin_bit_cast(To, x);
}
