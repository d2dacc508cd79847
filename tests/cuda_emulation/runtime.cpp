// Fibers, their schedules, where they meet, shared memory, launches.
#include "runtime.h"

#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <sys/mman.h>
#include <ucontext.h>

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
uint3 block_index;
dim3 grid_size, block_size;
Fiber fibers[MAX_THREADS];
Warp warps[MAX_WARPS];
unsigned epoch = 1, launch_epoch, block_epoch, block_linear;
bool checking, profiling;
Shared shared_arrays[64];
int shared_count;
char* arena;
const Buffer* buffers;
int buffer_count;
const Module* module;

namespace {
constexpr size_t STACK = 64 << 10, PAGE = 4096, GAP = 512;  // a gap lies after each shared array
char* stacks;
void* main_stack_pointer;
const Entry* kernel_entry;
char* arguments;
char message[2048];
bool failed;
int threads, alive, arrived, predicates, predicate_result;
unsigned schedule, block_serial;
size_t shared_used, static_bytes, dynamic_bytes, shared_limit;
uint64_t random_state;

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

constexpr int ORDERS = 64;
uint8_t lane_orders[ORDERS][32];

void prepare_orders(unsigned wanted) {
  static bool prepared = false;
  random_state = 0x9E3779B97F4A7C15ull * (wanted + 1);
  for (int i = 0; i < 4; i++) random_number();
  if (prepared && schedule == wanted) return;
  schedule = wanted, prepared = true;
  for (auto& order : lane_orders) {
    for (int i = 0; i < 32; i++) order[i] = static_cast<uint8_t>(schedule == 1 ? 31 - i : i);
    if (schedule > 1) shuffle_bytes(order, 32);
  }
}

struct BlockOrder {  // i -> (i * step + first) % count visits every block once, as step and count have no common divisor
  uint64_t count, step = 1, first = 0;
  explicit BlockOrder(uint64_t blocks) : count(blocks) {
    if (schedule == 1) step = count - 1, first = count - 1;
    if (schedule <= 1 || count < 3) return;
    first = random_number() % count;
    step = random_number() % count;
    while (divisor(step, count) != 1) step++;
  }
  static uint64_t divisor(uint64_t a, uint64_t b) { return b ? divisor(b, a % b) : a; }
  uint64_t operator()(uint64_t i) const {
    return static_cast<uint64_t>((static_cast<unsigned __int128>(i) * step + first) % count);
  }
};

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

void leave(Fiber* from, void** keep) {  // to the next lane that can run, or else back to run_block
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
  if (fiber->copies) fail("the thread returns while %d cp.async have not been waited for", fiber->copies);
  if (fiber->products) fail("the thread returns while %d wgmma have not been waited for", fiber->products);
  Warp& warp = *fiber->warp;
  warp.alive &= ~(1u << fiber->lane);
  alive--;
  for (unsigned left = warp.waiting; left; left &= left - 1) {
    int lane = __builtin_ctz(left);
    if (warp.waiting >> lane & 1) complete(warp, warp.lanes + lane);
  }
  void* dead;
  leave(fiber, &dead);
}

void fiber_main() {
  kernel_entry->run(kernel_entry->kernel, arguments);
  finish();
}

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

void prepare_stacks() {
  if (stacks) return;
  size_t bytes = MAX_THREADS * STACK;
  stacks = static_cast<char*>(
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  for (int i = 0; i < MAX_THREADS; i++) mprotect(stacks + i * STACK, PAGE, PROT_NONE);  // a stack ends in a fault
  arena = static_cast<char*>(
      mmap(nullptr, ARENA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
}

void prepare_fiber(int i) {
  Fiber& fiber = fibers[i];
  fiber.linear = i, fiber.lane = i & 31, fiber.warp = warps + (i >> 5);
  fiber.copies = fiber.copy_group = fiber.products = fiber.product_group = 0;
  fiber.product_fence = false, fiber.proxy_epoch = 0;
  // Stacks that start at the same offset in a page would all compete for the same lines of the first-level cache.
  void** top = reinterpret_cast<void**>(stacks + (i + 1) * STACK - (i * 320 & 4095) - 64);
  *--top = nullptr;  // fiber_main's return address, never used; keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(fiber_main);
  for (int k = 0; k < 6; k++) *--top = nullptr;
  fiber.stack_pointer = top;
}

void prepare_block() {
  dim3 size = block_size;
  epoch++;
  block_epoch = epoch;
  block_serial++;
  alive = threads, arrived = predicates = 0;
  shared_count = 0, shared_used = static_bytes = 0;
  if (dynamic_bytes) {
    char* p = arena;
    memset(p, 0xff, dynamic_bytes);
    memset(p + dynamic_bytes, GUARD_BYTE, GAP);
    shared_arrays[shared_count++] = {p, dynamic_bytes, "dynamic shared memory"};
    shared_used = (dynamic_bytes + GAP + 1023) & ~size_t(1023);
  }
  uint3 index = {0, 0, 0};
  for (int i = 0; i < threads; i++) {
    prepare_fiber(i);
    fibers[i].index = index;
    if (++index.x == size.x) {
      index.x = 0;
      if (++index.y == size.y) index.y = 0, index.z++;
    }
  }
  for (int w = 0; w * 32 < threads; w++) {
    Warp& warp = warps[w];
    int lanes = threads - w * 32;
    warp.lanes = fibers + w * 32;
    warp.alive = warp.ready = lanes >= 32 ? ~0u : (1u << lanes) - 1;
    warp.waiting = warp.at_barrier = 0;
    warp.clock = warp.all_met = 0, warp.some_met = false;
    new_round(warp);
  }
}

void report_deadlock() {
  int length = snprintf(message, sizeof message,
                        "%s block (%u,%u,%u): deadlock: %d of %d threads wait for ones that never come:", kernel_entry->name,
                        block_index.x, block_index.y, block_index.z, alive, threads);
  const void* told[8];
  int count = 0;
  for (int i = 0; i < threads && count < 8; i++) {  // one line for each place where threads wait
    Fiber& fiber = fibers[i];
    bool at_barrier = fiber.warp->at_barrier >> fiber.lane & 1, in_warp = fiber.warp->waiting >> fiber.lane & 1;
    if (!at_barrier && !in_warp) continue;
    bool known = false;
    for (int k = 0; k < count; k++) known |= told[k] == fiber.site;
    if (known) continue;
    told[count++] = fiber.site;
    length += snprintf(message + length, sizeof message - length, at_barrier ? " thread %d in __syncthreads at {%p};"
                       : " thread %d in a warp collective at {%p}, mask %08x;", i, fiber.site, fiber.mask);
  }
  failed = true;
}

void release_barrier() {
  if (alive < threads) {
    int gone = 0;
    while (fibers[gone].warp->alive >> fibers[gone].lane & 1) gone++;
    int here = 0;
    while (!(fibers[here].warp->alive >> fibers[here].lane & 1)) here++;
    current = fibers + here;
    snprintf(message, sizeof message,
             "%s block (%u,%u,%u): only %d of %d threads reach __syncthreads at {%p}: thread %d has returned", kernel_entry->name,
             block_index.x, block_index.y, block_index.z, alive, threads, fibers[here].site, gone);
    failed = true;
    return;
  }
  if (profiling) count_requests();
  epoch++;
  predicate_result = predicates;
  predicates = arrived = 0;
  for (int w = 0; w * 32 < threads; w++) {
    Warp& warp = warps[w];
    warp.ready = warp.at_barrier, warp.at_barrier = 0;
    warp.clock = warp.all_met = 0, warp.some_met = false;
    new_round(warp);
  }
}

void check_shared_guards() {
  for (int i = 0; i < shared_count && !failed; i++) {
    const Shared& shared = shared_arrays[i];
    for (size_t k = 0; k < GAP; k++)
      if (static_cast<unsigned char>(shared.begin[shared.bytes + k]) != GUARD_BYTE) {
        snprintf(message, sizeof message, "%s block (%u,%u,%u): wrote %zu bytes past the end of %s, which has %zu bytes",
                 kernel_entry->name, block_index.x, block_index.y, block_index.z, k, shared.name, shared.bytes);
        failed = true;
        break;
      }
  }
}

void run_block() {
  prepare_block();
  int warp_count = (threads + 31) / 32;
  uint8_t order[MAX_WARPS];
  while (alive && !failed) {
    for (int i = 0; i < warp_count; i++) order[i] = static_cast<uint8_t>(schedule == 1 ? warp_count - 1 - i : i);
    if (schedule > 1) shuffle_bytes(order, warp_count);
    for (int i = 0; i < warp_count && !failed; i++) {
      Fiber* first = next_lane(warps[order[i]]);
      if (!first) continue;
      current = first;
      emulation_switch(&main_stack_pointer, first->stack_pointer);
      current = nullptr;
    }
    if (failed || !alive) break;
    if (arrived == alive) release_barrier();
    else report_deadlock();
  }
  current = nullptr;
  if (!failed) check_shared_guards();
  if (profiling && !failed) count_requests();
}

void on_signal(int number, siginfo_t* info, void* context) {
  if (!current) {  // not a kernel's fault
    signal(number, SIG_DFL);
    return;
  }
  void* at = reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP] + 1);
  const char* p = static_cast<const char*>(info->si_addr);
  if (number == SIGFPE) fail("integer division by zero at {%p}", at);
  if (stacks && p >= stacks && p < stacks + MAX_THREADS * STACK)
    fail("the stack of the thread overflows (64 KiB) at {%p}", at);
  fail("access to address %p, wild or misaligned, at {%p}", static_cast<const void*>(p), at);
}

struct SignalHandlers {
  static constexpr int numbers[3] = {SIGSEGV, SIGBUS, SIGFPE};
  stack_t old_stack;
  struct sigaction old[3];
  SignalHandlers() {
    static char stack[65536];
    stack_t own = {stack, 0, sizeof stack};
    sigaltstack(&own, &old_stack);
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    for (int i = 0; i < 3; i++) sigaction(numbers[i], &action, &old[i]);
  }
  ~SignalHandlers() {
    for (int i = 0; i < 3; i++) sigaction(numbers[i], &old[i], nullptr);
    sigaltstack(&old_stack, nullptr);
  }
};

void check_buffer_guards() {
  static unsigned char expected[GUARD];
  if (!expected[0]) memset(expected, GUARD_BYTE, GUARD);
  for (int i = 0; i < buffer_count && !failed; i++) {
    const Buffer& buffer = buffers[i];
    if (!buffer.guarded) continue;
    const char* side[2] = {buffer.memory - GUARD, buffer.memory + buffer.memory_bytes};
    for (int k = 0; k < 2; k++)
      if (memcmp(side[k], expected, GUARD)) {
        snprintf(message, sizeof message, "%s: wrote out of bounds, %s the memory of argument %d", kernel_entry->name,
                 k ? "after" : "before", buffer.argument);
        failed = true;
        memset(const_cast<char*>(side[k]), GUARD_BYTE, GUARD);
        break;
      }
  }
}
}  // namespace

void fail(const char* format, ...) {
  if (!failed) {
    failed = true;
    int length = current ? snprintf(message, sizeof message, "%s block (%u,%u,%u) thread %d: ", kernel_entry->name, block_index.x,
                                    block_index.y, block_index.z, current->linear)
                         : snprintf(message, sizeof message, "%s: ", kernel_entry->name);
    va_list list;
    va_start(list, format);
    vsnprintf(message + length, sizeof message - length, format, list);
    va_end(list);
  }
  void* dead;  // no fiber runs again
  emulation_switch(&dead, main_stack_pointer);
  __builtin_unreachable();
}

bool on_stack(const char* p) {
  size_t offset = static_cast<size_t>(p - stacks);
  if (offset >= MAX_THREADS * STACK) return false;
  if (static_cast<int>(offset / STACK) != current->linear) fail("uses a local variable of thread %zu", offset / STACK);
  return true;
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

static void wait_for_block(const void* site) {
  Fiber* fiber = self();
  fiber->site = site;
  fiber->warp->at_barrier |= 1u << fiber->lane;
  arrived++;
  leave(fiber, &fiber->stack_pointer);
}
void block_barrier() { wait_for_block(__builtin_return_address(0)); }
int block_barrier_count(int predicate) {
  predicates += predicate;
  wait_for_block(__builtin_return_address(0));
  return predicate_result;
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

void* shared_array(SharedSite& site, size_t bytes, const char* name) {
  if (site.block == block_serial) return site.memory;
  if (shared_count == 64) fail("more than 64 shared arrays");
  static_bytes += bytes;
  if (static_bytes > 48 << 10) fail("%zu bytes of static shared memory; 48 KiB is the limit", static_bytes);
  if (static_bytes + dynamic_bytes > shared_limit)
    fail("%zu bytes of static and %zu of dynamic shared memory; the device has %zu", static_bytes, dynamic_bytes, shared_limit);
  char* p = arena + shared_used;
  memset(p, 0xff, bytes);  // NaN
  memset(p + bytes, GUARD_BYTE, GAP);
  shared_used = (shared_used + bytes + GAP + 127) & ~size_t(127);
  shared_arrays[shared_count++] = {p, bytes, name};
  site = {block_serial, p};
  return p;
}
void* dynamic_shared() {
  if (!dynamic_bytes) fail("uses dynamic shared memory, but the launch gave none (shared_mem=0)");
  return arena;
}
}  // namespace emulation

using namespace emulation;
extern "C" {
struct Launch {
  unsigned grid[3], block[3];
  uint64_t shared_bytes, shared_limit;
  const Buffer* buffers;
  char* arguments;
  int buffer_count, entry;
  unsigned schedule;
  int checked, profiled;
};

// NULL, or what went wrong, with code addresses in braces.
const char* emulation_launch(const Module* which, const Launch* launch) {
  module = which, kernel_entry = which->entries + launch->entry;
  arguments = launch->arguments, buffers = launch->buffers, buffer_count = launch->buffer_count;
  dynamic_bytes = launch->shared_bytes, shared_limit = launch->shared_limit;
  checking = launch->checked, profiling = launch->profiled;
  failed = false;
  grid_size = {launch->grid[0], launch->grid[1], launch->grid[2]};
  block_size = {launch->block[0], launch->block[1], launch->block[2]};
  threads = static_cast<int>(block_size.x * block_size.y * block_size.z);
  prepare_stacks();
  prepare_orders(launch->schedule);
  SignalHandlers handlers;
  launch_epoch = epoch + 1;
  uint64_t blocks = static_cast<uint64_t>(grid_size.x) * grid_size.y * grid_size.z;
  BlockOrder order(blocks);
  for (uint64_t i = 0; i < blocks && !failed; i++) {
    uint64_t b = order(i);
    block_linear = static_cast<unsigned>(b);
    block_index = {static_cast<unsigned>(b % grid_size.x), static_cast<unsigned>(b / grid_size.x % grid_size.y),
                   static_cast<unsigned>(b / grid_size.x / grid_size.y)};
    run_block();
  }
  check_buffer_guards();
  return failed ? message : nullptr;
}
}
