// The check build: every access that g++ -fsanitize=thread reports is held against bounds, alignment, initialised bytes
// and the accesses of other threads. Counts sectors and wavefronts too.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <vector>

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
const char* const ACCESS[] = {"read", "write", "atomic", "read-only load"};

struct Place {  // of an access: for messages
  const char* p;
  size_t bytes;
  int access;
  const void* site;
  const char *begin, *kind;
  const char* name;
  int argument;
  bool shared;
};

[[noreturn]] void report(const Place& at, const char* what, const Cell* cell = nullptr, bool reader = false) {
  char where[128], other[200] = "";
  if (at.shared) snprintf(where, sizeof where, "shared array %s", at.name);
  else snprintf(where, sizeof where, "argument %d", at.argument);
  if (cell) {
    unsigned when = reader ? cell->read_epoch : cell->write_epoch;
    const char* others = when < block_epoch ? "another block" : "this block";
    unsigned site = reader ? cell->read_site : cell->write_site;
    snprintf(other, sizeof other, "; the other access: %s by thread %d of %s at {%p}", reader ? "read" : "write",
             (reader ? cell->read_thread : cell->write_thread) & THREAD, others, static_cast<void*>(module->begin + site));
  }
  fail("%s: %s of %zu bytes at byte %td of %s, at {%p}%s", what, ACCESS[at.access], at.bytes, at.p - at.begin, where, at.site,
       other);
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
  if (fresh && c.write_thread & COPY_PENDING) report(at, "reads what a cp.async still has to write (no cp_async_wait)", &c);
  if (!fresh || !(c.write_thread & INITIALISED)) report(at, at.shared ? "uninitialised shared memory" : "uninitialised global memory");
  if (c.write_epoch >= launch_epoch) {
    if (!(c.write_thread & by_byte) && concurrent(c.write_epoch, c.write_thread, c.write_clock, at.shared))
      report(at, "race, no barrier between", &c);
    if (at.access == READ_ONLY_PATH) report(at, "read-only load of memory that this launch writes", &c);
  }
  uint16_t flags = 0;
  uint16_t linear = static_cast<uint16_t>(fiber->linear);
  if (c.read_epoch == epoch) {
    flags = c.read_thread & (OTHER_WARPS | OTHER_BLOCKS);
    int before = c.read_thread & THREAD;
    if (before >> 5 != linear >> 5) flags |= OTHER_WARPS;
    else if (c.read_clock >= fiber->warp->all_met) flags |= (c.read_thread & OTHER_LANES) | (before != linear ? OTHER_LANES : 0);
  } else if (c.read_epoch >= launch_epoch && !at.shared && (c.read_epoch < block_epoch || c.read_thread & OTHER_BLOCKS)) {
    flags = OTHER_BLOCKS;
  }
  c.read_epoch = epoch, c.read_thread = linear | flags | by_byte, c.read_clock = fiber->warp->clock;
  c.read_site = static_cast<unsigned>(static_cast<const char*>(at.site) - module->begin);
}

inline void check_write(Cell& c, const Place& at) {
  bool atomic = at.access == ATOMIC;
  const uint16_t by_byte = at.bytes == 1 ? BY_BYTE : 0;
  if (atomic && (!(c.write_thread & INITIALISED) || (at.shared && c.write_epoch < block_epoch)))
    report(at, at.shared ? "uninitialised shared memory" : "uninitialised global memory");
  if (c.write_epoch >= launch_epoch && !(c.write_thread & by_byte) && !(atomic && c.write_thread & BY_ATOMIC) &&
      concurrent(c.write_epoch, c.write_thread, c.write_clock, at.shared))
    report(at, "race, no barrier between", &c);
  if (c.read_epoch >= launch_epoch && !(c.read_thread & by_byte)) {
    bool race = concurrent(c.read_epoch, c.read_thread, c.read_clock, at.shared);
    if (!at.shared && c.read_thread & OTHER_BLOCKS) race = true;
    if (c.read_epoch == epoch && c.read_thread & OTHER_WARPS) race = true;
    if (c.read_epoch == epoch && c.read_thread & OTHER_LANES && c.read_clock >= self()->warp->all_met) race = true;
    if (race) report(at, "race, no barrier between", &c, true);
  }
  c.write_epoch = epoch, c.write_clock = self()->warp->clock;
  c.write_thread = static_cast<uint16_t>(current->linear | INITIALISED | by_byte | (atomic ? BY_ATOMIC : 0));
  c.write_site = static_cast<unsigned>(static_cast<const char*>(at.site) - module->begin);
  c.read_epoch = 0, c.read_thread = 0;
}

// ---- requests of a warp: the nth access of each lane at one place of the code belong together
struct Request {
  uintptr_t address[32];
  uint32_t lanes;
  uint16_t bytes;
};
struct Site {
  bool shared;
  int access;
  uint64_t requests = 0, sectors = 0, least_sectors = 0, wavefronts = 0, least_wavefronts = 0, bytes = 0;
  uint32_t seen[MAX_THREADS] = {};
  std::vector<Request> open[MAX_WARPS];
};
std::map<const void*, Site> sites;

void record(const Place& at) {
  Site& site = sites[at.site];
  site.shared = at.shared, site.access = at.access == READ_ONLY_PATH ? READ : at.access;
  std::vector<Request>& open = site.open[current->linear >> 5];
  uint32_t nth = site.seen[current->linear]++;
  if (nth >= open.size()) open.resize(nth + 1, Request{});
  Request& request = open[nth];
  request.address[current->lane] = reinterpret_cast<uintptr_t>(at.p);
  request.lanes |= 1u << current->lane;
  request.bytes = static_cast<uint16_t>(at.bytes);
}

