// SPDX-License-Identifier: Apache-2.0
// out[token][row] = sum over channels of weight[row][channel] * x[token][channel], few
// tokens, weight 2:4 sparse and stored compressed (mma_sp.py says how).
//
// The tensor cores multiply compressed values and metadata as they are (mma.sp), so
// nothing is expanded: every lane reads what it feeds to the tensor cores, 16 bytes at a
// time and next to its neighbour's. The weight is the sparse 16-row operand, the tokens
// are the 8 columns; each warp owns 32 rows and every WARPS_K-th chunk of 128 channels.
//
// Compiled once for each choice of
//   KIND     0 bfloat16, 1 float16, 2 float8_e4m3fn, 3 int8
//   TILES    tokens / 8
//   WARPS_N  warps side by side in rows, 32 rows each
//   WARPS_K  warps that share rows and split the channels
//   CLUSTER  blocks that share rows and split the channels (1 below sm_90)
//   DEPTH    chunks that a warp loads ahead: 0; 1, in registers; more (sm_90), in shared
//            memory, by the copy engine
// Sums are written as float16 for that kind, as bfloat16 for all others.

#if KIND == 3
typedef int Sum;
#define STEPS 2  // tensor core instructions along a chunk of 128 channels
#else
typedef float Sum;
#define STEPS 4
#endif
#define VALUES (KIND < 2 ? 8 : 4)  // pieces of 16 bytes: a lane's share of a chunk
#define PIECES (VALUES + 1)        // and one of metadata
#define SLICES (KIND < 2 ? 4 : 2)  // pieces of 16 bytes of a token that a lane reads
#define THREADS (32 * WARPS_N * WARPS_K)
#define PITCH 36  // of a token in shared memory: free of bank conflicts

typedef unsigned int uint;

__device__ __forceinline__ uint4 load_once(const uint4* at) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at));
  return v;
}

__device__ __forceinline__ uint4 load_cached(const void* at) {
  uint4 v;
  asm ("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at));
  return v;
}

// SELECTOR: which lanes of four hold the metadata.
#define MMA(NAME, CLASS, SELECTOR)                                                   \
  asm ("mma.sp::ordered_metadata.sync.aligned." NAME                         \
               " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12," \
               SELECTOR ";"                                                          \
               : "+" CLASS(c[0]), "+" CLASS(c[1]), "+" CLASS(c[2]), "+" CLASS(c[3])  \
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y),         \
                 "r"(b.z), "r"(b.w), "r"(meta))

template <int HALF>
__device__ __forceinline__ void mma(Sum (&c)[4], uint4 a, uint4 b, uint meta) {
#if KIND == 0
  if (HALF == 0) MMA("m16n8k32.row.col.f32.bf16.bf16.f32", "f", "0x0");
  else MMA("m16n8k32.row.col.f32.bf16.bf16.f32", "f", "0x1");
#elif KIND < 3
  if (HALF == 0) MMA("m16n8k32.row.col.f32.f16.f16.f32", "f", "0x0");
  else MMA("m16n8k32.row.col.f32.f16.f16.f32", "f", "0x1");
#else
  MMA("m16n8k64.row.col.s32.s8.s8.s32", "r", "0x0");
#endif
}

#if KIND == 2
// Two float8_e4m3fn as float16, which holds them exactly. Hopper's mma.sp has no float8
// of its own: the compiler would take it apart at great cost.
__device__ __forceinline__ uint widen(uint two) {
  uint wide;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(wide) : "h"((unsigned short)two));
  return wide;
}
__device__ __forceinline__ uint4 widen(uint low, uint high) {
  return make_uint4(widen(low), widen(low >> 16), widen(high), widen(high >> 16));
}
#endif

// The weight's operand for one step: rows 0..15 (half 0) or 16..31 of the warp's.
__device__ __forceinline__ uint4 weight_operand(const uint4 (&a)[PIECES], int step, int half) {
#if KIND == 2
  return half ? widen(a[step].z, a[step].w) : widen(a[step].x, a[step].y);
#else
  return a[2 * step + half];
#endif
}

