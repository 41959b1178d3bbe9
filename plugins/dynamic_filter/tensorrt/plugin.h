// TensorRT plugin DynamicFilter, version "1", namespace "misf": IPluginV3 around kernel.cuh, for TensorRT 10.3 to 11.x.
//
// Input 0    features  N, C, H, W
// Input 1    taps      N, M, H, W with M = C * kernel_size^2 / share
// Output 0             N, C, H, W, filtered (definition: op.py)
// Attributes kernel_size (kINT32, odd, default 3), share (kINT32, default 1; divides C * kernel_size^2)
// Types      all three tensors kLINEAR kFLOAT, kLINEAR kHALF, or kHWC8 kHALF; sums are always float32
// Shapes     all dynamic except C and M, which are related by the attributes
//
// One source serves both major versions because it uses only what they share: the output has the shape of an input, so
// that no expressions are built, and the plugin never calls the registry. Nothing throws: memory comes from
// new (std::nothrow), text from snprintf.
#pragma once

#include "../kernels/launch.h"

#include <NvInferRuntime.h>
#include <cstdint>

namespace misf
{

struct Attributes
{
    int32_t kernelSize{3};
    int32_t share{1};
};

class DynamicFilterPlugin final : public nvinfer1::IPluginV3,
                                  public nvinfer1::IPluginV3OneCore,
                                  public nvinfer1::IPluginV3OneBuild,
                                  public nvinfer1::IPluginV3OneRuntime
{
public:
    explicit DynamicFilterPlugin(Attributes const& attributes) noexcept;
    DynamicFilterPlugin(DynamicFilterPlugin const&) = delete; // mFields points into the object; clone() makes a new one

    // IPluginV3: TensorRT requests the three parts below, and clones the plugin into networks and engines.
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    // IPluginV3OneCore
    nvinfer1::AsciiChar const* getPluginName() const noexcept override;
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override;
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override;

    // IPluginV3OneBuild: called while an engine is built.
    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* out, int32_t nbOutputs) noexcept override;
    int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs, nvinfer1::DataType const* inputTypes,
        int32_t nbInputs) const noexcept override;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs, nvinfer1::DimsExprs const* shapeInputs,
        int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
        nvinfer1::IExprBuilder& exprBuilder) noexcept override;
    bool supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
        int32_t nbOutputs) noexcept override;
    int32_t getNbOutputs() const noexcept override;
    char const* getTimingCacheID() noexcept override;

    // IPluginV3OneRuntime: called while an engine runs (and while the builder times tactics).
    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs, nvinfer1::PluginTensorDesc const* out,
        int32_t nbOutputs) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const* outputDesc,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

private:
    // Returns whether the taps have the number of channels that C features need, and logs an error if not. A size of -1
    // is not known yet and is accepted.
    bool channelsAgree(int64_t channels, int64_t tapChannels) const noexcept;

    Attributes const mAttributes;
    Call mCall{};       // set by onShapeChange
    bool mReady{false}; // whether mCall is set
    char mTimingCacheId[128];
    nvinfer1::PluginField mFields[2];
    nvinfer1::PluginFieldCollection mFieldCollection;
};

// Makes plugins from fields: those of an ONNX node when a network is built, and those written by getFieldsToSerialize()
// when an engine is loaded. They have the same names, so that the same code serves both.
class DynamicFilterCreator final : public nvinfer1::IPluginCreatorV3One
{
public:
    DynamicFilterCreator() noexcept;

    // Returns nullptr, and logs why, if the fields are not valid.
    nvinfer1::IPluginV3* createPlugin(nvinfer1::AsciiChar const* name, nvinfer1::PluginFieldCollection const* fc,
        nvinfer1::TensorRTPhase phase) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override;
    nvinfer1::AsciiChar const* getPluginName() const noexcept override;
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override;
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override;

private:
    nvinfer1::PluginField mFields[2];
    nvinfer1::PluginFieldCollection mFieldCollection;
};

// The library's only creator.
DynamicFilterCreator& creator() noexcept;

constexpr char kNAMESPACE[] = "misf";

} // namespace misf
