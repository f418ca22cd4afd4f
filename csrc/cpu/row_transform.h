// From a raw logit to the exponent of its probability. Every exponent is k (x - x(top)) with x the raw logit, or its soft
// cap, and top the largest raw logit so far: a difference of two numbers that are there, times a factor. So it is at most 0
// and exactly 0 at the top whatever k rounds to, where a product less a rounded product may be anything once the logits are
// large.
#pragma once

#include "../math/rows.h"
#include "../rows.h"

namespace GAC_NAMESPACE {

template <class V>
constexpr bool kWide = sizeof(typename V::Scalar) == 8;

// Factors beyond are not told apart: they take any two neighbouring logits to probabilities of 1 and 0.
template <class V>
constexpr double kLargestFactor = kWide<V> ? 1e308 : 2e38;

// nan but for positive numbers, which every factor is.
template <class V>
GAC_INLINE double bounded_factor(double x) {
    return x > 0 ? (x > kLargestFactor<V> ? kLargestFactor<V> : x) : __builtin_nan("");
}

// e^(k d) for d <= 0: at most 1, exactly 0 far below; nan stays. Floats take powers of 2.
template <class V>
struct Exponential {
    static constexpr double kUnit = kWide<V> ? 1 : 1.4426950408889634, kLowest = kWide<V> ? -745.2 : -127;
    V rate, lowest;

    explicit Exponential(double k)
        : rate(k * kUnit), lowest(kLowest / (k * kUnit) > -1.5 * kLargestFactor<V> ? kLowest / (k * kUnit) : -1.5 * kLargestFactor<V>) {}

    GAC_INLINE V floor(V d) const { return greater(lowest, d); }  // finite, so that 0 times it is 0
    GAC_INLINE V at(V floored) const {
        if constexpr (kWide<V>) {
            return exp(floored * rate);
        } else {
            return exp2_floored(floored, rate);
        }
    }
};

template <class V>
GAC_INLINE double first_lane(V v) {
    typename V::Scalar lane[V::Lanes];
    v.store(lane);
    return static_cast<double>(lane[0]);
}

// z = k x, x = raw, or tanh(inner raw) with a soft cap.
template <class V, bool Capped>
struct Transform {
    double k, slope, doubled;  // slope: dz / draw where tanh' = 1; doubled: 2 inner

    Transform(double scale, double softcap, double temperature)
        : k(bounded_factor<V>((Capped ? softcap : scale) / temperature)), slope(bounded_factor<V>(scale / temperature)),
          doubled(Capped ? bounded_factor<V>(2 * scale / softcap) : 0) {}

    // What a row's x are measured from.
    struct Origin {
        V raw, gain, doubled, slope;
    };
    Origin from(double top) const { return {V(top), V(Capped ? capped_gain(doubled * top) : 0), V(doubled), V(slope)}; }

    struct Point {
        V fall, derivative;  // x - x(origin), at most 0, and dz / draw
    };
    static GAC_INLINE Point at(V raw, const Origin& o) {
        if constexpr (Capped) {
            constexpr double kMost = kWide<V> ? 1.7976931348623157e308 : 3.4028234663852886e38;
            const V x = clamp(raw, V(-kMost), V(kMost));  // the cap makes infinities finite
            const CappedPoint<V> c = capped_point(o.doubled * x, o.doubled * (x - o.raw), o.gain);
            return {c.fall, o.slope * c.slope};
        } else {
            return {raw - o.raw, o.slope};
        }
    }
    static GAC_INLINE V fall(V raw, const Origin& o) { return at(raw, o).fall; }

    // One logit, in double precision.
    double fall(double raw, double top) const {
        return Capped ? capped_fall(doubled * finite(raw), doubled * top) : raw - top;
    }
    double derivative(double raw) const { return Capped ? slope * capped_slope(doubled * finite(raw)) : slope; }

    // A raw logit as it may become a row's top.
    static double finite(double raw) {
        constexpr double kMost = kWide<V> ? 1.7976931348623157e308 : 3.4028234663852886e38;
        return !Capped ? raw : raw > kMost ? kMost : raw < -kMost ? -kMost : raw;
    }
};

}  // namespace GAC_NAMESPACE
