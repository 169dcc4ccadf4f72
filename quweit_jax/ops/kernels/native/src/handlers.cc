// What XLA calls. Shapes and dtypes are what `calls.py` gives; they are checked all the same.
#include "bit_sums.h"
#include "glu.h"
#include "handling.h"
#include "lut_handlers.h"
#include "many.h"
#include "ternary.h"
#include "trained.h"
#include "vectors.h"

using quweit::Packed;

namespace {

using Int8s = ffi::Buffer<ffi::S8>;
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

ffi::Error Ternary(ffi::ThreadPool pool, Int8s x, Words weights, ffi::Result<Int32s> out) {
  auto in = x.dimensions(), to = out->dimensions();
  if (in.size() != 2 || to.size() != 2 || in[0] != to[0] || !IsPacked(weights, in[1], to[1])) {
    return Wrong("ternary: shapes do not belong together");
  }
  const auto sums =
      static_cast<size_t>(in[0]) < quweit::kManyTokens ? quweit::TernarySums : quweit::ManySums;
  sums(pool, Now(), x.typed_data(), in[0], in[1], PackedOf(weights), to[1], out->typed_data());
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
  if (static_cast<size_t>(in[0]) >= quweit::kManyTokens &&
      mix.element_count() + total.element_count() <= quweit::kMostWords) {
    quweit::ManyGlu(pool, Now(), x.typed_data(), in[0], in[1], PackedOf(mix),
                    {gate.offsets, gate.tables, units, gate.groups, bits, step}, PackedOf(total),
                    to[1], out->typed_data());
    return ffi::Error::Success();
  }
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
  quweit::DigitsOf(Now(), weights.typed_data(), d[0], d[1], inverse.typed_data()[0],
                   of->typed_data(), transposed->typed_data());
  return ffi::Error::Success();
}

// The bits of the codes of tables (groups, C, C, ...); 0: they are none for so many units.
int CodeBits(ffi::Span<const int64_t> d, size_t units) {
  int bits = 0;
  if (d.size() < 3 || d[0] < 1 || units == 0 || units % d[0] || d[1] != d[2]) return 0;
  while ((int64_t{1} << bits) < d[1]) ++bits;
  return d[1] == int64_t{1} << bits && bits <= 6 ? bits : 0;
}

// Whether d is [blocks of 16 of the tokens][units][16].
bool AreBlocks(ffi::Span<const int64_t> d, int64_t tokens, size_t units) {
  return d.size() == 3 && d[0] == (tokens + 15) / 16 && static_cast<size_t>(d[1]) == units &&
         d[2] == 16;
}

ffi::Error GluForward(ffi::ThreadPool pool, Floats x, Digits mix, Int32s offsets, Int8s tables,
                      Digits total, ffi::Result<Floats> out, ffi::Result<Digits> addresses,
                      ffi::Result<Int8s> read, int32_t step) {
  auto in = x.dimensions(), to = out->dimensions();
  const size_t units = offsets.element_count() / 2;
  const int bits = CodeBits(tables.dimensions(), units);
  if (in.size() != 2 || to.size() != 2 || in[0] != to[0] || bits == 0 || step < 1 ||
      step >= 1 << 15 || !AreDigits(mix, in[1], 2 * units) || !AreDigits(total, units, to[1]) ||
      !AreBlocks(addresses->dimensions(), in[0], units) ||
      !AreBlocks(read->dimensions(), in[0], units)) {
    return Wrong("glu_forward: shapes do not belong together");
  }
  const quweit::TrainedGate gate = {offsets.typed_data(), tables.typed_data(), units,
                                    static_cast<size_t>(tables.dimensions()[0]), bits, step};
  quweit::GluForward(pool, Now(),
                     {x.typed_data(), static_cast<size_t>(in[0]), static_cast<size_t>(in[1]),
                      ChosenOf(mix), ChosenOf(total), gate, out->typed_data(),
                      addresses->typed_data(), read->typed_data()});
  return ffi::Error::Success();
}

ffi::Error GluBackward(ffi::ThreadPool pool, Floats gradient, Floats x, Digits addresses,
                       Int8s read, Floats slopes, Digits total, Digits mix, Floats scales,
                       ffi::Result<Floats> to_x, ffi::Result<Floats> to_mix,
                       ffi::Result<Floats> to_shift, ffi::Result<Floats> to_total,
                       ffi::Result<Floats> to_read) {
  auto in = gradient.dimensions(), of_x = x.dimensions(), of = slopes.dimensions();
  const size_t units = to_shift->element_count() / 2;
  int bits = 1;
  while (bits < 7 && of.size() == 3 && of[1] != int64_t{4} << 2 * bits) ++bits;
  if (in.size() != 2 || of_x.size() != 2 || in[0] != of_x[0] || of.size() != 3 || bits > 6 ||
      of[2] != 2 || of[0] < 1 || units == 0 || units % of[0] ||
      !AreBlocks(addresses.dimensions(), in[0], units) ||
      !AreBlocks(read.dimensions(), in[0], units) || !AreDigits(total, in[1], units) ||
      !AreDigits(mix, 2 * units, of_x[1]) || scales.element_count() != 2 ||
      !Same(to_x->dimensions(), of_x) || to_mix->element_count() != 2 * units * of_x[1] ||
      to_total->element_count() != units * in[1] ||
      (to_read->element_count() && !Same(to_read->dimensions(), read.dimensions()))) {
    return Wrong("glu_backward: shapes do not belong together");
  }
  quweit::GluBackward(
      pool, Now(),
      {gradient.typed_data(), x.typed_data(), static_cast<size_t>(in[0]),
       static_cast<size_t>(in[1]), addresses.typed_data(), read.typed_data(), slopes.typed_data(),
       units, static_cast<size_t>(of[0]), bits, ChosenOf(total), ChosenOf(mix),
       scales.typed_data()[0], scales.typed_data()[1], to_x->typed_data(), to_mix->typed_data(),
       to_shift->typed_data(), to_total->typed_data(),
       to_read->element_count() ? to_read->typed_data() : nullptr});
  return ffi::Error::Success();
}

ffi::Error ModelOf(const Floats& x, const Floats& thresholds, ffi::RemainingArgs layers,
                   quweit::BitModel& model) {
  auto in = x.dimensions(), of = thresholds.dimensions();
  if (in.size() != 2 || of.size() != 2 || (of[0] != 1 && of[0] != in[1]) || of[1] < 1 ||
      of[1] > 127 || layers.size() % 2) {
    return Wrong("bits: shapes do not belong together");
  }
  model = {x.typed_data(), static_cast<size_t>(in[0]), static_cast<size_t>(in[1]),
           thresholds.typed_data(), static_cast<size_t>(of[1]), of[0] != in[1], {}};
  for (size_t i = 0; i < layers.size(); i += 2) {
    auto wiring = layers.get<Int32s>(i);
    auto tables = layers.get<ffi::Buffer<ffi::U8>>(i + 1);
    if (!wiring.has_value() || !tables.has_value()) return Wrong("bits: layers of other types");
    auto w = wiring->dimensions(), t = tables->dimensions();
    if (w.size() != 2 || t.size() != 2 || w[0] != t[0] || w[1] < 1 || w[1] > 8 ||
        t[1] != ((int64_t{1} << w[1]) + 7) / 8) {
      return Wrong("bits: tables and wiring do not belong together");
    }
    const int32_t* at = wiring->typed_data();
    const int64_t bits = static_cast<int64_t>(model.Bits());
    for (size_t j = 0; j < wiring->element_count(); ++j) {
      if (at[j] < 0 || at[j] >= bits) return Wrong("bits: wiring to bits that are not there");
    }
    model.layers.emplace_back(at, tables->typed_data(), w[0], w[1], t[1]);
  }
  return ffi::Error::Success();
}

ffi::Error BitSums(ffi::ThreadPool pool, Floats x, Floats thresholds, Int8s vectors,
                   ffi::RemainingArgs layers, ffi::Result<Int32s> out) {
  quweit::BitModel model;
  if (auto error = ModelOf(x, thresholds, layers, model); error.failure()) return error;
  auto v = vectors.dimensions(), to = out->dimensions();
  if (v.size() != 2 || to.size() != 2 || static_cast<size_t>(v[0]) != model.Bits() ||
      static_cast<size_t>(to[0]) != model.tokens || to[1] != v[1]) {
    return Wrong("bit_sums: shapes do not belong together");
  }
  quweit::AddVectorsOfBits(pool, Now(), model, vectors.typed_data(), v[1], out->typed_data());
  return ffi::Error::Success();
}

ffi::Error BitCounts(ffi::ThreadPool pool, Floats x, Floats thresholds, ffi::RemainingArgs layers,
                     ffi::Result<Int32s> out) {
  quweit::BitModel model;
  if (auto error = ModelOf(x, thresholds, layers, model); error.failure()) return error;
  auto to = out->dimensions();
  if (to.size() != 2 || static_cast<size_t>(to[0]) != model.tokens || to[1] < 1 ||
      model.Bits() % to[1]) {
    return Wrong("bit_counts: shapes do not belong together");
  }
  quweit::CountBits(pool, Now(), model, to[1], out->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(quweit_bit_sums, BitSums,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Int8s>()
                                  .RemainingArgs()
                                  .Ret<Int32s>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(quweit_bit_counts, BitCounts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .RemainingArgs()
                                  .Ret<Int32s>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(quweit_digits, MakeDigits,
                              ffi::Ffi::Bind()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Digits>()
                                  .Ret<Digits>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(quweit_glu_forward, GluForward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Digits>()
                                  .Arg<Int32s>()
                                  .Arg<Int8s>()
                                  .Arg<Digits>()
                                  .Ret<Floats>()
                                  .Ret<Digits>()
                                  .Ret<Int8s>()
                                  .Attr<int32_t>("step"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(quweit_glu_backward, GluBackward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Digits>()
                                  .Arg<Int8s>()
                                  .Arg<Floats>()
                                  .Arg<Digits>()
                                  .Arg<Digits>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
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
