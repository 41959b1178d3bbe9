// Error messages of the plugin library: through TensorRT's logger if it is safe to call, else to stderr.
#pragma once

#include <NvInferRuntime.h>

namespace misf
{

// TensorRT passes this when it loads the library; may be nullptr.
void useLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept;

// Logs one line, formatted as by printf and cut at 500 characters.
[[gnu::format(printf, 1, 2)]] void logError(char const* format, ...) noexcept;

// Returns a function of the TensorRT that this process has loaded, or nullptr if there is none or its major version is
// not the one that this library was built for. TensorRT is looked up, not linked: the library also loads without it.
void* tensorRtFunction(char const* name) noexcept;

} // namespace misf
