// Runs the CUDA kernels of plugins/dynamic_filter on a CPU: the very source, compiled as C++, one thread after another.
//
// The kernels use neither shared memory nor synchronisation, so walking the grid in any order is a faithful execution.
// Compiled by test_kernel_host.py once per storage type (-DMISF_TYPE=... -DMISF_NAME=...), loaded with ctypes.
#include <vector_types.h>

#undef __launch_bounds__
#define __launch_bounds__(...)

namespace
{
thread_local uint3 threadIdx;
thread_local uint3 blockIdx;
} // namespace

#include "launch.cuh"

namespace
{

using misf::Layout;
using misf::Pass;
using T = MISF_TYPE;

template <Pass kPASS> misf::Kernel<T> kernelOf(Layout layout, const misf::Plan& plan)
{
    return layout == Layout::kPLANAR ? misf::kernelOf<kPASS, Layout::kPLANAR, T>(plan)
                                     : misf::kernelOf<kPASS, Layout::kCHANNELS_LAST, T>(plan);
}

misf::Kernel<T> kernelOf(Pass pass, Layout layout, const misf::Plan& plan)
{
    return pass == Pass::kFORWARD  ? kernelOf<Pass::kFORWARD>(layout, plan)
        : pass == Pass::kGRAD_TAPS ? kernelOf<Pass::kGRAD_TAPS>(layout, plan)
                                   : kernelOf<Pass::kGRAD_FEATURES>(layout, plan);
}

} // namespace

// Plans the call: `shape` is read and gets its geometry; `report` is fast, width, gridX, gridY.
extern "C" void misf_plan(int pass, int layout, misf::Shape* shape, int elementSize, unsigned long long alignment,
    int naive, unsigned* report)
{
    const misf::Plan plan = misf::plan(Pass(pass), Layout(layout), *shape, elementSize, alignment, naive != 0);
    *shape = plan.shape;
    report[0] = plan.fast;
    report[1] = unsigned(plan.width);
    report[2] = plan.gridX;
    report[3] = plan.gridY;
}

// Plans and runs the call from block (firstX, firstY) on; `arguments` are the pointers that a CUDA launch takes: to
// three pointers and a Shape.
extern "C" void misf_walk(
    int pass, int layout, void** arguments, unsigned long long alignment, int naive, unsigned firstX, unsigned firstY)
{
    const T* first = *static_cast<const T**>(arguments[0]);
    const T* second = *static_cast<const T**>(arguments[1]);
    T* written = *static_cast<T**>(arguments[2]);
    const misf::Shape shape = *static_cast<const misf::Shape*>(arguments[3]);
    const misf::Plan plan = misf::plan(Pass(pass), Layout(layout), shape, sizeof(T), alignment, naive != 0);
    const misf::Kernel<T> kernel = kernelOf(Pass(pass), Layout(layout), plan);
    for (blockIdx.y = firstY; blockIdx.y < plan.gridY; ++blockIdx.y)
        for (blockIdx.x = firstX; blockIdx.x < plan.gridX; ++blockIdx.x)
            for (threadIdx.x = 0; threadIdx.x < unsigned(misf::kTHREADS); ++threadIdx.x)
                kernel(first, second, written, plan.shape);
}
