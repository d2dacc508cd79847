// The check build: every access that g++ -fsanitize=thread reports is held against bounds, alignment, initialised bytes
// and the accesses of other threads.
#include <cstdio>
#include <cstdlib>

#include "runtime.h"

namespace emulation {
// Two bytes of memory: who wrote and who read them last. A thread number is 10 bits, flags lie above.
struct Cell {
  unsigned write_epoch, read_epoch;
  uint16_t write_thread, read_thread, write_clock, read_clock;
  unsigned write_site, read_site;  // relative to the module's image
};
constexpr uint16_t THREAD = 1023;
constexpr uint16_t BY_ATOMIC = 1 << 10, INITIALISED = 1 << 11, COPY_PENDING = 1 << 12;    // in write_thread
constexpr uint16_t OTHER_LANES = 1 << 10, OTHER_WARPS = 1 << 11, OTHER_BLOCKS = 1 << 12;  // in read_thread
// In both, for accesses of one byte: as a cell has two, they do not race with one another.
constexpr uint16_t BY_BYTE = 1 << 13;
constexpr size_t CELL_BYTES = 2;

namespace {
Cell arena_cells[ARENA / CELL_BYTES];
const char* const ACCESS[] = {"read", "write", "atomic", "read-only load", "copy"};
const char UNINITIALISED_SHARED[] = "uninitialised shared memory";
const char UNINITIALISED_GLOBAL[] = "uninitialised global memory";
const char RACE[] = "race, no barrier between";

struct Place {  // of an access: for messages
  const char* p;
  size_t bytes;
  int access;
  const void* site;
  const char *begin, *name;  // of the array
  int argument;
  bool shared;
};

unsigned relative(const void* site) { return static_cast<unsigned>(static_cast<const char*>(site) - module->begin); }
const void* place(unsigned site) { return module->begin + site; }

[[noreturn]] void report(const Place& at, const char* what, const char* other = "") {
  char where[128];
  if (at.shared) snprintf(where, sizeof where, "shared array %s", at.name);
  else snprintf(where, sizeof where, "argument %d", at.argument);
  fail("%s: %s of %zu bytes at byte %td of %s, at {%p}%s", what, ACCESS[at.access], at.bytes, at.p - at.begin, where,
       at.site, other);
}

[[noreturn]] void report_after_write(const Place& at, const char* what, const Cell& c) {
  char other[160];
  snprintf(other, sizeof other, "; the other access: write by thread %d of %s at {%p}", c.write_thread & THREAD,
           c.write_epoch < block_epoch ? "another block" : "this block", place(c.write_site));
  report(at, what, other);
}

// Only the last reader is known by its number; `others` says who else must have read.
[[noreturn]] void report_after_read(const Place& at, const Cell& c, const char* others) {
  char other[160];
  if (others)
    snprintf(other, sizeof other, "; the other access: read by a thread of %s, like that at {%p}", others,
             place(c.read_site));
  else
    snprintf(other, sizeof other, "; the other access: read by thread %d of %s at {%p}", c.read_thread & THREAD,
             c.read_epoch < block_epoch ? "another block" : "this block", place(c.read_site));
  report(at, RACE, other);
}

// Whether an access of this launch, stamped so, is unordered with one that the current thread makes now.
inline bool concurrent(unsigned when, uint16_t thread, uint16_t clock, bool shared) {
  if (when < launch_epoch) return false;
  if (when < block_epoch) return !shared;
  if (when != epoch) return false;
  Fiber* fiber = self();
  int other = thread & THREAD;
  if (other == fiber->linear) return false;
  if (other >> 5 != fiber->linear >> 5) return true;
  const Warp& warp = *fiber->warp;
  return clock >= warp.all_met && !(warp.some_met && clock < warp.met[fiber->lane][other & 31]);
}

inline void check_read(Cell& c, const Place& at) {
  Fiber* fiber = self();
  const uint16_t by_byte = at.bytes == 1 ? BY_BYTE : 0;
  bool fresh = !at.shared || c.write_epoch >= block_epoch;  // shared memory holds nothing at the start of a block
  if (fresh && c.write_thread & COPY_PENDING)
    report_after_write(at, "reads what a cp.async still has to write (no cp_async_wait)", c);
  if (!fresh || !(c.write_thread & INITIALISED)) report(at, at.shared ? UNINITIALISED_SHARED : UNINITIALISED_GLOBAL);
  if (c.write_epoch >= launch_epoch) {
    if (!(c.write_thread & by_byte) && concurrent(c.write_epoch, c.write_thread, c.write_clock, at.shared))
      report_after_write(at, RACE, c);
    if (at.access == READ_ONLY_PATH)
      report_after_write(at, "read-only load of memory that this launch writes", c);
  }
  uint16_t flags = 0;
  uint16_t linear = static_cast<uint16_t>(fiber->linear);
  if (c.read_epoch == epoch) {
    flags = c.read_thread & (OTHER_WARPS | OTHER_BLOCKS);
    int before = c.read_thread & THREAD;
    if (before >> 5 != linear >> 5) flags |= OTHER_WARPS;
    else if (c.read_clock >= fiber->warp->all_met)
      flags |= (c.read_thread & OTHER_LANES) | (before != linear ? OTHER_LANES : 0);
  } else if (c.read_epoch >= launch_epoch && !at.shared) {
    if (c.read_epoch < block_epoch || c.read_thread & OTHER_BLOCKS) flags = OTHER_BLOCKS;
  }
  c.read_epoch = epoch, c.read_thread = linear | flags | by_byte, c.read_clock = fiber->warp->clock;
  c.read_site = relative(at.site);
}

inline void check_write(Cell& c, const Place& at) {
  bool atomic = at.access == ATOMIC;
  const uint16_t by_byte = at.bytes == 1 ? BY_BYTE : 0;
  if (atomic && (!(c.write_thread & INITIALISED) || (at.shared && c.write_epoch < block_epoch)))
    report(at, at.shared ? UNINITIALISED_SHARED : UNINITIALISED_GLOBAL);
  if (c.write_epoch >= launch_epoch && !(c.write_thread & by_byte) && !(atomic && c.write_thread & BY_ATOMIC) &&
      concurrent(c.write_epoch, c.write_thread, c.write_clock, at.shared))
    report_after_write(at, RACE, c);
  if (c.read_epoch >= launch_epoch && !(c.read_thread & by_byte)) {
    if (concurrent(c.read_epoch, c.read_thread, c.read_clock, at.shared)) report_after_read(at, c, nullptr);
    if (!at.shared && c.read_thread & OTHER_BLOCKS) report_after_read(at, c, "another block");
    if (c.read_epoch == epoch && c.read_thread & OTHER_WARPS) report_after_read(at, c, "another warp");
    if (c.read_epoch == epoch && c.read_thread & OTHER_LANES && c.read_clock >= self()->warp->all_met)
      report_after_read(at, c, "its warp");
  }
  c.write_epoch = epoch, c.write_clock = self()->warp->clock;
  // A fence is for what came before it.
  if (at.shared && self()->proxy_epoch == epoch) self()->proxy_epoch = epoch - 1;
  c.write_thread = static_cast<uint16_t>(current->linear | INITIALISED | by_byte | (atomic ? BY_ATOMIC : 0));
  c.write_site = relative(at.site);
  c.read_epoch = 0, c.read_thread = 0;
}

const Buffer* buffer_at(const char* p) {
  static int last = 0;
  if (last < buffer_count && static_cast<size_t>(p - buffers[last].begin) < buffers[last].bytes) return buffers + last;
  for (int i = 0; i < buffer_count; i++)
    if (static_cast<size_t>(p - buffers[i].begin) < buffers[i].bytes) return buffers + (last = i);
  return nullptr;
}

const Shared* shared_at(const char* p) {
  for (int i = 0; i < shared_count; i++)
    if (static_cast<size_t>(p - shared_arrays[i].begin) < shared_arrays[i].bytes) return shared_arrays + i;
  return nullptr;
}

[[noreturn]] void report_outside(const char* p, size_t bytes, int access, const void* site) {
  char near[160] = "no array argument of the kernel is near";
  ptrdiff_t best = 1 << 20;
  auto consider = [&](const char* begin, size_t size, const char* name, int argument) {
    ptrdiff_t distance = p < begin ? begin - p : p - (begin + size) + 1;
    if (distance >= best) return;
    best = distance;
    if (name) snprintf(near, sizeof near, "byte %td of shared array %s, which has %zu bytes", p - begin, name, size);
    else snprintf(near, sizeof near, "byte %td of argument %d, which has %zu bytes", p - begin, argument, size);
  };
  for (int i = 0; i < buffer_count; i++) consider(buffers[i].begin, buffers[i].bytes, nullptr, buffers[i].argument);
  for (int i = 0; i < shared_count; i++)
    consider(shared_arrays[i].begin, shared_arrays[i].bytes, shared_arrays[i].name, 0);
  fail("out of bounds: %s of %zu bytes; %s, at {%p}", ACCESS[access], bytes, near, site);
}

// Cells that were the same before are the same after: mostly one thread wrote all that another one reads at once.
template <void (*CHECK)(Cell&, const Place&)> void check_cells(Cell* cell, const Cell* last, const Place& at) {
  Cell before = *cell;
  CHECK(*cell, at);
  for (Cell* next = cell + 1; next <= last; next++) {
    if (!memcmp(next, &before, sizeof before)) {
      *next = *cell;
      continue;
    }
    before = *next;
    CHECK(*next, at);
    cell = next;
  }
}

void visit(const Place& at, Cell* cells, size_t whole) {
  if (static_cast<size_t>(at.p - at.begin) + at.bytes > whole) report_outside(at.p, at.bytes, at.access, at.site);
  if (profiling) record(at.p, at.bytes, at.access, at.site, at.shared);
  size_t first = static_cast<size_t>(at.p - at.begin) / CELL_BYTES;
  size_t last = static_cast<size_t>(at.p - at.begin + at.bytes - 1) / CELL_BYTES;
  if (at.access != WRITE && at.access != ATOMIC) check_cells<check_read>(cells + first, cells + last, at);
  else check_cells<check_write>(cells + first, cells + last, at);
}

void access_memory(const void* pointer, size_t bytes, int access, const void* site) {
  const char* p = static_cast<const char*>(pointer);
  int owner = stack_owner(p);
  if (owner == current->linear) return;
  if (owner >= 0) fail("uses a local variable of thread %d, at {%p}", owner, site);
  if (static_cast<size_t>(p - arena) < ARENA) {
    if (const Shared* shared = shared_at(p))
      return visit({p, bytes, access, site, shared->begin, shared->name, 0, true},
                   arena_cells + (shared->begin - arena) / CELL_BYTES, shared->bytes);
  } else if (const Buffer* buffer = buffer_at(p)) {
    return visit({p, bytes, access, site, buffer->begin, nullptr, buffer->argument, false},
                 buffer->cells + (buffer->begin - buffer->memory) / CELL_BYTES, buffer->bytes);
  }
  auto in = [p](const auto& object) {
    return static_cast<size_t>(p - reinterpret_cast<const char*>(&object)) < sizeof object;
  };
  if (p >= module->begin && p < module->end) return;  // constants
  if (in(fibers) || in(current) || in(block_index) || in(block_size) || in(grid_size)) return;  // threadIdx and so on
  report_outside(p, bytes, access, site);
}

void access_aligned(const void* p, size_t bytes, int access, const void* site) {
  if (!checking || !current) return;
  size_t past = reinterpret_cast<uintptr_t>(p) & (bytes - 1);
  if (past)
    fail("misaligned %s of %zu bytes at {%p}: the address is %zu bytes past a multiple of %zu", ACCESS[access], bytes,
         site, past, bytes);
  access_memory(p, bytes, access, site);
}

Cell* shared_cell(const void* p) {
  const Shared* shared = shared_at(static_cast<const char*>(p));
  return shared ? arena_cells + (static_cast<const char*>(p) - arena) / CELL_BYTES : nullptr;
}
}  // namespace

void touch(const void* pointer, size_t bytes, int access, const void* site) {
  if ((bytes & (bytes - 1)) == 0 && bytes <= 16) return access_aligned(pointer, bytes, access, site);
  if (checking && current) access_memory(pointer, bytes, access, site);
}

void copy_started(const void* to, const void* site) {
  if (!checking) return;
  touch(to, 16, WRITE, site);
  Cell* cell = shared_cell(to);
  for (int i = 0; cell && i < 8; i++) cell[i].write_thread = (cell[i].write_thread & ~INITIALISED) | COPY_PENDING;
}

void copy_landed(const void* to, const void* site) {
  bool profile = profiling;  // it was counted when it was issued
  profiling = false;
  if (checking) touch(to, 16, WRITE, site);
  profiling = profile;
}

// A read by the tensor cores of what the kernel wrote before: through another path to memory, which needs a fence.
void product_reads(const void* p, size_t bytes, unsigned issued, const void* site) {
  if (!checking) return;
  bool profile = profiling;
  profiling = false;  // wgmma's own accesses have no lanes
  touch(p, bytes, READ, site);
  profiling = profile;
  const Cell* cell = shared_cell(p);
  if (!cell) fail("wgmma reads memory that is not shared, at {%p}", site);
  for (size_t i = 0; i < bytes / CELL_BYTES; i++) {
    if (cell[i].write_epoch > issued)
      fail("a tile is written between a wgmma and its wait, at {%p} and {%p}", place(cell[i].write_site), site);
    int writer = cell[i].write_thread & THREAD;
    if (fibers[writer].proxy_epoch < cell[i].write_epoch)
      fail("wgmma, awaited at {%p}, reads what thread %d wrote at {%p} with no fence_proxy_async after", site, writer,
           place(cell[i].write_site));
  }
}
}  // namespace emulation

