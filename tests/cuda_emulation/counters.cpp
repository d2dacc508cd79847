// Counts what the memory requests of whole warps cost, by the place in the code: sectors of global memory, passes over
// the banks of shared memory. The nth access of each lane at one place since the last barrier belong together.
//
// And for each kernel what bounds it: passes of 128 bytes over the one path that L1, shared memory and the operands of
// wgmma have together, multiply-adds of tensor cores, bytes of L2. L1 is a model: a block has what shared memory leaves of
// it to itself, finds it empty, and drops the lines that it has not touched for longest; between two barriers requests
// come in the order of the code.
#include <list>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "runtime.h"

namespace emulation {
namespace {
constexpr int MOST_UNITS = 1024;
struct Request {
  uintptr_t address[32];
  uint32_t lanes;
  uint16_t bytes;
};
struct Site {
  bool shared, past_l1;
  int access;
  int64_t requests = 0, sectors = 0, least_sectors = 0, wavefronts = 0, least_wavefronts = 0, bytes = 0;
  uint32_t seen[MAX_THREADS] = {};
  std::vector<Request> open[MAX_WARPS];
};
std::map<std::pair<const void*, bool>, Site> sites;  // a cp.async is two: what it reads and what it writes

struct Totals {
  int64_t launches, shared_passes, global_passes, operand_bytes, multiply_adds, tf32_multiply_adds, l2_bytes;
};
std::map<std::string, Totals> totals;
Totals* total;
constexpr unsigned LINE = 128, SECTOR = 32;  // bytes

struct Line {
  std::list<uintptr_t>::iterator age;
  unsigned sectors;
};
std::list<uintptr_t> oldest_last;
std::unordered_map<uintptr_t, Line> l1;
size_t l1_lines;

bool found_in_l1(uintptr_t sector) {  // or it is brought there
  const uintptr_t line = sector / (LINE / SECTOR);
  const unsigned bit = 1u << sector % (LINE / SECTOR);
  auto known = l1.find(line);
  if (known == l1.end()) {
    if (l1.size() >= l1_lines) {
      l1.erase(oldest_last.back());
      oldest_last.pop_back();
    }
    oldest_last.push_front(line);
    l1[line] = {oldest_last.begin(), bit};
    return false;
  }
  oldest_last.splice(oldest_last.begin(), oldest_last, known->second.age);
  const bool found = known->second.sectors & bit;
  known->second.sectors |= bit;
  return found;
}

// How many different units of `unit` bytes the lanes touch; the units land in `found`.
int units(const Request& r, unsigned lanes, unsigned unit, uintptr_t* found) {
  int count = 0;
  for (; lanes; lanes &= lanes - 1) {
    uintptr_t first = r.address[__builtin_ctz(lanes)], last = first + r.bytes - 1;
    for (uintptr_t u = first / unit; u <= last / unit; u++) {
      int k = 0;
      while (k < count && found[k] != u) k++;
      if (k == count && count < MOST_UNITS) found[count++] = u;
    }
  }
  return count;
}

// The lanes that go together: accesses of 16 bytes a quarter of the warp at a time, of 8 bytes half a warp.
template <class F> void each_pass_of_lanes(const Request& r, F of) {
  const int together = r.bytes >= 16 ? 8 : r.bytes == 8 ? 16 : 32;
  for (int first = 0; first < 32; first += together)
    if (const unsigned lanes = r.lanes & static_cast<unsigned>(((1ull << together) - 1) << first)) of(lanes);
}

void count_global(Site& site, const Request& r) {
  uintptr_t found[MOST_UNITS];
  const int sectors = units(r, r.lanes, SECTOR, found);
  site.sectors += sectors;
  for (int k = 0; k < sectors; k++)
    if (site.past_l1 || site.access != READ || !found_in_l1(found[k])) total->l2_bytes += SECTOR;
  // The fewest sectors that could hold these bytes, with those that several lanes touch counted once.
  site.least_sectors += (units(r, r.lanes, r.bytes, found) * r.bytes + 31) / 32;
  // Each line that lanes touch together takes a pass. A copy's bytes pass when shared memory is written.
  if (!site.past_l1)
    each_pass_of_lanes(r, [&](unsigned lanes) { total->global_passes += units(r, lanes, LINE, found); });
}

void count_shared(Site& site, const Request& r) {
  each_pass_of_lanes(r, [&](unsigned lanes) {
    uintptr_t found[MOST_UNITS];
    int banks[32] = {}, most = 0, count = units(r, lanes, 4, found);
    for (int k = 0; k < count; k++) {
      int use = ++banks[found[k] % 32];
      most = use > most ? use : most;
    }
    site.wavefronts += most;
    total->shared_passes += most;
    site.least_wavefronts += (count + 31) / 32;
  });
}

void count(Site& site, const Request& r) {
  site.requests++;
  site.bytes += static_cast<int64_t>(__builtin_popcount(r.lanes)) * r.bytes;
  if (site.shared) count_shared(site, r);
  else count_global(site, r);
}

void close_requests(bool counted) {
  for (auto& [key, site] : sites) {
    for (auto& open : site.open) {
      for (const Request& r : open)
        if (counted && r.lanes) count(site, r);
      open.clear();
    }
    memset(site.seen, 0, sizeof site.seen);
  }
}
}  // namespace

void record(const void* p, size_t bytes, int access, const void* address, bool shared) {
  Site& site = sites[{address, shared}];
  site.shared = shared, site.past_l1 = access == PAST_L1;
  site.access = access == READ_ONLY_PATH || access == PAST_L1 ? READ : access;
  std::vector<Request>& open = site.open[current->linear >> 5];
  uint32_t nth = site.seen[current->linear]++;
  if (nth >= open.size()) open.resize(nth + 1, Request{});
  Request& request = open[nth];
  request.address[current->lane] = reinterpret_cast<uintptr_t>(p);
  request.lanes |= 1u << current->lane;
  request.bytes = static_cast<uint16_t>(bytes);
}

void begin_counting(const char* kernel) {
  total = &totals[kernel];
  total->launches++;
}
void empty_l1(size_t bytes) {
  l1.clear();
  oldest_last.clear();
  l1_lines = bytes / LINE;
}
void count_product(int64_t multiply_adds, bool tf32, int64_t operand_bytes) {
  (tf32 ? total->tf32_multiply_adds : total->multiply_adds) += multiply_adds;
  total->operand_bytes += operand_bytes;
}
void count_requests() { close_requests(true); }
void discard_requests() { close_requests(false); }
}  // namespace emulation

using namespace emulation;
extern "C" {
struct SiteCounts {
  const void* site;
  int64_t shared, access, requests, sectors, least_sectors, wavefronts, least_wavefronts, bytes;
};
int emulation_take_counts(SiteCounts* out, int capacity) {  // and start again from 0
  int count = 0;
  for (const auto& [key, s] : sites)
    if (count < capacity && s.requests)
      out[count++] = {key.first,       s.shared,     s.access,           s.requests, s.sectors,
                      s.least_sectors, s.wavefronts, s.least_wavefronts, s.bytes};
  sites.clear();
  return count;
}
struct KernelCounts {
  const char* name;
  Totals totals;
};
int emulation_take_totals(KernelCounts* out, int capacity) {  // of each kernel; the names last until the next call
  static std::map<std::string, Totals> taken;
  taken.swap(totals);
  totals.clear();
  int count = 0;
  for (const auto& [name, t] : taken)
    if (count < capacity) out[count++] = {name.c_str(), t};
  return count;
}
}
