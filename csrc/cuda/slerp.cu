// slerp: spherical interpolation of a list of pairs of bfloat16 tensors, in one launch.
//
// The blocks of a cooperative launch, all resident, go through batches of whole tensors. For each batch they sum the
// products of their segments, meet at a barrier of the grid, compute the coefficients in float64, and combine their
// segments in reverse order: what was read last is still in the L2 cache. A batch is as large as that cache, or one
// tensor. Must move 4 bytes an element for the products; then 2 for the output, and 4 for what L2 has not kept.
//
// out = round(c0 * a + c1 * b): both products, the sum and the output are rounded, as by the op combine, to the bit.
// Sums are added in a fixed order, so that a result does not depend on the number of blocks.

#include "coefficients.cuh"
#include "ring.cuh"

namespace {

struct Segment {  // a row of the table of kernels/segments.py, without its last column
  long long a, b, out, count, vector;
};

__device__ Segment segment_of(const long long* table, int index) {
  const long long* row = table + 6ll * index;
  return {row[0], row[1], row[2], row[3], row[4]};
}

__device__ float low(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ float high(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }

// Knuth's two-sum: s + error is x + y exactly.
__device__ float two_sum(float x, float y, float& error) {
  const float s = __fadd_rn(x, y), y_part = __fsub_rn(s, x);
  const float of_x = __fsub_rn(x, __fsub_rn(s, y_part)), of_y = __fsub_rn(y, y_part);
  error = __fadd_rn(error, __fadd_rn(of_x, of_y));
  return s;
}

// The sum of x_i * y_i for eight neighbours. A product of two bfloat16 is exact in float32.
__device__ double dot(uint4 x, uint4 y) {
  float error = 0.0f;
  const float s0 = two_sum(__fmul_rn(low(x.x), low(y.x)), __fmul_rn(high(x.x), high(y.x)), error);
  const float s1 = two_sum(__fmul_rn(low(x.y), low(y.y)), __fmul_rn(high(x.y), high(y.y)), error);
  const float s2 = two_sum(__fmul_rn(low(x.z), low(y.z)), __fmul_rn(high(x.z), high(y.z)), error);
  const float s3 = two_sum(__fmul_rn(low(x.w), low(y.w)), __fmul_rn(high(x.w), high(y.w)), error);
  const float sum = two_sum(two_sum(s0, s1, error), two_sum(s2, s3, error), error);
  return __dadd_rn(sum, error);
}

struct Sums {
  double aa = 0.0, ab = 0.0, bb = 0.0;

  __device__ void add(const Sums& other) {
    aa = __dadd_rn(aa, other.aa);
    ab = __dadd_rn(ab, other.ab);
    bb = __dadd_rn(bb, other.bb);
  }
};

__device__ Sums shuffled(const Sums& sums, int distance) {
  return {__shfl_down_sync(~0u, sums.aa, distance), __shfl_down_sync(~0u, sums.ab, distance),
          __shfl_down_sync(~0u, sums.bb, distance)};
}

// The sum over the block, in thread 0. `scratch` has a row for each warp; all threads call this.
__device__ Sums block_sum(Sums sums, double* scratch) {
  for (int distance = 16; distance > 0; distance /= 2) sums.add(shuffled(sums, distance));
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) {
    scratch[3 * warp] = sums.aa;
    scratch[3 * warp + 1] = sums.ab;
    scratch[3 * warp + 2] = sums.bb;
  }
  __syncthreads();
  if (threadIdx.x == 0)
    for (int other = 1; other < THREADS / 32; ++other)
      sums.add({scratch[3 * other], scratch[3 * other + 1], scratch[3 * other + 2]});
  __syncthreads();
  return sums;
}

__device__ unsigned rounded(float first, float second) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

// An input with the coefficient zero has no effect: x + -0 has the bits of x, also where x is +0 or not finite.
__device__ float weighted(float c, float x) { return c == 0.0f ? -0.0f : __fmul_rn(c, x); }

__device__ float mixed(float a, float b, float2 c) { return __fadd_rn(weighted(c.x, a), weighted(c.y, b)); }

__device__ unsigned mixed(unsigned a, unsigned b, float2 c) {
  return rounded(mixed(low(a), low(b), c), mixed(high(a), high(b), c));
}

__device__ int nonfinite(unsigned bits) { return (bits & 0x7f80u) == 0x7f80u; }
__device__ int nonfinite_of_pair(unsigned pair) { return nonfinite(pair) + nonfinite(pair >> 16); }

__device__ unsigned load(long long address, long long element) {
  unsigned short bits;
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(bits) : "l"(address + 2 * element));
  return bits;
}

