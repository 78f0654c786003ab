// SPDX-License-Identifier: Apache-2.0
// out[token][row] = sum over channels of weight[row][channel] * x[token][channel], few
// tokens, weight 2:4 sparse and stored compressed (mma_sp.py says how).
//
// The tensor cores multiply compressed values and metadata as they are (mma.sp), so
// nothing is expanded: every lane reads what it feeds to the tensor cores, 16 bytes at a
// time and next to its neighbour's. The weight is the sparse 16-row operand, the tokens
// are the 8 columns; each warp owns 32 rows and every WARPS_K-th chunk of 128 channels.
// Many tokens (sm_90a, 16 bits) come through shared memory, once for a block, and meet the
// weights in wgmma.sp, of four warps: mma.sp alone would take longer than the reading.
//
// Compiled once for each choice of
//   KIND     0 bfloat16, 1 float16, 2 float8_e4m3fn, 3 int8
//   TILES    tokens / 8
//   WARPS_N  warps side by side in rows, 32 rows each
//   WARPS_K  warps that share rows and split the channels
//   CLUSTER  blocks that share rows and split the channels (1 below sm_90)
//   DEPTH    chunks that a warp loads ahead: 0; 1, in registers; more (sm_90), in shared
//            memory, by the copy engine
//   STAGES   rounds of chunks whose tokens lie in shared memory, 2 or more, for wgmma.sp:
//            WARPS_N is then a multiple of 4, TILES 4 or 8; 0: mma.sp
//   PITCH    of a token's sums in shared memory
// Sums are written as float16 for that kind, as bfloat16 for all others.

#define STAGE_BYTES (WARPS_K * TOKENS * TOKEN_BYTES)

#if STAGES
#define PANEL_BYTES (128 * TOKENS)  // tokens by 64 channels, as wgmma wants them

// Where a group of four channels of a token goes in a stage: groups in the tensor cores'
// order, and pieces of 16 bytes swizzled, so that eight tokens side by side use all banks.
__device__ __forceinline__ int staged(int token, int group) {
  const int piece = group / 8 % 2 * 4 + group % 4, half = group / 4 % 2;
  return group / 16 * PANEL_BYTES + token * 128 + (piece ^ token % 8) * 16 + half * 8;
}

// The block asks for the tokens of WARPS_K chunks. Those past the last repeat it.
__device__ __forceinline__ void stage(char* to, const char* x, int base, int tokens, int chunks) {
  for (int i = threadIdx.x; i < WARPS_K * TOKENS * 32; i += THREADS) {
    const int group = i % 32, token = i / 32 % TOKENS, k = i / (32 * TOKENS);
    if (base + k >= chunks) break;
    const char* from = x + ((long long)min(token, tokens - 1) * chunks + base + k) * TOKEN_BYTES;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(
                     shared_address(to + k * 2 * PANEL_BYTES + staged(token, group))),
                 "l"(__cvta_generic_to_global(from + group * 8))
                 : "memory");
  }
}

#if KIND == 0
#define TYPES ".f32.bf16.bf16 "
#else
#define TYPES ".f32.f16.f16 "
#endif
#define R4(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define R16(n) R4(n), R4(n + 1), R4(n + 2), R4(n + 3)
#define L16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define L32 L16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"

// 64 rows, 16 of each warp, by all tokens and 32 channels, whose tokens lie at `at`.
template <int HALF>
__device__ __forceinline__ void wgmma(Sum (&c)[TILES][4], uint4 a, uint at, uint meta) {
  const unsigned long long swizzle_128 = 1ull << 62, eight_tokens = 1024 >> 4;
  const unsigned long long tokens = swizzle_128 | eight_tokens << 32 | 1 << 16 | at >> 4;
#define WGMMA(N, SUMS, A, REST, ...)                                                \
  asm volatile("wgmma.mma_async.sp.sync.aligned.m64n" N "k32" TYPES "{" SUMS "}, {" \
               A "}, " REST ", 1, 1, 1, 0;"                                         \
               : __VA_ARGS__                                                        \
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(tokens), "r"(meta), "n"(HALF))
#if TILES == 4
  WGMMA("32", L16, "%16,%17,%18,%19", "%20, %21, %22", R16(0));
#else
  WGMMA("64", L32, "%32,%33,%34,%35", "%36, %37, %38", R16(0), R16(4));
#endif
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
  extern __shared__ __align__(1024) char shared[];  // the ring and the stages, then the sums
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_n = warp % WARPS_N, warp_k = warp / WARPS_N;
  const int group = lane / 4, quarter = lane % 4;
  // Of 32 rows; past the last it is that again, whose sums nobody reads.
  const int row_tile = min((int)blockIdx.x * WARPS_N + warp_n, rows / 32 - 1);
  const int start = blockIdx.y * WARPS_K, stride = WARPS_K * CLUSTER;

  Sum c[2][TILES][4] = {};
  const uint4* at = packed + (long long)row_tile * chunks * (PIECES * 32);
  const int chunk_size = PIECES * 32;

#if DEPTH == 1
  uint4 ahead[PIECES];
  const int first = start + warp_k;
  if (first < chunks) load_chunk(ahead, at + first * chunk_size + lane);
#elif DEPTH > 1
  __shared__ __align__(8) unsigned long long barriers[WARPS_N * WARPS_K * DEPTH];
  uint4* ring = (uint4*)shared + warp * DEPTH * chunk_size;
  const uint barrier = shared_address(barriers + warp * DEPTH);
  if (lane == 0) {
    for (int i = 0; i < DEPTH; i++)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier + 8 * i) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    for (int i = 0; i < DEPTH; i++) {
      const int chunk = start + warp_k + i * stride;
      if (chunk < chunks) fetch(ring + i * chunk_size, at + chunk * chunk_size, barrier + 8 * i);
    }
  }
  __syncwarp();
  int slot = 0, parity = 0;
