// The interface between the TensorRT plugin (plain C++) and the CUDA kernels (launch.cu).
#pragma once

#include <cuda_runtime_api.h>

namespace misf
{

enum class Storage : int
{
    kFLOAT,
    kHALF,
};

// Memory layout of the three tensors of a call; HWC8 is channels last, every pixel padded to a multiple of 8 channels.
enum class Format : int
{
    kLINEAR,
    kHWC8,
};

// Sizes of one forward call: features and output N,C,H,W; taps N,C*K*K/R,H,W. All below 2^31.
struct Call
{
    Storage storage;
    Format format; // kHWC8 is for kHALF only
    int batch, channels, height, width;
    int kernelSize, share;
};

// Launches the filter on `stream`, without allocation or synchronisation. Returns the launch's error;
// cudaErrorInvalidValue for a call that no kernel supports (kHWC8 with kFLOAT, more elements than a grid can hold).
cudaError_t launchForward(
    Call const& call, void const* features, void const* taps, void* output, cudaStream_t stream) noexcept;

} // namespace misf