// The tokens' operand for one step. Int8 groups of four channels lie whole in a lane;
// those of the others are shared by two lanes, which swap halves of what they read.
__device__ __forceinline__ uint4 token_operand(const uint4 (&b)[SLICES], int step, bool odd) {
#if KIND < 2
  uint4 x = b[step];
  uint keep0 = odd ? x.y : x.x, keep1 = odd ? x.w : x.z;
  uint swap0 = __shfl_xor_sync(0xffffffffu, odd ? x.x : x.y, 1);
  uint swap1 = __shfl_xor_sync(0xffffffffu, odd ? x.z : x.w, 1);
  return odd ? make_uint4(swap0, swap1, keep0, keep1)
             : make_uint4(keep0, keep1, swap0, swap1);
#elif KIND == 2
  uint low = step % 2 ? b[step / 2].z : b[step / 2].x;
  uint high = step % 2 ? b[step / 2].w : b[step / 2].y;
  uint keep = __byte_perm(low, high, odd ? 0x7632 : 0x5410);
  uint swap = __shfl_xor_sync(0xffffffffu, __byte_perm(low, high, odd ? 0x5410 : 0x7632), 1);
  return odd ? widen(swap, keep) : widen(keep, swap);
#else
  return b[step];
#endif
}

__device__ __forceinline__ unsigned short to_out(float value) {
  unsigned short bits;
#if KIND == 1
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#endif
  return bits;
}

__device__ __forceinline__ void load_chunk(uint4 (&a)[PIECES], const uint4* at) {
#pragma unroll
  for (int i = 0; i < PIECES; i++) a[i] = load_once(at + 32 * i);
}

#if DEPTH > 1
#define CHUNK_BYTES (PIECES * 512)

__device__ __forceinline__ uint shared_address(const void* at) {
  return (uint)__cvta_generic_to_shared(at);
}

// One lane asks the copy engine for a chunk; whoever waits on the barrier sees it whole.
__device__ __forceinline__ void fetch(uint4* to, const uint4* from, uint barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
               "r"(CHUNK_BYTES)
               : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(CHUNK_BYTES), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void await(uint barrier, uint parity) {
  uint done = 0;
  while (!done)
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;"
        " selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
}
#endif

#if CLUSTER > 1
#define CLUSTERED __cluster_dims__(1, CLUSTER, 1)
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// What the block of this rank holds at the same place of its shared memory.
__device__ __forceinline__ Sum of_rank(const Sum* at, uint rank) {
  uint here = (uint)__cvta_generic_to_shared(at), there, bits;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(bits) : "r"(there) : "memory");
#if KIND == 3
  return (int)bits;
#else
  return __uint_as_float(bits);
#endif
}
#else
#define CLUSTERED
#endif

extern "C" __global__ void CLUSTERED __launch_bounds__(THREADS)
    sparse24(const uint4* __restrict__ packed, const char* __restrict__ x,
             unsigned short* __restrict__ out, int tokens, int rows, int chunks) {
  __shared__ Sum sums[WARPS_N * WARPS_K * 8 * PITCH];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_n = warp % WARPS_N, warp_k = warp / WARPS_N;
  const int group = lane / 4, quarter = lane % 4;
  const int row_tile = blockIdx.x * WARPS_N + warp_n;  // of 32 rows
  const bool inside = row_tile * 32 < rows;
  const int first = blockIdx.y * WARPS_K + warp_k, stride = WARPS_K * CLUSTER;

  const long long token_bytes = (long long)chunks * (64 * SLICES);
  const char* x_of[TILES];
#pragma unroll
  for (int n = 0; n < TILES; n++) {  // tokens past the last repeat it; nobody reads them
    int token = min(n * 8 + group, tokens - 1);
    x_of[n] = x + token * token_bytes + quarter * 16;
  }
  Sum c[2][TILES][4] = {};
  const uint4* at = packed + (long long)row_tile * chunks * (PIECES * 32);
  const int chunk_size = PIECES * 32;

#if DEPTH == 1
  uint4 ahead[PIECES];
  if (inside && first < chunks) load_chunk(ahead, at + first * chunk_size + lane);
#elif DEPTH > 1
  extern __shared__ __align__(128) uint4 all_rings[];
  __shared__ __align__(8) unsigned long long barriers[WARPS_N * WARPS_K * DEPTH];
  uint4* ring = all_rings + warp * DEPTH * chunk_size;
  const uint barrier = shared_address(barriers + warp * DEPTH);
  if (lane == 0) {
    for (int i = 0; i < DEPTH; i++)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier + 8 * i) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    for (int i = 0; i < DEPTH && inside && first + i * stride < chunks; i++)
      fetch(ring + i * chunk_size, at + (first + i * stride) * chunk_size, barrier + 8 * i);
  }
  __syncwarp();
  int slot = 0, parity = 0;
