// A GPU's blocks and clusters on host threads, for tests of the very kernels that nvcc compiles.
//
// A launch starts one host thread for each CUDA thread of a cluster; the clusters of the grid are run one after another.
// Barriers, shuffles and the shared memory of other blocks behave as on the GPU. Asynchronous copies arrive as late as they
// may: when they are waited for. Shared memory begins filled with bytes that make any number absurd. A barrier that not all
// threads reach ends the process with a message instead of hanging. Not covered: the GPU's weaker memory order.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#define GAC_DEVICE inline
#define GAC_KERNEL(threads, blocks) inline void
#define __restrict__

namespace gac::cuda {

struct alignas(16) Bytes16 {
    uint32_t word[4];
};

namespace emulation {

constexpr auto kPatience = std::chrono::seconds(60);
constexpr unsigned char kPoison = 0xff;  // of shared memory: nan as a number, -1 as a count

inline std::atomic<uint64_t> progress{0};  // barriers that all threads have reached

class Barrier {
public:
    explicit Barrier(int count) : count_(count) {}

    void arrive_and_wait() { wait(arrive()); }

    // The generation that wait() waits to be over.
    uint32_t arrive() {
        const uint32_t mine = generation_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
            arrived_.store(0, std::memory_order_relaxed);
            progress.fetch_add(1, std::memory_order_relaxed);
            generation_.store(mine + 1, std::memory_order_release);
            generation_.notify_all();
        }
        return mine;
    }

    void wait(uint32_t generation) {
        while (generation_.load(std::memory_order_acquire) == generation)
            generation_.wait(generation, std::memory_order_acquire);
    }

private:
    const int count_;
    std::atomic<int> arrived_{0};
    std::atomic<uint32_t> generation_{0};
};

struct Warp {
    explicit Warp(int lanes) : barrier(lanes) {}
    Barrier barrier;
    unsigned char exchange[32][64];
};

struct Block {
    Block(int threads, size_t shared_bytes) : barrier(threads), shared(shared_bytes / sizeof(Bytes16) + 1) {
        for (int first = 0; first < threads; first += 32) warps.push_back(std::make_unique<Warp>(threads - first < 32 ? threads - first : 32));
    }
    Barrier barrier;
    std::vector<Bytes16> shared;  // a heap block of the size asked for, rounded up to 16 bytes: its ends are watched
    std::vector<std::unique_ptr<Warp>> warps;
};

struct Cluster {
    Cluster(int blocks, int threads, size_t shared_bytes) : barrier(blocks * threads) {
        for (int b = 0; b < blocks; ++b) this->blocks.push_back(std::make_unique<Block>(threads, shared_bytes));
    }
    Barrier barrier;
    std::vector<std::unique_ptr<Block>> blocks;
};

struct Copy {
    Bytes16* to;
    const void* from;
};

// Where a host thread stands.
struct Position {
    Cluster* cluster;
    Block* block;
    int thread, threads, rank, clusters_blocks;
    int64_t block_index, grid_blocks;
    uint32_t cluster_generation;
    std::vector<std::vector<Copy>> groups;  // committed copies, then the open group
};
inline thread_local Position here;

// kernel() by `grid` blocks of `threads` threads, in clusters of `cluster` blocks.
template <class F>
void launch(int64_t grid, int cluster, int threads, size_t shared_bytes, const F& kernel) {
    if (grid % cluster || threads < 1) {
        fprintf(stderr, "emulation: a grid of %lld blocks does not consist of clusters of %d\n", static_cast<long long>(grid), cluster);
        abort();
    }
    Cluster group(cluster, threads, shared_bytes);
    std::atomic<int> running{cluster * threads};
    const auto run = [&](int rank, int thread) {
        Block& own = *group.blocks[rank];
        for (int64_t first = 0; first < grid; first += cluster) {
            here = {&group, &own, thread, threads, rank, cluster, first + rank, grid, 0, {{}}};
            if (thread == 0) memset(own.shared.data(), kPoison, own.shared.size() * sizeof(Bytes16));
            group.barrier.arrive_and_wait();
            kernel();
            group.barrier.arrive_and_wait();
        }
        running.fetch_sub(1);
    };
    std::vector<std::thread> all;
    for (int rank = 0; rank < cluster; ++rank)
        for (int t = 0; t < threads; ++t) all.emplace_back(run, rank, t);
    for (auto [seen, since] = std::pair(progress.load(), std::chrono::steady_clock::now()); running.load() > 0;) {
        std::this_thread::sleep_for(std::chrono::microseconds(100));
        const auto now = std::chrono::steady_clock::now();
        if (const uint64_t latest = progress.load(); latest != seen) {
            seen = latest;
            since = now;
        } else if (now - since > kPatience) {
            fprintf(stderr, "emulation: threads wait at a barrier that others do not reach\n");
            abort();
        }
    }
    for (std::thread& each : all) each.join();
}

template <class T>
T exchanged(T value, int from) {
    static_assert(sizeof(T) <= sizeof Warp::exchange[0]);
    Warp& warp = *here.block->warps[here.thread / 32];
    memcpy(warp.exchange[here.thread % 32], &value, sizeof(T));
    warp.barrier.arrive_and_wait();
    memcpy(&value, warp.exchange[from], sizeof(T));
    warp.barrier.arrive_and_wait();
    return value;
}

}  // namespace emulation

