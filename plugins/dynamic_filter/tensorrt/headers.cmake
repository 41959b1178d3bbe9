# Sets TENSORRT_INCLUDE_DIR to a folder with NvInferRuntime.h, and MISF_TRT_MAJOR, MISF_TRT_MINOR to its version.
#
# TensorRT's pip packages have no headers. The first of these that exists is used:
#   1. -DTENSORRT_ROOT (or TRT_ROOT): an unpacked TensorRT, or a folder of headers
#   2. -DMISF_FETCH_TRT_HEADERS=ON with -DMISF_TRT_VERSION=10.3: NVIDIA's repository, at a pinned commit
#   3. TENSORRT_ROOT or TRT_ROOT in the environment
#   4. the CMake package of TensorRT 11.2 and later
#   5. the system's, in /usr/include, from JetPack or the deb packages (libnvinfer-headers-dev)

set(MISF_TRT_VERSION "" CACHE STRING "Version of the TensorRT headers to fetch, major.minor")
option(MISF_FETCH_TRT_HEADERS "Fetch TensorRT's headers from NVIDIA's repository" OFF)
set(MISF_TRT_REPOSITORY "https://github.com/NVIDIA/TensorRT.git" CACHE STRING "Where to fetch from")
set(MISF_TRT_COMMIT "" CACHE STRING "Commit to fetch; by default the one listed below for MISF_TRT_VERSION")

set(misf_commits
  "10.3=c5b9de37f7ef9034e2efc621c664145c7c12436e" "10.4=866548c95c6d7113a4c5f6a440022b2d216c04cf"
  "10.5=c8a50438f6929470800c22088480784b254a7ac0" "10.6=c468d67760e066f4d85c3e7f2fa89aa221fac83f"
  "10.7=17003e43da9858f574e3a4a1d795fcf218862fe3" "10.8=64e56ab6cbe95c8220d80bc7ff10ccf61935759a"
  "10.9=8c6d69ddec0b2feff12f55472dc5d55cb6861d53" "10.10=665cfbe8623652e706ce7e616a3db42dbff94f5f"
  "10.11=9255eb39e6642787828a4c1f7fc1d09fe004e7a2" "10.12=6d178ce8c736c4397317b24205fb4333218e5c89"
  "10.13=94e2b9ef6d2cce74c76cdad499cca36cc4949197" "10.14=3b4ddc1d45f11167f2ea53dc6046bba8df800e2d"
  "10.15=9973b2f4ab5c0d0055e9d36cd94a5692f8f8da1f" "10.16=52399f555c2f80cb690a4a558b604e1a5f227e7c"
  "11.0=771d8efdf7f9d7b1eeb0864eb05d4dd8a7755bb5" "11.1=82d1dca801c8318a5605399d5240780d0679e4e1")

function(misf_fetch_headers target)
  set(commit "${MISF_TRT_COMMIT}")
  foreach(pair IN LISTS misf_commits)
    if(NOT commit AND pair MATCHES "^${MISF_TRT_VERSION}=(.+)$")
      set(commit "${CMAKE_MATCH_1}")
    endif()
  endforeach()
  if(NOT commit)
    message(FATAL_ERROR "MISF_TRT_VERSION is '${MISF_TRT_VERSION}': expected 10.3 to 10.16, 11.0 or 11.1; "
      "for another version set TENSORRT_ROOT")
  endif()
  find_program(GIT_EXECUTABLE git REQUIRED)
  set(folder "${CMAKE_CURRENT_BINARY_DIR}/tensorrt-headers")
  if(NOT EXISTS "${folder}/include/NvInferRuntime.h")
    message(STATUS "Fetching TensorRT headers: ${MISF_TRT_REPOSITORY} ${commit}")
    file(REMOVE_RECURSE "${folder}")
    # Only include/ of one commit: a few hundred kilobytes instead of the repository.
    foreach(step
        "init;--quiet;${folder}"
        "-C;${folder};fetch;--quiet;--depth=1;--filter=blob:none;${MISF_TRT_REPOSITORY};${commit}"
        "-C;${folder};config;remote.origin.url;${MISF_TRT_REPOSITORY}"
        "-C;${folder};config;remote.origin.promisor;true"
        "-C;${folder};checkout;--quiet;${commit};--;include")
      execute_process(COMMAND "${GIT_EXECUTABLE}" ${step} RESULT_VARIABLE failed ERROR_VARIABLE reason)
      if(failed)
        message(FATAL_ERROR "could not fetch TensorRT's headers (git ${step}): ${reason}")
      endif()
    endforeach()
  endif()
  set(${target} "${folder}/include" PARENT_SCOPE)
