#include "rows_op.h"

#include "rows_kernels.h"
#include "stream.h"

namespace gac::cuda {

void Rows::run(RowTask task, const RowsCall<float>& call, Element element, int64_t rows, Device device) {
    const OnDevice at(device);
    launch_rows(task, call, element, rows, at.stream);
}
void Rows::run(RowTask task, const RowsCall<double>& call, Element element, int64_t rows, Device device) {
    const OnDevice at(device);
    launch_rows(task, call, element, rows, at.stream);
}

void scale_(Tensor gradient, Tensor factor) {
    const Inputs in{"scale_", &gradient};
    const bool wide = dtype_of(factor) == aoti_torch_dtype_float64();
    const void* const by = wide ? static_cast<const void*>(in.data<double>("factor", factor, 1)) : in.data<float>("factor", factor, 1);
    if (gradient.numel() == 0) return;
    const Element element = element_of(in, "gradient", gradient);
    const OnDevice at(device_of(gradient));
    if (gradient.is_contiguous()) {
        in.check_memory("gradient", gradient, gradient.numel(), bytes_of(element));
        const Grid dense{static_cast<char*>(gradient.data_ptr()), 1, 0, 0};
        return launch_scale(dense, element, 1, gradient.numel(), by, wide, at.stream);
    }
    launch_scale(
        grid_of(in, "gradient", gradient, element), element, gradient.size(0) * gradient.size(1), gradient.size(2), by,
        wide, at.stream);
}

}  // namespace gac::cuda
