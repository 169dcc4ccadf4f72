// What handlers share: the instructions in use, types of buffers, errors.
#pragma once

#include <atomic>

#include "blocks.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using quweit::Level;

namespace {

Level Best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd")) {
    return quweit::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2")) {
    return quweit::kAvx2;
  }
#endif
  return quweit::kPortable;
}

std::atomic<int> level{Best()};

Level Now() { return static_cast<Level>(level.load(std::memory_order_relaxed)); }

using Int32s = ffi::Buffer<ffi::S32>;
using Floats = ffi::Buffer<ffi::F32>;

ffi::Error Wrong(const char* what) { return ffi::Error::InvalidArgument(what); }

}  // namespace
