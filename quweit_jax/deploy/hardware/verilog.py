"""A circuit as Verilog-2001 that any tool reads: one wire a bit, every table an instance of one
small module, a module each for encoder, tables and reduction.
"""

from __future__ import annotations

from collections.abc import Sequence

from quweit_jax.deploy.hardware.circuit import MODULES, Circuit
from quweit_jax.deploy.hardware.network import Network, Node

LOOKUP = "lookup"  # the module of a table, behind the circuit's name
_HEADER = """// {name}: {classes} classes from {ports} words of {bits} bits, {sign}.
// A word is q = clip(round((x - offset) / step), {low}, {high}); see input_scaling.json.
// Latency: {latency}. One example enters at every edge of clk with valid_in high; rst is
// synchronous and clears valid_out alone.
"""
_LOOKUP = """
// A table of 2**N entries; entry 0 is the lowest bit of TABLE, i[0] the lowest of the address.
module {name} #(parameter N = 6, parameter [(1 << N) - 1:0] TABLE = 0) (
  input [N - 1:0] i,
  output o
);
  assign o = TABLE[i];
endmodule
"""


def verilog(circuit: Circuit, name: str = "dwn") -> str:
    """The circuit as one file of Verilog-2001, top level `name`."""
    return _Printer(circuit, name).text()


def words(circuit: Circuit, name: str = "dwn") -> list[str]:
    """The declarations of the top level's ports, in order."""
    scaling, c = circuit.classifier.scaling, circuit.classifier
    inputs = [f"input [{scaling.bits - 1}:0] x_{f}" for f in circuit.ports()]
    return [
        "input clk",
        "input rst",
        "input valid_in",
        *inputs,
        "output valid_out",
        f"output [{c.decision_bits - 1}:0] decision",
        f"output [{c.score_bits - 1}:0] score",
    ]


class Modules:
    """Prints the modules of a network, those signals that the outputs need, and how a top level
    holds them, where the bits of a word x_3 are x_3[0], x_3[1], ...
    """

    def __init__(self, network: Network, outputs: Sequence[int], name: str):
        self.name = name
        self.nodes = network.nodes
        self.signals = network.used(outputs)
        self.readers: dict[int, set[str]] = {signal: set() for signal in self.signals}
        for signal in self.signals:
            for source in self.nodes[signal].inputs:
                self.readers[source].add(self.nodes[signal].module)
        for signal in outputs:
            self.readers[signal].add("")

    def modules(self) -> list[str]:
        """The text of each module that has something in it, and of a table's."""
        found = [self._module(module) for module in MODULES if self._own(module)]
        return [*found, _LOOKUP.format(name=f"{self.name}_{LOOKUP}")]

    def instances(self) -> list[str]:
        """Lines of the top level: the wires between the modules, and the modules."""
        lines = [
            f"  wire {self._name(s)};"
            for s in self.signals
            if self.nodes[s].module and self.readers[s] - {self.nodes[s].module}
        ]
        for module in MODULES:
            if self._own(module):
                lines += self._instance(module)
        return lines

    def has(self, module: str) -> bool:
        """Whether there is anything in a module."""
        return bool(self._own(module))

    def outside(self, signal: int) -> str:
        """A signal as the top level calls it."""
        node = self.nodes[signal]
        if node.kind == "input":
            return "x_{1}[{2}]".format(*node.name.split("_"))
        return node.name

    def _own(self, module: str) -> list[int]:
        return [s for s in self.signals if self.nodes[s].module == module]

    def _interface(self, module: str) -> tuple[list[int], list[int]]:
        """Signals that a module takes from others, and those of its own that others read."""
        own = self._own(module)
        taken = {source for signal in own for source in self.nodes[signal].inputs}
        given = [signal for signal in own if self.readers[signal] - {module}]
        return sorted(taken - set(own)), given

    def _name(self, signal: int) -> str:
        return self.nodes[signal].name

    def _module(self, module: str) -> str:
        own = self._own(module)
        inputs, outputs = self._interface(module)
        registers = [s for s in own if self.nodes[s].kind == "register"]
        ports = ["input clk"] * bool(registers)
        ports += [f"input {self._name(s)}" for s in inputs]
        ports += [
            f"output {'reg ' * (self.nodes[s].kind == 'register')}{self._name(s)}" for s in outputs
        ]
        lines = [f"module {self.name}_{module} ("]
        lines += [f"  {port}{',' * (i < len(ports) - 1)}" for i, port in enumerate(ports)]
        lines += [");"]
        for signal in sorted(set(own) - set(outputs)):
            kind = "reg" if self.nodes[signal].kind == "register" else "wire"
            lines.append(f"  {kind} {self._name(signal)};")
        lines += [self._table(self.nodes[s]) for s in own if self.nodes[s].kind == "table"]
        if registers:
            lines.append("  always @(posedge clk) begin")
            for signal in registers:
                source = self.nodes[signal].inputs[0]
                lines.append(f"    {self._name(signal)} <= {self._name(source)};")
            lines.append("  end")
        return "\n".join([*lines, "endmodule", ""])

    def _table(self, node: Node) -> str:
        n = len(node.inputs)
        wires = ", ".join(self._name(s) for s in reversed(node.inputs))
        return (
            f"  {self.name}_{LOOKUP} #(.N({n}), .TABLE({1 << n}'h{node.table:x})) i_{node.name} "
            f"(.i({{{wires}}}), .o({node.name}));  // {node.note}"
        )

    def _instance(self, module: str) -> list[str]:
        inputs, outputs = self._interface(module)
        clocked = any(self.nodes[s].kind == "register" for s in self._own(module))
        wires = [".clk(clk)"] * clocked
        wires += [f".{self._name(s)}({self.outside(s)})" for s in (*inputs, *outputs)]
        return [
            f"  {self.name}_{module} {module} (",
            *(f"    {wire}{',' * (i < len(wires) - 1)}" for i, wire in enumerate(wires)),
            "  );",
        ]


