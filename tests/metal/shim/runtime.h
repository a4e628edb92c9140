// What a compiled kernel, the runtime and Python agree on.
#pragma once

typedef unsigned char EmuByte;
typedef unsigned int EmuU32;
typedef unsigned long long EmuU64;

enum EmuError {
  EMU_OK,
  EMU_BOUNDS,
  EMU_RACE,
  EMU_UNINITIALIZED,
  EMU_DIVERGENCE,
  EMU_THREADGROUP_MEMORY,
  EMU_READ_ONLY,
  EMU_MISALIGNED,
};

// A buffer argument; the counters are filled in by the launch.
struct EmuBuffer {
  const char* name;
  EmuByte* data;
  EmuU64 bytes;
  EmuU32 element_bytes;
  EmuU32 is_output;
  EmuU32 is_written;  // before the launch
  EmuU32 padding;
  EmuU64 read_bytes, written_bytes, unique_read_bytes, unique_written_bytes, unwritten_at;
};

struct EmuThread {
  EmuU32 position_in_grid[3], position_in_threadgroup[3], threadgroup_position[3];
  EmuU32 threads_per_grid[3], threadgroups_per_grid[3], threads_per_threadgroup[3],
      dispatch_threads[3];
  EmuU32 index_in_threadgroup, index_in_simdgroup, simdgroup_index, simdgroups, dispatch_simdgroups;
};

struct EmuLaunch {
  void (*entry)(void**, const EmuThread*);
  EmuBuffer* buffers;
  EmuU32 num_buffers, order, grid[3], group[3];
  EmuU64* float_ops;  // counted by the kernel itself
  EmuU64 num_threads, num_simd_ops, num_barriers, threadgroup_bytes, num_matrix_macs;
  EmuU32 error, padding;
  char message[512];
};

// Without `convergent` clang would copy a call into both branches before it, and lanes would miss
// each other.
#define EMU_CONVERGENT __attribute__((convergent))

extern "C" {
// Parks this lane until all lanes of its simdgroup are at the same place.
// Returns what each of the 32 lanes brought, 64 bytes apart.
EMU_CONVERGENT EmuByte* emu_simd(const void* site, const char* what, int line, const void* value,
                                 EmuU32 bytes);
// Lanes of this simdgroup that exist.
EmuU32 emu_lanes();
EmuU32 emu_lane();
// True for the first lane that asks after an emu_simd; it computes for all.
bool emu_first();
EMU_CONVERGENT void emu_barrier(const void* site, int flags, int line);
EMU_CONVERGENT void emu_simdgroup_barrier(const void* site, int flags, int line);
void emu_threadgroup_memory(void* data, EmuU64 bytes, EmuU32 element_bytes, const char* name);
void emu_atomic(void* address, EmuU32 bytes, bool reads);
void emu_fail(int error, const char* message, int line);
void emu_count_macs(EmuU64 macs);
}