inline int thread() { return emulation::here.thread; }
inline int threads() { return emulation::here.threads; }
inline int64_t block() { return emulation::here.block_index; }
inline int64_t blocks() { return emulation::here.grid_blocks; }
inline char* shared_memory() { return reinterpret_cast<char*>(emulation::here.block->shared.data()); }
inline void barrier() { emulation::here.block->barrier.arrive_and_wait(); }
inline void warp_barrier() { emulation::here.block->warps[thread() / 32]->barrier.arrive_and_wait(); }

template <class T>
T shuffle_xor(T value, int by) {
    return emulation::exchanged(value, thread() % 32 ^ by);
}
template <class T>
T shuffle(T value, int from) {
    return emulation::exchanged(value, from);
}

inline int cluster_rank() { return emulation::here.rank; }
inline int cluster_size() { return emulation::here.clusters_blocks; }
inline void cluster_arrive() { emulation::here.cluster_generation = emulation::here.cluster->barrier.arrive(); }
inline void cluster_wait() { emulation::here.cluster->barrier.wait(emulation::here.cluster_generation); }

template <class T>
T read_remote(const T* own, int rank) {
    const char* const mine = reinterpret_cast<const char*>(own);
    const char* const theirs = reinterpret_cast<const char*>(emulation::here.cluster->blocks[rank]->shared.data());
    T value;
    memcpy(&value, theirs + (mine - shared_memory()), sizeof(T));
    return value;
}

inline void copy_async(Bytes16* shared, const void* global) {
    if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16) {
        fprintf(stderr, "emulation: an asynchronous copy's address is no multiple of 16\n");
        abort();
    }
    memset(shared, emulation::kPoison, sizeof *shared);
    emulation::here.groups.back().push_back({shared, global});
}
inline void commit_copies() { emulation::here.groups.emplace_back(); }
template <int Pending>
void wait_for_copies() {
    auto& groups = emulation::here.groups;
    while (groups.size() > static_cast<size_t>(Pending) + 1) {
        for (const emulation::Copy& copy : groups.front()) memcpy(copy.to, copy.from, sizeof(Bytes16));
        groups.erase(groups.begin());
    }
}

inline Bytes16 load_once(const void* at) {
    if (reinterpret_cast<uintptr_t>(at) % 16) abort();
    Bytes16 v;
    memcpy(&v, at, sizeof v);
    return v;
}
inline void store_once(void* at, Bytes16 v) {
    if (reinterpret_cast<uintptr_t>(at) % 16) abort();
    memcpy(at, &v, sizeof v);
}

inline float exp2_hardware(float x) {
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
}

inline uint32_t bits_of_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline uint16_t narrow_bfloat16(float x) {
    const uint32_t bits = bits_of_float(x);
    if (x != x) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline uint32_t pack_bfloat16(float low, float high) {
    return narrow_bfloat16(low) | static_cast<uint32_t>(narrow_bfloat16(high)) << 16;
}
// GCC 12 has _Float16 on x86-64 alone.
inline uint16_t narrow_half(float x) {
    const _Float16 y = static_cast<_Float16>(x);
    uint16_t bits;
    memcpy(&bits, &y, sizeof bits);
    return bits;
}
inline uint32_t pack_half(float low, float high) {
    return narrow_half(low) | static_cast<uint32_t>(narrow_half(high)) << 16;
}
inline float widen_half(uint16_t x) {
    _Float16 y;
    memcpy(&y, &x, sizeof y);
    return static_cast<float>(y);
}

}  // namespace gac::cuda
