#include "log.h"

#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <dlfcn.h>

#define MISF_TEXT_OF(value) #value
#define MISF_TEXT(value) MISF_TEXT_OF(value)

namespace misf
{
namespace
{

std::atomic<nvinfer1::ILoggerFinder*> gFinder{nullptr};

void* find(char const* name) noexcept
{
    if (void* const function = dlsym(RTLD_DEFAULT, name))
        return function;
    // Python and Triton load TensorRT outside the default scope; RTLD_NOLOAD finds it there, and never loads it.
    void* const library = dlopen("libnvinfer.so." MISF_TEXT(NV_TENSORRT_MAJOR), RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr)
        return nullptr;
    void* const function = dlsym(library, name);
    dlclose(library);
    return function;
}

} // namespace

void* tensorRtFunction(char const* name) noexcept
{
    // The virtual functions of ILogger and of the registry differ between major versions: calling another's crashes.
    auto const version = reinterpret_cast<int32_t (*)()>(find("getInferLibVersion"));
    bool const same = version != nullptr && version() / 10000 == NV_TENSORRT_MAJOR;
    return same ? find(name) : nullptr;
}

void useLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept { gFinder = finder; }

void logError(char const* format, ...) noexcept
{
    char line[512];
    va_list arguments;
    va_start(arguments, format);
    int const prefix = std::snprintf(line, sizeof(line), "DynamicFilter: ");
    std::vsnprintf(line + prefix, sizeof(line) - static_cast<std::size_t>(prefix), format, arguments);
    va_end(arguments);

    nvinfer1::ILoggerFinder* const finder = gFinder;
    if (finder != nullptr && tensorRtFunction("getInferLibVersion") != nullptr)
    {
        try // ILoggerFinder is not noexcept
        {
            if (nvinfer1::ILogger* const logger = finder->findLogger())
            {
                logger->log(nvinfer1::ILogger::Severity::kERROR, line);
                return;
            }
        }
        catch (...)
        {
        }
    }
    std::fprintf(stderr, "misf plugin: %s\n", line);
}

} // namespace misf
