"""Self-checking benches of a block's circuit, in Verilog and in C++ (for Verilator): both put in
the golden tokens, every other one with gaps in which words are wrong and not valid, compare every
bit that comes out, and count the cycles to the first result, from one to the next, and until the
next token may come.
"""

from __future__ import annotations

import numpy as np

from quweit_jax.deploy.hardware.benches import CPP_HEAD, EXPECTED, INPUTS, PASSED
from quweit_jax.deploy.hardware.blocks.activations import Tokens
from quweit_jax.deploy.hardware.blocks.schedule import Schedule
from quweit_jax.layers.integer import ACTIVATION_BITS, RESIDUAL_BITS

_VERILOG = """`timescale 1ns / 1ps
// {passed} when all results are right: iverilog -g2001 -o bench bench.v {name}.v && vvp -n bench
module bench;
  parameter COUNT = {count}, FEATURES = {features}, LATENCY = {latency}, EVERY = {every},
    BUSY = {busy}, MOST = {most};
  reg clk = 0, rst = 1, valid_in = 0, waiting = 0;
  reg [{x_bits} - 1:0] x = 0;
  reg [{word_bits} - 1:0] stream = 0;
  wire ready, valid_out;
  wire [{word_bits} - 1:0] y;
  reg [{word_bits} - 1:0] inputs [0:2 * COUNT * FEATURES - 1];
  reg [{word_bits} - 1:0] expected [0:COUNT * FEATURES - 1];
  integer last_at [0:COUNT - 1];
  integer cycle = 0, token = 0, place = 0, from = 0, out = 0, wrong = 0, due, before;
  {name} dut (
    .clk(clk), .rst(rst), .valid_in(valid_in), .x(x), .stream(stream), .ready(ready),
    .valid_out(valid_out), .y(y)
  );
  always #5 clk = ~clk;
  initial begin
    $readmemh("{inputs}", inputs);
    $readmemh("{expected}", expected);
  end
  always @(negedge clk) begin
    cycle = cycle + 1;
    before = wrong;
    if (cycle > 3 && valid_out !== 1'b0) begin
      due = last_at[from] + LATENCY + out * EVERY;
      if (from >= COUNT || valid_out !== 1'b1 || cycle != due ||
          y !== expected[from * FEATURES + out]) wrong = wrong + 1;
      if (wrong != before && wrong < 10)
        $display("token %0d, feature %0d: %0d instead of %0d, in cycle %0d instead of %0d", from,
          out, y, expected[from * FEATURES + out], cycle, due);
      out = out + 1;
      if (out == FEATURES) begin
        out = 0;
        from = from + 1;
      end
    end
    if (waiting && (ready !== 1'b0 || cycle >= last_at[token - 1] + BUSY)) begin
      if (ready !== 1'b1 || cycle != last_at[token - 1] + BUSY) wrong = wrong + 1;
      waiting = 0;
    end
    rst = cycle < 3;
    if (cycle > 3 && ready === 1'b1 && token < COUNT && (token % 2 == 0 || cycle % 3 != 1)) begin
      valid_in = 1;
      x = inputs[2 * (token * FEATURES + place)];
      stream = inputs[2 * (token * FEATURES + place) + 1];
      place = place + 1;
      if (place == FEATURES) begin
        last_at[token] = cycle;
        place = 0;
        token = token + 1;
        waiting = 1;
      end
    end else begin
      valid_in = 0;
      x = ~x;
      stream = ~stream;
    end
    if (from == COUNT || cycle > MOST) begin
      if (from == COUNT && wrong == 0) $display("{passed} %0d tokens, %0d cycles", COUNT, cycle);
      else $display("FAILED %0d of %0d, %0d tokens came out", wrong, COUNT * FEATURES, from);
      $finish;
    end
  end
endmodule
"""

