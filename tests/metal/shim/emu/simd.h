// What the lanes of a simdgroup do together, barriers, and 8x8 matrices.
#pragma once
#include "runtime.h"

// The runtime's own memory, which is no kernel's business.
#pragma clang attribute push(__attribute__((no_sanitize("thread"))), apply_to = function)
namespace emu {

template <typename T> struct Slots {
  EmuByte* base;
  T operator[](EmuU32 lane) const {
    T v;
    __builtin_memcpy(&v, base + 64 * lane, sizeof v);
    return v;
  }
  void set(EmuU32 lane, T v) const { __builtin_memcpy(base + 64 * lane, &v, sizeof v); }
};

#if defined(EMU_CHECK_ONLY)
template <typename T> Slots<T> gather(const void*, const char*, int, T);
#else
template <typename T>
__attribute__((always_inline)) inline Slots<T> gather(const void* site, const char* what, int line,
                                                      T value) {
  static_assert(sizeof(T) <= 64, "too large for a simd operation");
  return {emu_simd(site, what, line, &value, sizeof value)};
}
#endif

inline bool lane_exists(EmuU32 lane) { return lane < 32 && (emu_lanes() >> lane & 1); }

// Neighbours first, then pairs, then fours: as Apple GPUs do it.
template <typename T, typename F>
__attribute__((always_inline)) inline T reduce(Slots<T> slots, F f) {
  if (emu_first()) {
    for (EmuU32 step = 1; step < 32; step *= 2)
      for (EmuU32 lane = 0; lane < 32; lane += 2 * step)
        if (lane_exists(lane + step)) slots.set(lane, f(slots[lane], slots[lane + step]));
  }
  return slots[0];
}

template <typename T, typename F>
__attribute__((always_inline)) inline T reduce_quad(Slots<T> slots, F f) {
  EmuU32 base = emu_lane() & ~3u;
  for (EmuU32 i = 0; i < 4; i++)
    if (!lane_exists(base + i)) return slots[base];
  return f(f(slots[base], slots[base + 1]), f(slots[base + 2], slots[base + 3]));
}

template <typename T> inline T from(Slots<T> slots, EmuU32 lane, const char* what, int line) {
  if (!lane_exists(lane)) emu_fail(EMU_DIVERGENCE, what, line);
  return slots[lane];
}

template <typename T> struct element {
  static constexpr EmuU32 bytes = sizeof(T);
};
template <typename T, size_t N> struct element<T[N]> : element<T> {};

}  // namespace emu
#pragma clang attribute pop

