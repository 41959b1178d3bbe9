// launch.cu and its kernels for a CPU, so that the TensorRT plugin can be linked with them and enqueue be run anywhere.
//
// No C++ compiler knows <<<...>>>. test_plugin.py rewrites it to `<< misf_host::On(...)` in a copy of launch.cu, whose
// name is MISF_LAUNCH; all else is the very source. As in walk.cpp, a launch walks the grid one thread after another.
#include <cstdlib>
#include <cuda_runtime_api.h>
#include <tuple>

#undef __launch_bounds__
#define __launch_bounds__(...)

namespace
{
thread_local uint3 threadIdx;
thread_local uint3 blockIdx;

// What the launch reports: no error, or the code in MISF_FAKE_LAUNCH_ERROR.
cudaError_t launchError()
{
    char const* const code = std::getenv("MISF_FAKE_LAUNCH_ERROR");
    return code == nullptr ? cudaSuccess : static_cast<cudaError_t>(std::atoi(code));
}
} // namespace

namespace misf_host
{

template <typename... Arguments> struct Launch
{
    dim3 grid;
    unsigned threads;
    std::tuple<Arguments...> arguments;
};

// The four values between the angle brackets; called with the kernel's arguments.
struct On
{
    dim3 grid;
    unsigned threads;

    On(dim3 itsGrid, int itsThreads, int, cudaStream_t)
        : grid(itsGrid)
        , threads(static_cast<unsigned>(itsThreads))
    {
    }

    template <typename... Arguments> Launch<Arguments...> operator()(Arguments... arguments) const
    {
        return {grid, threads, {arguments...}};
    }
};

template <typename Kernel, typename... Arguments> void operator<<(Kernel kernel, Launch<Arguments...> const& launch)
{
    if (launchError() != cudaSuccess)
        return;
    for (blockIdx.y = 0; blockIdx.y < launch.grid.y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < launch.grid.x; ++blockIdx.x)
            for (threadIdx.x = 0; threadIdx.x < launch.threads; ++threadIdx.x)
                std::apply(kernel, launch.arguments);
}

} // namespace misf_host

// Of the CUDA runtime: the two functions that the plugin calls.
extern "C" cudaError_t cudaGetLastError() { return launchError(); }
extern "C" char const* cudaGetErrorString(cudaError_t error)
{
    return error == cudaErrorInvalidValue ? "invalid argument" : "an error of the test's choice";
}

#include MISF_LAUNCH
