"""What a compiled program says of itself, and ternary weights that travel packed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from quweit_jax.layers.placement import placing
from quweit_jax.layers.ternary import BitLinear
from quweit_jax.ops import ternary
from quweit_jax.training import compiled, sharding

TEXT = """HloModule jit_step, is_scheduled=true

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[], f32[8,16]{1,0}) parameter(0)
  %g = f32[8,16]{1,0} get-tuple-element(%p), index=1
  %all-gather.1 = f32[32,16]{1,0} all-gather(%g), dimensions={0}
  %fusion.2 = f32[8,16]{1,0} fusion(%g), kind=kLoop, \
backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %t = (s32[], f32[8,16]{1,0}) tuple(%g, %fusion.2)
}

%condition (p.1: (s32[], f32[8,16])) -> pred[] {
  %p.1 = (s32[], f32[8,16]{1,0}) parameter(0)
  %constant.3 = s32[]{:T(128)} constant(24)
  %g.1 = s32[] get-tuple-element(%p.1), index=0
  ROOT %lt = pred[] compare(%g.1, %constant.3), direction=LT
}

ENTRY %main (x: f32[8,16]) -> f32[8,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %w = (s32[], f32[8,16]{1,0}) while(%x), condition=%condition, body=%body
  %collective-permute-start.1 = (s8[4,64]{1,0}, s8[4,64]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x), channel_id=1
  %all-reduce.1 = (bf16[10]{0}, f32[]) all-reduce(%x, %x), to_apply=%add
  ROOT %fusion.9 = f32[8,16]{1,0} fusion(%w), kind=kLoop, \
backend_config={"window_config":{"estimated_cycles":"7"}}
}
"""


def test_loops_count_as_often_as_they_run():
    program = compiled.read_program(TEXT)
    assert program.cycles == 24 * 100 + 7
    assert program.collectives == {
        "all-gather": 24 * 32 * 16 * 4,
        "all-reduce": 10 * 2 + 4,
        "collective-permute": 4 * 64,
    }


def test_matrix_products_are_counted_with_those_in_loops():
    def layer(x, w):
        return jnp.tanh(x @ w), None

    def network(x, layers):
        return jax.lax.scan(jax.checkpoint(layer), x, layers)[0].sum()

    x, layers = jnp.zeros((5, 8)), jnp.zeros((3, 8, 8))
    once = 2 * 5 * 8 * 8 * 3
    assert compiled.flops(jax.make_jaxpr(network)(x, layers)) == once
    both = jax.make_jaxpr(jax.grad(network, argnums=(0, 1)))(x, layers)
    assert compiled.flops(both) == once * 4  # forward, again, and two products backward


def test_the_largest_values_are_named_by_their_layer():
    def network(x):
        with jax.named_scope("block_1"), jax.named_scope("mlp"):
            y = jnp.broadcast_to(x, (100, 7))
        return y.sum(0) + x

    found = compiled.largest(jax.make_jaxpr(network)(jnp.zeros(7)), 1)
    assert found == [(2800, "float32 [100, 7]", "block_1/mlp")]


@pytest.mark.parametrize("spec", [P("fsdp", None), P(None, "fsdp")])
@pytest.mark.parametrize("inputs", [32, 12])
def test_ternary_weights_travel_packed_and_are_the_same(spec, inputs):
    """With 12 inputs over 4 devices a byte would hold weights of two, so they go as they are."""
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=4))
    layer, keys = BitLinear(24), jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (8, 3, inputs))
    params = layer.init(keys[1], x)["params"]
    places = {"kernel": NamedSharding(mesh, spec), "norm_scale": NamedSharding(mesh, P())}
    batch = sharding.batch_sharding(mesh)

    def loss(params, x):
        return jnp.square(layer.apply({"params": params}, x)).sum()

    def packed(params, x):
        with placing(sharding.hand_over(mesh), sharding.packed_gather(mesh)):
            return loss(params, x)

    expected = jax.value_and_grad(loss, argnums=(0, 1))(params, x)
    step = jax.jit(
        jax.value_and_grad(packed, argnums=(0, 1)),
        in_shardings=(places, batch),
        out_shardings=(None, (places, batch)),
    )
    found = step(jax.device_put(params, places), jax.device_put(x, batch))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # noqa: E731
    jax.tree.map(close, jax.device_get(found), jax.device_get(expected))
    gathers = step.lower(params, x).compile().as_text()
    assert ("u8[8,24]" in gathers) == (inputs == 32)


def test_packed_weights_are_an_eighth_of_bfloat16():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=8))
    place, whole = NamedSharding(mesh, P("fsdp", None)), NamedSharding(mesh, P())
    shape = jax.ShapeDtypeStruct((64, 128), jnp.int8, sharding=place)
    gather = jax.jit(sharding.packed_gather(mesh), out_shardings=whole)
    text = gather.lower(shape).compile().as_text()
    assert compiled.read_program(text).collectives["all-gather"] == 64 * 128 * 2 // 8


def test_four_weights_travel_in_a_byte():
    weights = jnp.asarray(np.random.default_rng(0).integers(-1, 2, (12, 5)), jnp.int8)
    packed = ternary.to_bytes(weights)
    assert packed.shape == (3, 5) and packed.dtype == jnp.uint8
    np.testing.assert_array_equal(ternary.from_bytes(packed), weights)
