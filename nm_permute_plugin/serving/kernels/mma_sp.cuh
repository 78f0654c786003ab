// SPDX-License-Identifier: Apache-2.0
// What kernels on packed 2:4 weights share: how a warp reads its chunks (packing.py says
// what these are) and feeds them to the tensor cores. It is put before their source, and
// compiled for the macros that sparse24.cu explains: KIND, TILES, WARPS_N, WARPS_K, DEPTH,
// PITCH.

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
#define TOKENS (8 * TILES)
#define TOKEN_BYTES (64 * SLICES)  // of a token in a chunk
#define WARP_SUMS (TOKENS * PITCH)
#define CHUNK_BYTES (PIECES * 512)
#define RING_BYTES (DEPTH > 1 ? WARPS_N * WARPS_K * DEPTH * CHUNK_BYTES : 0)

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

__device__ __forceinline__ uint shared_address(const void* at) {
  return (uint)__cvta_generic_to_shared(at);
}

#if DEPTH > 1
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

