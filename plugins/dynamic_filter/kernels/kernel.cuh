// The dynamic filter's forward pass on CUDA, for the TensorRT plugin.
//
// Definition (the contract is op.py; correlation, zero border, sums in float32 whatever the storage type):
//
//     output[n,c,y,x] = sum over i,j in [0,K) of
//         features[n, c, y + i - K/2, x + j - K/2] * taps[n, (c*K*K + i*K + j) / R, y, x]
//
// Two layouts. Planar: N,C,H,W. Channels last: N,H,W,C, where a pixel may be longer than its channels (`...Stride`
// elements from one pixel to the next: TensorRT's HWC8 rounds 3 up to 8, 27 up to 32); padding that is read is ignored,
// padding that is written is zero.
//
// R consecutive taps use one channel of `taps`, so P = R / gcd(R, K*K) channels of features form a group that uses
// whole channels of taps: 4 channels share 9 tap channels for MISF's K = 3, R = 4. A thread computes whole groups and
// therefore reads each of their taps once. No two threads write the same output: there are no atomics, no shared memory
// and no synchronisation, and results do not change from run to run.
//
// This file includes CUDA headers only: it is compiled by nvcc and, for the tests, by a host compiler that loops over
// grid and block. launch.cuh has the geometry and the choice of kernel.
#pragma once

#include "access.cuh"

