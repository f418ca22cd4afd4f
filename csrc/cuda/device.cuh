// The machine that the kernels are written for: threads of a block, blocks of a cluster, asynchronous copies.
//
// nvcc compiles the right half of every function. Under GAC_EMULATE any C++20 compiler runs the same kernels on the CPU, a
// host thread for each CUDA thread (emulate.h), where AddressSanitizer and ThreadSanitizer can watch them. So kernels keep
// to three rules: what they share lies in dynamic shared memory, reached by shared_memory(); they index in one dimension;
// and they touch the machine through this header alone.
#pragma once

#define GAC_NAMESPACE gac::cuda

#include <stdint.h>
#include <string.h>

#include "../math/config.h"

#ifdef GAC_EMULATE
#include "emulate.h"
#else
#include <cuda_runtime.h>
#define GAC_DEVICE __device__ __forceinline__
#define GAC_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#endif

namespace gac::cuda {

constexpr int kWarp = 32;

#ifndef GAC_EMULATE

GAC_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
GAC_DEVICE int threads() { return static_cast<int>(blockDim.x); }
GAC_DEVICE int64_t block() { return blockIdx.x; }
GAC_DEVICE int64_t blocks() { return gridDim.x; }

// Aligned to 16 bytes; of the size that the launch asked for.
GAC_DEVICE char* shared_memory() {
    extern __shared__ __align__(16) char gac_shared[];
    return gac_shared;
}

GAC_DEVICE void barrier() { __syncthreads(); }
GAC_DEVICE void warp_barrier() { __syncwarp(); }

// exchange(word) for each word of a value. T: any type of whole words.
template <class T, class F>
GAC_DEVICE T word_by_word(T value, const F& exchange) {
    static_assert(sizeof(T) % 4 == 0);
    int word[sizeof(T) / 4];
    memcpy(word, &value, sizeof(T));
#pragma unroll
    for (int& each : word) each = exchange(each);
    memcpy(&value, word, sizeof(T));
    return value;
}

// The value of the lane whose number differs in the bits `by`; all 32 lanes take part.
template <class T>
GAC_DEVICE T shuffle_xor(T value, int by) {
    return word_by_word(value, [=](int word) { return __shfl_xor_sync(0xffffffffu, word, by); });
}

// The value of lane `from`.
template <class T>
GAC_DEVICE T shuffle(T value, int from) {
    return word_by_word(value, [=](int word) { return __shfl_sync(0xffffffffu, word, from); });
}

// Clusters: from sm_90 on; before, every block is a cluster of its own.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
GAC_DEVICE int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
GAC_DEVICE int cluster_size() {
    int size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}
// What a thread wrote before it arrives is seen by those that have waited. A warp arrives and waits as one.
GAC_DEVICE void cluster_arrive() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
GAC_DEVICE void cluster_wait() {
    __syncwarp();
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// *own as block `rank` of the cluster has it: `own` points into this block's shared memory.
template <class T>
GAC_DEVICE T read_remote(const T* own, int rank) {
    static_assert(sizeof(T) % 4 == 0);
    uint32_t word[sizeof(T) / 4], at;
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(at)
        : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(own))), "r"(rank));
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) / 4); ++i)
        asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(word[i]) : "r"(at + 4 * i) : "memory");
    T value;
    memcpy(&value, word, sizeof(T));
    return value;
}
#else
GAC_DEVICE int cluster_rank() { return 0; }
GAC_DEVICE int cluster_size() { return 1; }
GAC_DEVICE void cluster_arrive() {}
GAC_DEVICE void cluster_wait() { __syncthreads(); }
template <class T>
GAC_DEVICE T read_remote(const T* own, int) {
    return *own;
}
#endif

struct alignas(16) Bytes16 {
    uint32_t word[4];
};

// 16 bytes to shared memory without passing through registers; both addresses are multiples of 16. They are there for the
// thread that asked, and for no other, once it has waited.
GAC_DEVICE void copy_async(Bytes16* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
                 "l"(global)
                 : "memory");
}
// Ends a group of copies.
GAC_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `Pending` of the latest groups are still under way.
template <int Pending>
GAC_DEVICE void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Read once or written once: these should not push out of the caches what is read again.
GAC_DEVICE Bytes16 load_once(const void* at) {
    const uint4 v = __ldcs(static_cast<const uint4*>(at));
    return {{v.x, v.y, v.z, v.w}};
}
GAC_DEVICE void store_once(void* at, Bytes16 v) {
    __stcs(static_cast<uint4*>(at), make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]));
}

// 2^x within 2 ulp; 0 below 2^-126.
GAC_DEVICE float exp2_hardware(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two floats, each rounded to nearest even, as 16-bit elements in a word: `low` in the low half.
GAC_DEVICE uint32_t pack_bfloat16(float low, float high) {
    uint32_t word;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
#endif
    return word;
}
GAC_DEVICE uint32_t pack_half(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
GAC_DEVICE float widen_half(uint16_t x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

#endif  // GAC_EMULATE

GAC_DEVICE int lane() { return thread() % kWarp; }
GAC_DEVICE int warp() { return thread() / kWarp; }
GAC_DEVICE void cluster_barrier() {
    cluster_arrive();
    cluster_wait();
}

// What `merge` makes of the values of all 32 lanes, the same bits in each: merge must not depend on its arguments' order.
template <class T, class F>
GAC_DEVICE T over_warp(T value, const F& merge) {
#pragma unroll
    for (int by = kWarp / 2; by > 0; by /= 2) value = merge(value, shuffle_xor(value, by));
    return value;
}

}  // namespace gac::cuda
