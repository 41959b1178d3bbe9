// What NvInferRuntime.h beside this file declares, stated a second time: it must compile against that header and
// against NVIDIA's. Run, it prints each virtual function's place in its class's table, which must be the same for both.
#include <NvInferRuntime.h>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <type_traits>

using namespace nvinfer1;

namespace
{

template <typename Enum> constexpr int32_t number(Enum value)
{
    static_assert(std::is_same_v<std::underlying_type_t<Enum>, int32_t>);
    return static_cast<int32_t>(value);
}

static_assert(number(DataType::kFLOAT) == 0 && number(DataType::kHALF) == 1 && number(DataType::kINT8) == 2
    && number(DataType::kINT32) == 3 && number(DataType::kBOOL) == 4 && number(DataType::kUINT8) == 5
    && number(DataType::kFP8) == 6 && number(DataType::kBF16) == 7 && number(DataType::kINT64) == 8
    && number(DataType::kINT4) == 9);
static_assert(number(TensorFormat::kLINEAR) == 0 && number(TensorFormat::kHWC8) == 2);
static_assert(number(PluginFieldType::kFLOAT32) == 1 && number(PluginFieldType::kINT32) == 5
    && number(PluginFieldType::kUNKNOWN) == 8 && number(PluginFieldType::kINT64) == 10);
static_assert(number(TensorRTPhase::kBUILD) == 0 && number(TensorRTPhase::kRUNTIME) == 1);
static_assert(number(PluginCapabilityType::kCORE) == 0 && number(PluginCapabilityType::kBUILD) == 1
    && number(PluginCapabilityType::kRUNTIME) == 2);
static_assert(number(APILanguage::kCPP) == 0 && number(ILogger::Severity::kERROR) == 1);

static_assert(sizeof(Dims) == 72 && offsetof(Dims, nbDims) == 0 && offsetof(Dims, d) == 8 && Dims::MAX_DIMS == 8);
static_assert(std::is_same_v<decltype(Dims::d), int64_t[8]>);
static_assert(sizeof(DimsExprs) == 72 && offsetof(DimsExprs, nbDims) == 0 && offsetof(DimsExprs, d) == 8);
static_assert(sizeof(PluginTensorDesc) == 88 && offsetof(PluginTensorDesc, dims) == 0
    && offsetof(PluginTensorDesc, type) == 72 && offsetof(PluginTensorDesc, format) == 76
    && offsetof(PluginTensorDesc, scale) == 80);
static_assert(sizeof(DynamicPluginTensorDesc) == 304 && offsetof(DynamicPluginTensorDesc, desc) == 0
    && offsetof(DynamicPluginTensorDesc, min) == 88 && offsetof(DynamicPluginTensorDesc, max) == 160
    && offsetof(DynamicPluginTensorDesc, opt) == 232);
static_assert(sizeof(PluginField) == 24 && offsetof(PluginField, name) == 0 && offsetof(PluginField, data) == 8
    && offsetof(PluginField, type) == 16 && offsetof(PluginField, length) == 20);
static_assert(std::is_nothrow_constructible_v<PluginField, char const*, void const*, PluginFieldType, int32_t>);
static_assert(sizeof(PluginFieldCollection) == 16 && offsetof(PluginFieldCollection, nbFields) == 0
    && offsetof(PluginFieldCollection, fields) == 8);
static_assert(sizeof(InterfaceInfo) == 16 && offsetof(InterfaceInfo, kind) == 0 && offsetof(InterfaceInfo, major) == 8
    && offsetof(InterfaceInfo, minor) == 12);

static_assert(std::is_base_of_v<IVersionedInterface, IPluginV3>
    && std::is_base_of_v<IVersionedInterface, IPluginCapability>
    && std::is_base_of_v<IVersionedInterface, IPluginCreatorInterface>
    && std::is_base_of_v<IPluginCapability, IPluginV3OneCore>
    && std::is_base_of_v<IPluginCapability, IPluginV3OneBuild>
    && std::is_base_of_v<IPluginCapability, IPluginV3OneRuntime>
    && std::is_base_of_v<IPluginCreatorInterface, IPluginCreatorV3One>);
static_assert(sizeof(IPluginV3) == sizeof(void*) && sizeof(IPluginV3OneCore) == sizeof(void*)
    && sizeof(IPluginV3OneBuild) == sizeof(void*) && sizeof(IPluginV3OneRuntime) == sizeof(void*)
    && sizeof(IPluginCreatorV3One) == sizeof(void*) && sizeof(IPluginRegistry) == sizeof(void*));
static_assert(std::has_virtual_destructor_v<IPluginV3> && std::has_virtual_destructor_v<ILogger>);

// In the Itanium C++ ABI (x86-64 here) a pointer to a virtual member function is 1 + its offset in the table.
template <typename Function> long slot(Function function)
{
    static_assert(sizeof(function) == 2 * sizeof(long));
    long words[2];
    std::memcpy(words, &function, sizeof(words));
    return (words[0] - 1) / static_cast<long>(sizeof(void*));
}

} // namespace

