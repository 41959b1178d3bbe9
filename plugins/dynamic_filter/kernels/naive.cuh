// The dynamic filter with one output per thread, for any K and R, in both layouts: the fallback for calls without a
// kernel in kernel.cuh, and the reference for its kernels on the same device. Definition and layouts: kernel.cuh.
#pragma once

#include "access.cuh"

namespace misf
{

template <typename T, bool ChannelsLast>
__device__ inline float at(const T* tensor, const Shape& s, int channels, int stride, long long n, int c, int y, int x)
{
    if (!insidePicture(s, y, x))
        return 0.F;
    const long long pixel = pixelIndex(s, 0, y, x);
    const long long plane = (long long)(s.height) * s.width;
    return toFloat(tensor[ChannelsLast ? (n * plane + pixel) * stride + c : (n * channels + c) * plane + pixel]);
}

// `index` counts the elements of the output in memory order, including padding.
template <bool ChannelsLast> struct Element
{
    long long index, image;
    int channel, row, column;

    static __device__ Element ofThread(const Shape& s)
    {
        Element e;
        e.index = (long long)(blockIdx.x) * kTHREADS + threadIdx.x;
        long long rest = e.index;
        if (ChannelsLast)
            e.channel = int(rest % s.outputStride), rest /= s.outputStride;
        e.column = int(rest % s.width), rest /= s.width;
        e.row = int(rest % s.height), rest /= s.height;
        if (!ChannelsLast)
            e.channel = int(rest % s.channels), rest /= s.channels;
        e.image = rest;
        return e;
    }
};

template <typename T, bool ChannelsLast>
__global__ void __launch_bounds__(kTHREADS)
    forwardNaive(const T* __restrict__ features, const T* __restrict__ taps, T* __restrict__ output, Shape s)
{
    const auto e = Element<ChannelsLast>::ofThread(s);
    if (e.image >= s.batch)
        return;

    const int area = s.kernelSize * s.kernelSize;
    float sum = 0.F;
    for (int t = 0; t < area && e.channel < s.channels; ++t)
    {
        const int row = e.row + t / s.kernelSize - s.kernelSize / 2;
        const int column = e.column + t % s.kernelSize - s.kernelSize / 2;
        const int m = int(((long long)(e.channel) * area + t) / s.share);
        sum += at<T, ChannelsLast>(features, s, s.channels, s.featureStride, e.image, e.channel, row, column)
            * at<T, ChannelsLast>(taps, s, s.tapChannels, s.tapStride, e.image, m, e.row, e.column);
    }
    output[e.index] = fromFloat<T>(sum);
}

} // namespace misf
