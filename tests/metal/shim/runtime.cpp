// Runs the threads of a Metal kernel as fibers and checks what they do to memory.
#include "runtime.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "fiber.h"

namespace {

constexpr EmuU32 MAX_THREADS = 1024, LANES = 32, SLOT = 64, MAX_REGIONS = 128;
constexpr EmuU64 STACK = 128 * 1024, THREADGROUP_LIMIT = 32 * 1024;
constexpr EmuU64 PROGRAM_PAGES = 64;
constexpr EmuU64 CANARY = 0x5afe57ac5afe57acull;

enum Parked { RUNNING, AT_SIMD, AT_BARRIER };
enum Space { THREADGROUP, DEVICE };
enum Touched { TOUCHED_READ = 1, TOUCHED_WRITE = 2, ATOMIC = 4 };

struct Fiber {
  void* stack_pointer;
  EmuByte* stack;
  const void* site;
  const char* what;
  int line, flags;
  Parked parked;
};

struct Simdgroup {
  EmuU32 lanes, ready, finished, parity;
  bool reduced;
  EmuU32 epoch[2];  // of memory, moved on by simdgroup_barrier
  alignas(64) EmuByte slots[2][LANES][SLOT];
};

struct Access {
  EmuU32 threadgroup;  // its serial number; 0 is nobody
  EmuU32 epoch, simd_epoch, thread;
};

struct Cell {
  Access write, read[2];
  EmuU32 first_reader;  // a threadgroup
  EmuU32 touched;
};

struct Region {
  const char* name;
  EmuByte* data;
  EmuU64 bytes;
  EmuU32 element_bytes, granule;
  Space space;
  bool writable, written;
  EmuBuffer* buffer;
  Cell* cells;       // of what can be written
  EmuByte* touched;  // of what cannot
};

EmuLaunch* launch;
void* main_stack_pointer;
Fiber fibers[MAX_THREADS];
Simdgroup groups[MAX_THREADS / LANES];
EmuThread ids[MAX_THREADS];
Region regions[MAX_REGIONS];
EmuU32 num_regions, num_buffers, last_region;
EmuU32 num_threads, num_groups, num_done, current, current_group;
EmuU32 threadgroup_serial, barrier_epoch[2];  // never used twice, so that nothing need be cleared
EmuU32 visit[MAX_THREADS / LANES];
EmuU64 random_state;
EmuU64 program_pages[PROGRAM_PAGES];
void* arguments[MAX_REGIONS];

// A write that raced with another one, and is harmless if it changes nothing.
struct {
  bool active;
  EmuByte* address;
  EmuU32 bytes, thread, other;
  Region* region;
  EmuByte before[64];
} pending;

bool in_range;  // between the parts of one copy: nothing is written yet

EmuU32 random_bits() {
  random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
  return EmuU32(random_state >> 33);
}

[[noreturn]] void stop() {
  pending.active = false;
  void* ignored;
  emu_switch(&ignored, main_stack_pointer);
  abort();
}

template <typename... A> [[noreturn]] void fail(EmuU32 error, const char* format, A... args) {
  launch->error = error;
  snprintf(launch->message, sizeof launch->message, format, args...);
  stop();
}

struct Who {
  char text[80];
  explicit Who(EmuU32 t) {
    const EmuU32 *p = ids[t].position_in_threadgroup, *g = ids[t].threadgroup_position;
    snprintf(text, sizeof text, "thread (%u, %u, %u) of threadgroup (%u, %u, %u)", p[0], p[1], p[2],
             g[0], g[1], g[2]);
  }
};

void settle_pending() {
  pending.active = false;
  if (memcmp(pending.address, pending.before, pending.bytes) == 0) return;
  const Region* r = pending.region;
  fail(EMU_RACE,
       "%s[%llu] is written by %s and, with another value, by thread %u; no barrier between",
       r->name, EmuU64(pending.address - r->data) / r->element_bytes, Who(pending.thread).text,
       pending.other);
}

// ---- Scheduling ----

EmuU32 choose_bit(EmuU32 mask) {
  if (launch->order == 0) return __builtin_ctz(mask);
  if (launch->order == 1) return 31 - __builtin_clz(mask);
  EmuU32 turn = random_bits() & 31;
  EmuU32 rotated = (mask >> turn) | (turn ? mask << (32 - turn) : 0);
  return (__builtin_ctz(rotated) + turn) & 31;
}

void describe(EmuU32 t, char* text, size_t bytes) {
  const Fiber& f = fibers[t];
  Who who(t);
  if (groups[t / LANES].finished >> (t % LANES) & 1)
    snprintf(text, bytes, "%s has returned", who.text);
  else snprintf(text, bytes, "%s is at %s in line %d", who.text, f.what, f.line);
}

[[noreturn]] void diverged(EmuU32 a, EmuU32 b) {
  char first[160], second[160];
  describe(a, first, sizeof first);
  describe(b, second, sizeof second);
  fail(EMU_DIVERGENCE, "not reached by all: %s, but %s", first, second);
}

// The line too, because clang may turn two calls into one.
bool same_place(const Fiber& a, const Fiber& b) {
  return a.parked == b.parked && a.site == b.site && a.line == b.line;
}

// All lanes of the group have stopped: lets them go on together, or finds out who is missing.
void settle_group(EmuU32 g) {
  Simdgroup& s = groups[g];
  EmuU32 alive = s.lanes & ~s.finished;
  if (!alive) return;
  EmuU32 first = g * LANES + __builtin_ctz(alive);
  const Fiber& f = fibers[first];
  for (EmuU32 rest = alive; rest; rest &= rest - 1) {
    EmuU32 t = g * LANES + __builtin_ctz(rest);
    if (!same_place(fibers[t], f)) diverged(first, t);
  }
  if (s.finished) diverged(first, g * LANES + __builtin_ctz(s.finished));
  if (f.parked != AT_SIMD) return;
  s.parity ^= 1;
  s.reduced = false;
  s.ready = alive;
  launch->num_simd_ops++;
  for (int space = 0; space < 2; space++) s.epoch[space] += f.flags >> space & 1;
}

// Every group has either returned or is at a barrier.
void release_barrier() {
  EmuU32 first = 0;
  while (groups[first].finished) first++;
  const Fiber& f = fibers[first * LANES];
  for (EmuU32 g = 0; g < num_groups; g++) {
    if (groups[g].finished || !same_place(fibers[g * LANES], f)) diverged(first * LANES, g * LANES);
    groups[g].ready = groups[g].lanes;
  }
  launch->num_barriers++;
  for (int space = 0; space < 2; space++) barrier_epoch[space] += f.flags >> space & 1;
}

EmuU32 next_fiber() {
  for (;;) {
    if (!groups[current_group].ready) settle_group(current_group);
    bool hop = launch->order == 2 && (random_bits() & 1);
    if (!groups[current_group].ready || hop) {
      EmuU32 i = 0;
      while (i < num_groups && !groups[visit[i]].ready) i++;
      if (i == num_groups) {
        release_barrier();
        i = 0;
      }
      current_group = visit[hop ? random_bits() % num_groups : i];
      if (!groups[current_group].ready) current_group = visit[i];
    }
    EmuU32 ready = groups[current_group].ready;
    if (ready) return current_group * LANES + choose_bit(ready);
  }
}

void resume(EmuU32 t, void** save) {
  current = t;
  current_group = t / LANES;
  groups[current_group].ready &= ~(1u << (t % LANES));
  emu_switch(save, fibers[t].stack_pointer);
}

void park(Parked how, const void* site, const char* what, int line, int flags) {
  if (pending.active) settle_pending();
  Fiber& f = fibers[current];
  if (*(EmuU64*)f.stack != CANARY) fail(EMU_BOUNDS, "stack overflow in %s", Who(current).text);
  f.parked = how;
  f.site = site;
  f.what = what;
  f.line = line;
  f.flags = flags;
  EmuU32 next = next_fiber();
  EmuU32 self = current;
  if (next != self) resume(next, &f.stack_pointer);
  else groups[current_group].ready &= ~(1u << (self % LANES));
  f.parked = RUNNING;
}

void fiber_main() {
  launch->entry(arguments, &ids[current]);
  if (pending.active) settle_pending();
  groups[current_group].finished |= 1u << (current % LANES);
  if (++num_done == num_threads) stop();
  void* ignored;
  resume(next_fiber(), &ignored);
  abort();
}

#include "checks.h"

// Memory that is kept from launch to launch, with room on both sides, so that a stray index meets
// nothing of ours.
struct Arena {
  EmuByte* data;
  EmuU64 capacity;

