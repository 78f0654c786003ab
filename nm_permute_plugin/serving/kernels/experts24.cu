// SPDX-License-Identifier: Apache-2.0
// out[pair][row] = sum over channels of weight[expert of the pair][row][channel] *
// x[row of the pair][channel]. A pair is a token and one of its experts; the weights are 2:4
// and packed (packing.py), those of all experts one after the other. Where GATED, the weight
// holds rows of gates, then as many of ups, and the output is silu(gate) * up.
//
// A slot is up to TOKENS pairs of one expert; a block multiplies the tokens of a slot by
// TILE_WARPS tiles of 32 rows. Of the weights all else is as in sparse24.cu.
//
// Compiled once for each choice of
//   KIND     0 bfloat16, 1 float16
//   GATED    0 or 1; then WARPS_N is even: one half of the warps has gates, one has ups
//   TILES    tokens of a slot / 8
//   WARPS_N  warps side by side in rows, 32 rows each
//   WARPS_K  warps that share rows and split the channels
//   DEPTH    chunks that a warp loads ahead, in registers: 0 or 1
//   PITCH    of a token's sums in shared memory

#define TILE_WARPS (GATED ? WARPS_N / 2 : WARPS_N)
#define CHUNK_PIECES (PIECES * 32)

// What the kernel before has written is seen from here on; in the stream's order by itself,
// where the launch does not allow the kernels to overlap.
__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Once all blocks have come here, those of the next kernel may start.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Not before the wait, as the compiler might do were it not volatile.
__device__ __forceinline__ uint4 load_fresh(const void* at) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at)
               : "memory");
  return v;
}

// The pairs of a slot. `direct`: there is a slot for each pair; it has pairs if those of its
// expert before it fill whole slots. Else `align` has filled in the pairs of each slot.
struct Slot {
  const int* pair_of;    // [slots, TOKENS]: or -1
  const int* expert_of;  // [slots]: or -1; with `direct` of each pair
  int direct, slot, pairs;

  // The expert, or -1 if the slot has no pairs. The same in all lanes.
  __device__ __forceinline__ int expert() const {
    const int expert = expert_of[slot], lane = threadIdx.x % 32;
    if (!direct || expert < 0) return expert;
    int before = 0;
    for (int base = 0; base < slot; base += 32)
      before += __popc(__ballot_sync(
          0xffffffffu, base + lane < slot && expert_of[base + lane] == expert));
    return before % TOKENS ? -1 : expert;
  }

  // The pair of each token that the lane feeds to the tensor cores, or -1.
  __device__ __forceinline__ void members(int (&pair)[TILES], int expert) const {
    const int lane = threadIdx.x % 32, group = lane / 4;
#pragma unroll
    for (int n = 0; n < TILES; n++)
      pair[n] = direct ? -1 : pair_of[slot * TOKENS + n * 8 + group];
    if (!direct) return;
    int found = 0;
    for (int base = slot; base < pairs && found < TOKENS; base += 32) {
      uint same = __ballot_sync(
          0xffffffffu, base + lane < pairs && expert_of[base + lane] == expert);
      for (; same; same &= same - 1, found++)
#pragma unroll
        for (int n = 0; n < TILES; n++)
          if (found == n * 8 + group) pair[n] = base + __ffs(same) - 1;
    }
  }
};