// Follows every declaration of threadgroup memory.
#if defined(EMU_CHECK_ONLY)
#define EMU_SHARE(NAME) (void)NAME
#else
#define EMU_SHARE(NAME) \
  emu_threadgroup_memory((void*)&NAME, sizeof NAME, emu::element<decltype(NAME)>::bytes, #NAME)
#endif
#define EMU_SITE __builtin_return_address(0)
#define EMU_LINE int line = __builtin_LINE()

#define EMU_REDUCTION_BY(HOW, NAME, EXPRESSION)                    \
  template <typename T> EMU_LANE_OP T NAME(T x, EMU_LINE) {        \
    using W = typename emu::wide<T>::type;                         \
    return T(emu::HOW(emu::gather<W>(EMU_SITE, #NAME, line, W(x)), \
                      [](W a, W b) { return W(EXPRESSION); }));    \
  }
#define EMU_REDUCTION(NAME, EXPRESSION) EMU_REDUCTION_BY(reduce, NAME, EXPRESSION)
#define EMU_QUAD_REDUCTION(NAME, EXPRESSION) EMU_REDUCTION_BY(reduce_quad, NAME, EXPRESSION)
#define EMU_SHUFFLE(NAME, PARAMETER, LANE)                                          \
  template <typename T> EMU_LANE_OP T NAME(T x, ushort PARAMETER, EMU_LINE) {       \
    auto slots = emu::gather<T>(EMU_SITE, #NAME, line, x);                          \
    EmuU32 self = emu_lane();                                                       \
    return emu::from(slots, LANE, #NAME " reads a lane that does not exist", line); \
  }
#define EMU_SCAN(NAME, START, STOP, UNIT, EXPRESSION)       \
  template <typename T> EMU_LANE_OP T NAME(T x, EMU_LINE) { \
    auto slots = emu::gather<T>(EMU_SITE, #NAME, line, x);  \
    T a = T(UNIT);                                          \
    for (EmuU32 i = 0; i STOP emu_lane(); i++) {            \
      T b = slots[i];                                       \
      a = EXPRESSION;                                       \
    }                                                       \
    return a;                                               \
  }

namespace metal {

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }

__attribute__((always_inline, convergent)) inline void threadgroup_barrier(mem_flags flags,
                                                                           EMU_LINE);
EMU_LANE_OP static void emu_barrier_here(int flags, int line) {
  emu_barrier(EMU_SITE, flags, line);
}
EMU_LANE_OP static void emu_simdgroup_barrier_here(int flags, int line) {
  emu_simdgroup_barrier(EMU_SITE, flags, line);
}
inline void threadgroup_barrier(mem_flags flags, int line) { emu_barrier_here(int(flags), line); }
__attribute__((always_inline, convergent)) inline void simdgroup_barrier(mem_flags flags,
                                                                         EMU_LINE) {
  emu_simdgroup_barrier_here(int(flags), line);
}

EMU_REDUCTION(simd_sum, a + b)
EMU_REDUCTION(simd_product, a* b)
EMU_REDUCTION(simd_max, max(a, b))
EMU_REDUCTION(simd_min, min(a, b))
EMU_REDUCTION(simd_and, a& b)
EMU_REDUCTION(simd_or, a | b)
EMU_REDUCTION(simd_xor, a ^ b)
EMU_QUAD_REDUCTION(quad_sum, a + b)
EMU_QUAD_REDUCTION(quad_product, a* b)
EMU_QUAD_REDUCTION(quad_max, max(a, b))
EMU_QUAD_REDUCTION(quad_min, min(a, b))
EMU_LANE_OP inline bool simd_all(bool x, EMU_LINE) {
  return emu::reduce(emu::gather(EMU_SITE, "simd_all", line, x),
                     [](bool a, bool b) { return a && b; });
}
EMU_LANE_OP inline bool simd_any(bool x, EMU_LINE) {
  return emu::reduce(emu::gather(EMU_SITE, "simd_any", line, x),
                     [](bool a, bool b) { return a || b; });
}
EMU_SHUFFLE(simd_shuffle, lane, lane)
EMU_SHUFFLE(simd_broadcast, lane, lane)
EMU_SHUFFLE(simd_shuffle_xor, mask, self ^ mask)
// The lanes at the edge keep their own value: Apple leaves theirs undefined.
EMU_SHUFFLE(simd_shuffle_down, delta, emu::lane_exists(self + delta) ? self + delta : self)
EMU_SHUFFLE(simd_shuffle_up, delta, self >= delta ? self - delta : self)
EMU_SHUFFLE(simd_shuffle_rotate_down, delta, (self + delta) & 31)
EMU_SHUFFLE(simd_shuffle_rotate_up, delta, (self - delta) & 31)
EMU_SHUFFLE(quad_shuffle, lane, (self & ~3u) + lane)
EMU_SHUFFLE(quad_broadcast, lane, (self & ~3u) + lane)
EMU_SHUFFLE(quad_shuffle_xor, mask, self ^ mask)
template <typename T> EMU_LANE_OP T simd_shuffle_and_fill_up(T x, T fill, ushort delta, EMU_LINE) {
  struct Pair {
    T x, fill;
  };
  auto slots = emu::gather<Pair>(EMU_SITE, "simd_shuffle_and_fill_up", line, {x, fill});
  return emu_lane() >= delta ? slots[emu_lane() - delta].x : slots[32 + emu_lane() - delta].fill;
}
template <typename T> EMU_LANE_OP T simd_broadcast_first(T x, EMU_LINE) {
  return emu::gather<T>(EMU_SITE, "simd_broadcast_first", line, x)[0];
}
EMU_LANE_OP inline bool simd_is_first(EMU_LINE) {
  emu::gather<int>(EMU_SITE, "simd_is_first", line, 0);
  return emu_lane() == 0;
}
EMU_SCAN(simd_prefix_inclusive_sum, 0, <=, 0, a + b)
EMU_SCAN(simd_prefix_exclusive_sum, 0, <, 0, a + b)
EMU_SCAN(simd_prefix_inclusive_product, 0, <=, 1, a* b)
EMU_SCAN(simd_prefix_exclusive_product, 0, <, 1, a* b)
struct simd_vote {
  ulong bits;
  explicit operator ulong() const { return bits; }
};
EMU_LANE_OP inline simd_vote simd_ballot(bool x, EMU_LINE) {
  auto slots = emu::gather<bool>(EMU_SITE, "simd_ballot", line, x);
  ulong bits = 0;
  for (EmuU32 i = 0; i < 32; i++) bits |= ulong(emu::lane_exists(i) && slots[i]) << i;
  return {bits};
}

// Each lane holds two neighbours of a row; the layout is the one MLX relies on.
template <typename T, int Rows, int Columns> struct simdgroup_matrix {
  static_assert(Rows == 8 && Columns == 8, "Metal has only 8x8");
  using storage_type = typename emu::vector<T, 2>::type;
  storage_type elements;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal) {
    for (int i = 0; i < 2; i++) elements[i] = row() == column() + i ? diagonal : T(0);
  }
  thread storage_type& thread_elements() { return elements; }
  thread const storage_type& thread_elements() const { return elements; }
  static int row() { return int((emu_lane() / 4 & 4) + (emu_lane() / 2) % 4); }
  static int column() { return int((emu_lane() / 4 & 2) * 2 + emu_lane() % 2 * 2); }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

namespace emu_matrix {
template <typename M> EMU_LANE_OP void meet(thread M& m, const char* what, int line) {
  emu::gather<int>(EMU_SITE, what, line, 0);
}
}  // namespace emu_matrix

#define EMU_MATRIX_ELEMENT                                                                \
  pointer[transpose ? (m.column() + i + origin.x) * elements_per_row + m.row() + origin.y \
                    : (m.row() + origin.y) * elements_per_row + m.column() + i + origin.x]
#define EMU_MATRIX_MOVE(SPACE)                                                                 \
  template <typename T>                                                                        \
  inline __attribute__((always_inline)) void simdgroup_load(                                   \
      thread simdgroup_matrix<T, 8, 8>& m, const SPACE T* pointer, ulong elements_per_row = 8, \
      ulong2 origin = 0, bool transpose = false, EMU_LINE) {                                   \
    emu_matrix::meet(m, "simdgroup_load", line);                                               \
    for (int i = 0; i < 2; i++) m.elements[i] = EMU_MATRIX_ELEMENT;                            \
  }                                                                                            \
  template <typename T>                                                                        \
  inline __attribute__((always_inline)) void simdgroup_store(                                  \
      simdgroup_matrix<T, 8, 8> m, SPACE T* pointer, ulong elements_per_row = 8,               \
      ulong2 origin = 0, bool transpose = false, EMU_LINE) {                                   \
    emu_matrix::meet(m, "simdgroup_store", line);                                              \
    for (int i = 0; i < 2; i++) EMU_MATRIX_ELEMENT = T(m.elements[i]);                            \
  }
EMU_MATRIX_MOVE(device)
#if defined(EMU_ADDRESS_SPACES)
EMU_MATRIX_MOVE(threadgroup)
#endif

template <typename T> inline simdgroup_matrix<T, 8, 8> emu_filled(T value) {
  simdgroup_matrix<T, 8, 8> m;
  m.elements = value;
  return m;
}
template <typename T, int Rows, int Columns>
inline simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(T value) {
  return emu_filled(value);
}

// d = a b + c; a lane brings two elements of a and of b, the first to go on multiplies for all.
template <typename D, typename A, typename B, typename C>
EMU_LANE_OP void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>& d,
                                               thread const simdgroup_matrix<A, 8, 8>& a,
                                               thread const simdgroup_matrix<B, 8, 8>& b,
                                               thread const simdgroup_matrix<C, 8, 8>& c,
                                               EMU_LINE) {
  struct Four {
    float a[2], b[2], out[2];
  };
  Four mine = {{float(a.elements[0]), float(a.elements[1])},
               {float(b.elements[0]), float(b.elements[1])},
               {float(c.elements[0]), float(c.elements[1])}};
  auto slots = emu::gather<Four>(EMU_SITE, "simdgroup_multiply_accumulate", line, mine);
  if (emu_first()) {
    emu_count_macs(512);
    float left[8][8], right[8][8];
    for (EmuU32 lane = 0; lane < 32; lane++) {
      int row = int((lane / 4 & 4) + (lane / 2) % 4),
          column = int((lane / 4 & 2) * 2 + lane % 2 * 2);
      Four v = emu::from(slots, lane, "a matrix needs all 32 lanes", line);
      for (int i = 0; i < 2; i++) left[row][column + i] = v.a[i], right[row][column + i] = v.b[i];
    }
    for (EmuU32 lane = 0; lane < 32; lane++) {
      int row = int((lane / 4 & 4) + (lane / 2) % 4),
          column = int((lane / 4 & 2) * 2 + lane % 2 * 2);
      Four v = slots[lane];
      for (int k = 0; k < 8; k++)
        for (int i = 0; i < 2; i++) v.out[i] += left[row][k] * right[k][column + i];
      slots.set(lane, v);
    }
  }
  Four v = slots[emu_lane()];
  d.elements[0] = D(v.out[0]);
  d.elements[1] = D(v.out[1]);
}
template <typename D, typename A, typename B>
inline __attribute__((always_inline)) void simdgroup_multiply(
    thread simdgroup_matrix<D, 8, 8>& d, thread const simdgroup_matrix<A, 8, 8>& a,
    thread const simdgroup_matrix<B, 8, 8>& b, EMU_LINE) {
  simdgroup_multiply_accumulate(d, a, b, emu_filled(D(0)), line);
}

}  // namespace metal
