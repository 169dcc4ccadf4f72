// What XLA calls. Shapes and dtypes are what `calls.py` gives; they are checked all the same.
#include "glu.h"
#include "ternary.h"
#include "trained.h"
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

bool Same(ffi::Span<const int64_t> a, ffi::Span<const int64_t> b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin());
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

using Digits = ffi::Buffer<ffi::U16>;
using Floats = ffi::Buffer<ffi::F32>;

bool AreDigits(const Digits& digits, size_t inputs, size_t outputs) {
  auto d = digits.dimensions();
  return d.size() == 3 && static_cast<size_t>(d[0]) == (inputs + 15) / 16 &&
         static_cast<size_t>(d[1]) == outputs && d[2] == 4;
}

quweit::Chosen ChosenOf(const Digits& digits) {
  auto d = digits.dimensions();
  return {digits.typed_data(), static_cast<size_t>(d[0]), static_cast<size_t>(d[1])};
}

ffi::Error MakeDigits(Floats weights, Floats inverse, ffi::Result<Digits> of,
                      ffi::Result<Digits> transposed) {
  auto d = weights.dimensions();
  if (d.size() != 2 || inverse.element_count() != 1 || !AreDigits(*of, d[0], d[1]) ||
      !AreDigits(*transposed, d[1], d[0])) {
    return Wrong("digits: shapes do not belong together");
  }
  const size_t inputs = d[0], outputs = d[1];
  const float scale = inverse.typed_data()[0];
  quweit::DigitsOf(weights.typed_data(), inputs, outputs, outputs, 1, scale, of->typed_data());
  quweit::DigitsOf(weights.typed_data(), outputs, inputs, 1, outputs, scale,
                   transposed->typed_data());
  return ffi::Error::Success();
}

// The bits of the codes of tables (groups, C, C, ...); 0: they are none for so many units.
int CodeBits(ffi::Span<const int64_t> d, size_t units) {
  int bits = 0;
  if (d.size() < 3 || d[0] < 1 || units == 0 || units % d[0] || d[1] != d[2]) return 0;
  while ((int64_t{1} << bits) < d[1]) ++bits;
  return d[1] == int64_t{1} << bits && bits <= 6 ? bits : 0;
}

ffi::Error GluForward(ffi::ThreadPool pool, Int8s x, Digits mix, Int32s offsets, Int8s tables,
                      Digits total, ffi::Result<Floats> out,
                      ffi::Result<ffi::Buffer<ffi::U16>> addresses, ffi::Result<Int8s> read,
                      int32_t step) {
  auto in = x.dimensions(), to = out->dimensions(), at = addresses->dimensions();
  const size_t units = offsets.element_count() / 2;
  const int bits = CodeBits(tables.dimensions(), units);
  if (in.size() != 2 || to.size() != 2 || at.size() != 2 || in[1] != to[1] || in[1] != at[1] ||
      static_cast<size_t>(at[0]) != units || !Same(at, read->dimensions()) || bits == 0 || step < 1 ||
      step >= 1 << 15 || !AreDigits(mix, in[0], 2 * units) || !AreDigits(total, units, to[0])) {
    return Wrong("glu_forward: shapes do not belong together");
  }
  const quweit::TrainedGate gate = {offsets.typed_data(), tables.typed_data(), units,
                                    static_cast<size_t>(tables.dimensions()[0]), bits, step};
  quweit::GluForward(pool, Now(),
                     {x.typed_data(), static_cast<size_t>(in[1]), static_cast<size_t>(in[0]),
                      ChosenOf(mix), ChosenOf(total), gate, out->typed_data(),
                      addresses->typed_data(), read->typed_data()});
  return ffi::Error::Success();
}

ffi::Error GluBackward(ffi::ThreadPool pool, Floats gradient, ffi::Buffer<ffi::U16> addresses,
                       Floats slopes, Digits total, Digits mix, ffi::Result<Floats> to_sums,
                       ffi::Result<Floats> to_x, ffi::Result<Floats> to_read) {
  auto in = gradient.dimensions(), at = addresses.dimensions(), to = to_sums->dimensions();
  auto x = to_x->dimensions(), of = slopes.dimensions(), read = to_read->dimensions();
  const int bits = at.size() == 2 ? CodeBits(of, at[0]) : 0;
  if (in.size() != 2 || to.size() != 2 || x.size() != 2 || read.size() != 2 || in[1] != at[1] ||
      in[1] != to[1] || in[1] != x[1] || to[0] != 2 * at[0] || bits == 0 || of.size() != 4 ||
      of[3] != 2 || !AreDigits(total, in[0], at[0]) || !AreDigits(mix, to[0], x[0]) ||
      (read[0] != 0 && !Same(read, at))) {
    return Wrong("glu_backward: shapes do not belong together");
  }
  quweit::GluBackward(
      pool, Now(),
      {gradient.typed_data(), static_cast<size_t>(in[1]), static_cast<size_t>(in[0]),
       addresses.typed_data(), slopes.typed_data(), static_cast<size_t>(at[0]),
       static_cast<size_t>(of[0]), bits, ChosenOf(total), ChosenOf(mix), to_sums->typed_data(),
       to_x->typed_data(), read[0] ? to_read->typed_data() : nullptr});
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(quweit_digits, MakeDigits,
                              ffi::Ffi::Bind()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Digits>()
                                  .Ret<Digits>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(quweit_glu_forward, GluForward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Int8s>()
                                  .Arg<Digits>()
                                  .Arg<Int32s>()
                                  .Arg<Int8s>()
                                  .Arg<Digits>()
                                  .Ret<Floats>()
                                  .Ret<ffi::Buffer<ffi::U16>>()
                                  .Ret<Int8s>()
                                  .Attr<int32_t>("step"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(quweit_glu_backward, GluBackward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<ffi::Buffer<ffi::U16>>()
                                  .Arg<Floats>()
                                  .Arg<Digits>()
                                  .Arg<Digits>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>());
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
