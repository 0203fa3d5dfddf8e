// CUDA's words on the CPU, so that kernels can be tested where there is no GPU. Each thread of a block is a fiber; the
// blocks of a cluster run together, clusters one after the other. A fiber runs until it must wait for others.
//
// EMULATED_CAPABILITY (90, or 80: no clusters, less shared memory), and EMULATED_ORDER: the fibers that can run do so
// "forward", "backward" or "shuffled". What depends on it is a race. Shared memory starts as NaN; a copy into it
// happens when it is first waited for.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define FASTDIFF_SHARED(name) unsigned char* name = fastdiff::emulator::shared_memory()

struct uint4 {
  uint32_t x, y, z, w;
};

namespace fastdiff::emulator {

struct Index {
  unsigned x = 0;
};

inline int capability() {
  const char* asked = std::getenv("EMULATED_CAPABILITY");
  return asked ? std::atoi(asked) : 90;
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

// Some fibers that meet. At each meeting a fiber leaves a value, and finds what the others left.
struct Group {
  int size = 0, arrived = 0, round = 0, line = 0;
  std::vector<uint64_t> left[2];  // by parity of the round: none leaves for the next before all have left for this one
};

struct Copy {
  uint4* to;
  const uint4* from;
  int units;
};

struct Block {
  std::unique_ptr<unsigned char[]> shared;
  std::vector<Copy> copies;  // by part
  Group threads;
  std::vector<Group> warps;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Index thread, block;
  int rank;
  bool done;
  int cluster_round;  // of the meeting that it has arrived at, and must wait for
  std::vector<Copy> copies;
};

struct Machine {
  static constexpr size_t kStack = 64 << 10;
  std::vector<Fiber> fibers;
  std::vector<Block> blocks;  // of the cluster that runs
  Group cluster;
  Index grid, block_size;
  ucontext_t scheduler;
  Fiber* now = nullptr;
  bool moved = false;  // whether anything has happened since the last look
  std::function<void()> kernel;

  static Machine& get() {
    static Machine machine;
    return machine;
  }

  Block& block() { return blocks[now->rank]; }

  void yield() { swapcontext(&now->context, &scheduler); }

  // Arrives, and gives the number of the round that ends when all have.
  int arrive(Group& group, int line) {
    if (group.arrived == 0) group.line = line;
    if (group.line != line) fail("threads of a group wait at different places");
    const int round = group.round;
    moved = true;
    if (++group.arrived == group.size) group.arrived = 0, ++group.round;
    return round;
  }
  void wait(const Group& group, int round) {
    while (group.round == round) yield();
  }

  // A meeting at which each leaves a value; gives all of them.
  const std::vector<uint64_t>& meet(Group& group, int index, uint64_t value, int line) {
    std::vector<uint64_t>& left = group.left[group.round & 1];
    left.resize(group.size);
    left[index] = value;
    wait(group, arrive(group, line));
    return left;
  }

  static void enter() {
    Machine& machine = get();
    machine.kernel();
    machine.now->done = machine.moved = true;
    machine.yield();
  }

  void start(Fiber& fiber) {
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, enter, 0);
    fiber.done = false;
    fiber.cluster_round = -1;
    fiber.copies.clear();
  }

  void run_cluster(int64_t first_block, int threads, size_t shared, int size) {
    blocks = std::vector<Block>(size);
    cluster = Group();
    cluster.size = size * threads;
    for (Block& block : blocks) {
      block.shared.reset(new unsigned char[shared]);
      std::memset(block.shared.get(), 0xFF, shared);
      block.threads.size = threads;
      block.warps.resize(threads / 32);
      for (Group& warp : block.warps) warp.size = 32;
    }
    std::vector<Fiber*> waiting;
    fibers.resize(std::max<size_t>(fibers.size(), size * threads));
    for (int i = 0; i < size * threads; ++i) {
      Fiber& fiber = fibers[i];
      start(fiber);
      fiber.thread.x = i % threads;
      fiber.rank = i / threads;
      fiber.block.x = static_cast<unsigned>(first_block + fiber.rank);
      waiting.push_back(&fiber);
    }
    static const char* asked = std::getenv("EMULATED_ORDER");
    static const std::string order = asked ? asked : "forward";
    if (order == "backward") std::reverse(waiting.begin(), waiting.end());
    std::mt19937 random(1);
    while (!waiting.empty()) {
      if (order == "shuffled") std::shuffle(waiting.begin(), waiting.end(), random);
      moved = false;
      for (Fiber* fiber : waiting) {
        now = fiber;
        swapcontext(&scheduler, &fiber->context);
      }
      if (!moved) fail("threads wait for some that will not come");
      waiting.erase(std::remove_if(waiting.begin(), waiting.end(), [](Fiber* f) { return f->done; }), waiting.end());
    }
  }
};

inline unsigned char* shared_memory() { return Machine::get().block().shared.get(); }

inline void launch(int64_t blocks, int threads, size_t shared, int cluster, std::function<void()> kernel) {
  if (threads % 32 || threads > 1024 || threads < 32) fail("a block has 32 to 1024 threads, in warps");
  if (blocks % cluster || blocks <= 0 || blocks >= int64_t{1} << 31) fail("a grid is some whole clusters");
  if (cluster > 1 && capability() < 90) fail("this GPU has no clusters");
  Machine& machine = Machine::get();
  machine.kernel = std::move(kernel);
  machine.grid.x = static_cast<unsigned>(blocks);
  machine.block_size.x = threads;
  for (int64_t first = 0; first < blocks; first += cluster) machine.run_cluster(first, threads, shared, cluster);
}

template <typename T>
T shuffled(T value, int from_lane, unsigned mask, int line) {
  static_assert(sizeof(T) <= 8);
  if (mask != 0xFFFFFFFF) fail("only whole warps shuffle");
  Machine& machine = Machine::get();
  const int thread = machine.now->thread.x;
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const auto& left = machine.meet(machine.block().warps[thread / 32], thread % 32, bits, line);
  std::memcpy(&value, &left[from_lane], sizeof(T));
  return value;
}

inline unsigned ballot(unsigned mask, bool vote, int line) {
  if (mask != 0xFFFFFFFF) fail("only whole warps vote");
  Machine& machine = Machine::get();
  const int thread = machine.now->thread.x;
  const auto& left = machine.meet(machine.block().warps[thread / 32], thread % 32, vote, line);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned>(left[lane]) << lane;
  return votes;
}

inline int lane() { return Machine::get().now->thread.x % 32; }

inline void sync_block(int line) {
  Machine& machine = Machine::get();
  Group& threads = machine.block().threads;
  machine.wait(threads, machine.arrive(threads, line));
}

}  // namespace fastdiff::emulator