// How many different units of `unit` bytes the lanes touch; the units land in `found`.
int units(const Request& r, unsigned lanes, unsigned unit, uintptr_t* found) {
  int count = 0;
  for (; lanes; lanes &= lanes - 1) {
    uintptr_t first = r.address[__builtin_ctz(lanes)], last = first + r.bytes - 1;
    for (uintptr_t u = first / unit; u <= last / unit; u++) {
      int k = 0;
      while (k < count && found[k] != u) k++;
      if (k == count && count < 1024) found[count++] = u;
    }
  }
  return count;
}

void count_shared(Site& site, const Request& r) {
  // Accesses of 16 bytes go a quarter of the warp at a time, of 8 bytes half a warp.
  int together = r.bytes >= 16 ? 8 : r.bytes == 8 ? 16 : 32;
  for (int first = 0; first < 32; first += together) {
    unsigned lanes = r.lanes & static_cast<unsigned>(((1ull << together) - 1) << first);
    if (!lanes) continue;
    uintptr_t found[1024];
    int banks[32] = {}, most = 0, count = units(r, lanes, 4, found);
    for (int k = 0; k < count; k++) {
      int use = ++banks[found[k] % 32];
      most = use > most ? use : most;
    }
    site.wavefronts += most;
    site.least_wavefronts += (count + 31) / 32;
  }
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

void visit(const Place& at, Cell* cells, size_t whole) {
  if (static_cast<size_t>(at.p - at.begin) + at.bytes > whole) report_outside(at.p, at.bytes, at.access, at.site);
  if (profiling) record(at);
  size_t first = static_cast<size_t>(at.p - at.begin) / CELL_BYTES, last = (at.p - at.begin + at.bytes - 1) / CELL_BYTES;
  if (at.access == READ || at.access == READ_ONLY_PATH)
    for (size_t i = first; i <= last; i++) check_read(cells[i], at);
  else
    for (size_t i = first; i <= last; i++) check_write(cells[i], at);
}

void access_memory(const void* pointer, size_t bytes, int access, const void* site) {
  const char* p = static_cast<const char*>(pointer);
  if (on_stack(p)) return;
  if (static_cast<size_t>(p - arena) < ARENA) {
    if (const Shared* shared = shared_at(p))
      return visit({p, bytes, access, site, shared->begin, "", shared->name, 0, true},
                   arena_cells + (shared->begin - arena) / CELL_BYTES, shared->bytes);
  } else if (const Buffer* buffer = buffer_at(p)) {
    return visit({p, bytes, access, site, buffer->begin, "", nullptr, buffer->argument, false},
                 buffer->cells + (buffer->begin - buffer->memory) / CELL_BYTES, buffer->bytes);
  }
  if (p >= module->begin && p < module->end) return;  // constants
  if (p >= reinterpret_cast<char*>(fibers) && p < reinterpret_cast<char*>(fibers + MAX_THREADS)) return;  // threadIdx
  if (p == reinterpret_cast<char*>(&current)) return;
  if (static_cast<size_t>(p - reinterpret_cast<char*>(&block_index)) < sizeof block_index) return;
  if (static_cast<size_t>(p - reinterpret_cast<char*>(&grid_size)) < sizeof grid_size) return;
  if (static_cast<size_t>(p - reinterpret_cast<char*>(&block_size)) < sizeof block_size) return;
  report_outside(p, bytes, access, site);
}

void access_aligned(const void* p, size_t bytes, int access, const void* site) {
  if (!checking || !current) return;
  if (reinterpret_cast<uintptr_t>(p) & (bytes - 1))
    fail("misaligned %s of %zu bytes at {%p}: the address is %zu bytes past a multiple of %zu", ACCESS[access], bytes, site,
         static_cast<size_t>(reinterpret_cast<uintptr_t>(p) & (bytes - 1)), bytes);
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
      fail("a tile is written between a wgmma and its wait, at {%p} and {%p}", static_cast<void*>(module->begin + cell[i].write_site), site);
    int writer = cell[i].write_thread & THREAD;
    if (fibers[writer].proxy_epoch < cell[i].write_epoch)
      fail("wgmma, awaited at {%p}, reads what thread %d wrote at {%p} with no fence_proxy_async after", site, writer,
           static_cast<void*>(module->begin + cell[i].write_site));
  }
}

void count_requests() {
  static uintptr_t found[1024];
  for (auto& [address, site] : sites) {
    for (auto& open : site.open) {
      for (const Request& r : open) {
        if (!r.lanes) continue;
        int lanes = __builtin_popcount(r.lanes);
        site.requests++;
        site.bytes += static_cast<uint64_t>(lanes) * r.bytes;
        if (site.shared) {
          count_shared(site, r);
          continue;
        }
        site.sectors += units(r, r.lanes, 32, found);
        // The fewest sectors that could hold these bytes, lanes that read the same ones counted once.
        site.least_sectors += (units(r, r.lanes, r.bytes, found) * r.bytes + 31) / 32;
      }
      open.clear();
    }
    memset(site.seen, 0, sizeof site.seen);
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

struct SiteCounts {
  const void* site;
  int64_t shared, access, requests, sectors, least_sectors, wavefronts, least_wavefronts, bytes;
};
int emulation_take_counts(SiteCounts* out, int capacity) {  // and start again from 0
  int count = 0;
  for (auto& [address, s] : sites)
    if (count < capacity && s.requests)
      out[count++] = {address, s.shared, s.access, (int64_t)s.requests, (int64_t)s.sectors, (int64_t)s.least_sectors,
                      (int64_t)s.wavefronts, (int64_t)s.least_wavefronts, (int64_t)s.bytes};
  sites.clear();
  return count;
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
  if (current) fail("conversion of a float that no int holds, at {%p}: use __float2int_rd or clamp it first", __builtin_return_address(0));
}
}