class _Printer(Modules):
    """Prints a classifier's circuit."""

    def __init__(self, circuit: Circuit, name: str):
        super().__init__(circuit.network, circuit.outputs, name)
        self.circuit = circuit

    def text(self) -> str:
        c, scaling = self.circuit.classifier, self.circuit.classifier.scaling
        edges = self.circuit.latency
        header = _HEADER.format(
            name=self.name,
            classes=c.classes,
            ports=len(self.circuit.ports()),
            bits=scaling.bits,
            sign="two's complement" if scaling.signed else "unsigned",
            low=scaling.low,
            high=scaling.high,
            latency=f"{edges} edges of clk" if edges else "none, all is combinational",
        )
        *modules, lookup = self.modules()
        return "\n".join([header + self._top(), *modules]) + lookup

    def _top(self) -> str:
        ports = words(self.circuit)
        lines = [f"module {self.name} ("]
        lines += [f"  {port}{',' * (i < len(ports) - 1)}" for i, port in enumerate(ports)]
        lines += [");", *self._valid(), *self.instances()]
        for port, bits in (("decision", self.circuit.decision), ("score", self.circuit.score)):
            wires = ", ".join(self.outside(s) for s in reversed(bits))
            lines.append(f"  assign {port} = {{{wires}}};")
        return "\n".join([*lines, "endmodule", ""])

    def _valid(self) -> Sequence[str]:
        latency = self.circuit.latency
        if not latency:
            return ["  assign valid_out = valid_in;"]
        shifted = f"{{valid[{latency - 2}:0], valid_in}}" if latency > 1 else "valid_in"
        return (
            f"  reg [{latency - 1}:0] valid;",
            "  always @(posedge clk) begin",
            f"    if (rst) valid <= {latency}'d0;",
            f"    else valid <= {shifted};",
            "  end",
            f"  assign valid_out = valid[{latency - 1}];",
        )
