// Launches the kernels for the TensorRT plugin.
#include "launch.cuh"
#include "launch.h"

#include <cstdint>

namespace misf
{
namespace
{

int roundUpTo8(int channels) { return (channels + 7) / 8 * 8; }

template <Layout kLAYOUT, typename T>
cudaError_t launch(Shape const& shape, void const* features, void const* taps, void* output, cudaStream_t stream)
{
    auto const addresses = reinterpret_cast<std::uintptr_t>(features) | reinterpret_cast<std::uintptr_t>(taps)
        | reinterpret_cast<std::uintptr_t>(output) | std::uintptr_t(kACCESS_BYTES);
    Plan const call = plan(kLAYOUT, shape, sizeof(T), addresses & ~(addresses - 1));
    if (call.gridX == 0)
    {
        bool const empty = shape.batch == 0 || shape.channels == 0 || shape.height == 0 || shape.width == 0;
        return empty ? cudaSuccess : cudaErrorInvalidValue;
    }
    kernelOf<kLAYOUT, T>(call)<<<dim3(call.gridX, call.gridY), kTHREADS, 0, stream>>>(
        static_cast<T const*>(features), static_cast<T const*>(taps), static_cast<T*>(output), call.shape);
    return cudaGetLastError();
}

} // namespace

cudaError_t launchForward(
    Call const& call, void const* features, void const* taps, void* output, cudaStream_t stream) noexcept
{
    bool const padded = call.format == Format::kHWC8;
    int const tapChannels =
        static_cast<int>(static_cast<long long>(call.channels) * call.kernelSize * call.kernelSize / call.share);
    Shape shape{};
    shape.batch = call.batch;
    shape.channels = call.channels;
    shape.height = call.height;
    shape.width = call.width;
    shape.tapChannels = tapChannels;
    shape.kernelSize = call.kernelSize;
    shape.share = call.share;
    shape.featureStride = shape.outputStride = padded ? roundUpTo8(call.channels) : call.channels;
    shape.tapStride = padded ? roundUpTo8(tapChannels) : tapChannels;

    if (!padded)
        return call.storage == Storage::kFLOAT ? launch<Layout::kPLANAR, float>(shape, features, taps, output, stream)
                                               : launch<Layout::kPLANAR, __half>(shape, features, taps, output, stream);
    if (call.storage == Storage::kHALF)
        return launch<Layout::kCHANNELS_LAST, __half>(shape, features, taps, output, stream);
    return cudaErrorInvalidValue;
}

} // namespace misf
