// Error lines of the plugin library: through TensorRT's logger where it is safe to call, to stderr elsewhere.
#pragma once

#include <NvInferRuntime.h>

namespace misf
{

// What TensorRT hands over when it loads the library; may be nullptr.
void useLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept;

// Logs one line, printf-like, cut at 500 characters.
[[gnu::format(printf, 1, 2)]] void logError(char const* format, ...) noexcept;

// Returns a function of the TensorRT that this process has loaded, if its major version is the one that this library
// was built for; else nullptr. TensorRT is looked up, never linked: the library loads with it and without it.
void* tensorRtFunction(char const* name) noexcept;

} // namespace misf
