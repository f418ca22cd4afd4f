// How the blocks of a cluster share a row, and how a thread reads, keeps and writes its part.
//
// A row is cut into vectors of 16 bytes, the vectors into one run a block; inside a run they go round the threads. Which
// thread a column belongs to depends on the row's length and type alone, so that a row's result does not depend on where
// it lies. Rows that begin on a 16-byte boundary are moved by vectors, others and the last few columns element by element.
//
// A thread keeps its first `held` vectors in shared memory and reads back only what it brought there itself: no barrier
// stands between the two passes over a row. What does not fit is read again, from the second-level cache with luck.
#pragma once

#include "elements.cuh"

namespace gac::cuda {

template <class E>
struct RowPart {
    using Stored = typename E::Stored;
    static constexpr int Width = E::Width;
    static constexpr int kGroups = 4;  // of copies: the first is worked on while the last are under way

    const Stored* row;
    Bytes16* kept;  // held * threads() of them
    int columns, held, first, last;  // this block's vectors: [first, last)
    bool aligned;

    GAC_DEVICE RowPart(const Stored* row, Bytes16* kept, int columns, int held) : row(row), kept(kept), columns(columns), held(held) {
        const int vectors = (columns - 1) / Width + 1, each = (vectors - 1) / cluster_size() + 1;
        first = cluster_rank() * each < vectors ? cluster_rank() * each : vectors;
        last = first + each < vectors ? first + each : vectors;
        aligned = reinterpret_cast<uintptr_t>(row) % 16 == 0;
    }

    GAC_DEVICE bool whole(int vector) const { return vector * Width + Width <= columns; }
    GAC_DEVICE Bytes16* place(int slot) const { return kept + slot * threads() + thread(); }

    GAC_DEVICE Bytes16 read_elements(int vector) const {
        Stored element[Width];
#pragma unroll
        for (int i = 0; i < Width; ++i) {
            const int column = vector * Width + i;
            element[i] = column < columns ? row[column] : E::narrow(-static_cast<typename E::Sum>(__builtin_huge_val()));
        }
        Bytes16 v;
        memcpy(&v, element, 16);
        return v;
    }
    GAC_DEVICE Bytes16 read(int vector) const {
        return aligned && whole(vector) ? load_once(row + static_cast<int64_t>(vector) * Width) : read_elements(vector);
    }

    // Slots of this thread that shared memory holds, and where group g of them begins.
    GAC_DEVICE int slots() const {
        const int mine = (last - first - thread() - 1 + threads()) / threads();
        return mine < 0 ? 0 : mine < held ? mine : held;
    }
    GAC_DEVICE int group(int g) const { return static_cast<int>((static_cast<int64_t>(slots()) * g + kGroups - 1) / kGroups); }

    // Starts to bring what will be kept.
    GAC_DEVICE void fetch() const {
#pragma unroll 1
        for (int g = 0; g < kGroups; ++g) {
#pragma unroll 1
            for (int slot = group(g); slot < group(g + 1); ++slot) {
                const int vector = first + slot * threads() + thread();
                if (aligned && whole(vector)) {
                    copy_async(place(slot), row + static_cast<int64_t>(vector) * Width);
                } else {
                    *place(slot) = read_elements(vector);
                }
            }
            commit_copies();
        }
    }

    // step(v, vector) for each of this thread's vectors while they arrive; after fetch().
    template <class F>
    GAC_DEVICE void first_pass(const F& step) const {
        wait_for_copies<3>();
        kept_range(group(0), group(1), step);
        wait_for_copies<2>();
        kept_range(group(1), group(2), step);
        wait_for_copies<1>();
        kept_range(group(2), group(3), step);
        wait_for_copies<0>();
        kept_range(group(3), group(4), step);
        rest(step);
    }

    // The same once they have arrived, or where none is kept. What was read last comes first.
    template <class F>
    GAC_DEVICE void second_pass(const F& step) const {
        rest(step);
        kept_range(0, slots(), step);
    }

    template <class F>
    GAC_DEVICE void kept_range(int begin, int end, const F& step) const {
#pragma unroll 1
        for (int slot = begin; slot < end; ++slot) step(*place(slot), first + slot * threads() + thread());
    }

    // What is not kept, one vector ahead.
    template <class F>
    GAC_DEVICE void rest(const F& step) const {
        int vector = first + held * threads() + thread();
        if (vector >= last) return;
#pragma unroll 1
        for (Bytes16 ahead = read(vector); vector < last; vector += threads()) {
            const Bytes16 v = ahead;
            if (vector + threads() < last) ahead = read(vector + threads());
            step(v, vector);
        }
    }

    // Whether `column` is among this thread's.
    GAC_DEVICE bool owns(int column) const {
        const int vector = column / Width;
        return vector >= first && vector < last && (vector - first) % threads() == thread();
    }
};

// A row that is written as RowPart reads.
template <class E>
struct RowOut {
    typename E::Stored* row;
    int columns;
    bool aligned;

    GAC_DEVICE RowOut(void* row, int columns)
        : row(static_cast<typename E::Stored*>(row)), columns(columns), aligned(reinterpret_cast<uintptr_t>(row) % 16 == 0) {}

    GAC_DEVICE void write(int vector, const typename E::Sum (&x)[E::Width]) const {
        if (aligned && vector * E::Width + E::Width <= columns) {
            store_once(row + static_cast<int64_t>(vector) * E::Width, E::narrow(x));
            return;
        }
#pragma unroll
        for (int i = 0; i < E::Width; ++i)
            if (vector * E::Width + i < columns) row[vector * E::Width + i] = E::narrow(x[i]);
    }
};

}  // namespace gac::cuda
