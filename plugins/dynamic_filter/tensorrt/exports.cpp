// The two functions that TensorRT looks up in a plugin library it is told to load (IPluginRegistry::loadLibrary,
// trtexec --dynamicPlugins). Nothing else is exported. What the library was built for can be read from the file,
// without running it: section .misf_info, see library.py.
#include "info.h"
#include "log.h"
#include "plugin.h"

#define MISF_EXPORT extern "C" __attribute__((visibility("default")))

MISF_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators)
{
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&misf::creator()};
    nbCreators = 1;
    return creators;
}

MISF_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { misf::useLoggerFinder(finder); }
