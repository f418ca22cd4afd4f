// The operators on CUDA C++: the forms `<operator>_cuda` that gac_kernels/library.py defines. Implementations only, through
// the LibTorch stable ABI: one binary serves every torch from 2.10 on. Built with GAC_EMULATE, the same operators take
// tensors on the CPU and run their kernels on host threads, for tests.
#ifndef GAC_EMULATE
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#endif
#include <torch/csrc/stable/library.h>

#include "advantages_op.h"
#include "controller_op.h"
#include "gradient_moments_op.h"
#include "rows_op.h"
#include "token_loss_op.h"

#ifdef GAC_EMULATE
STABLE_TORCH_LIBRARY_IMPL(gac_kernels, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(gac_kernels, CUDA, m) {
#endif
    m.impl("token_loss_cuda", TORCH_BOX(&gac::cuda::token_loss));
    m.impl("token_weights_cuda", TORCH_BOX(&gac::cuda::token_weights));
    m.impl("group_advantages_cuda", TORCH_BOX(&gac::cuda::group_advantages));
    m.impl("row_statistics_cuda", TORCH_BOX(&gac::cuda::RowOps::row_statistics));
    m.impl("row_gradient_cuda", TORCH_BOX(&gac::cuda::RowOps::row_gradient));
    m.impl("row_gradient__cuda", TORCH_BOX(&gac::cuda::RowOps::row_gradient_));
    m.impl("fused_rows_cuda", TORCH_BOX(&gac::cuda::RowOps::fused_rows));
    m.impl("fused_rows__cuda", TORCH_BOX(&gac::cuda::RowOps::fused_rows_));
    m.impl("scale__cuda", TORCH_BOX(&gac::cuda::scale_));
    m.impl("controller_step_cuda", TORCH_BOX(&gac::controller_step<gac::cuda::Controller>));
    m.impl("gradient_moments_cuda", TORCH_BOX(&gac::cuda::gradient_moments));
    m.impl("accumulate_moments__cuda", TORCH_BOX(&gac::cuda::accumulate_moments_));
}

#ifndef GAC_EMULATE
namespace {

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_CUDA", "CUDA kernels of gac_kernels; loading it fills the operators' forms for them.", -1,
    nullptr, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__CUDA(void) { return PyModule_Create(&module); }
#endif
