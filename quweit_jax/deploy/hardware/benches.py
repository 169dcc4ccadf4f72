"""Self-checking benches of a circuit, in Verilog and in C++ (for Verilator): both put in the golden
inputs, with gaps in which words are wrong and not valid, compare every output bit, and count the
edges between an input and its outputs.
"""

from __future__ import annotations

from quweit_jax.deploy.hardware.circuit import Circuit

PASSED = "PASSED"  # the first word of what a bench prints when all outputs are right
INPUTS, EXPECTED = "inputs.hex", "expected.hex"

_VERILOG = """`timescale 1ns / 1ps
// {passed} when all outputs are right: iverilog -g2001 -o bench bench.v {name}.v && vvp -n bench
module bench;
  parameter COUNT = {count}, WORDS = {words}, LATENCY = {latency};
  reg clk = 0, rst = 1, valid_in = 0;
{registers}
  wire valid_out;
  wire [{decision} - 1:0] decision;
  wire [{score} - 1:0] score;
  reg [{bits} - 1:0] inputs [0:COUNT * WORDS{spare}];
  reg [31:0] expected [0:2 * COUNT - 1];
  integer sent_at [0:COUNT - 1];
  integer cycle = 0, sent = 0, received = 0, wrong = 0, last;
  {name} dut (
    .clk(clk), .rst(rst), .valid_in(valid_in), .valid_out(valid_out),
{connected}
    .decision(decision), .score(score)
  );
  always #5 clk = ~clk;
  initial begin
    $readmemh("{inputs}", inputs);
    $readmemh("{expected}", expected);
  end
  always @(posedge clk) begin
    cycle <= cycle + 1;
    rst <= cycle < 2;
    if (cycle > 3 && sent < COUNT && cycle % 5 != 3) begin
      valid_in <= 1;
      sent_at[sent] <= cycle;
      sent <= sent + 1;
{driven}
    end else begin
      valid_in <= 0;
{garbled}
    end
    if (cycle > 2 * COUNT + LATENCY + 20) begin
      if (received == COUNT && wrong == 0) $display("{passed} %0d examples", COUNT);
      else $display("FAILED %0d of %0d, %0d received", wrong, COUNT, received);
      $finish;
    end
  end
  always @(negedge clk) if (cycle > 3 && valid_out !== 1'b0) begin
    if (received >= COUNT) wrong = wrong + 1;
    else begin
      last = wrong;
      if (valid_out !== 1'b1 || cycle - sent_at[received] - 1 != LATENCY) wrong = wrong + 1;
      if (decision !== expected[2 * received] || score !== expected[2 * received + 1])
        wrong = wrong + 1;
      if (wrong != last && wrong < 10)
        $display("example %0d: %0d, %0d instead of %0d, %0d after %0d edges", received, decision,
          score, expected[2 * received], expected[2 * received + 1],
          cycle - sent_at[received] - 1);
    end
    received = received + 1;
  end
endmodule
"""

# How a bench in C++ is built, and how it reads vectors.
CPP_HEAD = """\
// verilator --cc --exe --build -Wno-fatal --top-module {name} {name}.v bench.cpp && obj_dir/V{name}
#include <cstdio>
#include <cstdlib>
#include <vector>
#include "V{name}.h"
#include "verilated.h"

static std::vector<unsigned> numbers(const char* path) {{
  std::vector<unsigned> found;
  unsigned value;
  FILE* file = std::fopen(path, "r");
  if (!file) {{ std::printf("FAILED: no %s\\n", path); std::exit(1); }}
  while (std::fscanf(file, "%x", &value) == 1) found.push_back(value);
  std::fclose(file);
  return found;
}}
"""

_CPP = (
    f"// {{passed}} when all outputs are right:\n{CPP_HEAD}"
    + """
int main() {{
  const long COUNT = {count}, WORDS = {words}, LATENCY = {latency};
  const std::vector<unsigned> inputs = numbers("{inputs}"), expected = numbers("{expected}");
  if ((long)inputs.size() < COUNT * WORDS || (long)expected.size() != 2 * COUNT) {{
    std::printf("FAILED: vectors are incomplete\\n");
    return 1;
  }}
  std::vector<long> sent_at(COUNT);
  long sent = 0, received = 0, wrong = 0;
  V{name} dut;
  dut.rst = 1;
  dut.valid_in = 0;
  dut.clk = 0;
  dut.eval();  // what Verilator calls the first edge must be one
  for (long cycle = 0; cycle < 2 * COUNT + LATENCY + 20; ++cycle) {{
    dut.clk = 1;
    dut.eval();
    dut.rst = cycle < 2;
    const bool sends = cycle > 3 && sent < COUNT && cycle % 5 != 3;
    const unsigned* x = &inputs[(sends ? sent : 0) * WORDS];
    const unsigned flip = sends ? 0 : {mask};
    (void)x; (void)flip;
{driven}
    dut.valid_in = sends;
    if (sends) sent_at[sent++] = cycle;
    dut.clk = 0;
    dut.eval();
    if (cycle <= 3 || !dut.valid_out) continue;
    if (received >= COUNT || cycle - sent_at[received] != LATENCY ||
        dut.decision != expected[2 * received] || dut.score != expected[2 * received + 1]) {{
      if (++wrong < 10) std::printf("example %ld: %u, %u\\n", received, (unsigned)dut.decision,
                                    (unsigned)dut.score);
    }}
    ++received;
  }}
  if (received == COUNT && !wrong) {{
    std::printf("{passed} %ld examples\\n", COUNT);
    return 0;
  }}
  std::printf("FAILED %ld of %ld, %ld received\\n", wrong, COUNT, received);
  return 1;
}}
"""
)


def _common(circuit: Circuit, count: int, name: str) -> dict[str, object]:
    c = circuit.classifier
    return {
        "name": name,
        "passed": PASSED,
        "count": count,
        "words": len(circuit.ports()),
        "latency": circuit.latency,
        "bits": c.scaling.bits,
        "decision": c.decision_bits,
        "score": c.score_bits,
        "inputs": INPUTS,
        "expected": EXPECTED,
    }


def verilog_bench(circuit: Circuit, count: int, name: str = "dwn") -> str:
    """The bench for `count` examples in Verilog-2001, to be run where the vectors lie."""
    ports, bits = circuit.ports(), circuit.classifier.scaling.bits
    lines = {
        "registers": [f"  reg [{bits - 1}:0] x_{f} = 0;" for f in ports],
        "connected": [f"    .x_{f}(x_{f})," for f in ports],
        "driven": [f"      x_{f} <= inputs[sent * WORDS + {i}];" for i, f in enumerate(ports)],
        "garbled": [f"      x_{f} <= ~x_{f};" for f in ports],
    }
    text = {key: "\n".join(value) for key, value in lines.items()}
    # an array of no words is none
    spare = " - 1" if ports else ""
    return _VERILOG.format(**_common(circuit, count, name), **text, spare=spare)


def cpp_bench(circuit: Circuit, count: int, name: str = "dwn") -> str:
    """The bench for `count` examples in C++, for Verilator, to be run where the vectors lie."""
    driven = [f"    dut.x_{f} = x[{i}] ^ flip;" for i, f in enumerate(circuit.ports())]
    mask = (1 << circuit.classifier.scaling.bits) - 1
    return _CPP.format(**_common(circuit, count, name), driven="\n".join(driven), mask=mask)
