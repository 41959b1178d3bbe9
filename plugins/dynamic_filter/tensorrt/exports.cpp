// The two functions that TensorRT looks up in a plugin library when it loads it (IPluginRegistry::loadLibrary, trtexec
// --dynamicPlugins). Nothing else is exported. library.py reads what the library was built for from the file, section
// .misf_info, without running it.
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
