// The part of harness.cpp that needs a GPU: one inference on real buffers, captured into a CUDA graph.
//
//     harness LIBRARY FORMAT N C H W KERNEL_SIZE SHARE FEATURES TAPS OUTPUT
//
// FORMAT: linear_float, linear_half or hwc8_half. FEATURES and TAPS are files of raw memory in that format; OUTPUT is
// written. Every buffer lies between guard zones; the output is poisoned with NaN before each of two replays.
#pragma once

#include <cuda_runtime_api.h>
#include <fstream>
#include <iterator>

namespace
{

constexpr std::size_t kGUARD = 4096;

void must(cudaError_t error, char const* what)
{
    if (error == cudaSuccess)
        return;
    std::printf("FAIL %s: %s\n", what, cudaGetErrorString(error));
    std::exit(95);
}

struct Buffer
{
    char* base{nullptr};
    std::size_t size;

    explicit Buffer(std::size_t bytes)
        : size(bytes)
    {
        must(cudaMalloc(reinterpret_cast<void**>(&base), size + 2 * kGUARD), "cudaMalloc");
        must(cudaMemset(base, 0xff, size + 2 * kGUARD), "cudaMemset");
    }
    ~Buffer() { cudaFree(base); }
    void* data() const { return base + kGUARD; }

    bool guardsIntact() const
    {
        std::vector<unsigned char> guard(kGUARD);
        bool intact = true;
        for (char const* zone : {base, base + kGUARD + size})
        {
            must(cudaMemcpy(guard.data(), zone, kGUARD, cudaMemcpyDeviceToHost), "copy of a guard zone");
            for (unsigned char byte : guard)
                intact = intact && byte == 0xff;
        }
        return intact;
    }
};

std::vector<char> contents(char const* path)
{
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

int runOnBuffers(IPluginCreatorV3One& creator, char** arguments)
{
    std::string const name = arguments[0];
    int64_t size[6];
    for (int i = 0; i < 6; ++i)
        size[i] = std::atoll(arguments[1 + i]);
    auto const [n, c, h, w, kernelSize, share] = size;
    DataType const type = name == "linear_float" ? DataType::kFLOAT : DataType::kHALF;
    TensorFormat const format = name == "hwc8_half" ? TensorFormat::kHWC8 : TensorFormat::kLINEAR;

    std::vector<char> const features = contents(arguments[7]);
    std::vector<char> const taps = contents(arguments[8]);
    Buffer const in0(features.size());
    Buffer const in1(taps.size());
    Buffer const out(features.size());
    must(cudaMemcpy(in0.data(), features.data(), features.size(), cudaMemcpyHostToDevice), "copy of features");
    must(cudaMemcpy(in1.data(), taps.data(), taps.size(), cudaMemcpyHostToDevice), "copy of taps");

    Plugin const plugin = make(creator, static_cast<int32_t>(kernelSize), static_cast<int32_t>(share));
    Plugin const attached(Parts(*plugin).run->attachToContext(nullptr));
    IPluginV3OneRuntime& run = *Parts(*attached).run;
    int64_t const m = c * kernelSize * kernelSize / share;
    PluginTensorDesc const in[] = {tensor({n, c, h, w}, type, format), tensor({n, m, h, w}, type, format)};
    PluginTensorDesc const result[] = {tensor({n, c, h, w}, type, format)};
    check(run.onShapeChange(in, 2, result, 1) == 0, "onShapeChange");
    void const* const inputs[] = {in0.data(), in1.data()};
    void* const outputs[] = {out.data()};

    // Capture refuses what enqueue must not do: allocate, or wait.
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
    check(run.enqueue(in, result, inputs, outputs, nullptr, stream) == 0, "enqueue");
    must(cudaStreamSynchronize(stream), "first inference");
    must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
    check(run.enqueue(in, result, inputs, outputs, nullptr, stream) == 0, "enqueue while captured");
    must(cudaStreamEndCapture(stream, &graph), "end of capture");
    must(cudaGraphInstantiate(&executable, graph, 0), "graph");
    for (int replay = 0; replay < 2; ++replay)
    {
        must(cudaMemsetAsync(out.data(), 0xff, out.size, stream), "poison");
        must(cudaGraphLaunch(executable, stream), "replay");
        must(cudaStreamSynchronize(stream), "replay");
    }
    check(in0.guardsIntact() && in1.guardsIntact() && out.guardsIntact(), "nothing was written outside the output");

    std::vector<char> values(out.size);
    must(cudaMemcpy(values.data(), out.data(), out.size, cudaMemcpyDeviceToHost), "copy of the output");
    std::ofstream(arguments[9], std::ios::binary).write(values.data(), static_cast<std::streamsize>(values.size()));
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
    return gFailed;
}

} // namespace
