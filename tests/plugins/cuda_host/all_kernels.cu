// Every kernel that ships, for the compile test: the TensorRT plugin's, and those that cuda.py compiles on demand.
#include "launch.cuh"

namespace misf
{

template <typename T> Kernel<T> any(Pass pass, Layout layout, const Plan& plan)
{
    const bool planar = layout == Layout::kPLANAR;
    switch (pass)
    {
    case Pass::kFORWARD:
        return planar ? kernelOf<Pass::kFORWARD, Layout::kPLANAR, T>(plan)
                      : kernelOf<Pass::kFORWARD, Layout::kCHANNELS_LAST, T>(plan);
    case Pass::kGRAD_TAPS:
        return planar ? kernelOf<Pass::kGRAD_TAPS, Layout::kPLANAR, T>(plan)
                      : kernelOf<Pass::kGRAD_TAPS, Layout::kCHANNELS_LAST, T>(plan);
    default:
        return planar ? kernelOf<Pass::kGRAD_FEATURES, Layout::kPLANAR, T>(plan)
                      : kernelOf<Pass::kGRAD_FEATURES, Layout::kCHANNELS_LAST, T>(plan);
    }
}

template Kernel<float> any<float>(Pass, Layout, const Plan&);
template Kernel<__half> any<__half>(Pass, Layout, const Plan&);
template Kernel<__nv_bfloat16> any<__nv_bfloat16>(Pass, Layout, const Plan&);

} // namespace misf
