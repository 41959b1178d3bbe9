#include "plugin.h"

#include "log.h"

#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <new>

#ifndef MISF_VERSION_TEXT
#define MISF_VERSION_TEXT "unknown"
#endif

namespace misf
{
namespace
{

using namespace nvinfer1;

constexpr char kNAME[] = "DynamicFilter";
constexpr char kVERSION[] = "1";
constexpr char kKERNEL_SIZE[] = "kernel_size";
constexpr char kSHARE[] = "share";
constexpr int32_t kMAX_KERNEL_SIZE = 101; // larger values are mistakes; the limit keeps K * K small
constexpr int32_t kINPUTS = 2;
constexpr int32_t kOUTPUTS = 1;

// Reads an integer field; returns false, and logs an error, if it is not an integer.
bool readInteger(PluginField const& field, int32_t& value) noexcept
{
    if (field.data == nullptr || field.length != 1)
    {
        logError("attribute %s must be one integer, got %d", field.name, static_cast<int>(field.length));
        return false;
    }
    if (field.type == PluginFieldType::kINT32)
    {
        value = *static_cast<int32_t const*>(field.data);
        return true;
    }
    if (field.type == PluginFieldType::kINT64)
    {
        int64_t const wide = *static_cast<int64_t const*>(field.data);
        value = static_cast<int32_t>(wide);
        if (wide == value)
            return true;
    }
    logError("attribute %s must be an int32, got field type %d", field.name, static_cast<int>(field.type));
    return false;
}

bool readAttributes(PluginFieldCollection const& fields, Attributes& attributes) noexcept
{
    for (int32_t i = 0; i < fields.nbFields; ++i)
    {
        PluginField const& field = fields.fields[i];
        if (std::strcmp(field.name, kKERNEL_SIZE) == 0 && !readInteger(field, attributes.kernelSize))
            return false;
        if (std::strcmp(field.name, kSHARE) == 0 && !readInteger(field, attributes.share))
            return false;
    }
    if (attributes.kernelSize < 1 || attributes.kernelSize % 2 == 0 || attributes.kernelSize > kMAX_KERNEL_SIZE)
    {
        logError("kernel_size must be odd and from 1 to %d, got %d", kMAX_KERNEL_SIZE, attributes.kernelSize);
        return false;
    }
    if (attributes.share < 1)
    {
        logError("share must be positive, got %d", attributes.share);
        return false;
    }
    return true;
}

bool isServed(PluginTensorDesc const& tensor) noexcept
{
    return (tensor.format == TensorFormat::kLINEAR
               && (tensor.type == DataType::kFLOAT || tensor.type == DataType::kHALF))
        || (tensor.format == TensorFormat::kHWC8 && tensor.type == DataType::kHALF);
}

bool fitsInt(int64_t value) noexcept { return value >= 0 && value <= std::numeric_limits<int32_t>::max(); }

} // namespace

// ---- the plugin -----------------------------------------------------------------------------------------------------

DynamicFilterPlugin::DynamicFilterPlugin(Attributes const& attributes) noexcept
    : mAttributes(attributes)
    , mFields{PluginField{kKERNEL_SIZE, &mAttributes.kernelSize, PluginFieldType::kINT32, 1},
          PluginField{kSHARE, &mAttributes.share, PluginFieldType::kINT32, 1}}
    , mFieldCollection{2, mFields}
{
    // Cached timings of another version's kernels must not be used.
    std::snprintf(mTimingCacheId, sizeof(mTimingCacheId), "kernel_size=%d,share=%d,misf=%s", attributes.kernelSize,
        attributes.share, MISF_VERSION_TEXT);
}

IPluginCapability* DynamicFilterPlugin::getCapabilityInterface(PluginCapabilityType type) noexcept
{
    switch (type)
    {
    case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
    case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
    case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

IPluginV3* DynamicFilterPlugin::clone() noexcept
{
    auto* const copy = new (std::nothrow) DynamicFilterPlugin(mAttributes);
    if (copy == nullptr)
    {
        logError("out of memory");
        return nullptr;
    }
    copy->mCall = mCall;
    copy->mReady = mReady;
    return copy;
}

AsciiChar const* DynamicFilterPlugin::getPluginName() const noexcept { return kNAME; }
AsciiChar const* DynamicFilterPlugin::getPluginVersion() const noexcept { return kVERSION; }
AsciiChar const* DynamicFilterPlugin::getPluginNamespace() const noexcept { return kNAMESPACE; }
int32_t DynamicFilterPlugin::getNbOutputs() const noexcept { return kOUTPUTS; }
char const* DynamicFilterPlugin::getTimingCacheID() noexcept { return mTimingCacheId; }
PluginFieldCollection const* DynamicFilterPlugin::getFieldsToSerialize() noexcept { return &mFieldCollection; }

bool DynamicFilterPlugin::channelsAgree(int64_t channels, int64_t tapChannels) const noexcept
{
    if (channels < 0 || tapChannels < 0)
        return true;
    int64_t const area = static_cast<int64_t>(mAttributes.kernelSize) * mAttributes.kernelSize;
    int64_t const taps = fitsInt(channels) ? channels * area : -1;
    if (taps >= 0 && taps % mAttributes.share == 0 && taps / mAttributes.share == tapChannels && fitsInt(tapChannels))
        return true;
    logError("taps must have C*K*K/share channels, with C = %lld, K = %d, share = %d; got %lld",
        static_cast<long long>(channels), mAttributes.kernelSize, mAttributes.share,
        static_cast<long long>(tapChannels));
    return false;
}

// Called before tactics are timed, once per profile; sizes that the profile leaves open are -1.
int32_t DynamicFilterPlugin::configurePlugin(
    DynamicPluginTensorDesc const* in, int32_t nbInputs, DynamicPluginTensorDesc const*, int32_t nbOutputs) noexcept
{
    if (nbInputs != kINPUTS || nbOutputs != kOUTPUTS)
    {
        logError("expected 2 inputs (features, taps) and 1 output, got %d and %d", nbInputs, nbOutputs);
        return -1;
    }
    if (in[0].desc.dims.nbDims != 4 || in[1].desc.dims.nbDims != 4)
    {
        logError("features and taps must be N,C,H,W, got %d and %d dimensions",
            static_cast<int>(in[0].desc.dims.nbDims), static_cast<int>(in[1].desc.dims.nbDims));
        return -1;
    }
    return channelsAgree(in[0].desc.dims.d[1], in[1].desc.dims.d[1]) ? 0 : -1;
}

int32_t DynamicFilterPlugin::getOutputDataTypes(
    DataType* outputTypes, int32_t nbOutputs, DataType const* inputTypes, int32_t nbInputs) const noexcept
{
    if (nbOutputs != kOUTPUTS || nbInputs != kINPUTS)
        return -1;
    outputTypes[0] = inputTypes[0];
    return 0;
}

int32_t DynamicFilterPlugin::getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t,
    DimsExprs* outputs, int32_t nbOutputs, IExprBuilder&) noexcept
{
    if (nbInputs != kINPUTS || nbOutputs != kOUTPUTS || inputs[0].nbDims != 4 || inputs[1].nbDims != 4)
    {
        logError("expected features and taps, both N,C,H,W");
        return -1;
    }
    outputs[0] = inputs[0];
    return 0;
}

// Called for one tensor after the other; those after `pos` are not set yet.
bool DynamicFilterPlugin::supportsFormatCombination(
    int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept
{
    if (nbInputs != kINPUTS || nbOutputs != kOUTPUTS || pos < 0 || pos >= kINPUTS + kOUTPUTS)
        return false;
    PluginTensorDesc const& tensor = inOut[pos].desc;
    if (pos > 0)
        return tensor.type == inOut[0].desc.type && tensor.format == inOut[0].desc.format;
    return isServed(tensor);
}

// Called before enqueue whenever a size has changed; all sizes are known here.
int32_t DynamicFilterPlugin::onShapeChange(
    PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const* out, int32_t nbOutputs) noexcept
{
    mReady = false;
    if (nbInputs != kINPUTS || nbOutputs != kOUTPUTS)
        return -1;
    Dims const& features = in[0].dims;
    Dims const& taps = in[1].dims;
    if (features.nbDims != 4 || taps.nbDims != 4)
    {
        logError("features and taps must be N,C,H,W");
        return -1;
    }
    for (int32_t i : {0, 2, 3})
    {
        if (features.d[i] != taps.d[i] || features.d[i] != out[0].dims.d[i] || !fitsInt(features.d[i]))
        {
            logError("features, taps and output must agree in N, H and W; dimension %d is %lld, %lld and %lld",
                static_cast<int>(i), static_cast<long long>(features.d[i]), static_cast<long long>(taps.d[i]),
                static_cast<long long>(out[0].dims.d[i]));
            return -1;
        }
    }
    if (!channelsAgree(features.d[1], taps.d[1]) || features.d[1] < 0 || out[0].dims.d[1] != features.d[1])
        return -1;
    for (PluginTensorDesc const& tensor : {in[0], in[1], out[0]})
    {
        if (tensor.type != in[0].type || tensor.format != in[0].format || !isServed(tensor))
        {
            logError("features, taps and output must all be linear float, linear half or HWC8 half");
            return -1;
        }
    }

    mCall.storage = in[0].type == DataType::kFLOAT ? Storage::kFLOAT : Storage::kHALF;
    mCall.format = in[0].format == TensorFormat::kHWC8 ? Format::kHWC8 : Format::kLINEAR;
    mCall.batch = static_cast<int>(features.d[0]);
    mCall.channels = static_cast<int>(features.d[1]);
    mCall.height = static_cast<int>(features.d[2]);
    mCall.width = static_cast<int>(features.d[3]);
    mCall.kernelSize = mAttributes.kernelSize;
    mCall.share = mAttributes.share;
    mReady = true;
    return 0;
}

// Called for every inference; may be captured into a CUDA graph.
int32_t DynamicFilterPlugin::enqueue(PluginTensorDesc const*, PluginTensorDesc const*, void const* const* inputs,
    void* const* outputs, void*, cudaStream_t stream) noexcept
{
    if (!mReady)
    {
        logError("enqueue was called before a valid onShapeChange");
        return -1;
    }
    cudaError_t const error = launchForward(mCall, inputs[0], inputs[1], outputs[0], stream);
    if (error != cudaSuccess)
    {
        logError("launch failed: %s (N,C,H,W = %d,%d,%d,%d)", cudaGetErrorString(error), mCall.batch, mCall.channels,
            mCall.height, mCall.width);
        return -1;
    }
    return 0;
}

// Every execution context gets its own copy of the plugin, since mCall belongs to one context.
IPluginV3* DynamicFilterPlugin::attachToContext(IPluginResourceContext*) noexcept { return clone(); }

// ---- the creator ----------------------------------------------------------------------------------------------------

DynamicFilterCreator::DynamicFilterCreator() noexcept
    : mFields{PluginField{kKERNEL_SIZE, nullptr, PluginFieldType::kINT32, 1},
          PluginField{kSHARE, nullptr, PluginFieldType::kINT32, 1}}
    , mFieldCollection{2, mFields}
{
}

IPluginV3* DynamicFilterCreator::createPlugin(
    AsciiChar const* name, PluginFieldCollection const* fc, TensorRTPhase) noexcept
{
    Attributes attributes;
    if (fc != nullptr && !readAttributes(*fc, attributes))
    {
        logError("layer %s was not created", name == nullptr ? "(no name)" : name);
        return nullptr;
    }
    auto* const plugin = new (std::nothrow) DynamicFilterPlugin(attributes);
    if (plugin == nullptr)
        logError("out of memory");
    return plugin;
}

PluginFieldCollection const* DynamicFilterCreator::getFieldNames() noexcept { return &mFieldCollection; }
AsciiChar const* DynamicFilterCreator::getPluginName() const noexcept { return kNAME; }
AsciiChar const* DynamicFilterCreator::getPluginVersion() const noexcept { return kVERSION; }
AsciiChar const* DynamicFilterCreator::getPluginNamespace() const noexcept { return kNAMESPACE; }

DynamicFilterCreator& creator() noexcept
{
    static DynamicFilterCreator instance;
    return instance;
}

} // namespace misf