// Blocks: [row tiles / TILE_WARPS, slots].
extern "C" __global__ void __launch_bounds__(THREADS)
    experts24(const uint4* __restrict__ packed, const char* x, unsigned short* out,
              const int* pair_of, const int* expert_of, int direct, int pairs, int top_k,
              int rows, int chunks) {
  extern __shared__ __align__(16) char shared[];
  Sum* sums = (Sum*)shared;
  __shared__ int pair_at[TOKENS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_n = warp % WARPS_N, warp_k = warp / WARPS_N;
  const int group = lane / 4, quarter = lane % 4;

  // The second product waits later: the first one starts it, having seen the slots.
  if (GATED) wait_for_kernel_before();
  if (GATED) let_next_kernel_start();
  const Slot slot = {pair_of, expert_of, direct, (int)blockIdx.y, pairs};
  const int expert = slot.expert();
  if (expert < 0) {  // one block waits: the second product must not end before the first
    if (!GATED && blockIdx.x + blockIdx.y == 0) wait_for_kernel_before();
    return;
  }

  // Past the last row tile it is that again, whose sums nobody reads.
  const int row_tiles = rows / 32, column = GATED ? warp_n / 2 : warp_n;
  int row_tile = min((int)blockIdx.x * TILE_WARPS + column, row_tiles - 1);
  if (GATED) row_tile += warp_n % 2 * row_tiles;
  const long long tile = (long long)expert * (GATED ? 2 : 1) * row_tiles + row_tile;
  const uint4* at = packed + tile * chunks * CHUNK_PIECES + lane;
#if DEPTH
  uint4 next[PIECES];
  if (warp_k < chunks) load_chunk(next, at + warp_k * CHUNK_PIECES);
#endif
  int pair[TILES];
  slot.members(pair, expert);
  const int first = __shfl_sync(0xffffffffu, pair[0], 0);
  const char* x_of[TILES];
#pragma unroll
  for (int n = 0; n < TILES; n++) {  // places without a pair repeat the first
    if (warp == 0 && quarter == 0) pair_at[n * 8 + group] = pair[n];
    const int row = (pair[n] < 0 ? first : pair[n]) / top_k;
    x_of[n] = x + (long long)row * chunks * TOKEN_BYTES + quarter * 16;
  }
  if (!GATED) wait_for_kernel_before();
  if (!GATED) let_next_kernel_start();

  Sum c[2][TILES][4] = {};
  for (int chunk = warp_k; chunk < chunks; chunk += WARPS_K) {
    uint4 b[TILES][SLICES];
#pragma unroll
    for (int slice = 0; slice < SLICES; slice++)
#pragma unroll
      for (int n = 0; n < TILES; n++)
        b[n][slice] = load_fresh(x_of[n] + (chunk * SLICES + slice) * 64);
    uint4 a[PIECES];
#if DEPTH
#pragma unroll
    for (int i = 0; i < PIECES; i++) a[i] = next[i];
    if (chunk + WARPS_K < chunks) load_chunk(next, at + (chunk + WARPS_K) * CHUNK_PIECES);
#else
    load_chunk(a, at + chunk * CHUNK_PIECES);
#endif
    const uint meta[4] = {a[VALUES].x, a[VALUES].y, a[VALUES].z, a[VALUES].w};
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      const uint4 upper = weight_operand(a, step, 0), lower = weight_operand(a, step, 1);
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        const uint4 token = token_operand(b[n], step, lane & 1);
        mma<0>(c[0][n], upper, token, meta[step]);
        mma<1>(c[1][n], lower, token, meta[step]);
      }
    }
  }

#pragma unroll
  for (int n = 0; n < TILES; n++)
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        sums[warp * WARP_SUMS + (n * 8 + 2 * quarter + i % 2) * PITCH + 16 * half +
             8 * (i / 2) + group] = c[half][n][i];
  __syncthreads();
  for (int i = threadIdx.x; i < TILE_WARPS * TOKENS * 32; i += THREADS) {
    const int token = i / 32 % TOKENS, of_block = i / (TOKENS * 32);
    const int row = (blockIdx.x * TILE_WARPS + of_block) * 32 + i % 32;
    if (pair_at[token] < 0 || row >= rows) continue;
    const Sum* from = sums + (GATED ? 2 : 1) * of_block * WARP_SUMS + token * PITCH + i % 32;
    Sum sum = 0;
#pragma unroll
    for (int k = 0; k < WARPS_K; k++) sum += from[k * WARPS_N * WARP_SUMS];
    if (GATED) {
      Sum up = 0;
#pragma unroll
      for (int k = 0; k < WARPS_K; k++) up += from[(k * WARPS_N + 1) * WARP_SUMS];
      sum *= up / (1 + __expf(-sum));
    }
    out[(long long)pair_at[token] * rows + row] = to_out(sum);
  }
}
