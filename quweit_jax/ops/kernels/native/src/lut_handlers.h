// What XLA calls of look-ups of real tables, and the transposes around them. Shapes are those of `calls.py`, and checked.
#pragma once

#include "handling.h"
#include "lut_forward.h"
#include "lut_gradients.h"
#include "turn.h"

namespace {

using Addresses = ffi::Buffer<ffi::U8>;

// Whether d is [tables][blocks of 64 of the tokens][64].
bool AreAddresses(ffi::Span<const int64_t> d, int64_t count, int64_t tokens) {
  return d.size() == 3 && d[0] == count && d[1] == (tokens + 63) / 64 && d[2] == 64;
}

// Whether tables have a number of inputs that they can have, and inputs to read.
bool IsWired(ffi::Span<const int64_t> wiring, int64_t inputs) {
  return wiring.size() == 2 && wiring[1] >= 1 && wiring[1] <= quweit::kMostLutInputs &&
         (inputs > 0 || wiring[0] == 0);
}

ffi::Error LutForward(ffi::ThreadPool pool, ffi::Buffer<ffi::PRED> bits, Int32s wiring,
                      Floats tables, ffi::Result<Floats> out, ffi::Result<Addresses> addresses) {
  auto in = bits.dimensions(), of = wiring.dimensions(), to = out->dimensions();
  auto t = tables.dimensions();
  if (in.size() != 2 || !IsWired(of, in[0]) || t.size() != 2 || t[0] != of[0] ||
      t[1] != int64_t{1} << of[1] || to.size() != 2 || to[0] != of[0] || to[1] != in[1] ||
      !AreAddresses(addresses->dimensions(), of[0], in[1])) {
    return Wrong("lut_forward: shapes do not belong together");
  }
  quweit::ReadLuts(pool, Now(),
                   {reinterpret_cast<const uint8_t*>(bits.typed_data()),
                    static_cast<size_t>(in[0]), static_cast<size_t>(in[1]), wiring.typed_data(),
                    tables.typed_data(), static_cast<size_t>(of[0]), out->typed_data(),
                    addresses->typed_data()},
                   of[1]);
  return ffi::Error::Success();
}

ffi::Error LutBackward(ffi::ThreadPool pool, Addresses addresses, Int32s wiring,
                       Floats differences, Floats gradient, ffi::Result<Floats> to_tables,
                       ffi::Result<Floats> to_bits) {
  auto of = wiring.dimensions(), in = gradient.dimensions(), d = differences.dimensions();
  auto tables = to_tables->dimensions(), bits = to_bits->dimensions();
  const bool asked = bits.size() == 2 && bits[0] > 0;
  if (in.size() != 2 || bits.size() != 2 || !IsWired(of, asked ? bits[0] : 1) ||
      in[0] != of[0] || tables.size() != 2 || tables[0] != of[0] ||
      tables[1] != int64_t{1} << of[1] || !AreAddresses(addresses.dimensions(), of[0], in[1]) ||
      (asked && (bits[1] != in[1] || d.size() != 3 || d[0] != of[1] || d[1] != of[0] ||
                 d[2] != int64_t{1} << (of[1] - 1)))) {
    return Wrong("lut_backward: shapes do not belong together");
  }
  quweit::LutGradients(
      pool, Now(),
      {addresses.typed_data(), wiring.typed_data(), differences.typed_data(),
       gradient.typed_data(), static_cast<size_t>(of[0]), static_cast<size_t>(in[1]),
       static_cast<size_t>(of[1]), static_cast<size_t>(bits[0]), to_tables->typed_data(),
       asked ? to_bits->typed_data() : nullptr});
  return ffi::Error::Success();
}

ffi::Error TurnMatrix(ffi::ThreadPool pool, ffi::AnyBuffer of, ffi::Result<ffi::AnyBuffer> out) {
  auto from = of.dimensions(), to = out->dimensions();
  const size_t bytes = ffi::ByteWidth(of.element_type());
  if (from.size() != 2 || to.size() != 2 || from[0] != to[1] || from[1] != to[0] ||
      of.element_type() != out->element_type() || (bytes != 1 && bytes != 2 && bytes != 4 && bytes != 8)) {
    return Wrong("turn: shapes or types do not belong together");
  }
  const auto turn = bytes == 1   ? quweit::Turn<uint8_t>
                    : bytes == 2 ? quweit::Turn<uint16_t>
                    : bytes == 4 ? quweit::Turn<uint32_t>
                                 : quweit::Turn<uint64_t>;
  turn(pool, of.untyped_data(), from[0], from[1], out->untyped_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(quweit_turn, TurnMatrix,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(quweit_lut_forward, LutForward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<Int32s>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Addresses>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(quweit_lut_backward, LutBackward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Addresses>()
                                  .Arg<Int32s>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>());
