#pragma once

namespace gac {

enum class Isa { kPortable, kAvx2, kAvx512 };

// The instruction set the kernels run with, chosen on the first call: the best this CPU has, or a lower one that the
// environment variable GAC_KERNELS_ISA names. std::runtime_error if this CPU does not have that one.
Isa isa();
const char* isa_name();  // "portable", "avx2" or "avx512"

}  // namespace gac