// A class of the interface, a function of it, and its type without the class.
#define MISF_AGREE(Class, name, Result, parameters, ...)                                                               \
    {                                                                                                                  \
        using Expected = Result(Class::*) parameters __VA_ARGS__;                                                      \
        static_assert(std::is_same_v<decltype(static_cast<Expected>(&Class::name)), Expected>);                        \
        std::printf("%s::%s %ld\n", #Class, #name, slot(static_cast<Expected>(&Class::name)));                         \
    }

int main()
{
    using Text = AsciiChar const*;
    using In = PluginTensorDesc const*;
    using DynamicIn = DynamicPluginTensorDesc const*;
    static_assert(std::is_same_v<Text, char const*>);

    MISF_AGREE(IPluginV3, getInterfaceInfo, InterfaceInfo, (), const noexcept)
    MISF_AGREE(IPluginV3, getCapabilityInterface, IPluginCapability*, (PluginCapabilityType), noexcept)
    MISF_AGREE(IPluginV3, clone, IPluginV3*, (), noexcept)
    MISF_AGREE(IPluginV3OneCore, getPluginName, Text, (), const noexcept)
    MISF_AGREE(IPluginV3OneCore, getPluginVersion, Text, (), const noexcept)
    MISF_AGREE(IPluginV3OneCore, getPluginNamespace, Text, (), const noexcept)
    MISF_AGREE(IPluginV3OneBuild, configurePlugin, int32_t, (DynamicIn, int32_t, DynamicIn, int32_t), noexcept)
    MISF_AGREE(IPluginV3OneBuild, getOutputDataTypes, int32_t, (DataType*, int32_t, DataType const*, int32_t),
        const noexcept)
    MISF_AGREE(IPluginV3OneBuild, getOutputShapes, int32_t,
        (DimsExprs const*, int32_t, DimsExprs const*, int32_t, DimsExprs*, int32_t, IExprBuilder&), noexcept)
    MISF_AGREE(IPluginV3OneBuild, supportsFormatCombination, bool, (int32_t, DynamicIn, int32_t, int32_t), noexcept)
    MISF_AGREE(IPluginV3OneBuild, getNbOutputs, int32_t, (), const noexcept)
    MISF_AGREE(IPluginV3OneBuild, getWorkspaceSize, std::size_t, (DynamicIn, int32_t, DynamicIn, int32_t),
        const noexcept)
    MISF_AGREE(IPluginV3OneBuild, getValidTactics, int32_t, (int32_t*, int32_t), noexcept)
    MISF_AGREE(IPluginV3OneBuild, getNbTactics, int32_t, (), noexcept)
    MISF_AGREE(IPluginV3OneBuild, getTimingCacheID, char const*, (), noexcept)
    MISF_AGREE(IPluginV3OneBuild, getFormatCombinationLimit, int32_t, (), noexcept)
    MISF_AGREE(IPluginV3OneBuild, getMetadataString, char const*, (), noexcept)
    MISF_AGREE(IPluginV3OneRuntime, setTactic, int32_t, (int32_t), noexcept)
    MISF_AGREE(IPluginV3OneRuntime, onShapeChange, int32_t, (In, int32_t, In, int32_t), noexcept)
    MISF_AGREE(IPluginV3OneRuntime, enqueue, int32_t,
        (In, In, void const* const*, void* const*, void*, cudaStream_t), noexcept)
    MISF_AGREE(IPluginV3OneRuntime, attachToContext, IPluginV3*, (IPluginResourceContext*), noexcept)
    MISF_AGREE(IPluginV3OneRuntime, getFieldsToSerialize, PluginFieldCollection const*, (), noexcept)
    MISF_AGREE(IPluginCreatorV3One, createPlugin, IPluginV3*, (Text, PluginFieldCollection const*, TensorRTPhase),
        noexcept)
    MISF_AGREE(IPluginCreatorV3One, getFieldNames, PluginFieldCollection const*, (), noexcept)
    MISF_AGREE(IPluginCreatorV3One, getPluginName, Text, (), const noexcept)
    MISF_AGREE(IPluginCreatorV3One, getPluginVersion, Text, (), const noexcept)
    MISF_AGREE(IPluginCreatorV3One, getPluginNamespace, Text, (), const noexcept)
#if NV_TENSORRT_MAJOR >= 11 // Their tables differ in version 10; the libraries of one major never see the other's.
    using Creators = IPluginCreatorInterface* const*;
    MISF_AGREE(ILogger, log, void, (ILogger::Severity, Text), noexcept)
    MISF_AGREE(ILoggerFinder, findLogger, ILogger*, ())
    MISF_AGREE(IPluginRegistry, registerCreator, bool, (IPluginCreatorInterface&, Text), noexcept)
    MISF_AGREE(IPluginRegistry, getAllCreators, Creators, (int32_t*), const noexcept)
    MISF_AGREE(IPluginRegistry, getAllCreatorsRecursive, Creators, (int32_t*), noexcept)
#endif
}