// Results are not read again: they leave the cache first.
__device__ void store(long long address, uint4 v) {
  asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

__device__ void store(long long address, unsigned bits) {
  asm volatile("st.global.cs.u16 [%0], %1;" : : "l"(address), "h"((unsigned short)bits) : "memory");
}

__device__ Sums products(const Segment& segment, Ring& ring) {
  Sums sums;
  const int moved = ring.stream(segment.a, segment.b, vectored(segment.a | segment.b, segment.count),
                                [&](int, uint4 a, uint4 b) { sums.add({dot(a, a), dot(a, b), dot(b, b)}); });
  for (long long i = moved + threadIdx.x; i < segment.count; i += THREADS) {
    const double a = low(load(segment.a, i)), b = low(load(segment.b, i));
    sums.add({__dmul_rn(a, a), __dmul_rn(a, b), __dmul_rn(b, b)});
  }
  return sums;
}

// How many values of this thread are infinite or NaN.
__device__ int combine(const Segment& segment, float2 c, Ring& ring) {
  int found = 0;
  const int aligned = vectored(segment.a | segment.b | segment.out, segment.count);
  const int moved = ring.stream(segment.a, segment.b, aligned, [&](int element, uint4 a, uint4 b) {
    const uint4 v = {mixed(a.x, b.x, c), mixed(a.y, b.y, c), mixed(a.z, b.z, c), mixed(a.w, b.w, c)};
    store(segment.out + 2ll * element, v);
    found += nonfinite_of_pair(v.x) + nonfinite_of_pair(v.y) + nonfinite_of_pair(v.z) + nonfinite_of_pair(v.w);
  });
  for (long long i = moved + threadIdx.x; i < segment.count; i += THREADS) {
    const unsigned v = mixed(load(segment.a, i), load(segment.b, i), c) & 0xffffu;
    store(segment.out + 2 * i, v);
    found += nonfinite(v);
  }
  return found;
}

// All blocks of the grid have arrived `times` times, and what they wrote before is visible.
__device__ void grid_barrier(unsigned* arrived, unsigned times) {
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" : : "l"(arrived) : "memory");
    unsigned count;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(arrived) : "memory");
    while (count < times * gridDim.x);
  }
  __syncthreads();
}

}  // namespace

// segments: [S, 6] and runs: [V, 3], tables of kernels/segments.py, rows of runs `run_stride` apart; a vector is a pair
// of tensors. batches: [B + 1] the first segment of each batch; a vector lies in one batch. t: [V], or [1] with
// t_stride 0. partials: [S, 3] scratch. arrived: zero. Results are coefficients: [V, 2], and nonfinites: [V], to which
// the count of values that are infinite or NaN is added.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
    slerp(const long long* __restrict__ segments, const int* __restrict__ batches, const long long* __restrict__ runs,
          const double* __restrict__ t, double* partials, unsigned* arrived, float2* coefficients,
          unsigned long long* nonfinites, int batch_count, int normalize, int run_stride, int t_stride) {
  double* scratch = reinterpret_cast<double*>(global_smem + Ring::BYTES);
  float2* chosen = reinterpret_cast<float2*>(scratch + 3 * (THREADS / 32));
  Ring ring;
  for (int batch = 0; batch < batch_count; ++batch) {
    const int first = batches[batch] + blockIdx.x, past = batches[batch + 1];
    int last = first;
    for (int index = first; index < past; index += gridDim.x) {
      const Sums sums = block_sum(products(segment_of(segments, index), ring), scratch);
      if (threadIdx.x == 0) {
        partials[3ll * index] = sums.aa;
        partials[3ll * index + 1] = sums.ab;
        partials[3ll * index + 2] = sums.bb;
      }
      last = index;
    }
    grid_barrier(arrived, batch + 1);
    if (first >= past) continue;
    long long vector = -1;
    for (int index = last; index >= first; index -= gridDim.x) {
      const Segment segment = segment_of(segments, index);
      if (segment.vector != vector) {
        vector = segment.vector;
        const long long begin = runs[run_stride * vector], end = runs[run_stride * vector + 1];
        Sums sums;
        for (long long part = begin + threadIdx.x; part < end; part += THREADS)
          sums.add({__ldcg(partials + 3 * part), __ldcg(partials + 3 * part + 1), __ldcg(partials + 3 * part + 2)});
        sums = block_sum(sums, scratch);
        if (threadIdx.x == 0) *chosen = coefficients_of(sums.aa, sums.ab, sums.bb, t[t_stride * vector], normalize);
        __syncthreads();
      }
      const float2 c = *chosen;
      if (index == runs[run_stride * vector] && threadIdx.x == 0) coefficients[vector] = c;
      const int found = __reduce_add_sync(~0u, combine(segment, c, ring));
      if (found && threadIdx.x % 32 == 0) atomicAdd(nonfinites + vector, (unsigned long long)found);
    }
  }
}