_CPP = (
    f"// {{passed}} when all results are right:\n{CPP_HEAD}"
    + """
int main() {{
  const long COUNT = {count}, FEATURES = {features}, LATENCY = {latency}, EVERY = {every},
             BUSY = {busy}, MOST = {most};
  const std::vector<unsigned> inputs = numbers("{inputs}"), expected = numbers("{expected}");
  if ((long)inputs.size() != 2 * COUNT * FEATURES || (long)expected.size() != COUNT * FEATURES) {{
    std::printf("FAILED: vectors are incomplete\\n");
    return 1;
  }}
  std::vector<long> last_at(COUNT);
  long token = 0, place = 0, from = 0, out = 0, wrong = 0, cycle = 0;
  bool waiting = false;
  V{name} dut;
  dut.rst = 1;
  dut.valid_in = 0;
  dut.clk = 0;
  dut.eval();  // what Verilator calls the first edge must be one
  while (from < COUNT && cycle <= MOST) {{
    dut.clk = 1;
    dut.eval();
    ++cycle;
    if (cycle > 3 && dut.valid_out) {{
      const long due = last_at[from] + LATENCY + out * EVERY;
      if (cycle != due || dut.y != expected[from * FEATURES + out]) {{
        if (++wrong < 10)
          std::printf("token %ld, feature %ld: %u, cycle %ld, due %ld\\n", from, out,
                      (unsigned)dut.y, cycle, due);
      }}
      if (++out == FEATURES) {{ out = 0; ++from; }}
    }}
    if (waiting && (dut.ready || cycle >= last_at[token - 1] + BUSY)) {{
      wrong += !dut.ready || cycle != last_at[token - 1] + BUSY;
      waiting = false;
    }}
    dut.rst = cycle < 3;
    if (cycle > 3 && dut.ready && token < COUNT && (token % 2 == 0 || cycle % 3 != 1)) {{
      const unsigned* word = &inputs[2 * (token * FEATURES + place)];
      dut.valid_in = 1;
      dut.x = word[0];
      dut.stream = word[1];
      if (++place == FEATURES) {{
        last_at[token++] = cycle;
        place = 0;
        waiting = true;
      }}
    }} else {{
      dut.valid_in = 0;
      dut.x = ~dut.x;
      dut.stream = ~dut.stream;
    }}
    dut.clk = 0;
    dut.eval();
  }}
  if (from == COUNT && !wrong) {{
    std::printf("{passed} %ld tokens, %ld cycles\\n", COUNT, cycle);
    return 0;
  }}
  std::printf("FAILED %ld of %ld, %ld tokens came out\\n", wrong, COUNT * FEATURES, from);
  return 1;
}}
"""
)


def _filled(text: str, schedule: Schedule, count: int, name: str) -> str:
    return text.format(
        name=name,
        passed=PASSED,
        count=count,
        features=schedule.features,
        latency=schedule.latency,
        every=schedule.every,
        busy=schedule.busy,
        most=2 * count * schedule.interval + schedule.latency + 100,
        x_bits=ACTIVATION_BITS,
        word_bits=RESIDUAL_BITS,
        inputs=INPUTS,
        expected=EXPECTED,
    )


def verilog_bench(schedule: Schedule, count: int, name: str) -> str:
    """The bench for `count` tokens in Verilog-2001, to be run where the vectors lie."""
    return _filled(_VERILOG, schedule, count, name)


def cpp_bench(schedule: Schedule, count: int, name: str) -> str:
    """The bench for `count` tokens in C++, for Verilator, to be run where the vectors lie."""
    return _filled(_CPP, schedule, count, name)


def vectors(tokens: Tokens) -> tuple[str, str]:
    """(inputs, expected results) as hexadecimal numbers, a line a token: a word of 8 and one of 16
    bits for each feature, and its result.
    """
    x, word = (1 << ACTIVATION_BITS) - 1, (1 << RESIDUAL_BITS) - 1
    pairs = np.stack([tokens.x & x, tokens.residual & word], 2).reshape(len(tokens.x), -1)
    return _hex(pairs), _hex(tokens.y & word)


def _hex(rows: np.ndarray) -> str:
    return "".join(" ".join(f"{value:x}" for value in row) + "\n" for row in rows)
