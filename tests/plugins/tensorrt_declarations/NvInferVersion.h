// The version that the declarations beside this file follow; see NvInferRuntime.h.
#pragma once

#define NV_TENSORRT_MAJOR 11
#define NV_TENSORRT_MINOR 0
