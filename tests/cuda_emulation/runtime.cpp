// Launches: blocks one after the other, their shared memory, guards, and what is reported when something goes wrong.
#include "runtime.h"

#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <pthread.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <xmmintrin.h>

namespace emulation {
uint3 block_index;
dim3 grid_size, block_size;
unsigned epoch = 1, launch_epoch, block_epoch;
bool checking, profiling;
Shared shared_arrays[MAX_SHARED];
int shared_count;
char* arena;
const Buffer* buffers;
int buffer_count;
const Module* module;

namespace {
constexpr size_t GAP = 512;  // lies after each shared array
constexpr size_t STATIC_LIMIT = 48 << 10;
constexpr size_t L1_ALONE = 29 << 10;  // bytes of a multiprocessor's memory that shared memory cannot have
const Entry* kernel;
char* arguments;
char message[2048];
bool failed;
unsigned block_serial;
size_t shared_used, static_bytes, dynamic_bytes, shared_limit;
pthread_t launching_thread;

// Writes the start of a message about the running block, and returns its length.
int begin_message() {
  failed = true;
  return snprintf(message, sizeof message, "%s block (%u,%u,%u)", kernel->name, block_index.x, block_index.y,
                  block_index.z);
}

void* add_shared(size_t bytes, const char* name) {
  if (shared_count == MAX_SHARED) fail("more than %d shared arrays", MAX_SHARED);
  char* p = arena + shared_used;
  memset(p, 0xff, bytes);  // NaN
  memset(p + bytes, GUARD_BYTE, GAP);
  shared_arrays[shared_count++] = {p, bytes, name};
  shared_used = (shared_used + bytes + GAP + 127) & ~size_t(127);
  return p;
}

void prepare_block() {
  epoch++;
  block_epoch = epoch;
  block_serial++;
  shared_count = 0, shared_used = static_bytes = 0;
  if (dynamic_bytes) add_shared(dynamic_bytes, "dynamic shared memory");
  if (profiling) empty_l1(shared_limit + L1_ALONE - dynamic_bytes);
  prepare_fibers();
}

void report_deadlock() {
  int length = begin_message();
  length += snprintf(message + length, sizeof message - length,
                     ": deadlock: %d of %d threads wait for ones that never come:", block.alive, block.threads);
  const void* told[8];
  int count = 0;
  for (int i = 0; i < block.threads && count < 8; i++) {  // one line for each place where threads wait
    Fiber& fiber = fibers[i];
    bool at_barrier = fiber.warp->at_barrier >> fiber.lane & 1, in_warp = fiber.warp->waiting >> fiber.lane & 1;
    if (!at_barrier && !in_warp) continue;
    bool known = false;
    for (int k = 0; k < count; k++) known |= told[k] == fiber.site;
    if (known) continue;
    told[count++] = fiber.site;
    length += snprintf(message + length, sizeof message - length,
                       at_barrier ? " thread %d in __syncthreads at {%p};"
                                  : " thread %d in a warp collective at {%p}, mask %08x;",
                       i, fiber.site, fiber.mask);
  }
}

void report_missing_threads() {
  int gone = 0, here = 0;
  while (fibers[gone].warp->alive >> fibers[gone].lane & 1) gone++;
  while (!(fibers[here].warp->alive >> fibers[here].lane & 1)) here++;
  int length = begin_message();
  snprintf(message + length, sizeof message - length,
           ": only %d of %d threads reach __syncthreads at {%p}: thread %d has returned", block.alive, block.threads,
           fibers[here].site, gone);
}

void finish_barrier() {
  if (block.alive < block.threads) return report_missing_threads();
  if (profiling) count_requests();
  epoch++;
  release_fibers();
}

void check_shared_guards() {
  for (int i = 0; i < shared_count && !failed; i++) {
    const Shared& shared = shared_arrays[i];
    for (size_t k = 0; k < GAP; k++) {
      if (static_cast<unsigned char>(shared.begin[shared.bytes + k]) == GUARD_BYTE) continue;
      int length = begin_message();
      snprintf(message + length, sizeof message - length,
               ": wrote %zu bytes past the end of %s, which has %zu bytes", k, shared.name, shared.bytes);
      break;
    }
  }
}

void run_block() {
  prepare_block();
  int warp_count = (block.threads + 31) / 32;
  uint8_t order[MAX_WARPS];
  while (block.alive && !failed) {
    for (int i = 0; i < warp_count; i++) order[i] = static_cast<uint8_t>(schedule == 1 ? warp_count - 1 - i : i);
    if (schedule > 1) shuffle_bytes(order, warp_count);
    for (int i = 0; i < warp_count && !failed; i++) run_warp(warps[order[i]]);
    if (failed || !block.alive) break;
    if (block.arrived == block.alive) finish_barrier();
    else report_deadlock();
  }
  if (failed) return;
  check_shared_guards();
  if (profiling) count_requests();
}

struct BlockOrder {  // i -> (i * step + first) % count visits every block once: step and count have no common divisor
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

void on_signal(int number, siginfo_t* info, void* context) {
  if (!current || !pthread_equal(pthread_self(), launching_thread)) {  // not a kernel's fault
    signal(number, SIG_DFL);
    return;
  }
  void* at = reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP] + 1);
  if (number == SIGFPE) fail("integer division by zero at {%p}", at);
  if (stack_owner(static_cast<const char*>(info->si_addr)) >= 0)
    fail("the stack of the thread overflows (64 KiB) at {%p}", at);
  fail("access to address %p, wild or misaligned, at {%p}", info->si_addr, at);
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

// float32 as under -ftz=true, which CuPy gives to every kernel: a denormal counts as 0, and none results. The processor
// has one switch for both lengths, and CUDA flushes no double: a kernel that has an array of doubles keeps denormals.
struct FlushToZero {
  const unsigned before = _mm_getcsr();
  explicit FlushToZero(const Entry& entry) {
    for (int i = 0; i < entry.count; i++)
      if (entry.parameters[i].pointee_kind == 'f' && entry.parameters[i].pointee_size == 8) return;
    _mm_setcsr(before | FLUSH_TO_ZERO);
  }
  ~FlushToZero() { _mm_setcsr(before); }
};

void check_buffer_guards() {
  static unsigned char expected[GUARD];
  if (!expected[0]) memset(expected, GUARD_BYTE, GUARD);
  for (int i = 0; i < buffer_count; i++) {
    const Buffer& buffer = buffers[i];
    if (!buffer.guarded) continue;
    char* const sides[2] = {buffer.memory - GUARD, buffer.memory + buffer.memory_bytes};
    for (char* side : sides) {
      if (!memcmp(side, expected, GUARD)) continue;
      if (!failed)
        snprintf(message, sizeof message, "%s: wrote out of bounds, %s the memory of argument %d", kernel->name,
                 side < buffer.memory ? "before" : "after", buffer.argument);
      failed = true;
      memset(side, GUARD_BYTE, GUARD);
    }
  }
}
}  // namespace

void run_kernel() { kernel->run(kernel->kernel, arguments); }

void fail(const char* format, ...) {
  int length = begin_message();
  if (current) length += snprintf(message + length, sizeof message - length, " thread %d", current->linear);
  length += snprintf(message + length, sizeof message - length, ": ");
  va_list list;
  va_start(list, format);
  vsnprintf(message + length, sizeof message - length, format, list);
  va_end(list);
  abandon_fibers();
}

void* shared_array(SharedSite& site, size_t bytes, const char* name) {
  if (site.block == block_serial) return site.memory;
  static_bytes += bytes;
  if (static_bytes > STATIC_LIMIT) fail("%zu bytes of static shared memory; 48 KiB is the limit", static_bytes);
  if (static_bytes + dynamic_bytes > shared_limit)
    fail("%zu bytes of static and %zu of dynamic shared memory; the device has %zu", static_bytes, dynamic_bytes,
         shared_limit);
  site = {block_serial, add_shared(bytes, name)};
  return site.memory;
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
  module = which, kernel = which->entries + launch->entry;
  arguments = launch->arguments, buffers = launch->buffers, buffer_count = launch->buffer_count;
  dynamic_bytes = launch->shared_bytes, shared_limit = launch->shared_limit;
  checking = launch->checked, profiling = launch->profiled;
  failed = false;
  if (profiling) begin_counting(kernel->name);
  grid_size = {launch->grid[0], launch->grid[1], launch->grid[2]};
  block_size = {launch->block[0], launch->block[1], launch->block[2]};
  block.threads = static_cast<int>(block_size.x * block_size.y * block_size.z);
  launching_thread = pthread_self();
  prepare_stacks();
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  if (!arena) arena = static_cast<char*>(mmap(nullptr, ARENA, PROT_READ | PROT_WRITE, flags, -1, 0));
  prepare_schedule(launch->schedule);
  SignalHandlers handlers;
  FlushToZero flush(*kernel);
  launch_epoch = epoch + 1;
  uint64_t blocks = static_cast<uint64_t>(grid_size.x) * grid_size.y * grid_size.z;
  BlockOrder order(blocks);
  for (uint64_t i = 0; i < blocks && !failed; i++) {
    uint64_t b = order(i);
    block_index = {static_cast<unsigned>(b % grid_size.x), static_cast<unsigned>(b / grid_size.x % grid_size.y),
                   static_cast<unsigned>(b / grid_size.x / grid_size.y)};
    run_block();
  }
  if (failed && profiling) discard_requests();
  check_buffer_guards();
  return failed ? message : nullptr;
}
}
