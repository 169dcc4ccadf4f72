"""LookupGLUs that are computed from a teacher's dense MLPs, by least squares on a few batches,
where they would be drawn and trained.

A unit of an MLP is GELU(w x). Its argument is had from two ternary sums, w = a (t1 + t2 / 3): nine
evenly spaced weights from -4/3 a to 4/3 a. The sums' codes address one entry of a table, which is
what GELU(w x) is on average where both codes are read; so the table adds, where in a LookupGLU
trained from the start it multiplies. The ternary sum behind it is fitted to the teacher's answers,
given what is read.

Dimensions: N rows (tokens of all batches), d model width, H units, G tables, C codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from quweit_jax.data import pipeline
from quweit_jax.errors import InputError
from quweit_jax.layers.lookup_glu import INPUT_SCALE, LookupGLU, to_int8, whole_numbers
from quweit_jax.ops import pair_table, ternary_fit
from quweit_jax.training import distill, solve_ternary

if TYPE_CHECKING:
    from quweit_jax.training.setup import Setup
    from quweit_jax.training.teacher import Teacher

_SECOND = 1 / 3  # what the second ternary sum's weights are worth beside the first one's
_WEIGHT = 1.2  # what a first weight is worth, in root mean squares of a group's dense weights
_GAINS = (0.5, 0.7, 1.0)  # of the normalized inputs, of which the one that fits best is taken
_SHIFTS = (-1, 0, 1, 2, 3)  # of the first codes' range, in sixteenths of it; likewise
_FULLEST = 120  # of the tables' int8 entries at the start, which leaves them room
_RIDGE = 1e-3  # of the mean square of inputs, added to their products with themselves
_EXPECTED = 8  # reads that the GELU itself counts for in the mean of an entry
_EPSILON = 1e-5  # of a LookupGLU's norm
# Mean magnitude of the floats behind the first ternary weights, where no start is given.
_MIX = 0.02
_TINY = 1e-12


@dataclasses.dataclass(frozen=True)
class DenseMLP:
    """A teacher's mixer and the norm before it: GELU(norm(x) up + up_bias) down + down_bias.

    up (d, H), down (H, d), biases and scale (d,) or (H,), float64. tanh: which GELU it is.
    """

    scale: np.ndarray
    bias: np.ndarray
    up: np.ndarray
    up_bias: np.ndarray
    tanh: bool

    @classmethod
    def of(cls, block: Mapping[str, Any], model: Any) -> DenseMLP:
        """That of a block's parameters."""
        norm, up = block["mlp_norm"], block["mlp"]["up"]
        width, hidden = up["kernel"].shape
        return cls(
            *(
                np.asarray(values, np.float64)
                for values in (
                    norm["scale"],
                    norm.get("bias", np.zeros(width)),
                    up["kernel"],
                    up.get("bias", np.zeros(hidden)),
                )
            ),
            tanh=getattr(model.config, "gelu", "exact") == "tanh",
        )

    def gelu(self, x: np.ndarray) -> np.ndarray:
        """Of any numbers."""
        return np.asarray(jax.nn.gelu(jnp.asarray(x, jnp.float32), approximate=self.tanh))


@dataclasses.dataclass(frozen=True)
class _Units:
    """What some units are to do: what a weight of 1 is worth in their arguments (K,), what they
    answer (N, K), and their arguments' constants (K,).
    """

    worth: np.ndarray
    wanted: np.ndarray
    constant: np.ndarray

    def of(self, mine: np.ndarray, worth: np.ndarray) -> _Units:
        """Some of them, their sums in other units."""
        return _Units(worth, self.wanted[:, mine], self.constant[mine])


@dataclasses.dataclass(frozen=True)
class Solved:
    """A LookupGLU's parameters, as its layer names them, and by what the norm before it is
    multiplied, (d,).
    """

    params: dict[str, np.ndarray]
    factor: np.ndarray


