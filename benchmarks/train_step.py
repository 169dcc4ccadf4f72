"""One training step of nanogpt_cpu with every channel mixer, beside the dense step in PyTorch 2:
taskset -c 0 python benchmarks/train_step.py

All in one process, in turn, medians of the process's own time and the quartiles around them.
"..., XLA" is a block without native code. PyTorch takes part if it is installed (pip
install torch); its model is written here, in the usual way (fused attention, AdamW with foreach,
gradient clipping), with the same sizes and the same batch.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import jax
import numpy as np
import roofline
import timing

from quweit_jax import models
from quweit_jax.config import load_file
from quweit_jax.ops.kernels import choice
from quweit_jax.training import optimizers, sharding, state

VOCABULARY = 65
KINDS = (
    "dense",
    "swiglu",
    "weightless",
    "weightless, XLA",
    "lookup_glu",
    "lookup_glu, XLA",
    "bitglu",
    "none",
)


def ours(kind: str, batch: dict[str, np.ndarray]):
    """A call that runs one step of our own train loop's compiled function to the end."""
    mlp, _, xla = kind.partition(", ")
    call = _ours(mlp, batch)
    if not xla:
        return call

    def without_native_code():
        # Every call, as what is compiled belongs to the context it is called in; a program that
        # could be exported has no native code.
        with choice.compiling_for("cpu", portable=True):
            call()

    return without_native_code


def _ours(mlp: str, batch: dict[str, np.ndarray]):
    experiment = Path(__file__).parents[1] / "experiments" / "configs" / "gpt_char.py"
    config = load_file(f"{experiment}:nanogpt_cpu,mlp={mlp}")
    model = models.build(config.model.to_dict(), VOCABULARY)
    optimizer = optimizers.make_optimizer(
        optimizers.OptimizerConfig(**config.optimizer.to_dict()), config.steps
    )
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1))
    init = state.make_init(model, optimizer, 0, ema=False)
    current = state.init_state(init, batch["inputs"][:1], mesh)
    shardings = jax.tree.map(lambda x: x.sharding, current)
    step = state.make_train_step(model, optimizer, state_shardings=shardings, mesh=mesh)
    placed = sharding.put_batch(batch, sharding.batch_sharding(mesh))
    holder = [current]

    def call():
        holder[0], metrics = step(holder[0], placed)
        jax.block_until_ready((holder[0], metrics))

    return call


def torch_dense(batch: dict[str, np.ndarray], layers: int = 4, heads: int = 4, width: int = 128):
    """The same step in PyTorch: forward, backward, clip, AdamW."""
    import torch
    from torch import nn
    from torch.nn import functional

    torch.manual_seed(0)
    context = batch["inputs"].shape[1]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1 = nn.LayerNorm(width, bias=False)
            self.norm2 = nn.LayerNorm(width, bias=False)
            self.qkv = nn.Linear(width, 3 * width, bias=False)
            self.proj = nn.Linear(width, width, bias=False)
            self.up = nn.Linear(width, 4 * width, bias=False)
            self.down = nn.Linear(4 * width, width, bias=False)

        def forward(self, x):
            q, k, v = (
                part.view(*part.shape[:2], heads, width // heads).transpose(1, 2)
                for part in self.qkv(self.norm1(x)).split(width, dim=2)
            )
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.proj(mixed.transpose(1, 2).reshape(x.shape))
            return x + self.down(functional.gelu(self.up(self.norm2(x))))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(VOCABULARY, width)
            self.positions = nn.Embedding(context, width)
            self.blocks = nn.ModuleList(Block() for _ in range(layers))
            self.norm = nn.LayerNorm(width, bias=False)

        def forward(self, ids):
            x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
            for block in self.blocks:
                x = block(x)
            return self.norm(x) @ self.tokens.weight.T

    model = GPT()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, foreach=True
    )
    inputs, targets = (torch.from_numpy(batch[k].astype(np.int64)) for k in ("inputs", "targets"))

    def call():
        loss = functional.cross_entropy(model(inputs).view(-1, VOCABULARY), targets.view(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return call


def main() -> None:
    parser = timing.parser(__doc__, rounds=31)
    parser.add_argument("--kinds", nargs="+", default=KINDS, help="the channel mixers")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    batch = {
        k: rng.integers(0, VOCABULARY, (12, 64)).astype(np.int32) for k in ("inputs", "targets")
    }
    contenders = {f"jax {mlp}": ours(mlp, batch) for mlp in args.kinds}
    packages = ["jax", "jaxlib", "flax", "optax", "numpy"]
    try:
        contenders["torch dense"] = torch_dense(batch)
        packages.append("torch")
    except ImportError:
        print("PyTorch is not installed: its row is left out (pip install torch).")
    seconds = timing.samples(contenders | roofline.contenders(), args.rounds)
    limits = roofline.rates({k: statistics.median(seconds.pop(k)) for k in roofline.LIMITS})
    found = timing.summary(seconds)
    base = found["jax dense"]["median_ms"]
    ratios = {name: of["median_ms"] / base for name, of in found.items()}
    lines = [
        "one training step of nanogpt_cpu (4 layers, width 128, 12 x 64 tokens), "
        f"{jax.default_backend()}, native: {timing.native_level()}",
        timing.machine(packages),
        timing.cores(),
        timing.spread_table(found, "jax dense"),
        "of the dense step's time: "
        + ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items()),
        "roofline: " + ", ".join(f"{k} {v:.1f}" for k, v in limits.items()),
    ]
    print("\n".join(lines))
    timing.write(args.out, lines)
    facts = {
        "machine": timing.machine(packages),
        "native": timing.native_level(),
        "timed": timing.cores(),
    }
    timing.write_json(args.out, facts | {"contenders": found, "ratios": ratios, "roofline": limits})


if __name__ == "__main__":
    main()
