// Judges every access to memory. Part of runtime.cpp, whose state it uses.
#pragma once

bool before(const Access& a, Space space) {
  if (a.threadgroup == 0) return true;
  if (a.threadgroup != threadgroup_serial) return space == THREADGROUP;
  if (a.thread == current || a.epoch < barrier_epoch[space]) return true;
  return a.thread / LANES == current_group && a.simd_epoch < groups[current_group].epoch[space];
}

Region* find(EmuByte* p) {
  if (EmuU64(p - regions[last_region].data) < regions[last_region].bytes)
    return &regions[last_region];
  for (EmuU32 i = 0; i < num_regions; i++)
    if (EmuU64(p - regions[i].data) < regions[i].bytes) return &regions[last_region = i];
  return nullptr;
}

// A table in the program itself. The loader is slow to ask, so its answers are kept by page.
bool in_program(EmuByte* p) {
  EmuU64 page = EmuU64(p) >> 12;
  EmuU64& known = program_pages[page % PROGRAM_PAGES];
  Dl_info info;
  if (known != page && dladdr(p, &info)) known = page;
  return known == page;
}

[[noreturn]] void out_of_bounds(EmuByte* p, EmuU32 bytes, const char* verb) {
  const Region* nearest = nullptr;
  EmuU64 best = ~0ull;
  for (EmuU32 i = 0; i < num_regions; i++) {
    const Region& r = regions[i];
    EmuU64 distance = p < r.data ? r.data - p : p - r.data - r.bytes;
    if (distance < best) best = distance, nearest = &r;
  }
  for (EmuU32 t = 0; t < num_threads; t++)
    if (EmuU64(p - fibers[t].stack) < STACK)
      fail(EMU_BOUNDS, "%s in memory private to %s, by %s", verb, Who(t).text, Who(current).text);
  long long offset = nearest ? p - nearest->data : 0;
  fail(EMU_BOUNDS, "%s of %u bytes out of bounds of %s: index %lld of %llu, by %s", verb, bytes,
       nearest ? nearest->name : "everything",
       nearest ? offset / (long long)nearest->element_bytes : 0ll,
       nearest ? nearest->bytes / nearest->element_bytes : 0ull, Who(current).text);
}

[[noreturn]] void race(const Region& r, EmuU64 index, const char* verb, const Access& other,
                       const char* other_verb) {
  fail(EMU_RACE, "%s[%llu] is %s by %s and %s by thread %u of %s threadgroup; no barrier between",
       r.name, index, verb, Who(current).text, other_verb, other.thread,
       other.threadgroup == threadgroup_serial ? "this" : "another");
}

void access(void* address, EmuU32 bytes, bool is_write, bool atomic = false) {
  EmuByte* p = (EmuByte*)address;
  if (EmuU64(p - fibers[current].stack) < STACK) return;
  if (pending.active && !in_range) settle_pending();
  const char* verb = is_write ? "write" : "read";
  Region* r = find(p);
  if (!r) {
    if (!is_write && in_program(p)) return;
    out_of_bounds(p, bytes, verb);
  }
  EmuU64 offset = p - r->data;
  if (offset + bytes > r->bytes) out_of_bounds(p, bytes, verb);
  if (r->buffer) (is_write ? r->buffer->written_bytes : r->buffer->read_bytes) += bytes;
  if (!r->writable) {
    if (is_write)
      fail(EMU_READ_ONLY, "write to input %s[%llu] by %s", r->name, offset / r->element_bytes,
           Who(current).text);
    memset(r->touched + offset, 1, bytes);
    return;
  }
  Access now = {threadgroup_serial, barrier_epoch[r->space], groups[current_group].epoch[r->space],
                current};
  for (EmuU64 c = offset / r->granule; c <= (offset + bytes - 1) / r->granule; c++) {
    Cell& cell = r->cells[c];
    auto index = [&] { return c * r->granule / r->element_bytes; };
    bool both_atomic = atomic && (cell.touched & ATOMIC);
    if (!is_write) {
      bool written = cell.write.threadgroup &&
                     (r->space == DEVICE || cell.write.threadgroup == threadgroup_serial);
      if (!written && !r->written)
        fail(EMU_UNINITIALIZED, "%s[%llu] is read by %s; nobody wrote it", r->name, index(),
             Who(current).text);
      if (!both_atomic && !before(cell.write, r->space))
        race(*r, index(), "read", cell.write, "written");
      cell.touched |= TOUCHED_READ;
      if (cell.read[1].thread != current || cell.read[1].threadgroup != now.threadgroup)
        cell.read[0] = cell.read[1];
      cell.read[1] = now;
      if (!cell.first_reader) cell.first_reader = now.threadgroup;
    } else {
      if (!both_atomic) {
        for (const Access& read : cell.read)
          if (!before(read, r->space)) race(*r, index(), "written", read, "read");
        if (r->space == DEVICE && cell.first_reader && cell.first_reader != now.threadgroup) {
          Access read = {cell.first_reader, 0, 0, 0};
          race(*r, index(), "written", read, "read");
        }
        if (!before(cell.write, r->space)) {
          if (atomic || (cell.touched & ATOMIC))
            race(*r, index(), "written", cell.write, "written atomically");
          pending = {true, p, bytes, current, cell.write.thread, r, {}};
          memcpy(pending.before, p, bytes);
        }
      }
      cell.touched |= TOUCHED_WRITE;
      cell.write = now;
    }
    if (atomic) cell.touched |= ATOMIC;
    else cell.touched &= ~EmuU32(ATOMIC);
  }
}

void checked(void* address, EmuU32 bytes, bool is_write) {
  if (EmuU64(address) & (bytes - 1))
    fail(EMU_MISALIGNED, "%u bytes at an address that is not a multiple of it, by %s", bytes,
         Who(current).text);
  access(address, bytes, is_write);
}
