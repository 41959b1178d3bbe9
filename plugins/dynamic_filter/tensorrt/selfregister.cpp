// The library for programs that only dlopen it: Triton's plugins=, ONNX Runtime's trt_extra_plugin_lib_paths, trtexec
// --staticPlugins. It registers its creator when it is loaded, so TensorRT must be loaded before it. Do not pass it to
// loadLibrary, which refuses a creator that is already registered; use the other library there.
#include "info.h"
#include "log.h"
#include "plugin.h"

namespace
{

__attribute__((constructor)) void registerCreator() noexcept
{
    auto const registry =
        reinterpret_cast<nvinfer1::IPluginRegistry* (*)()>(misf::tensorRtFunction("getPluginRegistry"));
    if (registry == nullptr)
    {
        misf::logError("not registered: load TensorRT %d before this library", NV_TENSORRT_MAJOR);
        return;
    }
    if (!registry()->registerCreator(misf::creator(), misf::kNAMESPACE))
        misf::logError("not registered: TensorRT already has a plugin of this name");
}

} // namespace
