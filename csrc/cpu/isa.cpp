#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace gac {
namespace {

constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512"};

Isa best_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return Isa::kAvx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return Isa::kAvx2;
#endif
    return Isa::kPortable;
}

Isa choose_isa() {
    const char* asked = std::getenv("GAC_KERNELS_ISA");
    const Isa best = best_isa();
    if (!asked || !*asked) return best;
    for (int i = 0; i <= static_cast<int>(best); ++i)
        if (std::string(asked) == kIsaNames[i]) return static_cast<Isa>(i);
    throw std::runtime_error(
        "GAC_KERNELS_ISA must be one of portable, avx2, avx512 and no more than this CPU's " +
        std::string(kIsaNames[static_cast<int>(best)]) + "; got '" + asked + "'");
}

}  // namespace

Isa isa() {
    static const Isa chosen = choose_isa();
    return chosen;
}

const char* isa_name() { return kIsaNames[static_cast<int>(isa())]; }

}  // namespace gac
