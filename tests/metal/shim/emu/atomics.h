// Atomics, relaxed as in Metal.
#pragma once

namespace metal {

enum memory_order { memory_order_relaxed };

template <typename T> struct atomic {
  T emu_value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;

}  // namespace metal

namespace emu {
#if defined(EMU_ADDRESS_SPACES)
template <typename P, typename F> auto atomically(P* p, F, bool = true) { return p->emu_value; }
#else
template <typename T, typename F>
__attribute__((no_sanitize("thread"), noinline)) T atomically(metal::atomic<T>* p, F f,
                                                              bool reads = true) {
  emu_atomic(p, sizeof(T), reads);
  T old = p->emu_value;
  p->emu_value = f(old);
  return old;
}
#endif
}  // namespace emu

#define EMU_FETCH(NAME, SPACE, EXPRESSION)                                \
  template <typename T, typename U>                                       \
  inline T NAME(SPACE atomic<T>* object, U operand, memory_order) {       \
    T x = T(operand);                                                     \
    return emu::atomically(object, [x](T old) { return T(EXPRESSION); }); \
  }
#define EMU_ATOMICS(SPACE)                                                                       \
  EMU_FETCH(atomic_fetch_add_explicit, SPACE, old + x)                                           \
  EMU_FETCH(atomic_fetch_sub_explicit, SPACE, old - x)                                           \
  EMU_FETCH(atomic_fetch_max_explicit, SPACE, old < x ? x : old)                                 \
  EMU_FETCH(atomic_fetch_min_explicit, SPACE, x < old ? x : old)                                 \
  EMU_FETCH(atomic_fetch_and_explicit, SPACE, old& x)                                            \
  EMU_FETCH(atomic_fetch_or_explicit, SPACE, old | x)                                            \
  EMU_FETCH(atomic_fetch_xor_explicit, SPACE, old ^ x)                                           \
  EMU_FETCH(atomic_exchange_explicit, SPACE, x)                                                  \
  template <typename T> inline T atomic_load_explicit(SPACE atomic<T>* object, memory_order) {   \
    return emu::atomically(object, [](T old) { return old; });                                   \
  }                                                                                              \
  template <typename T, typename U>                                                              \
  inline void atomic_store_explicit(SPACE atomic<T>* object, U operand, memory_order o) {        \
    T x = T(operand);                                                                            \
    emu::atomically(object, [x](T) { return x; }, false);                                        \
  }                                                                                              \
  template <typename T, typename U>                                                              \
  inline bool atomic_compare_exchange_weak_explicit(SPACE atomic<T>* object, thread T* expected, \
                                                    U desired, memory_order, memory_order) {     \
    T wanted = *expected, x = T(desired);                                                        \
    *expected = emu::atomically(object, [wanted, x](T old) { return old == wanted ? x : old; }); \
    return *expected == wanted;                                                                  \
  }

namespace metal {
EMU_ATOMICS(device)
#if defined(EMU_ADDRESS_SPACES)
EMU_ATOMICS(threadgroup)
#endif
}  // namespace metal
