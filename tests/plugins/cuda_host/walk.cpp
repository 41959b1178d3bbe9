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
using T = MISF_TYPE;

} // namespace

// Plans the call: `shape` is read and gets its geometry; `report` is fast, width, gridX, gridY.
extern "C" void misf_plan(int layout, misf::Shape* shape, unsigned long long alignment, int naive, unsigned* report)
{
    const misf::Plan plan = misf::plan(Layout(layout), *shape, sizeof(T), alignment, naive != 0);
    *shape = plan.shape;
    report[0] = plan.fast;
    report[1] = unsigned(plan.width);
    report[2] = plan.gridX;
    report[3] = plan.gridY;
}

// Plans and runs the call from block (firstX, firstY) on.
extern "C" void misf_walk(int layout, const T* features, const T* taps, T* output, const misf::Shape* shape,
    unsigned long long alignment, int naive, unsigned firstX, unsigned firstY)
{
    const misf::Plan plan = misf::plan(Layout(layout), *shape, sizeof(T), alignment, naive != 0);
    const misf::Kernel<T> kernel = Layout(layout) == Layout::kPLANAR
        ? misf::kernelOf<Layout::kPLANAR, T>(plan)
        : misf::kernelOf<Layout::kCHANNELS_LAST, T>(plan);
    for (blockIdx.y = firstY; blockIdx.y < plan.gridY; ++blockIdx.y)
        for (blockIdx.x = firstX; blockIdx.x < plan.gridX; ++blockIdx.x)
            for (threadIdx.x = 0; threadIdx.x < unsigned(misf::kTHREADS); ++threadIdx.x)
                kernel(features, taps, output, plan.shape);
}
