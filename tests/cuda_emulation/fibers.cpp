// Threads as fibers: their stacks, the order in which they run, and the places where they meet.
#include <sys/mman.h>

#include "runtime.h"

#if !defined(__x86_64__)
#error "the emulation switches stacks in x86-64 assembly; another machine needs its own version of emulation_switch"
#endif
// Saves what a called function must preserve, continues on the other stack.
extern "C" void emulation_switch(void** from, void* to);
asm(R"(.text
.globl emulation_switch
.type emulation_switch,@function
emulation_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp,(%rdi)
  mov %rsi,%rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

namespace emulation {
Thread* current;
Fiber fibers[MAX_THREADS];
Warp warps[MAX_WARPS];
Block block;
unsigned schedule;

namespace {
constexpr size_t STACK = 64 << 10, PAGE = 4096;
constexpr int ORDERS = 64;
char* stacks;
void* main_stack_pointer;
uint64_t random_state;
uint8_t lane_orders[ORDERS][32];

void new_round(Warp& warp) {
  warp.position = 0;
  warp.order = lane_orders[schedule > 1 ? random_number() % ORDERS : 0];
}

Fiber* next_lane(Warp& warp) {
  while (warp.ready) {
    while (warp.position < 32) {
      int lane = warp.order[warp.position++];
      if (warp.ready >> lane & 1) {
        warp.ready &= ~(1u << lane);
        return warp.lanes + lane;
      }
    }
    new_round(warp);
  }
  return nullptr;
}

void leave(Fiber* from, void** keep) {  // to the next lane that can run, or else back to run_warp
  Fiber* next = next_lane(*from->warp);
  if (next == from && keep == &from->stack_pointer) return;
  current = next;
  emulation_switch(keep, next ? next->stack_pointer : main_stack_pointer);
}

bool complete(Warp& warp, Fiber* fiber) {  // if all lanes that `fiber` waits for have come
  unsigned lanes = fiber->mask & warp.alive;
  if ((warp.waiting & lanes) != lanes) return false;
  for (unsigned left = lanes; left; left &= left - 1) {
    Fiber& other = warp.lanes[__builtin_ctz(left)];
    if (other.mask != fiber->mask || other.collective != fiber->collective) return false;
  }
  fiber->collective(warp, lanes);
  warp.waiting &= ~lanes;
  warp.ready |= lanes;
  return true;
}

void finish() {
  Fiber* fiber = self();
  if (fiber->copies)
    fail("the thread returns while %d cp.async have not been waited for, the first at {%p}", fiber->copies,
         fiber->copy->site);
  if (fiber->products)
    fail("the thread returns while %d wgmma have not been waited for, the first at {%p}", fiber->products,
         fiber->product->site);
  Warp& warp = *fiber->warp;
  warp.alive &= ~(1u << fiber->lane);
  block.alive--;
  for (unsigned left = warp.waiting; left; left &= left - 1) {
    int lane = __builtin_ctz(left);
    if (warp.waiting >> lane & 1) complete(warp, warp.lanes + lane);
  }
  void* dead;
  leave(fiber, &dead);
}

void fiber_main() {
  run_kernel();
  finish();
}

void prepare_fiber(int i) {
  Fiber& fiber = fibers[i];
  fiber.linear = i, fiber.lane = i & 31, fiber.warp = warps + (i >> 5);
  fiber.copies = fiber.copy_group = fiber.products = fiber.product_group = 0;
  fiber.product_fence = false, fiber.proxy_epoch = 0;
  if (fiber.flights)  // of a launch that failed
    for (Flight& flight : fiber.flight) flight.registers = nullptr;
  fiber.flights = 0;
  // Stacks that start at the same offset in a page would all compete for the same lines of the first-level cache.
  void** top = reinterpret_cast<void**>(stacks + (i + 1) * STACK - (i * 320 & 4095) - 64);
  *--top = nullptr;  // fiber_main's return address, never used; keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(fiber_main);
  for (int k = 0; k < 6; k++) *--top = nullptr;
  fiber.stack_pointer = top;
}

void prepare_warp(Warp& warp, unsigned ready) {
  warp.ready = ready;
  warp.at_barrier = 0;
  warp.clock = warp.all_met = 0, warp.some_met = false;
  new_round(warp);
}

// ---- what happens when the lanes of a warp have met
void barrier_collective(Warp& warp, unsigned lanes) {  // __syncwarp: the one collective that orders memory
  if (!checking) return;
  warp.clock++;
  if (lanes == warp.alive) {
    warp.all_met = warp.clock;
    return;
  }
  if (!warp.some_met) memset(warp.met, 0, sizeof warp.met);
  warp.some_met = true;
  for (unsigned i = lanes; i; i &= i - 1)
    for (unsigned j = lanes; j; j &= j - 1) warp.met[__builtin_ctz(i)][__builtin_ctz(j)] = warp.clock;
}

void shuffle_collective(Warp& warp, unsigned lanes) {
  uint64_t values[32];
  for (unsigned left = lanes; left; left &= left - 1) {
    int lane = __builtin_ctz(left);
    values[lane] = warp.lanes[lane].value;
  }
  for (unsigned left = lanes; left; left &= left - 1) {
    Fiber& fiber = warp.lanes[__builtin_ctz(left)];
    if (!(lanes >> fiber.source & 1))
      fail("lane %d shuffles from lane %d, which %s; mask %08x, at {%p}", fiber.lane, fiber.source,
           fiber.mask >> fiber.source & 1 ? "has returned" : "the mask leaves out", fiber.mask, fiber.site);
    fiber.value = values[fiber.source];
  }
}

void ballot_collective(Warp& warp, unsigned lanes) {
  unsigned votes = 0;
  for (unsigned left = lanes; left; left &= left - 1) {
    int lane = __builtin_ctz(left);
    votes |= static_cast<unsigned>(warp.lanes[lane].value) << lane;
  }
  for (unsigned left = lanes; left; left &= left - 1) warp.lanes[__builtin_ctz(left)].value = votes;
}

void wait_for_block(const void* site) {
  Fiber* fiber = self();
  fiber->site = site;
  fiber->warp->at_barrier |= 1u << fiber->lane;
  block.arrived++;
  leave(fiber, &fiber->stack_pointer);
}
}  // namespace

unsigned random_number() {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return static_cast<unsigned>(random_state * 0x2545F4914F6CDD1Dull >> 32);
}

void shuffle_bytes(uint8_t* order, int count) {
  for (int i = count - 1; i > 0; i--) {
    int j = static_cast<int>(static_cast<uint64_t>(random_number()) * (i + 1) >> 32);
    uint8_t t = order[i];
    order[i] = order[j], order[j] = t;
  }
}

void prepare_schedule(unsigned wanted) {
  static bool prepared = false;
  const uint64_t seed = 0x9E3779B97F4A7C15ull * (wanted + 1);
  random_state = seed;
  if (prepared && schedule == wanted) return;
  schedule = wanted, prepared = true;
  for (auto& order : lane_orders) {
    for (int i = 0; i < 32; i++) order[i] = static_cast<uint8_t>(schedule == 1 ? 31 - i : i);
    if (schedule > 1) shuffle_bytes(order, 32);
  }
  random_state = seed;
}

void prepare_stacks() {
  if (stacks) return;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  stacks = static_cast<char*>(mmap(nullptr, MAX_THREADS * STACK, PROT_READ | PROT_WRITE, flags, -1, 0));
  for (int i = 0; i < MAX_THREADS; i++) mprotect(stacks + i * STACK, PAGE, PROT_NONE);  // a stack ends in a fault
}

void prepare_fibers() {
  uint3 index = {0, 0, 0};
  for (int i = 0; i < block.threads; i++) {
    prepare_fiber(i);
    fibers[i].index = index;
    if (++index.x == block_size.x) {
      index.x = 0;
      if (++index.y == block_size.y) index.y = 0, index.z++;
    }
  }
  for (int w = 0; w * 32 < block.threads; w++) {
    int lanes = block.threads - w * 32;
    warps[w].lanes = fibers + w * 32;
    warps[w].alive = lanes >= 32 ? ~0u : (1u << lanes) - 1;
    warps[w].waiting = 0;
    prepare_warp(warps[w], warps[w].alive);
  }
  block.alive = block.threads, block.arrived = block.predicates = 0;
}

void run_warp(Warp& warp) {  // until each of its lanes waits or has returned
  Fiber* first = next_lane(warp);
  if (!first) return;
  current = first;
  emulation_switch(&main_stack_pointer, first->stack_pointer);
  current = nullptr;
}

void release_fibers() {  // all have reached __syncthreads
  block.result = block.predicates;
  block.predicates = block.arrived = 0;
  for (int w = 0; w * 32 < block.threads; w++) prepare_warp(warps[w], warps[w].at_barrier);
}

void abandon_fibers() {
  void* dead;
  emulation_switch(&dead, main_stack_pointer);
  __builtin_unreachable();
}

int stack_owner(const char* p) {
  size_t offset = static_cast<size_t>(p - stacks);
  return stacks && offset < MAX_THREADS * STACK ? static_cast<int>(offset / STACK) : -1;
}

void meet(unsigned mask, Collective collective, const void* site) {
  Fiber* fiber = self();
  Warp& warp = *fiber->warp;
  fiber->site = site;
  if (!(mask >> fiber->lane & 1))
    fail("calls a warp collective with mask %08x, which leaves its own lane %d out, at {%p}", mask, fiber->lane, site);
  fiber->mask = mask, fiber->collective = collective;
  warp.waiting |= 1u << fiber->lane;
  complete(warp, fiber);
  leave(fiber, &fiber->stack_pointer);
}

// ---- called by kernels
void block_barrier() { wait_for_block(__builtin_return_address(0)); }
int block_barrier_count(int predicate) {
  block.predicates += predicate;
  wait_for_block(__builtin_return_address(0));
  return block.result;
}
void warp_barrier(unsigned mask) { meet(mask, barrier_collective, __builtin_return_address(0)); }
uint64_t shuffle(unsigned mask, uint64_t value, int source_lane) {
  Fiber* fiber = self();
  fiber->value = value, fiber->source = source_lane & 31;
  meet(mask, shuffle_collective, __builtin_return_address(0));
  return fiber->value;
}
unsigned ballot(unsigned mask, bool predicate) {
  Fiber* fiber = self();
  fiber->value = predicate;
  meet(mask, ballot_collective, __builtin_return_address(0));
  return static_cast<unsigned>(fiber->value);
}
}  // namespace emulation
