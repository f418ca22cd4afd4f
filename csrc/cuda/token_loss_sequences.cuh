// What kernels with one block a sequence share: packs of tokens, sums over a block in a fixed order, counts and
// weights.
#pragma once

#include "block_sums.cuh"
#include "cooperative.cuh"
#include "lane.cuh"
#include "token_loss.h"

namespace gac::cuda {

constexpr int kSequenceThreads = 192;
// Of a multiprocessor: what leaves a thread 168 registers, and in float64 255.
template <class T>
constexpr int kSequenceBlocks = sizeof(T) == 4 ? 2 : 1;
constexpr int kWeightBlocks = 4;  // of the token weights, which need few registers

// Packs: 16 bytes of a stream, which one thread works on -------------------------------------------------------------

template <class T>
struct alignas(16) Pack {
    static constexpr int Size = 16 / static_cast<int>(sizeof(T));
    T at[Size];
};

// Elements [i, i + Size) of a stream, or nothing; 0 from `end` on. `whole`: all are there, and aligned.
template <class T>
GAC_DEVICE Pack<T> load_pack(const T* from, int64_t i, int64_t end, bool whole) {
    Pack<T> pack{};
    if (!from) return pack;
    if (whole) {
        const Bytes16 bytes = *reinterpret_cast<const Bytes16*>(from + i);
        memcpy(&pack, &bytes, sizeof pack);
    } else {
#pragma unroll
        for (int k = 0; k < Pack<T>::Size; ++k) pack.at[k] = i + k < end ? from[i + k] : T(0);
    }
    return pack;
}

template <class T>
GAC_DEVICE void store_pack(T* to, int64_t i, int64_t end, bool whole, const Pack<T>& pack) {
    if (!to) return;
    if (whole) {
        Bytes16 bytes;
        memcpy(&bytes, &pack, sizeof bytes);
        *reinterpret_cast<Bytes16*>(to + i) = bytes;
    } else {
#pragma unroll
        for (int k = 0; k < Pack<T>::Size; ++k)
            if (i + k < end) to[i + k] = pack.at[k];
    }
}

// Bit k: token i + k counts.
template <int Size>
GAC_DEVICE uint32_t live_bits(const uint8_t* mask, int64_t i, int64_t end, bool whole) {
    static_assert(Size == 2 || Size == 4);
    uint32_t bits = 0;
    if (whole) {
        uint32_t bytes;
        if (Size == 4)
            bytes = *reinterpret_cast<const uint32_t*>(mask + i);
        else
            bytes = *reinterpret_cast<const uint16_t*>(mask + i);
#pragma unroll
        for (int k = 0; k < Size; ++k) bits |= (bytes >> 8 * k & 0xffu ? 1u : 0u) << k;
    } else {
#pragma unroll
        for (int k = 0; k < Size; ++k) bits |= (i + k < end && mask[i + k] ? 1u : 0u) << k;
    }
    return bits;
}

// Whether packs from at + i on may be read and written as a whole; a stream that is absent is no obstacle.
template <class T>
GAC_DEVICE bool aligned(const T* at, int64_t i) {
    return !at || reinterpret_cast<uintptr_t>(at + i) % (sizeof(T) == 1 ? 4 : 16) == 0;
}

// Blocks that take turns with the sequences, all resident at once.
inline Grid1 sequence_grid(int64_t sequences, int per_multiprocessor) {
    const int threads = machine().threads < kSequenceThreads ? machine().threads : kSequenceThreads;
    return {resident_blocks(sequences, per_multiprocessor), threads, sums_bytes(threads)};
}

// Sequences ----------------------------------------------------------------------------------------------------------

struct Span {
    int64_t begin, end;
};

GAC_DEVICE int64_t inside(int64_t offset, int64_t tokens) { return offset < 0 ? 0 : offset < tokens ? offset : tokens; }

// Offsets as they count: clamped, and never falling. A block asks for its sequences in rising order; each of its warps
// then looks at every offset once.
struct RisingOffsets {
    const TokenSequences& batch;
    int64_t seen = 0, top = 0;  // how many offsets, and the largest of them

    // The largest offset of [0, s]; all lanes of a warp call.
    GAC_DEVICE int64_t at(int64_t s) {
        int64_t most = top;
        for (int64_t j = seen + lane(); j <= s; j += kWarp) {
            const int64_t offset = inside(batch.offsets[j], batch.tokens);
            most = offset > most ? offset : most;
        }
        top = over_warp(most, [](int64_t a, int64_t b) { return a > b ? a : b; });
        seen = s + 1 > seen ? s + 1 : seen;
        return top;
    }

