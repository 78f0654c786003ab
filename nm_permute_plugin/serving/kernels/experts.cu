// SPDX-License-Identifier: Apache-2.0
// What routed experts need around their products, which are experts24.cu's: pairs sorted by
// expert, the sum over the experts of a token, and dense weights for many tokens.
//
// Compiled once for each KIND: 0 bfloat16, 1 float16.

#define MOST_EXPERTS 1024

// Sort pairs by expert, and give each expert whole slots of `size` pairs. One block.
extern "C" __global__ void __launch_bounds__(1024)
    align(const int* __restrict__ ids,  // [pairs]: the expert of each; negative: none here
          int* __restrict__ pair_of,    // [slots, size]: or -1
          int* __restrict__ expert_of,  // [slots]: or -1
          int pairs, int slots, int size, int experts) {
  __shared__ int count[MOST_EXPERTS], first[MOST_EXPERTS];
  __shared__ int used;
  for (int i = threadIdx.x; i < experts; i += blockDim.x) count[i] = 0;
  for (int i = threadIdx.x; i < slots * size; i += blockDim.x) pair_of[i] = -1;
  __syncthreads();
  for (int i = threadIdx.x; i < pairs; i += blockDim.x)
    if (ids[i] >= 0) atomicAdd(count + ids[i], 1);
  __syncthreads();
  if (threadIdx.x < 32) {
    int before = 0;
    for (int base = 0; base < experts; base += 32) {
      const int expert = base + threadIdx.x;
      const int needed = expert < experts ? (count[expert] + size - 1) / size : 0;
      int last = needed;
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, last, step);
        if (threadIdx.x >= step) last += other;
      }
      if (expert < experts) first[expert] = before + last - needed;
      before += __shfl_sync(0xffffffffu, last, 31);
    }
    if (threadIdx.x == 0) used = before;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < experts; i += blockDim.x) {
    const int needed = (count[i] + size - 1) / size;
    for (int slot = 0; slot < needed; slot++) expert_of[first[i] + slot] = i;
  }
  for (int i = used + threadIdx.x; i < slots; i += blockDim.x) expert_of[i] = -1;
  __syncthreads();
  for (int i = threadIdx.x; i < experts; i += blockDim.x) count[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < pairs; i += blockDim.x)
    if (ids[i] >= 0) pair_of[first[ids[i]] * size + atomicAdd(count + ids[i], 1)] = i;
}

__device__ __forceinline__ float from_half(uint bits) {
  float value;
#if KIND == 1
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((unsigned short)bits));
#else
  value = __uint_as_float(bits << 16);
#endif
  return value;
}

__device__ __forceinline__ uint to_halves(float low, float high) {
  uint bits;
#if KIND == 1
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
#endif
  return bits;
}

// out[token][row] = sum over the token's pairs of scale[pair] * products[pair][row], for two
// rows a thread; blocks: [rows / 2 / threads, tokens]. Pairs of no expert here count nothing.
extern "C" __global__ void combine(const uint* products,
                                   const float* __restrict__ scale,
                                   const int* __restrict__ ids, uint* __restrict__ out,
                                   int top_k, int halves) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  const int at = blockIdx.x * blockDim.x + threadIdx.x, token = blockIdx.y;
  if (at >= halves) return;
  float low = 0, high = 0;
#pragma unroll 8
  for (int pair = token * top_k; pair < (token + 1) * top_k; pair++) {
    if (ids[pair] < 0) continue;
    const uint both = products[(long long)pair * halves + at];
    low += scale[pair] * from_half(both & 0xffff);
    high += scale[pair] * from_half(both >> 16);
  }
  out[(long long)token * halves + at] = to_halves(low, high);
}

// Four weights, of which two are not zero, at the places that their metadata say.
__device__ __forceinline__ uint2 group_of(uint two, uint places) {
  const uint low = two & 0xffff, high = two >> 16;
  const unsigned long long group = (unsigned long long)low << places % 4 * 16 |
                                   (unsigned long long)high << places / 4 * 16;
  return make_uint2((uint)group, (uint)(group >> 32));
}

// Write the dense weights of packed ones, a chunk for each warp.
//   packed [tiles, chunks, 9, 32] pieces of 16 bytes: packing.py says of what
//   out    [32 * tiles, 128 * chunks]
extern "C" __global__ void expand(const uint4* __restrict__ packed, uint4* __restrict__ out,
                                  int total, int chunks) {
  const int lane = threadIdx.x % 32, row = lane / 4, quarter = lane % 4;
  const int chunk = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (chunk >= total) return;
  const uint4* at = packed + (long long)chunk * (9 * 32) + lane;
  const uint4 meta = at[8 * 32];
  const uint words[4] = {meta.x, meta.y, meta.z, meta.w};
  out += (long long)(chunk / chunks) * 32 * chunks * 16 + chunk % chunks * 16;
#pragma unroll
  for (int step = 0; step < 4; step++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint4 piece = at[(2 * step + half) * 32];
#pragma unroll
      for (int eight = 0; eight < 2; eight++) {
        uint2 groups[2];
#pragma unroll
        for (int high = 0; high < 2; high++) {
          const uint word =
              __shfl_sync(0xffffffffu, words[step], row * 4 + half * 2 + high);
          const uint two = high ? (eight ? piece.w : piece.z) : (eight ? piece.y : piece.x);
          groups[high] = group_of(two, word >> (16 * eight + 4 * quarter) & 15);
        }
        // Lanes 0 and 2 of four have groups 0 and 2, 1 and 3 of eight; 1 and 3 the others.
        const bool later = quarter >= 2;
        const uint2 give = later ? groups[0] : groups[1], keep = later ? groups[1] : groups[0];
        const uint2 got = make_uint2(__shfl_xor_sync(0xffffffffu, give.x, 2),
                                     __shfl_xor_sync(0xffffffffu, give.y, 2));
        const uint4 both = later ? make_uint4(got.x, got.y, keep.x, keep.y)
                                 : make_uint4(keep.x, keep.y, got.x, got.y);
        const long long of_row = half * 16 + eight * 8 + row;
        out[of_row * chunks * 16 + step * 4 + quarter % 2 * 2 + later] = both;
      }
    }
}
