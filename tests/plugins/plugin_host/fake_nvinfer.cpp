// Stands in for libnvinfer in tests of the plugin library: a version, and a registry that counts registrations.
#include <NvInferRuntime.h>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace
{

using namespace nvinfer1;

class Registry final : public IPluginRegistry
{
public:
#if NV_TENSORRT_MAJOR < 11
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
    bool registerCreator(IPluginCreator&, AsciiChar const* const) noexcept override { std::abort(); }
    IPluginCreator* const* getPluginCreatorList(int32_t* const) const noexcept override { std::abort(); }
    IPluginCreator* getPluginCreator(
        AsciiChar const* const, AsciiChar const* const, AsciiChar const* const) noexcept override
    {
        std::abort();
    }
    bool deregisterCreator(IPluginCreator const&) noexcept override { std::abort(); }
#endif
#if NV_TENSORRT_MAJOR * 100 + NV_TENSORRT_MINOR >= 1010
    IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t* const) noexcept override { std::abort(); }
#endif
    void setErrorRecorder(IErrorRecorder* const) noexcept override { std::abort(); }
    IErrorRecorder* getErrorRecorder() const noexcept override { std::abort(); }
    bool isParentSearchEnabled() const override { std::abort(); }
    void setParentSearchEnabled(bool const) override { std::abort(); }
    PluginLibraryHandle loadLibrary(AsciiChar const*) noexcept override { std::abort(); }
    void deregisterLibrary(PluginLibraryHandle) noexcept override { std::abort(); }
    IPluginCreatorInterface* const* getAllCreators(int32_t* const) const noexcept override { std::abort(); }
    IPluginCreatorInterface* getCreator(
        AsciiChar const* const, AsciiChar const* const, AsciiChar const* const) noexcept override
    {
        std::abort();
    }
    bool deregisterCreator(IPluginCreatorInterface const&) noexcept override { std::abort(); }
    IPluginResource* acquirePluginResource(AsciiChar const*, IPluginResource*) noexcept override { std::abort(); }
    int32_t releasePluginResource(AsciiChar const*) noexcept override { std::abort(); }

    bool registerCreator(IPluginCreatorInterface& creator, AsciiChar const* const pluginNamespace) noexcept override
    {
        auto& v3 = static_cast<IPluginCreatorV3One&>(creator);
        bool const right = std::strcmp(v3.getPluginName(), "DynamicFilter") == 0
            && std::strcmp(v3.getPluginVersion(), "1") == 0 && std::strcmp(pluginNamespace, "misf") == 0;
        mCount += right ? 1 : 100;
        return true;
    }

    int mCount{0};
};

Registry gRegistry;

} // namespace

extern "C" nvinfer1::IPluginRegistry* getPluginRegistry() { return &gRegistry; }
extern "C" int32_t getInferLibVersion()
{
    char const* const major = std::getenv("MISF_FAKE_MAJOR");
    return (major == nullptr ? NV_TENSORRT_MAJOR : std::atoi(major)) * 10000 + NV_TENSORRT_MINOR * 100;
}
extern "C" int misf_fake_registrations() { return gRegistry.mCount; }