namespace misf
{

// ---- planar ---------------------------------------------------------------------------------------------------------

// Columns column - K/2 .. column + V - 1 + K/2 of one row of a plane; zero outside the picture.
template <typename T, int K, int V> struct Window
{
    static constexpr int kBORDER = K / 2;
    Strip<T, V, V> middle;
    float left[kBORDER], right[kBORDER];

    __device__ float operator[](int index) const
    {
        return index < kBORDER ? left[index]
            : index < kBORDER + V ? middle[index - kBORDER]
                                  : right[index - kBORDER - V];
    }

    static __device__ Window read(const T* plane, const Shape& s, int row, int column)
    {
        const bool rowInside = row >= 0 && row < s.height;
        const T* const from = plane + (rowInside ? (long long)(row)*s.width + column : 0);
        Window window;
        window.middle = Strip<T, V, V>::read(from, rowInside ? V : 0);
#pragma unroll
        for (int k = 0; k < kBORDER; ++k)
        {
            window.left[k] = rowInside && column + k >= kBORDER ? toFloat(from[k - kBORDER]) : 0.F;
            window.right[k] = rowInside && column + V + k < s.width ? toFloat(from[V + k]) : 0.F;
        }
        return window;
    }
};

// A thread computes one channel group at V adjacent columns. V > 1 needs W % V == 0 and pointers aligned to V
// elements.
template <typename T, int K, int R, int V>
__global__ void __launch_bounds__(kTHREADS)
    forwardPlanar(const T* __restrict__ features, const T* __restrict__ taps, T* __restrict__ output, Shape s)
{
    constexpr int kAREA = K * K;
    constexpr int kGROUP = groupChannels(K, R);
    constexpr int kGROUP_TAPS = kGROUP * kAREA / R;

    const Place at = Place::ofThread(s, V);
    if (!at.inside(s))
        return;

    Strip<T, V, V> tap[kGROUP_TAPS];
#pragma unroll
    for (int m = 0; m < kGROUP_TAPS; ++m)
    {
        const long long row = planarRow(s, at.image, s.tapChannels, at.group * kGROUP_TAPS + m, at.row);
        tap[m] = Strip<T, V, V>::read(taps + row + at.column);
    }

#pragma unroll
    for (int p = 0; p < kGROUP; ++p)
    {
        const long long plane = planarRow(s, at.image, s.channels, at.group * kGROUP + p, 0);
        float sum[V] = {};
#pragma unroll
        for (int i = 0; i < K; ++i)
        {
            const auto window = Window<T, K, V>::read(features + plane, s, at.row + i - K / 2, at.column);
#pragma unroll
            for (int j = 0; j < K; ++j)
#pragma unroll
                for (int v = 0; v < V; ++v)
                    sum[v] += window[v + j] * tap[(p * kAREA + i * K + j) / R][v];
        }
        Strip<T, V, V>::of(sum).write(output + plane + (long long)(at.row) * s.width + at.column);
    }
}

// ---- channels last --------------------------------------------------------------------------------------------------

// The V channels of a pixel that one thread computes, and their taps. `Width`: elements per access, 1 or 16 bytes'
// worth; above 1 it needs pointers and strides that are multiples of it. V is a whole number of groups.
template <typename T, int K, int R, int V, int Width> struct Pixel
{
    static_assert(V % groupChannels(K, R) == 0, "a thread makes whole groups");
    static constexpr int kTAPS = V * K * K / R;
    static constexpr int kTAP_WIDTH = accessWidth(kTAPS, Width); // 18 and 36 taps are not multiples of 8
    using Channels = Strip<T, V, Width>;
    using Taps = Strip<T, kTAPS, kTAP_WIDTH>;

    // Offset of element `first` of the pixel `down` rows and `right` columns from the thread's. It is computed even if
    // that pixel is outside the picture, because loads without branches are issued together and wait together.
    static __device__ long long offset(const Shape& s, const Place& at, int down, int right, int stride, int first)
    {
        const long long own = pixelIndex(s, at.image, at.row, at.column) * stride + first;
        return own + down * ((long long)(s.width) * stride) + right * stride;
    }

    // The thread's channels, or taps, of that pixel; zero outside the picture.
    static __device__ Channels readChannels(
        const T* from, const Shape& s, const Place& at, int down, int right, int stride)
    {
        const int first = at.group * V;
        const bool inside = insidePicture(s, at.row + down, at.column + right);
        return Channels::read(from + offset(s, at, down, right, stride, first), inside ? stride - first : 0);
    }

    static __device__ Taps readTaps(const T* from, const Shape& s, const Place& at, int down, int right)
    {
        const int first = at.group * kTAPS;
        const bool inside = insidePicture(s, at.row + down, at.column + right);
        return Taps::read(from + offset(s, at, down, right, s.tapStride, first), inside ? s.tapStride - first : 0);
    }

    // Channels from `channels` on are padding and zero.
    static __device__ void writeChannels(float (&sum)[V], T* to, const Shape& s, const Place& at, int stride)
    {
#pragma unroll
        for (int v = 0; v < V; ++v)
            sum[v] = at.group * V + v < s.channels ? sum[v] : 0.F;
        Channels::of(sum).write(to + offset(s, at, 0, 0, stride, at.group * V), stride - at.group * V);
    }
};

// Two blocks per multiprocessor: by default ptxas aims at 64 registers, and spills on sm_75.
template <typename T, int K, int R, int V, int Width>
__global__ void __launch_bounds__(kTHREADS, 2)
    forwardChannelsLast(const T* __restrict__ features, const T* __restrict__ taps, T* __restrict__ output, Shape s)
{
    using Mine = Pixel<T, K, R, V, Width>;

    const Place at = Place::ofThread(s, 1);
    if (!at.inside(s) || at.group * V >= s.outputStride)
        return;

    const auto tap = Mine::readTaps(taps, s, at, 0, 0);
    typename Mine::Channels feature[K * K];
#pragma unroll
    for (int t = 0; t < K * K; ++t)
        feature[t] = Mine::readChannels(features, s, at, t / K - K / 2, t % K - K / 2, s.featureStride);

    float sum[V] = {};
#pragma unroll
    for (int t = 0; t < K * K; ++t)
#pragma unroll
        for (int v = 0; v < V; ++v)
            sum[v] += feature[t][v] * tap[(v * K * K + t) / R];
    Mine::writeChannels(sum, output, s, at, s.outputStride);
}

} // namespace misf
