// What the parts of the runtime share: fibers, warps, the state of the launch.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#define EMULATION_RUNTIME
#include "emulation.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace emulation {
constexpr int MAX_THREADS = 1024, MAX_WARPS = 32, MAX_SHARED = 64;
constexpr int MAX_COPIES = 256, MAX_PRODUCTS = 64, MAX_FLIGHTS = 8;  // that a thread may have under way
constexpr size_t GUARD = 2048;  // bytes of no man's land on each side of a buffer; arrays.py has the same number
constexpr unsigned char GUARD_BYTE = 0xA5;
constexpr unsigned FLUSH_TO_ZERO = 0x8040;  // FTZ and DAZ of MXCSR

struct Warp;
using Collective = void (*)(Warp&, unsigned lanes);

struct Copy {  // a cp.async that has not been waited for
  void* to;
  const void *from, *site;
  int group;
};
struct Product {  // a wgmma that has not been waited for
  uint64_t a, b;  // descriptors
  const void* site;
  int flight, columns, type, add, group;
  unsigned epoch;
};
// Accumulators that belong to the tensor cores: what they hold is kept here meanwhile, the kernel sees NaN.
struct Flight {
  float* registers;
  int count, pending;
  float saved[128];
};

struct Fiber : Thread {
  void* stack_pointer;
  Warp* warp;
  const void* site;  // where it waits
  unsigned mask;     // of the collective it waits in
  Collective collective;
  union {
    struct { uint64_t value; int source; };                                                // shuffle, ballot
    struct { const void* row; uint32_t* fragments; };                                      // ldmatrix
    struct { float* d; const uint32_t* a; uint32_t b0, b1; };                              // mma
    struct { int wait_for; };                                                              // wgmma_wait
  };
  int copies, copy_group, products, product_group, flights;
  bool product_fence;        // wgmma_fence since the last wait
  unsigned proxy_epoch;      // of its last fence_proxy_async
  Copy copy[MAX_COPIES];
  Product product[MAX_PRODUCTS];
  Flight flight[MAX_FLIGHTS];
};

struct Warp {
  Fiber* lanes;
  unsigned alive, ready, waiting, at_barrier;
  const uint8_t* order;  // in which lanes run
  int position;
  // For the checker: __syncwarps since the last barrier, at which of them all lanes, or two of them, last met.
  uint16_t clock, all_met;
  uint16_t met[32][32];
  bool some_met;
};

// ---- fibers.cpp
struct Block {
  int threads, alive, arrived;
  int predicates, result;  // of __syncthreads_count
};
extern Fiber fibers[MAX_THREADS];
extern Warp warps[MAX_WARPS];
extern Block block;
extern unsigned schedule;
inline Fiber* self() { return static_cast<Fiber*>(current); }
unsigned random_number();
void shuffle_bytes(uint8_t* order, int count);
void prepare_schedule(unsigned wanted);
void prepare_stacks();
void prepare_fibers();
void run_warp(Warp& warp);
void release_fibers();
[[noreturn]] void abandon_fibers();
int stack_owner(const char* p);  // the thread on whose stack p lies, or -1
void meet(unsigned mask, Collective collective, const void* site);

// ---- runtime.cpp
extern unsigned epoch, launch_epoch, block_epoch;  // counts barriers, blocks and launches: never the same number twice
extern bool checking, profiling;
void run_kernel();
struct Shared {  // one shared array of the running block
  char* begin;
  size_t bytes;
  const char* name;
};
extern Shared shared_arrays[MAX_SHARED];
extern int shared_count;
extern char* arena;
constexpr size_t ARENA = 512 << 10;

struct Cell;     // what the checker keeps for two bytes
struct Buffer {  // an array argument, as Python passes it
  char* begin;
  size_t bytes;
  char* memory;
  size_t memory_bytes;
  Cell* cells;
  int argument, guarded;
};
extern const Buffer* buffers;
extern int buffer_count;
struct Module {
  Entry* entries;
  int count;
  char *begin, *end;
};
extern const Module* module;

// ---- checker.cpp, counters.cpp
void copy_started(const void* to, const void* site);
void copy_landed(const void* to, const void* site);
void product_reads(const void* p, size_t bytes, unsigned issued, const void* site);
void record(const void* p, size_t bytes, int access, const void* site, bool shared);
void begin_counting(const char* kernel);
void empty_l1(size_t bytes);
void count_product(int64_t multiply_adds, bool tf32, int64_t operand_bytes);
void count_requests();
void discard_requests();
}  // namespace emulation