  EmuByte* hold(EmuU64 bytes) {
    constexpr EmuU64 ROOM = 1 << 22;
    if (bytes < capacity) return data;
    if (data) munmap(data - ROOM, capacity + 2 * ROOM);
    capacity = 2 * bytes + 4096;
    void* p = mmap(nullptr, capacity + 2 * ROOM, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) abort();
    return data = (EmuByte*)p + ROOM;
  }
  EmuByte* hold_zeroed(EmuU64 bytes) { return (EmuByte*)memset(hold(bytes), 0, bytes); }
};
Arena buffer_arenas[MAX_REGIONS], shadow_arenas[MAX_REGIONS], stack_arena, threadgroup_arena;

EmuU32 granule_of(EmuU32 element_bytes) {
  if (element_bytes == 1 || element_bytes == 2 || element_bytes == 4) return element_bytes;
  return element_bytes == 16 ? 4 : element_bytes == 8 ? 2 : 1;
}

// ---- A launch ----

void start_fiber(EmuU32 t) {
  Fiber& f = fibers[t];
  // Not all at the same place of a page, or they would share a few lines of the cache.
  f.stack = stack_arena.data + t * (STACK + 192);
  *(EmuU64*)f.stack = CANARY;
  f.parked = RUNNING;
  EmuU64* top = (EmuU64*)(f.stack + STACK) - SAVED_WORDS - 2;
  memset(top, 0, SAVED_WORDS * 8);
  top[RETURN_WORD] = (EmuU64)(void*)fiber_main;
  f.stack_pointer = top;
}

void run_threadgroup(const EmuU32* position) {
  const EmuU32 *grid = launch->grid, *full = launch->group;
  EmuU32 size[3];
  num_threads = 1;
  for (int d = 0; d < 3; d++) {
    EmuU32 rest = grid[d] - position[d] * full[d];
    num_threads *= size[d] = rest < full[d] ? rest : full[d];
  }
  num_groups = (num_threads + LANES - 1) / LANES;
  num_done = 0;
  num_regions = num_buffers;
  last_region = 0;
  pending.active = in_range = false;
  launch->num_threads += num_threads;
  for (EmuU32 t = 0; t < num_threads; t++) {
    EmuThread& i = ids[t];
    EmuU32 local[3] = {t % size[0], t / size[0] % size[1], t / (size[0] * size[1])};
    for (int d = 0; d < 3; d++) {
      i.position_in_threadgroup[d] = local[d];
      i.threadgroup_position[d] = position[d];
      i.position_in_grid[d] = position[d] * full[d] + local[d];
      i.threads_per_grid[d] = grid[d];
      i.threadgroups_per_grid[d] = (grid[d] + full[d] - 1) / full[d];
      i.threads_per_threadgroup[d] = size[d];
      i.dispatch_threads[d] = full[d];
    }
    i.index_in_threadgroup = t;
    i.index_in_simdgroup = t % LANES;
    i.simdgroup_index = t / LANES;
    i.simdgroups = num_groups;
    i.dispatch_simdgroups = (full[0] * full[1] * full[2] + LANES - 1) / LANES;
    start_fiber(t);
  }
  for (EmuU32 g = 0; g < num_groups; g++) {
    EmuU32 lanes = num_threads - g * LANES;
    groups[g].lanes = groups[g].ready = lanes >= LANES ? ~0u : (1u << lanes) - 1;
    groups[g].finished = groups[g].parity = groups[g].epoch[0] = groups[g].epoch[1] = 0;
    visit[g] = launch->order == 1 ? num_groups - 1 - g : g;
  }
  if (launch->order == 2)
    for (EmuU32 g = num_groups; g > 1; g--) {
      EmuU32 other = random_bits() % g, keep = visit[g - 1];
      visit[g - 1] = visit[other];
      visit[other] = keep;
    }
  current_group = visit[0];
  resume(next_fiber(), &main_stack_pointer);
}

}  // namespace

