// What a kernel may ask about the thread it runs in, by the names of Metal.
#pragma once
#include "runtime.h"

namespace emu {
inline uint3 three(const EmuU32* p) { return uint3{p[0], p[1], p[2]}; }
#define EMU_ATTRIBUTE(TYPE, NAME, EXPRESSION)                                               \
  __attribute__((no_sanitize("thread"))) inline TYPE attribute_##NAME(const EmuThread* t) { \
    return EXPRESSION;                                                                      \
  }
EMU_ATTRIBUTE(uint, dispatch_quadgroups_per_threadgroup, t->dispatch_simdgroups * 8)
EMU_ATTRIBUTE(uint, dispatch_simdgroups_per_threadgroup, t->dispatch_simdgroups)
EMU_ATTRIBUTE(uint3, dispatch_threads_per_threadgroup, three(t->dispatch_threads))
EMU_ATTRIBUTE(uint3, grid_origin, uint3(0))
EMU_ATTRIBUTE(uint3, grid_size, three(t->threads_per_grid))
EMU_ATTRIBUTE(uint, quadgroup_index_in_threadgroup, t->index_in_threadgroup / 4)
EMU_ATTRIBUTE(uint, quadgroups_per_threadgroup, t->simdgroups * 8)
EMU_ATTRIBUTE(uint, simdgroup_index_in_threadgroup, t->simdgroup_index)
EMU_ATTRIBUTE(uint, simdgroups_per_threadgroup, t->simdgroups)
EMU_ATTRIBUTE(uint, thread_execution_width, 32)
EMU_ATTRIBUTE(uint, thread_index_in_quadgroup, t->index_in_threadgroup % 4)
EMU_ATTRIBUTE(uint, thread_index_in_simdgroup, t->index_in_simdgroup)
EMU_ATTRIBUTE(uint, thread_index_in_threadgroup, t->index_in_threadgroup)
EMU_ATTRIBUTE(uint3, thread_position_in_grid, three(t->position_in_grid))
EMU_ATTRIBUTE(uint3, thread_position_in_threadgroup, three(t->position_in_threadgroup))
EMU_ATTRIBUTE(uint3, threadgroup_position_in_grid, three(t->threadgroup_position))
EMU_ATTRIBUTE(uint3, threadgroups_per_grid, three(t->threadgroups_per_grid))
EMU_ATTRIBUTE(uint3, threads_per_grid, three(t->threads_per_grid))
EMU_ATTRIBUTE(uint, threads_per_simdgroup, 32)
EMU_ATTRIBUTE(uint3, threads_per_threadgroup, three(t->threads_per_threadgroup))
}  // namespace emu