#define threadIdx (fastdiff::emulator::Machine::get().now->thread)
#define blockIdx (fastdiff::emulator::Machine::get().now->block)
#define blockDim (fastdiff::emulator::Machine::get().block_size)
#define gridDim (fastdiff::emulator::Machine::get().grid)
#define __syncthreads() fastdiff::emulator::sync_block(__LINE__)
#define __syncwarp() fastdiff::emulator::ballot(0xFFFFFFFF, true, __LINE__)
#define __shfl_xor_sync(mask, value, with) \
  fastdiff::emulator::shuffled(value, fastdiff::emulator::lane() ^ (with), mask, __LINE__)
#define __shfl_up_sync(mask, value, by)                                                                                \
  fastdiff::emulator::shuffled(                                                                                        \
      value, fastdiff::emulator::lane() < int(by) ? fastdiff::emulator::lane() : fastdiff::emulator::lane() - int(by), \
      mask, __LINE__)
#define __ballot_sync(mask, vote) fastdiff::emulator::ballot(mask, vote, __LINE__)

template <typename T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }

namespace fastdiff {

struct Cluster {
  static int size() { return static_cast<int>(emulator::Machine::get().blocks.size()); }
  static int rank() { return emulator::Machine::get().now->rank; }
  static void arrive() {
    emulator::Machine& machine = emulator::Machine::get();
    if (machine.now->cluster_round >= 0) emulator::fail("a thread arrives twice");
    machine.now->cluster_round = machine.arrive(machine.cluster, 0);
  }
  static void wait() {
    emulator::Machine& machine = emulator::Machine::get();
    if (machine.now->cluster_round < 0) emulator::fail("a thread waits without having arrived");
    machine.wait(machine.cluster, machine.now->cluster_round);
    machine.now->cluster_round = -1;
  }
  template <typename T>
  static T* at(T* mine, int rank) {
    emulator::Machine& machine = emulator::Machine::get();
    const auto offset = reinterpret_cast<unsigned char*>(mine) - emulator::shared_memory();
    return reinterpret_cast<T*>(machine.blocks[rank].shared.get() + offset);
  }
};

struct Copies {
  static constexpr int kParts = 4;

  explicit Copies(uint64_t*) { emulator::sync_block(0); }

  void start(int part, uint4* to, const uint4* from, int units) const {
    const auto places = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
    if (units > 0 && places % 16) emulator::fail("an unaligned copy");
    const bool each = emulator::capability() < 90;
    if (each || threadIdx.x == 0) copies(each)[part] = {to, from, units};
  }

  void wait(int part) const {
    const bool each = emulator::capability() < 90;
    emulator::Copy& copy = copies(each)[part];
    while (!copy.to) emulator::Machine::get().yield();  // until thread 0 has started it
    const int step = each ? blockDim.x : 1;
    for (int i = each ? threadIdx.x : 0; i < copy.units; i += step) copy.to[i] = copy.from[i];
    copy.units = 0;
  }

 private:
  // Of this thread, or of its block.
  static std::vector<emulator::Copy>& copies(bool each) {
    emulator::Machine& machine = emulator::Machine::get();
    auto& copies = each ? machine.now->copies : machine.block().copies;
    copies.resize(kParts);
    return copies;
  }
};

}  // namespace fastdiff
