// Chooses kernel and grid for a call of the dynamic filter: plain host code around kernel.cuh, shared by the TensorRT
// plugin and the tests' host launcher.
#pragma once

#include "kernel.cuh"
#include "naive.cuh"

namespace misf
{

enum class Layout : int
{
    kPLANAR,
    kCHANNELS_LAST,
};

// Features, taps and output; all of type T, with the layout in Shape.
template <typename T> using Kernel = void (*)(const T*, const T*, T*, Shape);

struct Plan
{
    Shape shape;           // with the geometry filled in
    bool fast;             // a kernel of kernel.cuh, else of naive.cuh
    int width;             // elements per access of the fast kernel
    unsigned gridX, gridY; // blocks; 0 if there is nothing to do or (N, C, H, W above 0) a grid cannot hold them
};

constexpr long long kMAX_GRID_X = 0x7fffffff;
constexpr long long kMAX_GRID_Y = 0xffff;
constexpr int kMAX_SIDE = 1 << 30; // largest side of a picture for the fast kernels, whose tiles may end beyond it

constexpr long long divideUp(long long a, long long b) { return (a + b - 1) / b; }

// Returns a * b, at most a number that no grid can hold; never overflows.
constexpr long long capped(long long a, long long b)
{
    constexpr long long kCAP = kTHREADS * (kMAX_GRID_X + 1);
    return a > kCAP / b ? kCAP : a * b;
}

// Returns the smallest b with 2^b >= count, at most `limit`.
inline int bitsFor(long long count, int limit)
{
    int bits = 0;
    while (bits < limit && (1LL << bits) < count)
        ++bits;
    return bits;
}

// Number of channels that a thread of the channels-last kernel computes: one group, or one wide access; two if each tap
// is used by four products.
constexpr int channelsPerThread(int elementSize, int share, int width)
{
    return width == 1 ? groupChannels(3, share) : kACCESS_BYTES / elementSize * (share == 4 ? 2 : 1);
}

// Plans a call. `shape` has no geometry yet; `alignment`: bytes to which all three pointers are aligned; `naive`
// selects the reference kernel.
inline Plan plan(Layout layout, Shape shape, int elementSize, unsigned long long alignment, bool naive = false)
{
    Plan result{shape, false, 1, 0, 0};
    Shape& s = result.shape;
    s.columnTiles = s.rowTiles = 1;
    s.groupBits = s.columnBits = 0;
    if (s.batch <= 0 || s.channels <= 0 || s.height <= 0 || s.width <= 0)
        return result;

    const bool channelsLast = layout == Layout::kCHANNELS_LAST;
    const int written = channelsLast ? s.outputStride : s.channels;
    const bool shipped = s.kernelSize == 3 && (s.share == 4 || s.share == 1);
    if (shipped && !naive && s.height <= kMAX_SIDE && s.width <= kMAX_SIDE)
    {
        const int wide = kACCESS_BYTES / elementSize;
        const int middle = 4 / elementSize;
        long long groups;
        if (channelsLast)
        {
            const bool fits = alignment % kACCESS_BYTES == 0 && s.featureStride % wide == 0 && s.tapStride % wide == 0
                && s.outputStride % wide == 0;
            result.width = fits ? wide : 1;
            const int perThread = channelsPerThread(elementSize, s.share, result.width);
            groups = divideUp(written, perThread);
            // 128 bytes of features per pixel are whole cache lines; the rest of the block is a square of pixels.
            s.groupBits = bitsFor(groups, bitsFor(128 / (perThread * elementSize), 5));
            s.columnBits = bitsFor(s.width, (8 - s.groupBits) / 2);
            s.columnTiles = int(divideUp(s.width, 1 << s.columnBits));
        }
        else
        {
            result.width = s.width % wide == 0 && alignment % kACCESS_BYTES == 0 ? wide
                : s.width % middle == 0 && alignment % 4 == 0                    ? middle
                                                                                 : 1;
            groups = s.channels / groupChannels(s.kernelSize, s.share);
            const long long columns = s.width / result.width;
            s.columnBits = bitsFor(columns, 5); // a warp reads one row
            s.columnTiles = int(divideUp(columns, 1 << s.columnBits));
        }
        s.rowTiles = int(divideUp(s.height, kTHREADS >> (s.groupBits + s.columnBits)));
        const long long gridX = capped(capped(s.columnTiles, s.rowTiles), s.batch);
        const long long gridY = divideUp(groups, 1LL << s.groupBits);
        result.fast = gridX <= kMAX_GRID_X && gridY <= kMAX_GRID_Y;
        if (result.fast)
        {
            result.gridX = unsigned(gridX);
            result.gridY = unsigned(gridY);
            return result;
        }
    }

    const long long pixels = capped(capped(s.batch, s.height), s.width);
    const long long blocks = divideUp(capped(pixels, written), kTHREADS);
    result.width = 1;
    result.gridX = blocks <= kMAX_GRID_X ? unsigned(blocks) : 0;
    result.gridY = result.gridX > 0 ? 1 : 0;
    return result;
}

// ---- from a plan to a kernel ----------------------------------------------------------------------------------------

template <Layout kLAYOUT, typename T, int R> Kernel<T> fastKernel(int width)
{
    constexpr int kWIDE = kACCESS_BYTES / sizeof(T);
    if constexpr (kLAYOUT == Layout::kPLANAR)
    {
        constexpr int kMIDDLE = 4 / sizeof(T);
        return width == kWIDE  ? forwardPlanar<T, 3, R, kWIDE>
            : width == kMIDDLE ? forwardPlanar<T, 3, R, kMIDDLE>
                               : forwardPlanar<T, 3, R, 1>;
    }
    else
        return width == kWIDE ? forwardChannelsLast<T, 3, R, channelsPerThread(sizeof(T), R, kWIDE), kWIDE>
                              : forwardChannelsLast<T, 3, R, channelsPerThread(sizeof(T), R, 1), 1>;
}

// Returns the kernel of a plan. Only the kernels that the template arguments select are compiled.
template <Layout kLAYOUT, typename T> Kernel<T> kernelOf(const Plan& plan)
{
    if (!plan.fast)
        return forwardNaive<T, kLAYOUT == Layout::kCHANNELS_LAST>;
    return plan.shape.share == 4 ? fastKernel<kLAYOUT, T, 4>(plan.width) : fastKernel<kLAYOUT, T, 1>(plan.width);
}

} // namespace misf
