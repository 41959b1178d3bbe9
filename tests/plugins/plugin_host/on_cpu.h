// The part of harness.cpp that runs one inference on a CPU, from the ONNX node to the output, as TensorRT does it.
//
//     harness LIBRARY FORMAT N C H W KERNEL_SIZE SHARE FEATURES TAPS OUTPUT
//
// The arguments are those of on_gpu.h. Every buffer ends at a page that nothing may touch, so reading or writing beyond
// it ends the process; it runs a second time with buffers that are aligned to one element only, and must agree.
#pragma once

#include <cstdint>
#include <fstream>
#include <iterator>
#include <sys/mman.h>
#include <unistd.h>

namespace
{

class Buffer
{
public:
    // `shift`: bytes left free between the data and the page behind it. All bits are set: NaN in every float type.
    Buffer(std::size_t bytes, std::size_t shift)
        : mBytes(bytes)
    {
        std::size_t const page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
        std::size_t const body = (bytes + shift + page - 1) / page * page;
        mSize = body + 2 * page;
        void* const memory = mmap(nullptr, mSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED)
            std::abort();
        mBase = static_cast<char*>(memory);
        std::memset(mBase, 0xff, mSize);
        mData = mBase + page + body - bytes - shift;
        if (mprotect(mBase, page, PROT_NONE) != 0 || mprotect(mBase + page + body, page, PROT_NONE) != 0)
            std::abort();
    }
    Buffer(std::vector<char> const& content, std::size_t shift)
        : Buffer(content.size(), shift)
    {
        std::memcpy(mData, content.data(), content.size());
    }
    Buffer(Buffer const&) = delete;
    ~Buffer() { munmap(mBase, mSize); }
    void* data() const { return mData; }
    std::vector<char> content() const { return {mData, mData + mBytes}; }

private:
    char* mBase;
    char* mData;
    std::size_t mBytes;
    std::size_t mSize;
};

std::vector<char> contents(char const* path)
{
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

struct Sizes
{
    std::vector<int64_t> features, taps;
};

// What the builder asks a plugin, in its order; checks every answer.
void build(IPluginV3OneBuild& build, Sizes const& sizes, DataType type, TensorFormat format)
{
    DynamicPluginTensorDesc all[3]{};
    for (int pos = 0; pos < 3; ++pos)
        all[pos].desc = tensor(pos == 1 ? sizes.taps : sizes.features, type, format);
    DataType const inputTypes[] = {type, type};
    DataType outputType{};
    check(build.getOutputDataTypes(&outputType, 1, inputTypes, 2) == 0 && outputType == type, "output type");
    char expressions[8] = {}; // only their addresses matter
    DimsExprs shapes[2]{};
    for (int i = 0; i < 8; ++i)
        shapes[i / 4].d[i % 4] = reinterpret_cast<IDimensionExpr const*>(expressions + i);
    shapes[0].nbDims = shapes[1].nbDims = 4;
    DimsExprs output{};
    auto& builder = *reinterpret_cast<IExprBuilder*>(expressions); // nothing is built
    check(build.getOutputShapes(shapes, 2, nullptr, 0, &output, 1, builder) == 0
            && std::memcmp(&output, &shapes[0], sizeof(output)) == 0,
        "output shape");
    for (int pos = 0; pos < 3; ++pos)
        check(build.supportsFormatCombination(pos, all, 2, 1), "format");
    check(build.configurePlugin(all, 2, all + 2, 1) == 0, "configurePlugin");
    check(build.getWorkspaceSize(all, 2, all + 2, 1) == 0, "no workspace");
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
    Sizes const sizes{{n, c, h, w}, {n, c * kernelSize * kernelSize / share, h, w}};
    PluginTensorDesc const in[] = {tensor(sizes.features, type, format), tensor(sizes.taps, type, format)};

    Plugin made = make(creator, static_cast<int32_t>(kernelSize), static_cast<int32_t>(share));
    Plugin cloned(made->clone());
    made.reset();
    build(*Parts(*cloned).build, sizes, type, format);
    Plugin const loaded = reload(creator, std::move(cloned));
    Plugin const attached(Parts(*loaded).run->attachToContext(nullptr));
    IPluginV3OneRuntime& run = *Parts(*attached).run;
    check(run.onShapeChange(in, 2, in, 1) == 0, "onShapeChange");

    std::vector<char> const features = contents(arguments[7]);
    std::vector<char> const taps = contents(arguments[8]);
    std::vector<char> results[2];
    for (std::size_t shift : {std::size_t(0), type == DataType::kFLOAT ? sizeof(float) : sizeof(int16_t)})
    {
        Buffer const in0(features, shift);
        Buffer const in1(taps, shift);
        Buffer const out(features.size(), shift);
        void const* const inputs[] = {in0.data(), in1.data()};
        void* const outputs[] = {out.data()};
        check(run.enqueue(in, in, inputs, outputs, nullptr, nullptr) == 0, "enqueue");
        results[shift == 0 ? 0 : 1] = out.content();
    }
    std::vector<char> const& first = results[0];
    check(first == results[1], "results do not depend on the buffers' alignment");
    std::ofstream(arguments[9], std::ios::binary).write(first.data(), static_cast<std::streamsize>(first.size()));
    return gFailed;
}

} // namespace
