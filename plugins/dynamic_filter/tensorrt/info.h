// What this library was built for: a line of JSON in a separate section, which misf-plugin info reads from the file.
#pragma once

#include <NvInferVersion.h>
#include <cuda_runtime_api.h>

#define MISF_INFO_TEXT_OF(value) #value
#define MISF_INFO_TEXT(value) MISF_INFO_TEXT_OF(value)

#ifndef MISF_ARCHITECTURES
#define MISF_ARCHITECTURES unknown
#endif
#ifndef MISF_VERSION
#define MISF_VERSION unknown
#endif
#ifndef MISF_KIND
#define MISF_KIND unknown
#endif

// clang-format off
__attribute__((section(".misf_info"), used)) static char const kMISF_INFO[]
    = "misf-plugin {\"misf\": \"" MISF_INFO_TEXT(MISF_VERSION) "\", \"kind\": \"" MISF_INFO_TEXT(MISF_KIND)
      "\", \"tensorrt\": \"" MISF_INFO_TEXT(NV_TENSORRT_MAJOR) "." MISF_INFO_TEXT(NV_TENSORRT_MINOR)
      "\", \"cuda\": " MISF_INFO_TEXT(CUDART_VERSION)
      ", \"architectures\": \"" MISF_INFO_TEXT(MISF_ARCHITECTURES) "\"}";
// clang-format on