#endif
#if STAGES
  char* stages = shared + RING_BYTES;
  for (int i = 0; i < STAGES - 1; i++) {
    stage(stages + i * STAGE_BYTES, x, start + i * stride, tokens, chunks);
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  int full = 0, empty = STAGES - 1;
#else
  const char* x_of[TILES];
#pragma unroll
  for (int n = 0; n < TILES; n++) {  // tokens past the last repeat it; nobody reads them
    int token = min(n * 8 + group, tokens - 1);
    x_of[n] = x + (long long)token * chunks * TOKEN_BYTES + quarter * 16;
  }
#endif
  for (int base = start; base < chunks; base += stride) {
    const int chunk = base + warp_k;
#if STAGES
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();  // all see the stage that is full, and have left the one before it
    stage(stages + empty * STAGE_BYTES, x, base + (STAGES - 1) * stride, tokens, chunks);
    asm volatile("cp.async.commit_group;" ::: "memory");
    const uint of_tokens = shared_address(stages + full * STAGE_BYTES + warp_k * 2 * PANEL_BYTES);
    empty = full;
    if (++full == STAGES) full = 0;
#endif
    if (chunk >= chunks) continue;
#if !STAGES
    uint4 b[TILES][SLICES];
#pragma unroll
    for (int slice = 0; slice < SLICES; slice++)
#pragma unroll
      for (int n = 0; n < TILES; n++)
        b[n][slice] = load_cached(x_of[n] + (chunk * SLICES + slice) * 64);
#endif
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
    // All have read before the copy engine writes: it keeps no order with other accesses.
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
    const int next = chunk + DEPTH * stride;
    if (lane == 0 && next < chunks) fetch(here, at + next * chunk_size, barrier + 8 * slot);
    if (++slot == DEPTH) slot = 0, parity ^= 1;
#endif
    const uint meta[4] = {a[VALUES].x, a[VALUES].y, a[VALUES].z, a[VALUES].w};
#if STAGES
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      const uint tokens_at = of_tokens + step / 2 * PANEL_BYTES + step % 2 * 64;
      wgmma<0>(c[0], weight_operand(a, step, 0), tokens_at, meta[step]);
      wgmma<1>(c[1], weight_operand(a, step, 1), tokens_at, meta[step]);
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#else
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
#endif
  }

  // Sum over the warps, then over the cluster, of which each block adds up its share.
  __syncthreads();  // ring and stages have been read
  Sum* sums = (Sum*)shared;
#pragma unroll
  for (int n = 0; n < TILES; n++)
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        sums[warp * WARP_SUMS + (n * 8 + 2 * quarter + i % 2) * PITCH + 16 * half + 8 * (i / 2) +
             group] = c[half][n][i];
  __syncthreads();
  const int found = WARPS_N * TOKENS * 32;
#if CLUSTER > 1
  for (int i = threadIdx.x; WARPS_K > 1 && i < found; i += THREADS) {
    Sum* from = sums + i / (TOKENS * 32) * WARP_SUMS + i / 32 % TOKENS * PITCH + i % 32;
    for (int k = 1; k < WARPS_K; k++) *from += from[k * WARPS_N * WARP_SUMS];
  }
  cluster_sync();
#endif
  for (int i = blockIdx.y * THREADS + threadIdx.x; i < found; i += CLUSTER * THREADS) {
    const int token = i / 32 % TOKENS;
    const int row = (blockIdx.x * WARPS_N + i / (TOKENS * 32)) * 32 + i % 32;
    if (token >= tokens || row >= rows) continue;
    Sum* from = sums + i / (TOKENS * 32) * WARP_SUMS + token * PITCH + i % 32;
    Sum sum = 0;
#if CLUSTER > 1
#pragma unroll
    for (int rank = 0; rank < CLUSTER; rank++) sum += of_rank(from, rank);
#else
#pragma unroll
    for (int k = 0; k < WARPS_K; k++) sum += from[k * WARPS_N * WARP_SUMS];
#endif
    out[(long long)token * rows + row] = to_out((float)sum);
  }
#if CLUSTER > 1
  cluster_sync();  // nobody reads from a block that has ended
#endif
}
