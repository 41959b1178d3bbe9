// The building blocks of the dynamic filter's kernels: the description of a call, conversions, wide loads, and the
// output that a thread computes. See kernel.cuh.
#pragma once

#include <cstring>
#include <cuda_fp16.h>
#include <type_traits>

namespace misf
{

constexpr int kTHREADS = 256;     // per block, of every kernel
constexpr int kACCESS_BYTES = 16; // width of the widest load and store

// One call. Every kernel takes it by value, after three pointers.
struct Shape
{
    int batch, channels, height, width;         // N, C, H, W
    int tapChannels;                            // M = C*K*K / R
    int kernelSize, share;                      // K, R; only the naive kernels read them here
    int featureStride, tapStride, outputStride; // channels last: elements from pixel to pixel; planar: not used
    int columnTiles, rowTiles;                  // blocks side by side, and one above the other
    int groupBits, columnBits;                  // a block is 2^groupBits channel groups x 2^columnBits columns x rows
};

// ---- values ---------------------------------------------------------------------------------------------------------

__host__ __device__ inline float toFloat(float value) { return value; }
__host__ __device__ inline float toFloat(__half value) { return __half2float(value); }

template <typename T> __host__ __device__ inline T fromFloat(float value);
template <> __host__ __device__ inline float fromFloat<float>(float value) { return value; }
template <> __host__ __device__ inline __half fromFloat<__half>(float value) { return __float2half_rn(value); }

// Two halves in one register, in memory order.
__device__ inline float2 unpack(unsigned word)
{
    __half2 pair;
    memcpy(static_cast<void*>(&pair), &word, sizeof(word));
    return __half22float2(pair);
}

__device__ inline unsigned pack(float first, float second)
{
    const __half2 pair = __floats2half2_rn(first, second);
    unsigned word;
    memcpy(&word, &pair, sizeof(word));
    return word;
}

__host__ __device__ constexpr int gcd(int a, int b) { return b == 0 ? a : gcd(b, a % b); }

// P, the number of channels that use whole channels of taps.
__host__ __device__ constexpr int groupChannels(int kernelSize, int share)
{
    return share / gcd(share, kernelSize * kernelSize);
}

// The widest access, in elements and at most `limit`, that divides a run of `count` elements.
__host__ __device__ constexpr int accessWidth(int count, int limit)
{
    return limit <= 1 || count % limit == 0 ? limit : accessWidth(count, limit / 2);
}

template <typename T, int Width> struct alignas(sizeof(T) * Width) Packed
{
    T value[Width];
};

// `Count` adjacent elements in registers, moved in accesses of `Width` elements (to which the pointer is aligned).
// Pairs of halves stay packed: unpacked, each half would need a register and moves (sm_90, the features in HWC8: 941
// instructions instead of 691).
template <typename T, int Count, int Width> struct Strip
{
    static_assert(Count % Width == 0, "a strip is a whole number of accesses");
    static_assert(sizeof(T) * Width <= kACCESS_BYTES, "no access is wider than 16 bytes");
    static constexpr bool kPAIRS = sizeof(T) == 2 && Width % 2 == 0;
    static constexpr int kPER_WORD = kPAIRS ? 2 : 1;
    using Word = std::conditional_t<kPAIRS, unsigned, T>;
    using Access = Packed<Word, Width / kPER_WORD>;
    Word word[Count / kPER_WORD];

    __device__ float operator[](int index) const
    {
        if constexpr (kPAIRS)
        {
            const float2 both = unpack(word[index / 2]);
            return index % 2 == 0 ? both.x : both.y;
        }
        else
            return toFloat(word[index]);
    }

    // Rounds to T.
    static __device__ Strip of(const float (&values)[Count])
    {
        Strip strip;
#pragma unroll
        for (int k = 0; k < Count; k += kPER_WORD)
            if constexpr (kPAIRS)
                strip.word[k / 2] = pack(values[k], values[k + 1]);
            else
                strip.word[k] = fromFloat<T>(values[k]);
        return strip;
    }

    // Reads the accesses that lie before `limit` elements; the rest is zero.
    static __device__ Strip read(const T* from, int limit = Count)
    {
        Strip strip;
#pragma unroll
        for (int start = 0; start < Count; start += Width)
        {
            Access access{};
            if (start + Width <= limit)
                access = *reinterpret_cast<const Access*>(from + start);
#pragma unroll
            for (int k = 0; k < Width / kPER_WORD; ++k)
                strip.word[start / kPER_WORD + k] = access.value[k];
        }
        return strip;
    }

    // Writes the accesses that lie before `limit` elements.
    __device__ void write(T* to, int limit = Count) const
    {
#pragma unroll
        for (int start = 0; start < Count; start += Width)
        {
            Access access;
#pragma unroll
            for (int k = 0; k < Width / kPER_WORD; ++k)
                access.value[k] = word[start / kPER_WORD + k];
            if (start + Width <= limit)
                *reinterpret_cast<Access*>(to + start) = access;
        }
    }
};

// ---- places ---------------------------------------------------------------------------------------------------------

// The output that a thread computes: image n, pixel (row, column), channel group `group`.
struct Place
{
    long long image;
    int group, row, column;

    static __device__ Place ofThread(const Shape& s, int columnsPerThread)
    {
        const unsigned thread = threadIdx.x;
        const unsigned rowTile = blockIdx.x / unsigned(s.columnTiles);
        const unsigned columnInBlock = thread >> s.groupBits & ((1U << s.columnBits) - 1U);
        const unsigned rowInBlock = thread >> (s.groupBits + s.columnBits);
        const unsigned rowsPerBlock = unsigned(kTHREADS) >> (s.groupBits + s.columnBits);
        Place at;
        at.image = rowTile / unsigned(s.rowTiles);
        at.group = int(blockIdx.y << s.groupBits | (thread & ((1U << s.groupBits) - 1U)));
        at.row = int(rowTile % unsigned(s.rowTiles) * rowsPerBlock + rowInBlock);
        at.column = int(((blockIdx.x % unsigned(s.columnTiles)) << s.columnBits | columnInBlock) * columnsPerThread);
        return at;
    }

    __device__ bool inside(const Shape& s) const { return row < s.height && column < s.width; }
};

__device__ inline bool insidePicture(const Shape& s, int row, int column)
{
    return row >= 0 && row < s.height && column >= 0 && column < s.width;
}

// Offset of element (n, c, y, 0) of a planar tensor; in 64 bits, like all offsets here.
__device__ inline long long planarRow(const Shape& s, long long image, int channels, int channel, int row)
{
    return ((image * channels + channel) * s.height + row) * s.width;
}

// Index of pixel (n, y, x); multiplied by the stride, it is the pixel's offset in a channels-last tensor.
__device__ inline long long pixelIndex(const Shape& s, long long image, int row, int column)
{
    return (image * s.height + row) * s.width + column;
}

} // namespace misf
