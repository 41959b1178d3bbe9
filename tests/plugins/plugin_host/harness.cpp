// Drives the plugin library as TensorRT would, without TensorRT: harness LIBRARY [FAKE_NVINFER].
//
// Prints one line per check and returns the number of failed ones. With a fake libnvinfer the errors must arrive at its
// logger, without at stderr. With more arguments it runs enqueue on real buffers instead: on the GPU where nvcc
// compiled this with -DMISF_WITH_GPU (on_gpu.h), on the CPU with a library whose kernels run there (on_cpu.h).
#include <NvInferRuntime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <memory>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace
{

int gFailed = 0;
std::vector<std::string> gLogged;

// Whether timings of a plugin are kept for these attributes and the version that tests/test_plugin.py builds.
bool timedAs(IPluginV3OneBuild& build, std::string const& attributes)
{
    return build.getTimingCacheID() == attributes + ",misf=0.0-test";
}

void check(bool ok, char const* what)
{
    std::printf("%s %s\n", ok ? "ok  " : "FAIL", what);
    gFailed += ok ? 0 : 1;
}

class Logger final : public ILogger
{
public:
    void log(Severity severity, AsciiChar const* message) noexcept override
    {
        gLogged.emplace_back((severity == Severity::kERROR ? "error " : "other ") + std::string(message));
    }
} gLogger;

class Finder final : public ILoggerFinder
{
public:
    ILogger* findLogger() override { return &gLogger; }
} gFinder;

using Plugin = std::unique_ptr<IPluginV3>;

struct Parts
{
    IPluginV3OneCore* core;
    IPluginV3OneBuild* build;
    IPluginV3OneRuntime* run;

    explicit Parts(IPluginV3& plugin)
        : core(static_cast<IPluginV3OneCore*>(plugin.getCapabilityInterface(PluginCapabilityType::kCORE)))
        , build(static_cast<IPluginV3OneBuild*>(plugin.getCapabilityInterface(PluginCapabilityType::kBUILD)))
        , run(static_cast<IPluginV3OneRuntime*>(plugin.getCapabilityInterface(PluginCapabilityType::kRUNTIME)))
    {
    }
};

Plugin make(
    IPluginCreatorV3One& creator, std::vector<PluginField> const& fields, TensorRTPhase phase = TensorRTPhase::kBUILD)
{
    PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
    return Plugin(creator.createPlugin("layer", &collection, phase));
}

Plugin make(IPluginCreatorV3One& creator, int32_t kernelSize, int32_t share)
{
    return make(creator,
        {PluginField("kernel_size", &kernelSize, PluginFieldType::kINT32, 1),
            PluginField("share", &share, PluginFieldType::kINT32, 1)});
}

// Writes a plugin into a plan, destroys it, and makes the one that an engine loads from the plan. TensorRT copies names
// and data; here into memory of our own, before the plugin goes.
Plugin reload(IPluginCreatorV3One& creator, Plugin plugin)
{
    PluginFieldCollection const* const fields = Parts(*plugin).run->getFieldsToSerialize();
    std::vector<std::pair<std::string, std::vector<char>>> plan;
    for (int32_t i = 0; i < fields->nbFields; ++i)
    {
        auto const* const bytes = static_cast<char const*>(fields->fields[i].data);
        plan.emplace_back(fields->fields[i].name, std::vector<char>(bytes, bytes + sizeof(int32_t)));
    }
    plugin.reset();
    std::vector<PluginField> restored;
    for (auto const& [name, bytes] : plan)
        restored.emplace_back(name.c_str(), bytes.data(), PluginFieldType::kINT32, 1);
    return make(creator, restored, TensorRTPhase::kRUNTIME);
}

PluginTensorDesc tensor(std::vector<int64_t> const& dims, DataType type, TensorFormat format)
{
    PluginTensorDesc desc{};
    desc.dims.nbDims = static_cast<int32_t>(dims.size());
    for (std::size_t i = 0; i < dims.size(); ++i)
        desc.dims.d[i] = dims[i];
    desc.type = type;
    desc.format = format;
    return desc;
}

void checkCreator(IPluginCreatorV3One& creator)
{
    InterfaceInfo const info = creator.getInterfaceInfo();
    check(std::strcmp(info.kind, "PLUGIN CREATOR_V3ONE") == 0 && info.major == 1, "the creator is a V3 creator");
    check(std::strcmp(creator.getPluginName(), "DynamicFilter") == 0, "name");
    check(std::strcmp(creator.getPluginVersion(), "1") == 0, "version");
    check(std::strcmp(creator.getPluginNamespace(), "misf") == 0, "namespace");
    PluginFieldCollection const* const names = creator.getFieldNames();
    check(names->nbFields == 2 && std::strcmp(names->fields[0].name, "kernel_size") == 0
            && std::strcmp(names->fields[1].name, "share") == 0 && names->fields[0].type == PluginFieldType::kINT32
            && names->fields[1].type == PluginFieldType::kINT32,
        "field names, without which the parser drops attributes");
}

void checkBadFields(IPluginCreatorV3One& creator)
{
    std::size_t const before = gLogged.size();
    check(make(creator, 2, 1) == nullptr, "an even kernel_size makes no plugin");
    check(make(creator, -3, 1) == nullptr, "a negative kernel_size makes no plugin");
    check(make(creator, 3, 0) == nullptr, "share 0 makes no plugin");
    float const number = 3.0F;
    check(make(creator, {PluginField("kernel_size", &number, PluginFieldType::kFLOAT32, 1)}) == nullptr,
        "a float makes no plugin");
    int32_t const two[] = {3, 3};
    check(make(creator, {PluginField("kernel_size", two, PluginFieldType::kINT32, 2)}) == nullptr,
        "a list makes no plugin");
    check(make(creator, {PluginField("share", nullptr, PluginFieldType::kINT32, 1)}) == nullptr,
        "no data makes no plugin");
    if (dlsym(RTLD_DEFAULT, "misf_fake_registrations") != nullptr)
    {
        bool named = gLogged.size() >= before + 6;
        for (std::string const& line : gLogged)
            named = named && line.rfind("error DynamicFilter: ", 0) == 0;
        check(named, "every refusal is an error in TensorRT's log");
    }
    else
        check(gLogged.empty(), "without a TensorRT of this version its logger is never called");
}

void checkBuild(IPluginCreatorV3One& creator)
{
    Plugin const plugin = make(creator, 3, 4);
    check(plugin != nullptr, "created");
    Parts const parts(*plugin);
    check(parts.core && parts.build && parts.run, "has the three parts");
    check(std::strcmp(parts.core->getPluginName(), "DynamicFilter") == 0
            && std::strcmp(parts.core->getPluginVersion(), "1") == 0
            && std::strcmp(parts.core->getPluginNamespace(), "misf") == 0,
        "the plugin has its creator's name, version and namespace");
    check(parts.build->getNbOutputs() == 1, "one output");

    DataType const inputs[] = {DataType::kHALF, DataType::kHALF};
    DataType output = DataType::kINT32;
    check(parts.build->getOutputDataTypes(&output, 1, inputs, 2) == 0 && output == DataType::kHALF, "output type");

    // The expressions are only passed on; nothing may look behind them, so anything will do.
    char storage[1024] = {};
    DimsExprs shapes[2];
    for (int i = 0; i < 2; ++i)
    {
        shapes[i].nbDims = 4;
        for (int d = 0; d < 4; ++d)
            shapes[i].d[d] = reinterpret_cast<IDimensionExpr const*>(storage + 16 * (4 * i + d));
    }
    DimsExprs result{};
    auto& builder = *reinterpret_cast<IExprBuilder*>(storage + 512);
    check(parts.build->getOutputShapes(shapes, 2, nullptr, 0, &result, 1, builder) == 0 && result.nbDims == 4
            && std::memcmp(result.d, shapes[0].d, 4 * sizeof(result.d[0])) == 0,
        "the output has the features' shape");
    shapes[1].nbDims = 3;
    check(
        parts.build->getOutputShapes(shapes, 2, nullptr, 0, &result, 1, builder) != 0, "three dimensions are refused");

    auto const configure = [&](std::vector<int64_t> const& features, std::vector<int64_t> const& taps)
    {
        DynamicPluginTensorDesc in[2]{};
        DynamicPluginTensorDesc out[1]{};
        in[0].desc = tensor(features, DataType::kFLOAT, TensorFormat::kLINEAR);
        in[1].desc = tensor(taps, DataType::kFLOAT, TensorFormat::kLINEAR);
        return parts.build->configurePlugin(in, 2, out, 1);
    };
    check(configure({-1, 256, -1, -1}, {-1, 576, -1, -1}) == 0, "dynamic batch, height and width");
    check(configure({1, 256, 8, 8}, {1, 2304, 8, 8}) != 0, "taps of another share are refused");
    check(configure({1, 6, 8, 8}, {1, 13, 8, 8}) != 0, "channels that share does not divide are refused");
    check(configure({1, 256, 8}, {1, 576, 8}) != 0, "three dimensions are refused at configuration");
    check(timedAs(*parts.build, "kernel_size=3,share=4"), "timing cache id");
}

void checkFormats(IPluginCreatorV3One& creator)
{
    Plugin const plugin = make(creator, 3, 4);
    IPluginV3OneBuild& build = *Parts(*plugin).build;
    int accepted = 0;
    bool right = true;
    constexpr int kTYPES = 11;
    constexpr int kFORMATS = 13;
    constexpr int kALL = kTYPES * kFORMATS;
    for (int combination = 0; combination < kALL * kALL; ++combination)
    {
        DynamicPluginTensorDesc all[3]{};
        int const codes[] = {combination % kALL, combination / kALL};
        auto const set = [&](int pos, int code)
        {
            all[pos].desc =
                tensor({1, 8, 4, 4}, static_cast<DataType>(code % kTYPES), static_cast<TensorFormat>(code / kTYPES));
        };
        set(0, codes[0]);
        set(1, kALL - 1); // what is not asked for yet must not matter
        set(2, kALL - 1);
        if (!build.supportsFormatCombination(0, all, 2, 1))
            continue;
        set(1, codes[1]);
        bool const second = build.supportsFormatCombination(1, all, 2, 1);
        right = right && second == (codes[0] == codes[1]);
        if (!second)
            continue;
        for (int third = 0; third < kALL; ++third)
        {
            set(2, third);
            bool const ok = build.supportsFormatCombination(2, all, 2, 1);
            right = right && ok == (third == codes[0]);
            accepted += ok ? 1 : 0;
            auto const type = all[0].desc.type;
            auto const format = all[0].desc.format;
            right = right
                && (!ok || (format == TensorFormat::kLINEAR && (type == DataType::kFLOAT || type == DataType::kHALF))
                    || (format == TensorFormat::kHWC8 && type == DataType::kHALF));
        }
    }
    check(right && accepted == 3, "exactly three combinations: linear float, linear half, HWC8 half");
    DynamicPluginTensorDesc none[3]{};
    check(!build.supportsFormatCombination(3, none, 2, 1) && !build.supportsFormatCombination(0, none, 3, 1),
        "other tensor counts are refused");
}

void checkSerialisation(IPluginCreatorV3One& creator)
{
    Plugin first = make(creator, 5, 5);
    PluginFieldCollection const* const fields = Parts(*first).run->getFieldsToSerialize();
    for (int32_t i = 0; i < fields->nbFields; ++i)
        check(fields->fields[i].type == PluginFieldType::kINT32 && fields->fields[i].length == 1,
            "a serialised field is one int32");
    Plugin second = reload(creator, std::move(first));
    check(second != nullptr && timedAs(*Parts(*second).build, "kernel_size=5,share=5"),
        "what was serialised makes the same plugin");

    Plugin copy(second->clone());
    second.reset();
    Plugin attached(Parts(*copy).run->attachToContext(nullptr));
    copy.reset();
    check(timedAs(*Parts(*attached).build, "kernel_size=5,share=5")
            && *static_cast<int32_t const*>(Parts(*attached).run->getFieldsToSerialize()->fields[1].data) == 5,
        "clones outlive the original");
    Plugin const byDefault(creator.createPlugin("layer", nullptr, TensorRTPhase::kBUILD));
    check(timedAs(*Parts(*byDefault).build, "kernel_size=3,share=1"), "defaults: 3 and 1");
}

void checkRuntime(IPluginCreatorV3One& creator)
{
    Plugin const plugin = make(creator, 3, 4);
    IPluginV3OneRuntime& run = *Parts(*plugin).run;
    void const* inputs[2] = {};
    void* outputs[1] = {};
    check(run.enqueue(nullptr, nullptr, inputs, outputs, nullptr, nullptr) != 0, "enqueue before onShapeChange fails");

    auto const change =
        [&](std::vector<int64_t> const& features, std::vector<int64_t> const& taps, DataType type, TensorFormat format)
    {
        PluginTensorDesc const in[] = {tensor(features, type, format), tensor(taps, type, format)};
        PluginTensorDesc const out[] = {tensor(features, type, format)};
        return run.onShapeChange(in, 2, out, 1);
    };
    auto const kLINEAR = TensorFormat::kLINEAR;
    check(change({2, 256, 64, 48}, {2, 576, 64, 48}, DataType::kFLOAT, kLINEAR) == 0, "sizes");
    check(change({1, 8, 5, 7}, {1, 18, 5, 7}, DataType::kHALF, TensorFormat::kHWC8) == 0, "sizes in HWC8");
    check(change({1, 8, 5, 7}, {1, 18, 7, 5}, DataType::kFLOAT, kLINEAR) != 0, "taps of another height are refused");
    check(change({1, 8, 5, 7}, {1, 72, 5, 7}, DataType::kFLOAT, kLINEAR) != 0, "taps of another count are refused");
    check(change({1, 8, 5, 7}, {1, 18, 5, 7}, DataType::kINT8, kLINEAR) != 0, "int8 is refused");
    check(change({1, 8, 5, 7}, {1, 18, 5, 7}, DataType::kFLOAT, TensorFormat::kHWC8) != 0, "HWC8 float is refused");
    PluginTensorDesc const mixed[] = {tensor({1, 8, 5, 7}, DataType::kFLOAT, kLINEAR),
        tensor({1, 18, 5, 7}, DataType::kHALF, kLINEAR)};
    check(run.onShapeChange(mixed, 2, mixed, 1) != 0, "two types are refused");
    check(change({1, 8, 5, -1}, {1, 18, 5, -1}, DataType::kFLOAT, kLINEAR) != 0, "unknown sizes are refused");
    check(
        change({1LL << 32, 8, 5, 7}, {1LL << 32, 18, 5, 7}, DataType::kFLOAT, kLINEAR) != 0, "2^32 images are refused");
    check(
        run.enqueue(nullptr, nullptr, inputs, outputs, nullptr, nullptr) != 0, "enqueue after a refused change fails");
    check(change({0, 8, 5, 7}, {0, 18, 5, 7}, DataType::kFLOAT, kLINEAR) == 0
            && run.enqueue(nullptr, nullptr, inputs, outputs, nullptr, nullptr) == 0,
        "nothing to do is done");
    Plugin const copy(plugin->clone());
    check(Parts(*copy).run->enqueue(nullptr, nullptr, inputs, outputs, nullptr, nullptr) == 0,
        "a clone knows the sizes of the original");
    int64_t const large = 1 << 30;
    check(change({large, 4, large, large}, {large, 9, large, large}, DataType::kHALF, kLINEAR) == 0
            && run.enqueue(nullptr, nullptr, inputs, outputs, nullptr, nullptr) != 0,
        "more than a grid holds is an error");
#ifndef MISF_WITH_GPU
    float memory[72] = {};
    inputs[0] = inputs[1] = outputs[0] = memory;
    check(change({1, 4, 1, 1}, {1, 9, 1, 1}, DataType::kFLOAT, kLINEAR) == 0
            && run.enqueue(nullptr, nullptr, inputs, outputs, nullptr, nullptr) != 0,
        "a launch without a GPU is an error, not a crash");
#endif
}

} // namespace

