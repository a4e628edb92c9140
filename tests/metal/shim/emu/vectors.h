// Vectors of two, three and four: clang's own, with Metal's constructors.
#pragma once

#define EMU_VECTOR_TYPES(T)                           \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
EMU_VECTOR_TYPES(bool)
EMU_VECTOR_TYPES(char)
EMU_VECTOR_TYPES(short)
EMU_VECTOR_TYPES(int)
EMU_VECTOR_TYPES(long)
EMU_VECTOR_TYPES(uchar)
EMU_VECTOR_TYPES(ushort)
EMU_VECTOR_TYPES(uint)
EMU_VECTOR_TYPES(ulong)
EMU_VECTOR_TYPES(float)
EMU_VECTOR_TYPES(half)
typedef __bf16 bfloat2 __attribute__((ext_vector_type(2)));
typedef __bf16 bfloat3 __attribute__((ext_vector_type(3)));
typedef __bf16 bfloat4 __attribute__((ext_vector_type(4)));

namespace emu {

template <typename T> struct storage {
  using type = T;
};
#if defined(EMU_STRICT_BFLOAT)
template <> struct storage<bfloat> {
  using type = __bf16;
};
#endif

template <typename T, int N> struct vector {
  typedef typename storage<T>::type type __attribute__((ext_vector_type(N)));
};

// Number of components and type of one; 0 for what is no vector.
template <typename V> struct shape {
  static constexpr int size = 0;
  using scalar = V;
};
template <typename T, int N> struct shape<T __attribute__((ext_vector_type(N)))> {
  static constexpr int size = N;
  using scalar = T;
};
template <typename V> constexpr int size = shape<__remove_cv(V)>::size;
template <typename V> using scalar = typename shape<__remove_cv(V)>::scalar;

template <typename V, typename A> constexpr void put(V& v, int& i, A a) {
  if constexpr (size<A> == 0) v[i++] = scalar<V>(a);
  else
    for (int k = 0; k < size<A>; k++) v[i++] = scalar<V>(a[k]);
}

// V(a, b, ...): components from scalars and vectors, or one scalar for all.
template <typename V, typename... A> constexpr V make(A... a) {
  if constexpr (size<V> == 0) return V(a...);
  else {
    V v = {};
    int i = 0;
    if constexpr (sizeof...(A) == 1 && ((size<A> == 0) && ...)) {
      for (; i < size<V>; i++) v[i] = (scalar<V>(a), ...);
    } else {
      static_assert(((size<A> ? size<A> : 1) + ... + 0) == size<V>,
                    "components do not fill the vector");
      (put(v, i, a), ...);
    }
    return v;
  }
}

// (V)x is written cast<V>()->*x
template <typename V> struct cast {
  template <typename A> constexpr V operator->*(A a) const { return make<V>(a); }
};

}  // namespace emu

namespace metal {
template <typename T, int N> using vec = typename emu::vector<T, N>::type;
}