#endif
  if (inside)
    for (int chunk = first; chunk < chunks; chunk += stride) {
      uint4 b[TILES][SLICES];
#pragma unroll
      for (int slice = 0; slice < SLICES; slice++)
#pragma unroll
        for (int n = 0; n < TILES; n++)
          b[n][slice] = load_cached(x_of[n] + (chunk * SLICES + slice) * 64);
      uint4 a[PIECES];
#if DEPTH == 0
      load_chunk(a, at + chunk * chunk_size + lane);
#elif DEPTH == 1
#pragma unroll
      for (int i = 0; i < PIECES; i++) a[i] = ahead[i];
      if (chunk + stride < chunks) load_chunk(ahead, at + (chunk + stride) * chunk_size + lane);
#else
      await(barrier + 8 * slot, parity);
      uint4* here = ring + slot * chunk_size;
#pragma unroll
      for (int i = 0; i < PIECES; i++) a[i] = here[32 * i + lane];
      __syncwarp();
      const int next = chunk + DEPTH * stride;
      if (lane == 0 && next < chunks) fetch(here, at + next * chunk_size, barrier + 8 * slot);
      if (++slot == DEPTH) slot = 0, parity ^= 1;
#endif
      const uint meta[4] = {a[VALUES].x, a[VALUES].y, a[VALUES].z, a[VALUES].w};
#pragma unroll
      for (int step = 0; step < STEPS; step++) {
        const uint4 upper = weight_operand(a, step, 0), lower = weight_operand(a, step, 1);
#pragma unroll
        for (int n = 0; n < TILES; n++) {
          const uint4 token = token_operand(b[n], step, lane & 1);
#if KIND == 3
          mma<0>(c[0][n], upper, token, meta[2 * step]);
          mma<0>(c[1][n], lower, token, meta[2 * step + 1]);
#else
          mma<0>(c[0][n], upper, token, meta[step]);
          mma<1>(c[1][n], lower, token, meta[step]);
#endif
        }
      }
    }

  // Sum over the warps, then over the cluster, 8 tokens at a time.
  Sum* mine = sums + warp * 8 * PITCH;
#pragma unroll
  for (int n = 0; n < TILES; n++) {
    if (n * 8 >= tokens) break;
    if (n) __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        mine[(2 * quarter + i % 2) * PITCH + 16 * half + 8 * (i / 2) + group] = c[half][n][i];
    __syncthreads();
    for (int i = threadIdx.x; i < WARPS_N * 256; i += THREADS) {
      Sum* from = sums + (i / 256) * 8 * PITCH + (i / 32 % 8) * PITCH + i % 32;
      Sum sum = 0;
#pragma unroll
      for (int k = 0; k < WARPS_K; k++) sum += from[k * WARPS_N * 8 * PITCH];
#if CLUSTER > 1
      *from = sum;
    }
    cluster_sync();
    for (int i = threadIdx.x; blockIdx.y == 0 && i < WARPS_N * 256; i += THREADS) {
      Sum* from = sums + (i / 256) * 8 * PITCH + (i / 32 % 8) * PITCH + i % 32;
      Sum sum = 0;
#pragma unroll
      for (int rank = 0; rank < CLUSTER; rank++) sum += of_rank(from, rank);
#endif
      int token = n * 8 + i / 32 % 8;
      int row = (blockIdx.x * WARPS_N + i / 256) * 32 + i % 32;
      if (token < tokens && row < rows)
        out[(long long)token * rows + row] = to_out((float)sum);
    }
#if CLUSTER > 1
    cluster_sync();
#endif
  }
}