#ifdef MISF_WITH_GPU
#include "on_gpu.h"
#else
#include "on_cpu.h"
#endif

int main(int argc, char** argv)
{
    if (argc < 2)
        return 99;
    // As Python, Triton and ONNX Runtime have it: TensorRT is loaded, but not in the default scope. (Global here for
    // checkBadFields to see which case it is in.)
    bool const withTensorRt = argc == 3;
    if (withTensorRt && dlopen(argv[2], RTLD_NOW | RTLD_GLOBAL) == nullptr)
        return std::printf("FAIL %s\n", dlerror()), 98;
    void* const library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr)
        return std::printf("FAIL %s\n", dlerror()), 97;
    auto const getCreators =
        reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
    auto const setLoggerFinder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
    if (getCreators == nullptr || setLoggerFinder == nullptr)
        return std::printf("FAIL entry points\n"), 96;
    setLoggerFinder(&gFinder);
    int32_t count = 0;
    IPluginCreatorInterface* const* const creators = getCreators(count);
    check(count == 1, "one creator");
    auto& creator = static_cast<IPluginCreatorV3One&>(*creators[0]);
    if (argc > 3)
        return runOnBuffers(creator, argv + 2);
    checkCreator(creator);
    checkBadFields(creator);
    checkBuild(creator);
    checkFormats(creator);
    checkSerialisation(creator);
    checkRuntime(creator);
    setLoggerFinder(nullptr);
    check(make(creator, 4, 1) == nullptr, "a refusal without a logger");
    return gFailed;
}
