// Tiles of two inputs, copied to shared memory while the ones before are in use.
#pragma once

constexpr int THREADS = 256;
constexpr int TILE = 8 * THREADS;  // elements: 16 bytes a thread
constexpr int TILE_BYTES = 2 * TILE;
// Three tiles of 8 KB are on the way while one is in use. Three blocks of a multiprocessor then have 72 KB in flight;
// an H100 needs 15 KB for 25 KB a microsecond at a latency of 600 ns, a B200 31 KB.
constexpr int STAGES = 4;

extern "C" __shared__ __align__(128) unsigned char global_smem[];

// How many elements of a segment are moved 16 bytes at a time: whole tiles, if all addresses allow it.
__device__ inline int vectored(long long addresses, long long count) {
  return addresses % 16 == 0 ? static_cast<int>(count / TILE * TILE) : 0;
}

__device__ inline unsigned shared_address(int offset) {
  return static_cast<unsigned>(__cvta_generic_to_shared(global_smem)) + offset;
}

class Ring {
 public:
#if __CUDA_ARCH__ >= 900
  static constexpr int BYTES = 2 * STAGES * TILE_BYTES + 8 * STAGES;  // and a barrier for each stage

  __device__ Ring() {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < STAGES; ++stage)
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" : : "r"(barrier(stage)) : "memory");
      asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
    }
    __syncthreads();
  }
#else
  static constexpr int BYTES = 2 * STAGES * TILE_BYTES;
#endif

  // Call visit(element, a, b) with this thread's eight elements of every tile before `count`; returns `count`.
  template <class Visit>
  __device__ int stream(long long a, long long b, int count, Visit visit) {
    for (int ahead = 0; ahead < STAGES - 1; ++ahead) fetch(a, b, ahead * TILE, count, ahead);
    int stage = 0;
    for (int start = 0; start < count; start += TILE) {
      wait(stage);
      const int place = stage * 2 * TILE_BYTES + 16 * threadIdx.x;
      const uint4 of_a = *reinterpret_cast<const uint4*>(global_smem + place);
      const uint4 of_b = *reinterpret_cast<const uint4*>(global_smem + place + TILE_BYTES);
      release();
      fetch(a, b, start + (STAGES - 1) * TILE, count, (stage + STAGES - 1) % STAGES);
      visit(start + 8 * threadIdx.x, of_a, of_b);
      stage = (stage + 1) % STAGES;
    }
    return count;
  }

 private:
#if __CUDA_ARCH__ >= 900
  unsigned phases = 0;  // a bit for each stage: the parity of the phase to wait for

  static __device__ unsigned barrier(int stage) { return shared_address(2 * STAGES * TILE_BYTES + 8 * stage); }

  // One thread starts the copy of a tile of both inputs; the barrier of the stage counts its bytes.
  __device__ void fetch(long long a, long long b, int start, int count, int stage) {
    if (threadIdx.x != 0 || start >= count) return;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :
                 : "r"(barrier(stage)), "r"(2 * TILE_BYTES)
                 : "memory");
    copy(a + 2ll * start, 2 * stage, stage);
    copy(b + 2ll * start, 2 * stage + 1, stage);
  }

  __device__ void copy(long long from, int tile, int stage) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :
                 : "r"(shared_address(tile * TILE_BYTES)), "l"(from), "r"(TILE_BYTES), "r"(barrier(stage))
                 : "memory");
  }

  __device__ void wait(int stage) {
    unsigned done;
    do
      asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
                   : "=r"(done)
                   : "r"(barrier(stage)), "r"(phases >> stage & 1)
                   : "memory");
    while (!done);
    phases ^= 1u << stage;
  }

  // All threads have read the tile that the next copy will overwrite.
  __device__ void release() { __syncthreads(); }
#else
  // Each thread copies what it will read itself. Every call commits a group, so that the count of groups is known.
  __device__ void fetch(long long a, long long b, int start, int count, int stage) {
    if (start < count) {
      copy(a + 2ll * start, 2 * stage);
      copy(b + 2ll * start, 2 * stage + 1);
    }
    asm volatile("cp.async.commit_group;" : : : "memory");
  }

  __device__ void copy(long long from, int tile) {
    const int place = 16 * threadIdx.x;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                 :
                 : "r"(shared_address(tile * TILE_BYTES + place)), "l"(from + place)
                 : "memory");
  }

  __device__ void wait(int) { asm volatile("cp.async.wait_group %0;" : : "n"(STAGES - 2) : "memory"); }
  __device__ void release() {}
#endif
};
