// Fills the CPU slots of the operators that gac_kernels/library.py defines. Implementations only, through the LibTorch
// stable ABI and the limited Python API: one binary serves every torch from 2.10 on and every Python from 3.10 on.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <exception>

#include "cpu/advantages_op.h"
#include "cpu/controller_op.h"
#include "cpu/gradient_moments_op.h"
#include "cpu/isa.h"
#include "cpu/rows_op.h"
#include "cpu/scale_op.h"
#include "cpu/token_loss_op.h"
#include "cpu/token_weights_op.h"

STABLE_TORCH_LIBRARY_IMPL(gac_kernels, CPU, m) {
    m.impl("token_loss", TORCH_BOX(&gac::token_loss));
    m.impl("token_weights", TORCH_BOX(&gac::token_weights));
    m.impl("row_statistics", TORCH_BOX(&gac::CpuRowOps::row_statistics));
    m.impl("row_gradient", TORCH_BOX(&gac::CpuRowOps::row_gradient));
    m.impl("row_gradient_", TORCH_BOX(&gac::CpuRowOps::row_gradient_));
    m.impl("fused_rows", TORCH_BOX(&gac::CpuRowOps::fused_rows));
    m.impl("fused_rows_", TORCH_BOX(&gac::CpuRowOps::fused_rows_));
    m.impl("scale_", TORCH_BOX(&gac::scale_));
    m.impl("controller_step", TORCH_BOX(&gac::controller_step<gac::CpuController>));
    m.impl("gradient_moments", TORCH_BOX(&gac::gradient_moments));
    m.impl("accumulate_moments_", TORCH_BOX(&gac::accumulate_moments_));
    m.impl("group_advantages", TORCH_BOX(&gac::group_advantages));
}

namespace {

PyObject* instruction_set(PyObject*, PyObject*) { return PyUnicode_FromString(gac::isa_name()); }

PyMethodDef methods[] = {
    {"instruction_set", instruction_set, METH_NOARGS,
     "The instruction set the kernels run with: 'avx512', 'avx2' or 'portable'. GAC_KERNELS_ISA lowers it."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", "CPU kernels of gac_kernels; loading it fills the operators' CPU slots.", -1, methods,
    nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) {
    try {
        gac::isa_name();  // settles the choice, and refuses an impossible one, at import
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_ImportError, error.what());
        return nullptr;
    }
    return PyModule_Create(&module);
}