using namespace emulation;
extern "C" {
Cell* emulation_new_cells(size_t bytes) { return static_cast<Cell*>(calloc(bytes / CELL_BYTES + 1, sizeof(Cell))); }
void emulation_free_cells(Cell* cells) { free(cells); }
void emulation_mark_initialised(Cell* cells, size_t offset, size_t bytes) {
  for (size_t i = offset / CELL_BYTES; i < (offset + bytes + CELL_BYTES - 1) / CELL_BYTES; i++) {
    cells[i].write_thread |= INITIALISED;
  }
}

// What g++ -fsanitize=thread calls before each access.
#define EMULATION_HOOKS(n)                                                                                             \
  void __tsan_read##n(void* p) { access_aligned(p, n, READ, __builtin_return_address(0)); }                            \
  void __tsan_write##n(void* p) { access_aligned(p, n, WRITE, __builtin_return_address(0)); }                          \
  void __tsan_unaligned_read##n(void* p) {                                                                             \
    if (checking && current) access_memory(p, n, READ, __builtin_return_address(0));                                   \
  }                                                                                                                    \
  void __tsan_unaligned_write##n(void* p) {                                                                            \
    if (checking && current) access_memory(p, n, WRITE, __builtin_return_address(0));                                  \
  }
EMULATION_HOOKS(1)
EMULATION_HOOKS(2)
EMULATION_HOOKS(4)
EMULATION_HOOKS(8)
EMULATION_HOOKS(16)
void __tsan_read_range(void* p, size_t n) {
  if (checking && current) access_memory(p, n, READ, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t n) {
  if (checking && current) access_memory(p, n, WRITE, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
// g++ -fsanitize=float-cast-overflow: the CPU's cast differs from the GPU's, which saturates.
void __ubsan_handle_float_cast_overflow(void*, void*) {
  if (!current) return;
  fail("conversion of a float that no int holds, at {%p}: use __float2int_rd or clamp it first",
       __builtin_return_address(0));
}
}
