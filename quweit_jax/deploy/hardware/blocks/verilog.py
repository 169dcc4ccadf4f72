"""A block of an integer-only ViT as Verilog-2001: the top level that folds it over cycles, and the
modules of both kinds of block. Weights lie in files beside the source.
"""

from __future__ import annotations

import dataclasses

from quweit_jax.deploy.hardware.blocks import glu, tables
from quweit_jax.deploy.hardware.blocks.description import Block, GLUBlock
from quweit_jax.deploy.hardware.blocks.parts import Memory, index_bits, module, requantizer
from quweit_jax.deploy.hardware.blocks.schedule import Schedule, plan
from quweit_jax.layers.integer import ACTIVATION_BITS, RESIDUAL_BITS

NAME = "block"
PORTS = (
    "input clk",
    "input rst",
    "input valid_in",
    f"input [{ACTIVATION_BITS - 1}:0] x",
    f"input [{RESIDUAL_BITS - 1}:0] stream",
    "output ready",
    "output valid_out",
    f"output [{RESIDUAL_BITS - 1}:0] y",
)
_HEADER = """// {what}
// {features} features. A token's words of 8 and of 16 bits come in one feature a cycle while ready
// is high, at edges of clk with valid_in; its {features} results go out with valid_out, in order,
// the first {latency} cycles behind the token's last word, then one every {every} cycles; ready
// comes back {busy} cycles behind that word. rst is synchronous.
"""
_STATES = """// words come in (0), sums are made (1), results go out (2)
reg [1:0] state;
reg [{place_bits}:0] place;
reg [{row_bits}:0] row;
reg begun, running;
reg [{depth}:0] went, ended;
reg [{tick_bits}:0] tick;
reg [{word}:0] stream_words [0:{last}];
reg [{word}:0] stream_word;
assign ready = state == 0;
wire take = valid_in & ready;
wire issue = state == 2 && tick == 0;
wire last_place = place == {last};
wire last_row = running && row == {last_row};
always @(posedge clk) begin
  begun <= !rst && take && last_place;
  went <= rst ? 0 : {{went, running}};
  ended <= rst ? 0 : {{ended, {finished}}};
  if (rst) begin
    state <= 0;
    place <= 0;
    row <= 0;
    running <= 0;
    tick <= 0;
  end else begin
    if (take || issue) place <= last_place ? 0 : place + 1;
    if (take && last_place) state <= 1;
    if (begun) running <= {folded};
    if (running) row <= last_row ? 0 : row + 1;
    if (last_row) running <= 0;
    if (state == 1 && ended[{depth}]) state <= 2;
    if (state == 2) tick <= tick == {last_tick} ? 0 : tick + 1;
    if (issue && last_place) begin
      state <= 0;
      tick <= 0;
    end
  end
end
always @(posedge clk) begin
  if (take) stream_words[place] <= stream;
  stream_word <= stream_words[place];
end
"""


@dataclasses.dataclass(frozen=True)
class Circuit:
    """A block's circuit. text: its source. memories: the files that it reads. modules: the names of
    its parts, the top level last.
    """

    block: Block
    schedule: Schedule
    text: str
    memories: tuple[Memory, ...]
    modules: tuple[str, ...]

    @property
    def memory_bits(self) -> int:
        """Bits of read-only memory."""
        return sum(len(memory.rows) * memory.bits for memory in self.memories)


def build(block: Block, parallel: int = 1, pipeline: int = 1, name: str = NAME) -> Circuit:
    """The circuit of a block; see `schedule.plan`."""
    schedule = plan(block, parallel, pipeline)
    kind = glu if isinstance(block, GLUBlock) else tables
    parts = kind.parts(block, schedule, pipeline, name)  # type: ignore[arg-type]
    requantize, multipliers = requantizer(name, schedule)
    header = _HEADER.format(
        what=parts.what,
        features=block.features,
        latency=schedule.latency,
        every=schedule.every,
        busy=schedule.busy,
    )
    top = module(name, PORTS, _top(schedule, name, parts.lines))
    text = "\n".join([header + top, *parts.modules, requantize])
    names = (*parts.names, "requantize", "lane", "")
    return Circuit(block, schedule, text, (*parts.memories, *multipliers), names)


def _top(schedule: Schedule, name: str, lines: list[str]) -> list[str]:
    features = schedule.features
    states = _STATES.format(
        place_bits=index_bits(features) - 1,
        row_bits=index_bits(schedule.rows) - 1,
        depth=schedule.depth,
        tick_bits=index_bits(schedule.every) - 1,
        word=RESIDUAL_BITS - 1,
        last=features - 1,
        last_row=max(0, schedule.rows - 1),
        finished="last_row" if schedule.rows else "begun",
        folded=int(schedule.rows > 0),
        last_tick=schedule.every - 1,
    )
    words = [f"reg signed [{ACTIVATION_BITS - 1}:0] x_{i};" for i in range(features)]
    words += ["always @(posedge clk) if (take) begin"]
    words += [f"  x_{i} <= {f'x_{i + 1}' if i + 1 < features else 'x'};" for i in range(features)]
    words += ["end"]
    requantize = [
        f"{name}_requantize requantize (",
        "  .clk(clk), .rst(rst), .issue(issue), .place(place), .sum(sum), .stream(stream_word),",
        "  .valid(valid_out), .y(y)",
        ");",
    ]
    total = [f"wire signed [{schedule.sum_bits - 1}:0] sum;"]
    return [*states.splitlines(), *words, *total, *lines, *requantize]