    GAC_DEVICE Span span(int64_t s) {
        if (!batch.offsets) return {s * batch.seq_len, (s + 1) * batch.seq_len};
        const int64_t begin = at(s);
        return {begin, at(s + 1)};
    }
};

// Where sequence s lies, as the counting has left it.
GAC_DEVICE Span counted_span(const SequenceCount& count) { return {count.begin, count.end}; }

// How many of 16 bytes are not 0.
GAC_DEVICE uint32_t count_bytes(const Bytes16& bytes) {
    uint32_t sum = 0;
#pragma unroll
    for (const uint32_t word : bytes.word) {
        const uint32_t top = ((word & 0x7f7f7f7fu) + 0x7f7f7f7fu) | word;  // the highest bit of each byte that is not 0
        sum += ((top >> 7 & 0x01010101u) * 0x01010101u) >> 24;
    }
    return sum;
}

// This thread's part of the live tokens of a sequence, in blocks of 16 bytes wherever it begins.
GAC_DEVICE int64_t count_live(const uint8_t* mask, Span own) {
    int64_t count = 0;
    const int64_t before = static_cast<int64_t>(reinterpret_cast<uintptr_t>(mask + own.begin) % 16);
    for (int64_t i = own.begin - before + 16 * thread(); i < own.end; i += 16 * threads()) {
        if (i >= own.begin && i + 16 <= own.end) {
            count += count_bytes(*reinterpret_cast<const Bytes16*>(mask + i));
        } else {
            for (int64_t k = i < own.begin ? own.begin : i; k < i + 16 && k < own.end; ++k) count += mask[k] != 0;
        }
    }
    return count;
}

// Adds a sequence to what its block has counted (SequenceCount::of_block).
GAC_DEVICE void add_sequence(int64_t (&of_block)[4], bool expert, int64_t live) {
    of_block[0] += expert ? 0 : live;
    of_block[1] += !expert && live > 0;
    of_block[2] += expert ? live : 0;
    of_block[3] += expert && live > 0;
}

// The live tokens of a sequence, the same in every thread.
GAC_DEVICE int64_t count_sequence(const TokenSequences& batch, Span own, double* shared) {
    double count[1] = {static_cast<double>(count_live(batch.mask, own))};
    block_sums(count, shared);
    return static_cast<int64_t>(count[0]);
}

GAC_DEVICE void leave_sequence(SequenceCount& count, Span own, int64_t live) {
    count.begin = own.begin;
    count.end = own.end;
    count.live = live;
}

GAC_DEVICE void leave_counts(SequenceCount* counts, const int64_t (&of_block)[4], bool wanted) {
    if (!wanted || thread() != 0) return;
#pragma unroll
    for (int k = 0; k < 4; ++k) counts[block()].of_block[k] = of_block[k];
}

// Until the counts are there: of the whole batch, or of the block's own sequences, which its first thread has written.
GAC_DEVICE void wait_for_counts(bool of_batch) {
    if (of_batch)
        grid_barrier();
    else
        barrier();
}

// What a branch divides its tokens by, but for the part that differs between sequences.
struct BranchWeights {
    double policy, supervised;
};

template <class T>
GAC_DEVICE double own_count(const BranchRule<T>& rule, double tokens, double sequences) {
    if (rule.denominator) return static_cast<double>(*rule.denominator);
    return rule.aggregation == kTokenMean ? tokens : sequences;
}

// Denominators of the branches; `counted`: all blocks have left their counts, else they are not needed.
template <class Call>
GAC_DEVICE BranchWeights denominators(const Call& call, bool counted, double* shared) {
    double own[4] = {0, 0, 0, 0};
    if (counted) {
        for (int64_t b = thread(); b < blocks(); b += threads()) {
#pragma unroll
            for (int k = 0; k < 4; ++k) own[k] += static_cast<double>(call.counts[b].of_block[k]);
        }
        block_sums(own, shared);
    }
    return {own_count(call.policy, own[0], own[1]), own_count(call.supervised, own[2], own[3])};
}

// The weight of every token of a sequence; 0 without any.
template <class Call>
GAC_DEVICE double token_weight(const Call& call, const BranchWeights& denominator, bool expert, int64_t live) {
    if (live == 0) return 0;
    const int aggregation = expert ? call.supervised.aggregation : call.policy.aggregation;
    const double norm_length = expert ? call.supervised.norm_length : call.policy.norm_length;
    const double length = aggregation == kSeqMeanTokenMean      ? static_cast<double>(live)
                          : aggregation == kSeqMeanTokenSumNorm ? norm_length
                                                                : 1.0;
    return 1.0 / (length * (expert ? denominator.supervised : denominator.policy));
}

// Tokens of some sequence; all of a padded batch.
GAC_DEVICE Span covered(const TokenSequences& batch, RisingOffsets& offsets) {
    if (!batch.offsets) return {0, batch.tokens};
    return {inside(batch.offsets[0], batch.tokens), offsets.at(batch.sequences)};
}

// What a branch counts for in the loss.
template <class T>
GAC_DEVICE double share_of(const Mixing<T>& mixing, bool expert) {
    if (expert) return static_cast<double>(mixing.mu[0]);
    return mixing.both ? static_cast<double>(mixing.mu[1]) : 1 - static_cast<double>(mixing.mu[0]);
}

// Zeros for the tokens of no sequence, shared out among all threads.
template <class T>
GAC_DEVICE void clear_uncovered(const TokenSequences& batch, Span covered, T* out) {
    if (!out) return;
    const int64_t head = covered.begin, tail = covered.end;
    const int64_t first = block() * threads() + thread(), step = blocks() * threads();
    for (int64_t i = first; i < head; i += step) out[i] = T(0);
    for (int64_t i = tail + first; i < batch.tokens; i += step) out[i] = T(0);
}

}  // namespace gac::cuda
