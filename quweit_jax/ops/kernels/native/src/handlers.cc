// What XLA calls. Shapes and dtypes are what `calls.py` gives; they are checked all the same.
#include "glu.h"
#include "ternary.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using quweit::Level;
using quweit::Packed;

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

using Int8s = ffi::Buffer<ffi::S8>;
using Int32s = ffi::Buffer<ffi::S32>;
using Words = ffi::Buffer<ffi::U32>;

bool IsPacked(const Words& words, size_t inputs, size_t outputs) {
  auto d = words.dimensions();
  return d.size() == 3 && d[1] == static_cast<int64_t>((inputs + 15) / 16) && d[2] % 16 == 0 &&
         static_cast<size_t>(d[0] * d[2]) >= outputs;
}

Packed PackedOf(const Words& words) {
  auto d = words.dimensions();
  return {words.typed_data(), static_cast<size_t>(d[0]), static_cast<size_t>(d[1]),
          static_cast<size_t>(d[2])};
}

ffi::Error Wrong(const char* what) { return ffi::Error::InvalidArgument(what); }

ffi::Error Ternary(ffi::ThreadPool pool, Int8s x, Words weights, ffi::Result<Int32s> out) {
  auto in = x.dimensions(), to = out->dimensions();
  if (in.size() != 2 || to.size() != 2 || in[0] != to[0] || !IsPacked(weights, in[1], to[1])) {
    return Wrong("ternary: shapes do not belong together");
  }
  quweit::TernarySums(pool, Now(), x.typed_data(), in[0], in[1], PackedOf(weights), to[1],
                      out->typed_data());
  return ffi::Error::Success();
}

ffi::Error Glu(ffi::ThreadPool pool, Int8s x, Words mix, Int32s offsets, Int8s tables, Words total,
               ffi::Result<Int32s> out, int32_t step) {
  auto in = x.dimensions(), to = out->dimensions(), of = tables.dimensions();
  const size_t units = offsets.element_count() / 2;
  int bits = 0;
  if (of.size() == 3) {
    while ((int64_t{1} << bits) < of[1]) ++bits;
  }
  if (in.size() != 2 || to.size() != 2 || in[0] != to[0] || of.size() != 3 || bits < 1 ||
      of[1] != int64_t{1} << bits || of[1] != of[2] || of[0] < 1 || units % of[0] || units % 16 ||
      units == 0 || step < 1 || step >= 1 << 15 || !IsPacked(mix, in[1], 2 * units) ||
      !IsPacked(total, units, to[1])) {
    return Wrong("glu: shapes do not belong together");
  }
  const quweit::Gate gate = {offsets.typed_data(), tables.typed_data(), units,
                             static_cast<size_t>(of[0]), bits, step};
  quweit::GluSums(pool, Now(), x.typed_data(), in[0], in[1], PackedOf(mix), gate, PackedOf(total),
                  to[1], out->typed_data());
  return ffi::Error::Success();
}

ffi::Error Vectors(ffi::ThreadPool pool, ffi::Buffer<ffi::U8> addresses, Int8s vectors,
                   ffi::Result<Int32s> out) {
  auto in = addresses.dimensions(), of = vectors.dimensions(), to = out->dimensions();
  if (in.size() != 2 || of.size() != 3 || to.size() != 2 || in[0] != to[0] || in[1] != of[0] ||
      of[2] != to[1]) {
    return Wrong("vectors: shapes do not belong together");
  }
  quweit::VectorSums(pool, Now(), addresses.typed_data(), in[0], in[1], vectors.typed_data(),
                     of[1], of[2], out->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(quweit_ternary, Ternary,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Int8s>()
                                  .Arg<Words>()
                                  .Ret<Int32s>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(quweit_glu, Glu,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Int8s>()
                                  .Arg<Words>()
                                  .Arg<Int32s>()
                                  .Arg<Int8s>()
                                  .Arg<Words>()
                                  .Ret<Int32s>()
                                  .Attr<int32_t>("step"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(quweit_vectors, Vectors,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<Int8s>()
                                  .Ret<Int32s>());

// The instructions used from now on: at most `most`, and what this machine has. Returns which.
extern "C" int quweit_use(int most) {
  level = std::min<int>(most, Best());
  return level;
}