def solve(layer: LookupGLU, mlp: DenseMLP, reads: np.ndarray, answers: np.ndarray) -> Solved:
    """The LookupGLU that answers as the MLP does.

    Args:
      layer: what is to be had: H units as the MLP has, its tables trained.
      reads: what the teacher's norm reads, answers: what its mixer then answers, both (N, d).
    """
    width, hidden = mlp.up.shape
    inputs = _normalized(reads) * mlp.scale + mlp.bias
    wanted = mlp.gelu(inputs @ mlp.up + mlp.up_bias)
    # Each input at the scale that its weights ask for, together at about unit variance.
    factor = np.sqrt(np.square(mlp.up).mean(1)) + _TINY
    factor /= np.sqrt(np.square(inputs * factor).mean()) + _TINY
    inputs, weights = inputs * factor, mlp.up / factor[:, None]
    # Units of a table have weights of about one size.
    order = np.argsort(np.linalg.norm(weights, axis=0), kind="stable")
    weights, groups = weights[:, order], layer.groups(width)
    sizes = np.sqrt(np.square(weights).reshape(width, groups, -1).mean((0, 2)))
    worth = np.repeat(_WEIGHT * sizes + _TINY, hidden // groups)
    mix, near = _mix(inputs, weights, worth)
    units = _Units(worth, wanted[:, order], mlp.up_bias[order])
    gain, tables = _tables(layer, mlp, inputs, mix, units)
    entries = np.stack([table.entries for table in tables])
    entries = np.round(entries * (_FULLEST / max(float(np.abs(entries).max()), _TINY)))
    read = [mine[table.places] for mine, table in zip(entries, tables)]
    total, scale, bias = _sum(np.concatenate(read, 1), answers)
    unit = pair_table.entry_scale(pair_table.silu_gate(layer.code_bits, layer.code_step))
    params = {
        "mix": ternary_fit.float_weights(mix, near, layer.mix_init or _MIX),
        "sum": ternary_fit.float_weights(*total, scale * unit),
        "offsets": np.concatenate([table.offsets for table in tables] + [np.zeros(hidden)]),
        "bias": bias,
        "gates": (entries / unit).reshape(groups, *2 * (2**layer.code_bits,)),
    }
    return Solved({k: np.asarray(v, np.float32) for k, v in params.items()}, factor * gain)


def _normalized(reads: np.ndarray) -> np.ndarray:
    reads = reads.astype(np.float64)
    centered = reads - reads.mean(-1, keepdims=True)
    return centered / np.sqrt(np.square(centered).mean(-1, keepdims=True) + _EPSILON)


def _ridge(gram: np.ndarray) -> float:
    return _RIDGE * float(np.trace(gram)) / len(gram) + _TINY


def _mix(
    inputs: np.ndarray, weights: np.ndarray, worth: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The first and second ternary weights side by side, (d, 2 H), whose sums times `worth` (H,)
    give the dense ones' on these inputs; and what they would be as floats.
    """
    gram = inputs.T @ inputs / len(inputs)
    gram += _ridge(gram) * np.eye(len(gram))
    both = np.concatenate([np.eye(len(gram)), _SECOND * np.eye(len(gram))])
    first = np.clip(np.round(weights / worth), -1, 1)
    start = np.concatenate([first, np.round((weights / worth - first) / _SECOND)])
    fitted = ternary_fit.fit_ternary(both @ gram @ both.T, both @ gram @ weights, worth, start)
    first, second = np.split(fitted, 2)
    wanted = weights / worth
    near = np.concatenate([wanted, (wanted - first) / _SECOND], 1)
    return np.concatenate([first, second], 1), near


@dataclasses.dataclass(frozen=True)
class _Table:
    """One table, (C C,): its squared error on all that its units read, their offsets (K,) and the
    entries' places (N, K).
    """

    error: float
    offsets: np.ndarray
    entries: np.ndarray
    places: np.ndarray


def _tables(
    layer: LookupGLU, mlp: DenseMLP, inputs: np.ndarray, mix: np.ndarray, units: _Units
) -> tuple[float, list[_Table]]:
    """What the inputs (N, d) are multiplied with, and a table for each group of units."""
    width, fits = inputs.shape[1], []
    for gain in _GAINS:
        whole = np.asarray(to_int8(jnp.asarray(inputs * gain, jnp.float32)))
        halves = np.split(whole @ mix.astype(np.float32), 2, axis=1)
        tables = []
        for mine in np.split(np.arange(len(units.worth)), layer.groups(width)):
            sums = (halves[0][:, mine], halves[1][:, mine])
            # of a whole number of such a sum
            own = units.of(mine, units.worth[mine] / (INPUT_SCALE * gain))
            tables.append(_best_table(layer, mlp, width, sums, own))
        fits.append((gain, tables))
    return min(fits, key=lambda fit: sum(table.error for table in fit[1]))


def _best_table(
    layer: LookupGLU, mlp: DenseMLP, width: int, sums: tuple[np.ndarray, np.ndarray], units: _Units
) -> _Table:
    """The mean of what is wanted where two codes are read, for the best of some ranges of the first
    code; where little is read, nearer to the GELU of what the codes stand for.
    """
    bits, step = layer.code_bits, layer.step(width)
    side, worth = 2**bits, float(units.worth[0])
    at = np.arange(-side // 2, side // 2) * step

    def codes(sums: np.ndarray) -> np.ndarray:
        found = pair_table.codes(jnp.asarray(sums, jnp.float32), step, bits)
        return np.asarray(found).astype(np.int32) + side // 2

    tables, below = [], codes(sums[1])
    for shift in (s * side * step / 16 for s in _SHIFTS):
        offsets = np.round(shift - units.constant / worth)
        places = codes(sums[0] - offsets) * side + below
        counts, totals = (
            np.bincount(places.ravel(), weights, minlength=side**2)
            for weights in (None, units.wanted.ravel())
        )
        expected = mlp.gelu(worth * (at[:, None] + shift + _SECOND * at)).ravel()
        entries = (totals + _EXPECTED * expected) / (counts + _EXPECTED)
        error = float(np.square(entries[places] - units.wanted).sum())
        tables.append(_Table(error, offsets / whole_numbers(width), entries, places))
    return min(tables, key=lambda table: table.error)


def _sum(
    read: np.ndarray, answers: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray], float, np.ndarray]:
    """Ternary weights (H, d) and what they would be as floats, their scale, and the bias (d,) that
    make of entries (N, H) the answers (N, d).
    """
    means = read.mean(0), answers.mean(0, dtype=np.float64)
    read, answers = read - means[0], answers - means[1]
    gram, cross = read.T @ read / len(read), read.T @ answers / len(read)
    weights, wanted, scale = ternary_fit.fit_ternary_and_scale(gram, cross, _RIDGE)
    return (weights, wanted), scale, means[1] - scale * (means[0] @ weights)


def solved(setup: Setup, variables: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The variables with every new LookupGLU computed from the teacher's MLP, and every new ternary
    projection from its dense one, on the first `distill.solve_batches` batches of the run.
    """
    teacher, config = setup.teacher, setup.config
    assert teacher is not None
    drawn = pipeline.train_batches(setup.data.train, config.batch_size, config.seed, prefetch=0)
    batches = [next(drawn)["inputs"] for _ in range(setup.distill_config.solve_batches)]
    ternary = solve_ternary.parts(teacher, setup)
    if blocks := _new_lookup_glus(teacher, setup, ternary):
        print(f"solving {len(blocks)} LookupGLUs on {len(batches)} batches", flush=True)
        variables = _with_lookup_glus(teacher, setup, variables, blocks, batches)
    return solve_ternary.solved(teacher, setup, variables, ternary, batches)


def _new_lookup_glus(
    teacher: Teacher, setup: Setup, ternary: Sequence[solve_ternary.Part]
) -> list[str]:
    """The blocks whose channel mixer is new, but not because of the ternary projections in it."""
    new = distill.new_mixers(setup.abstract_state().params, teacher.variables["params"])
    return [block for block in new if (block, "mlp") not in {part.path[:2] for part in ternary}]


def _with_lookup_glus(
    teacher: Teacher,
    setup: Setup,
    variables: Mapping[str, PyTree],
    blocks: Sequence[str],
    batches: Sequence[np.ndarray],
) -> dict[str, PyTree]:
    read = jax.jit(lambda taught, inputs: distill.branches(teacher.model, taught, inputs))
    lessons: dict[str, list[Sequence[np.ndarray]]] = {}
    for inputs in batches:
        for block, pair in jax.device_get(read(teacher.variables, inputs)).items():
            rows = [np.asarray(x, np.float32).reshape(-1, x.shape[-1]) for x in pair]
            lessons.setdefault(block, []).append(rows)
    params = jax.device_get(dict(variables["params"]))
    taught = jax.device_get(teacher.variables["params"])
    for block in blocks:
        reads, answers = (np.concatenate(part) for part in zip(*lessons[block]))
        mlp = DenseMLP.of(taught[block], teacher.model)
        made = solve(_layer_of(setup, reads.shape[-1]), mlp, reads, answers)
        params[block] = _placed(params[block], taught[block]["mlp_norm"], made)
    return {**variables, "params": params}


def _placed(block: Mapping[str, Any], norm: Mapping[str, Any], made: Solved) -> dict[str, Any]:
    """A block's parameters with a solved mixer, whose norm is the mixer's own or the block's."""
    scaled = {name: np.asarray(value) * made.factor for name, value in norm.items()}
    if "norm" in block["mlp"]:
        return {**block, "mlp": {**made.params, "norm": scaled}}
    return {**block, "mlp": made.params, "mlp_norm": scaled}


def _layer_of(setup: Setup, width: int) -> LookupGLU:
    """The student's LookupGLU, as its config describes it, outside of the model."""
    options = dataclasses.asdict(setup.model.config.lookup_glu)  # type: ignore[attr-defined]
    return LookupGLU(width, **options)


def check(teacher: Teacher, setup: Setup) -> None:
    """Checks that a teacher's mixers or projections can be solved for, before anything is read.

    Raises:
      InputError: more than one process; no `init_from`; more batches than there are; nothing that
        differs, or student or teacher have other kinds of mixers, or other numbers of units; tables
        that are not trained.
    """
    where = "distill.solve_batches: "
    if jax.process_count() > 1:
        raise InputError(
            f"{where}expected one process, found {jax.process_count()}; solve in one, and go on "
            "from that run with init_from."
        )
    if not setup.config.get("init_from"):
        raise InputError(
            f"{where}expected init_from, without which the rest of the student is drawn, found "
            "none; set --config.init_from to what the teacher is."
        )
    there, wanted = len(setup.data.train), setup.distill_config.solve_batches
    if wanted * setup.config.batch_size > there:
        raise InputError(
            f"{where}expected at most {there // setup.config.batch_size:,}, the batches of "
            f"{setup.config.batch_size} in {there:,} examples, found {wanted:,}; 16 do well."
        )
    params = setup.abstract_state().params
    taught = teacher.variables["params"]
    ternary = solve_ternary.parts(teacher, setup)
    blocks = _new_lookup_glus(teacher, setup, ternary)
    if not blocks and not ternary:
        raise InputError(
            f"{where}found no channel mixer and no ternary projection that the teacher has "
            "otherwise; set --config.model.mlp or --config.model.linear=ternary, or leave it at 0."
        )
    for block in blocks:
        theirs = taught[block]["mlp"]
        mine = set(params[block]["mlp"])
        if not {"gates", "mix", "offsets"} <= mine or "norm_scale" in mine:
            raise InputError(
                f"{where}{block}: expected a lookup_glu with sum='ternary', output_norm=0 and "
                "tables of its own; set --config.model.mlp=lookup_glu "
                "--config.model.lookup_glu.train_tables=true, or leave it at 0."
            )
        if set(theirs) != {"up", "down"} or "mlp_norm" not in taught[block]:
            raise InputError(
                f"{where}{block}: expected a dense GELU MLP behind a LayerNorm in the teacher, "
                f"found a mixer of {', '.join(sorted(theirs))}; use distill.fit_steps for it."
            )
        units, found = np.shape(theirs["up"]["kernel"])[1], params[block]["mlp"]["sum"].shape[0]
        if units != found:
            raise InputError(
                f"{where}{block}: expected as many units as the teacher's {units}, found {found}; "
                f"set --config.model.lookup_glu.hidden={units}."
            )