endfunction()

set(roots "${TENSORRT_ROOT}" "${TRT_ROOT}")
if(NOT MISF_FETCH_TRT_HEADERS)
  list(APPEND roots "$ENV{TENSORRT_ROOT}" "$ENV{TRT_ROOT}")
endif()
list(REMOVE_ITEM roots "")
if(roots)
  list(GET roots 0 root)
  file(GLOB candidates
    "${root}" "${root}/include" "${root}/targets/*/include" "${root}/include/${CMAKE_LIBRARY_ARCHITECTURE}")
  find_path(TENSORRT_INCLUDE_DIR NvInferRuntime.h PATHS ${candidates} NO_DEFAULT_PATH)
  if(NOT TENSORRT_INCLUDE_DIR)
    message(FATAL_ERROR "no NvInferRuntime.h in ${root} (TENSORRT_ROOT), nor in its include or targets/*/include")
  endif()
elseif(MISF_FETCH_TRT_HEADERS)
  misf_fetch_headers(TENSORRT_INCLUDE_DIR)
else()
  find_package(TensorRT-Enterprise CONFIG QUIET)
  set(from_package "")
  if(TARGET TensorRT::nvinfer)
    get_target_property(from_package TensorRT::nvinfer INTERFACE_INCLUDE_DIRECTORIES)
  endif()
  find_path(TENSORRT_INCLUDE_DIR NvInferRuntime.h HINTS ${from_package} ${TensorRT_INCLUDE_DIRS})
  if(NOT TENSORRT_INCLUDE_DIR)
    message(FATAL_ERROR "TensorRT's headers were not found. Do one of these: give an unpacked TensorRT with "
      "--tensorrt-root or TENSORRT_ROOT; install TensorRT 11.2 or later with its CMake package; install "
      "libnvinfer-headers-dev (JetPack: nvidia-jetpack); or fetch them: misf-plugin build --fetch-headers 10.3, "
      "in CMake -DMISF_FETCH_TRT_HEADERS=ON -DMISF_TRT_VERSION=10.3")
  endif()
endif()

# The preprocessor reads the version, because the macros are numbers in some versions and other macros in others.
set(probe "${CMAKE_CURRENT_BINARY_DIR}/version_probe.cpp")
file(WRITE "${probe}" "#include <NvInferVersion.h>\nmisf_probe NV_TENSORRT_MAJOR NV_TENSORRT_MINOR\n")
execute_process(COMMAND "${CMAKE_CXX_COMPILER}" -E -P "-I${TENSORRT_INCLUDE_DIR}" "${probe}" OUTPUT_VARIABLE expanded)
if(NOT expanded MATCHES "misf_probe ([0-9]+) ([0-9]+)")
  message(FATAL_ERROR "could not read TensorRT's version from ${TENSORRT_INCLUDE_DIR}/NvInferVersion.h")
endif()
set(MISF_TRT_MAJOR "${CMAKE_MATCH_1}")
set(MISF_TRT_MINOR "${CMAKE_MATCH_2}")
if("${MISF_TRT_MAJOR}.${MISF_TRT_MINOR}" VERSION_LESS 10.3)
  message(FATAL_ERROR "the plugin needs TensorRT 10.3 or later, got ${MISF_TRT_MAJOR}.${MISF_TRT_MINOR} from "
    "${TENSORRT_INCLUDE_DIR}")
endif()
message(STATUS "TensorRT ${MISF_TRT_MAJOR}.${MISF_TRT_MINOR} headers: ${TENSORRT_INCLUDE_DIR}")
