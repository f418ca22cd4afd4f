// What the host must know of a device. No CUDA and no torch headers.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace gac::cuda {

struct Machine {
    int capability;       // 90 is sm_90
    int multiprocessors;
    int cluster;          // most blocks of a cluster: 8, or 1 where there are none
    int threads;          // of a block that works on a row
    size_t shared_bytes;  // of a block, at most
};

// The current device, asked once; in emulation a small one, so that small inputs meet every limit.
const Machine& machine();

}  // namespace gac::cuda
