// Times the TensorRT plugin's kernels without TensorRT: plugin_kernel FORMAT N C H W SHARE REPEATS, for K = 3.
//
// FORMAT: linear_float, linear_half or hwc8_half. Prints two numbers: the median of REPEATS runs and the distance between
// their quartiles, in milliseconds. Before each run a write that is larger than any L2 flushes it, and is so long that the
// run is in the queue before the GPU is done with it. Results are not looked at here: tests/plugins/test_plugin.py does that.
#include "launch.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace
{

void must(cudaError_t error, char const* what)
{
    if (error == cudaSuccess)
        return;
    std::fprintf(stderr, "plugin_kernel: %s: %s\n", what, cudaGetErrorString(error));
    std::exit(1);
}

void* buffer(std::size_t bytes, int value)
{
    void* memory;
    must(cudaMalloc(&memory, bytes), "cudaMalloc");
    must(cudaMemset(memory, value, bytes), "cudaMemset");
    return memory;
}

std::size_t roundedUp(std::size_t channels, bool padded) { return padded ? (channels + 7) / 8 * 8 : channels; }

} // namespace

int main(int argc, char** argv)
{
    if (argc != 8)
        return std::fprintf(stderr, "plugin_kernel FORMAT N C H W SHARE REPEATS\n"), 2;
    std::string const format = argv[1];
    int size[6];
    for (int i = 0; i < 6; ++i)
        size[i] = std::atoi(argv[2 + i]);
    auto const [n, c, h, w, share, repeats] = size;
    bool const padded = format == "hwc8_half";
    misf::Storage const storage = format == "linear_float" ? misf::Storage::kFLOAT : misf::Storage::kHALF;
    misf::Call const call{storage, padded ? misf::Format::kHWC8 : misf::Format::kLINEAR, n, c, h, w, 3, share};

    std::size_t const element = storage == misf::Storage::kFLOAT ? 4 : 2;
    std::size_t const pixels = std::size_t(n) * h * w * element;
    void* const features = buffer(pixels * roundedUp(c, padded), 0x3c);
    void* const taps = buffer(pixels * roundedUp(std::size_t(c) * 9 / share, padded), 0x3c);
    void* const output = buffer(pixels * roundedUp(c, padded), 0);
    std::size_t const kFLUSH = std::size_t(256) << 20;
    void* const flush = buffer(kFLUSH, 0);

    cudaStream_t stream;
    cudaEvent_t begin, end;
    must(cudaStreamCreate(&stream), "stream");
    must(cudaEventCreate(&begin), "event");
    must(cudaEventCreate(&end), "event");
    std::vector<float> times;
    for (int run = -3; run < repeats; ++run) // the first three warm up
    {
        for (int i = 0; i < 4; ++i)
            must(cudaMemsetAsync(flush, 0, kFLUSH, stream), "flush");
        must(cudaEventRecord(begin, stream), "event");
        must(misf::launchForward(call, features, taps, output, stream), "launch");
        must(cudaEventRecord(end, stream), "event");
        must(cudaEventSynchronize(end), "run");
        float milliseconds;
        must(cudaEventElapsedTime(&milliseconds, begin, end), "time");
        if (run >= 0)
            times.push_back(milliseconds);
    }
    std::sort(times.begin(), times.end());
    std::size_t const count = times.size();
    std::printf("%.6f %.6f\n", times[count / 2], times[count * 3 / 4] - times[count / 4]);
    return 0;
}
