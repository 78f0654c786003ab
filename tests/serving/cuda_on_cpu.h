// SPDX-License-Identifier: Apache-2.0
// Runs a CUDA kernel on a CPU, a block after the other: its threads are fibers, which go on
// to the next place where they wait for one another. For kernels of 16 bits.

#include <math.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <vector>

using std::min;

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct Index { unsigned x, y; };

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// What a thread has given to its warp.
struct Given {
  unsigned word, meta;
  uint4 a, b;
};

struct Meeting {
  int come = 0, passed = 0;
};

struct Warp {
  Meeting meeting;
  Given given[32];
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool ended;
};

static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static Meeting of_block;
static ucontext_t scheduler;
static Index threadIdx, blockIdx, blockDim, gridDim;
static const std::function<void()>* kernel;
alignas(1024) char shared[1 << 18];

inline void others_go_on() {
  const unsigned here = threadIdx.x;
  swapcontext(&fibers[here].context, &scheduler);
  threadIdx.x = here;
}

inline void meet(Meeting& meeting, int all) {
  const int passed = meeting.passed;
  if (++meeting.come == all) {
    meeting.come = 0;
    meeting.passed++;
  }
  while (meeting.passed == passed) others_go_on();
}

inline Warp& own_warp() { return warps[threadIdx.x / 32]; }
inline void __syncthreads() { meet(of_block, (int)blockDim.x); }
inline void __syncwarp() { meet(own_warp().meeting, 32); }

template <typename Read>
auto exchange(const Given& given, Read read) {
  own_warp().given[threadIdx.x % 32] = given;
  __syncwarp();
  auto found = read(own_warp().given);
  __syncwarp();
  return found;
}

inline unsigned __shfl_sync(unsigned, unsigned value, int lane) {
  return exchange({value}, [=](Given* of) { return of[lane % 32].word; });
}
inline unsigned __shfl_xor_sync(unsigned all, unsigned value, int mask) {
  return __shfl_sync(all, value, threadIdx.x % 32 ^ mask);
}
inline unsigned __shfl_up_sync(unsigned all, unsigned value, int step) {
  const int lane = threadIdx.x % 32;
  return __shfl_sync(all, value, lane < step ? lane : lane - step);
}
inline unsigned __ballot_sync(unsigned, bool value) {
  return exchange({value}, [](Given* of) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; lane++) bits |= of[lane].word << lane;
    return bits;
  });
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline float __expf(float value) { return expf(value); }
inline int atomicAdd(int* at, int value) { return (*at += value) - value; }
inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline unsigned long __cvta_generic_to_shared(const void* at) { return (unsigned long)at; }

static void begin_thread() {
  (*kernel)();
  fibers[threadIdx.x].ended = true;
}

static void launch(int grid_x, int grid_y, int threads, const std::function<void()>& body) {
  kernel = &body;
  gridDim = {(unsigned)grid_x, (unsigned)grid_y};
  blockDim = {(unsigned)threads, 1};
  fibers.resize(threads);
  for (int block = 0; block < grid_x * grid_y; block++) {
    blockIdx = {(unsigned)(block % grid_x), (unsigned)(block / grid_x)};
    memset(shared, 0xff, sizeof shared);  // NaN: nothing is there before it is written
    warps.assign((threads + 31) / 32, Warp());
    of_block = Meeting();
    for (Fiber& fiber : fibers) {
      fiber.stack.resize(1 << 16);
      fiber.ended = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = &scheduler;
      makecontext(&fiber.context, begin_thread, 0);
    }
    for (bool some = true; some;) {
      some = false;
      for (int i = 0; i < threads; i++) {
        if (fibers[i].ended) continue;
        some = true;
        threadIdx.x = i;
        swapcontext(&scheduler, &fibers[i].context);
      }
    }
  }
}

#if KIND == 0
inline float from_16(unsigned bits) { return __uint_as_float(bits << 16); }
inline unsigned short to_16(float value) {
  unsigned bits;
  memcpy(&bits, &value, 4);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest even; there is no NaN
}
#else
inline float from_16(unsigned bits) {
  _Float16 value;
  memcpy(&value, &bits, 2);
  return value;
}
inline unsigned short to_16(float value) {
  const _Float16 narrow = value;
  unsigned short bits;
  memcpy(&bits, &narrow, 2);
  return bits;
}
#endif

// The functions that are PTX on a card.

inline unsigned short to_out(float value) { return to_16(value); }
inline float from_half(unsigned bits) { return from_16(bits & 0xffff); }
inline unsigned to_halves(float low, float high) { return to_16(low) | to_16(high) << 16; }
inline uint4 load_once(const uint4* at) { return *at; }
inline uint4 load_cached(const void* at) { return *(const uint4*)at; }
inline uint4 load_fresh(const void* at) { return *(const uint4*)at; }
inline void await(unsigned, unsigned) {}
inline void fetch(uint4* to, const uint4* from, unsigned) { memcpy(to, from, 9 * 512); }

inline unsigned word_of(const uint4& of, int number) {
  const unsigned words[4] = {of.x, of.y, of.z, of.w};
  return words[number];
}

// mma.sp.m16n8k32 as the PTX manual defines its fragments, metadata and selector.
template <int SELECTOR>
inline void mma(float (&c)[4], uint4 a, uint4 b, unsigned meta) {
  const int lane = threadIdx.x % 32;
  own_warp().given[lane] = {0, meta, a, b};
  __syncwarp();
  const Given* of = own_warp().given;
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int kept = 0; kept < 16; kept++) {
      const int group = kept / 2;
      const Given& with_meta = of[row % 8 * 4 + 2 * SELECTOR + group / 4];
      const int place = with_meta.meta >> (row / 8 * 16 + group % 4 * 4 + kept % 2 * 2) & 3;
      const Given& with_a = of[row % 8 * 4 + kept % 8 / 2];
      const unsigned two = word_of(with_a.a, row / 8 + kept / 8 * 2);
      const int k = 4 * group + place;
      const unsigned both = word_of(of[column * 4 + k % 8 / 2].b, k / 8);
      c[i] += from_16(two >> kept % 2 * 16 & 0xffff) * from_16(both >> k % 2 * 16 & 0xffff);
    }
  }
  __syncwarp();
}

#define __device__
#define __global__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define asm
#define volatile(...)