extern "C" {

EmuU32 emu_run(EmuLaunch* l) {
  launch = l;
  random_state = 0x9e3779b97f4a7c15ull;
  stack_arena.hold(MAX_THREADS * (STACK + 192));
  num_buffers = l->num_buffers;
  EmuU64 total = 1;
  for (EmuU32 i = 0; i < num_buffers; i++) {
    EmuBuffer& b = l->buffers[i];
    Region& r = regions[i];
    EmuByte* data = (EmuByte*)memcpy(buffer_arenas[i].hold(b.bytes), b.data, b.bytes);
    EmuU32 granule = granule_of(b.element_bytes);
    r = {b.name,  data,    b.bytes,          b.element_bytes,
         granule, DEVICE,  b.is_output != 0, b.is_written != 0,
         &b,      nullptr, nullptr};
    EmuU64 shadow_bytes = r.writable ? b.bytes / granule * sizeof(Cell) : b.bytes;
    EmuByte* shadow = shadow_arenas[i].hold_zeroed(shadow_bytes);
    if (r.writable) r.cells = (Cell*)shadow;
    else r.touched = shadow;
    arguments[i] = data;
  }
  EmuU32 count[3];
  for (int d = 0; d < 3; d++) total *= count[d] = (l->grid[d] + l->group[d] - 1) / l->group[d];
  EmuU64 step = total / 2 + 1;
  while (l->order == 2) {  // a step without a common divisor visits all
    EmuU64 a = total, b = step;
    while (b) {
      EmuU64 m = a % b;
      a = b;
      b = m;
    }
    if (a == 1) break;
    step++;
  }
  for (EmuU64 i = 0; i < total && !l->error; i++) {
    EmuU64 n = l->order == 0 ? i : l->order == 1 ? total - 1 - i : i * step % total;
    threadgroup_serial++;
    EmuU32 position[3] = {EmuU32(n % count[0]), EmuU32(n / count[0] % count[1]),
                          EmuU32(n / (EmuU64(count[0]) * count[1]))};
    run_threadgroup(position);
  }
  for (EmuU32 i = 0; i < num_buffers; i++) {
    EmuBuffer& b = l->buffers[i];
    Region& r = regions[i];
    b.unwritten_at = ~0ull;
    EmuU64 cells = r.writable ? b.bytes / r.granule : 0;
    for (EmuU64 c = 0; c < cells; c++) {
      if (r.cells[c].touched & TOUCHED_READ) b.unique_read_bytes += r.granule;
      if (r.cells[c].touched & TOUCHED_WRITE) b.unique_written_bytes += r.granule;
      else if (b.unwritten_at == ~0ull) b.unwritten_at = c * r.granule / b.element_bytes;
    }
    for (EmuU64 c = 0; !r.writable && c < b.bytes; c++) b.unique_read_bytes += r.touched[c];
    if (r.writable) memcpy(b.data, r.data, b.bytes);
  }
  return l->error;
}

EmuByte* emu_simd(const void* site, const char* what, int line, const void* value, EmuU32 bytes) {
  Simdgroup& s = groups[current_group];
  EmuU32 mine = s.parity ^ 1;
  memcpy(s.slots[mine][current % LANES], value, bytes);
  park(AT_SIMD, site, what, line, 0);
  return groups[current_group].slots[mine][0];
}

EmuU32 emu_lanes() { return groups[current_group].lanes; }
EmuU32 emu_lane() { return current % LANES; }
bool emu_first() {
  bool first = !groups[current_group].reduced;
  groups[current_group].reduced = true;
  return first;
}

// mem_device is 1 and mem_threadgroup 2; here bit 0 is threadgroup memory and bit 1 the device's.
static int spaces(int flags) { return (flags >> 1 & 1) | (flags & 1) << 1; }
void emu_barrier(const void* site, int flags, int line) {
  park(AT_BARRIER, site, "threadgroup_barrier", line, spaces(flags));
}
void emu_simdgroup_barrier(const void* site, int flags, int line) {
  park(AT_SIMD, site, "simdgroup_barrier", line, spaces(flags));
}

void emu_threadgroup_memory(void* data, EmuU64 bytes, EmuU32 element_bytes, const char* name) {
  EmuU64 total = bytes;
  for (EmuU32 i = num_buffers; i < num_regions; i++) {
    if (regions[i].data == data) return;
    total += regions[i].bytes;
  }
  if (total > THREADGROUP_LIMIT)
    fail(EMU_THREADGROUP_MEMORY, "%llu bytes of threadgroup memory with %s; the limit is 32768",
         total, name);
  if (total > launch->threadgroup_bytes) launch->threadgroup_bytes = total;
  if (num_regions == MAX_REGIONS) abort();
  Cell* cells = (Cell*)threadgroup_arena.hold(THREADGROUP_LIMIT * sizeof(Cell));
  regions[num_regions++] = {
      name,        (EmuByte*)data, bytes, element_bytes, granule_of(element_bytes),
      THREADGROUP, true,           false, nullptr,       cells + (total - bytes),
      nullptr};
}

void emu_atomic(void* address, EmuU32 bytes, bool reads) {
  if (reads) access(address, bytes, false, true);
  access(address, bytes, true, true);
}

void emu_fail(int error, const char* message, int line) {
  fail(error, "%s in line %d, by %s", message, line, Who(current).text);
}
void emu_count_macs(EmuU64 macs) { launch->num_matrix_macs += macs; }

#define INSTRUMENTED(N)                                                             \
  void __tsan_read##N(void* p) { checked(p, N, false); }                            \
  void __tsan_write##N(void* p) { checked(p, N, true); }                            \
  void __tsan_unaligned_read##N(void* p) { access(p, N, false); }                   \
  void __tsan_unaligned_write##N(void* p) { access(p, N, true); }                   \
  void __tsan_read_write##N(void* p) { checked(p, N, false), checked(p, N, true); } \
  void __tsan_unaligned_read_write##N(void* p) { access(p, N, false), access(p, N, true); }
INSTRUMENTED(1)
INSTRUMENTED(2)
INSTRUMENTED(4) INSTRUMENTED(8) INSTRUMENTED(16)

    static void access_range(void* p, EmuU64 bytes, bool is_write) {
  if (pending.active) settle_pending();
  in_range = true;
  for (EmuU64 i = 0; i < bytes; i += 32)
    access((EmuByte*)p + i, EmuU32(bytes - i < 32 ? bytes - i : 32), is_write);
  in_range = false;
}
void* __tsan_memcpy(void* to, const void* from, EmuU64 bytes) {
  access_range((void*)from, bytes, false);
  access_range(to, bytes, true);
  return memmove(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, EmuU64 bytes) {
  return __tsan_memcpy(to, from, bytes);
}
void* __tsan_memset(void* to, int value, EmuU64 bytes) {
  access_range(to, bytes, true);
  return memset(to, value, bytes);
}
// What clang calls to round to bfloat where the processor cannot: to nearest, ties to even.
__bf16 __truncsfbf2(float x) {
  EmuU32 bits = __builtin_bit_cast(EmuU32, x);
  bits = x != x ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);
  return __builtin_bit_cast(__bf16, (unsigned short)(bits >> 16));
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
}
