// Counts what the memory requests of whole warps cost, by the place in the code: sectors of global memory, passes over
// the banks of shared memory. The nth access of each lane at one place since the last barrier belong together.
#include <map>
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
  bool shared;
  int access;
  int64_t requests = 0, sectors = 0, least_sectors = 0, wavefronts = 0, least_wavefronts = 0, bytes = 0;
  uint32_t seen[MAX_THREADS] = {};
  std::vector<Request> open[MAX_WARPS];
};
std::map<const void*, Site> sites;

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

void count_global(Site& site, const Request& r) {
  uintptr_t found[MOST_UNITS];
  site.sectors += units(r, r.lanes, 32, found);
  // The fewest sectors that could hold these bytes, with those that several lanes touch counted once.
  site.least_sectors += (units(r, r.lanes, r.bytes, found) * r.bytes + 31) / 32;
}

void count_shared(Site& site, const Request& r) {
  // Accesses of 16 bytes go a quarter of the warp at a time, of 8 bytes half a warp.
  int together = r.bytes >= 16 ? 8 : r.bytes == 8 ? 16 : 32;
  for (int first = 0; first < 32; first += together) {
    unsigned lanes = r.lanes & static_cast<unsigned>(((1ull << together) - 1) << first);
    if (!lanes) continue;
    uintptr_t found[MOST_UNITS];
    int banks[32] = {}, most = 0, count = units(r, lanes, 4, found);
    for (int k = 0; k < count; k++) {
      int use = ++banks[found[k] % 32];
      most = use > most ? use : most;
    }
    site.wavefronts += most;
    site.least_wavefronts += (count + 31) / 32;
  }
}

void count(Site& site, const Request& r) {
  site.requests++;
  site.bytes += static_cast<int64_t>(__builtin_popcount(r.lanes)) * r.bytes;
  if (site.shared) count_shared(site, r);
  else count_global(site, r);
}

void close_requests(bool counted) {
  for (auto& [address, site] : sites) {
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
  Site& site = sites[address];
  site.shared = shared, site.access = access == READ_ONLY_PATH ? READ : access;
  std::vector<Request>& open = site.open[current->linear >> 5];
  uint32_t nth = site.seen[current->linear]++;
  if (nth >= open.size()) open.resize(nth + 1, Request{});
  Request& request = open[nth];
  request.address[current->lane] = reinterpret_cast<uintptr_t>(p);
  request.lanes |= 1u << current->lane;
  request.bytes = static_cast<uint16_t>(bytes);
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
  for (const auto& [address, s] : sites)
    if (count < capacity && s.requests)
      out[count++] = {address,         s.shared,     s.access,           s.requests, s.sectors,
                      s.least_sectors, s.wavefronts, s.least_wavefronts, s.bytes};
  sites.clear();
  return count;
}
}
