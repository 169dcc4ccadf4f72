"""Native code: the values of the references on drawn shapes, with every level of instructions; the
cache of compiled libraries; doing without.
"""

import logging
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from quweit_jax.errors import InputError
from quweit_jax.ops import packed_glu, packed_ternary, vector_lut
from quweit_jax.ops.kernels.choice import compiling_for
from quweit_jax.ops.kernels.native import build, library

try:
    build.find_compiler()
    WHY = None
except build.NoCompilerError as error:
    WHY = str(error)
needs_compiler = pytest.mark.skipif(WHY is not None, reason=f"native code: {WHY}")
# Few sizes, so that programs are compiled once; the odd ones and those beside a block's bounds.
TOKENS, INPUTS = st.sampled_from([0, 1, 2, 3, 5, 7, 13]), st.sampled_from([0, 1, 3, 16, 33, 100])
OUTPUTS = st.sampled_from([1, 5, 16, 47, 128, 130, 257])
LEVEL = st.sampled_from(library.LEVELS)
drawn = settings(max_examples=24, deadline=None, derandomize=True)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A library compiled for these tests alone, by the first one that needs it."""
    patch = pytest.MonkeyPatch()
    if "XDG_CACHE_HOME" not in os.environ:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    patch.delenv(library.VARIABLE, raising=False)
    yield
    patch.undo()


def draw_int8(rng, *shape):
    """int8 over its whole range, -128 and 127 often."""
    values = rng.integers(-128, 128, shape)
    return np.where(rng.random(shape) < 0.3, rng.choice([-128, 127], shape), values).astype(np.int8)


def draw_ternary(rng, *shape):
    return rng.integers(-1, 2, shape).astype(np.int8)


@needs_compiler
@drawn
@given(TOKENS, INPUTS, OUTPUTS, LEVEL, st.integers(0, 99))
def test_ternary_sums(tokens, inputs, outputs, level, seed):
    rng = np.random.default_rng(seed)
    x, w = draw_int8(rng, tokens, inputs), draw_ternary(rng, inputs, outputs)
    if seed % 4 == 0:  # the largest sums there are
        x, w = np.full_like(x, -128), np.full_like(w, -1)
    packed = jnp.asarray(packed_ternary.pack_ternary(w))
    with library.using(level):
        found = packed_ternary.packed_sums(
            jnp.asarray(x), packed, num_outputs=outputs, implementation="native"
        )
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, x.astype(np.int64) @ w)


def glu_arguments(rng, inputs, units, outputs, groups, bits):
    return (
        jnp.asarray(packed_ternary.pack_ternary(draw_ternary(rng, inputs, 2 * units))),
        jnp.asarray(rng.integers(-300, 300, 2 * units), jnp.int16),
        jnp.asarray(draw_int8(rng, groups, 2**bits, 2**bits)),
        jnp.asarray(packed_ternary.pack_ternary(draw_ternary(rng, units, outputs))),
    )


@needs_compiler
@drawn
@given(
    TOKENS,
    st.sampled_from([1, 20, 33]),
    st.sampled_from([16, 48, 160]),
    st.sampled_from([1, 17, 130]),
    st.sampled_from([1, 4]),
    st.integers(1, 6),
    st.sampled_from([1, 2, 37, 500]),
    LEVEL,
)
def test_glu_sums(tokens, inputs, units, outputs, groups, bits, step, level):
    rng = np.random.default_rng(tokens + inputs)
    x = jnp.asarray(draw_int8(rng, tokens, inputs))
    arguments = glu_arguments(rng, inputs, units, outputs, groups, bits)
    options = {"step": step, "num_outputs": outputs}
    expected = packed_glu.packed_glu(x, *arguments, **options, implementation="reference")
    with library.using(level):
        found = packed_glu.packed_glu(x, *arguments, **options, implementation="native")
    np.testing.assert_array_equal(found, expected)


@needs_compiler
@drawn
@given(
    TOKENS,
    st.sampled_from([1, 3, 127, 130]),
    st.integers(1, 8),
    st.sampled_from([1, 5, 64, 131]),
    LEVEL,
)
def test_vector_sums(tokens, tables, bits, outputs, level):
    rng = np.random.default_rng(tokens + tables)
    read = jnp.asarray(rng.integers(0, 2, (tables, bits, tokens)), jnp.float32)
    vectors = jnp.asarray(draw_int8(rng, tables, 2**bits, outputs))
    expected = vector_lut.packed_vector_lookup(read, vectors, implementation="reference")
    with library.using(level):
        found = vector_lut.packed_vector_lookup(read, vectors, implementation="native")
    np.testing.assert_array_equal(found, expected)


@needs_compiler
def test_many_tokens_and_a_large_matrix():
    """Enough of both for several threads, and for blocks of every size."""
    rng = np.random.default_rng(0)
    for tokens, inputs, outputs in ((1, 700, 1500), (3, 512, 2048), (150, 90, 300)):
        x, w = draw_int8(rng, tokens, inputs), draw_ternary(rng, inputs, outputs)
        packed = jnp.asarray(packed_ternary.pack_ternary(w))
        found = packed_ternary.packed_sums(jnp.asarray(x), packed, num_outputs=outputs)
        np.testing.assert_array_equal(found, x.astype(np.int64) @ w)


@needs_compiler
def test_transformations():
    """jit, vmap of tokens and of weights, scan, shard_map, and a gradient around it."""
    rng = np.random.default_rng(0)
    x, w = draw_int8(rng, 4, 3, 40), draw_ternary(rng, 2, 40, 21)
    packed = jnp.stack([jnp.asarray(packed_ternary.pack_ternary(one)) for one in w])
    x, expected = jnp.asarray(x), x.astype(np.int64) @ w[0]

    def sums(x, packed):
        return packed_ternary.packed_sums(x, packed, num_outputs=21, implementation="native")

    same = np.testing.assert_array_equal
    same(jax.jit(sums)(x, packed[0]), expected)
    same(jax.vmap(sums, (0, None))(x, packed[0]), expected)
    same(jax.vmap(sums, (1, None), 1)(x, packed[0]), expected)
    same(jax.vmap(sums, (None, 0))(x, packed)[0], expected)
    same(jax.vmap(sums, (0, 0))(x[:2], packed)[1], np.asarray(x[1], np.int64) @ w[1])
    _, scanned = jax.lax.scan(lambda c, one: (c, sums(one, packed[0])), 0, x)
    same(scanned, expected)
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",))
    by_data = PartitionSpec("data")
    sharded = jax.shard_map(sums, mesh=mesh, in_specs=(by_data, PartitionSpec()), out_specs=by_data)
    same(jax.jit(sharded)(x, packed[0]), expected)
    scaled = jax.grad(lambda s: packed_ternary.packed_matmul(x, packed[0], s).sum())(2.0)
    assert scaled == expected.sum()


@needs_compiler
def test_what_is_exported_has_no_native_code():
    packed = jnp.asarray(packed_ternary.pack_ternary(np.ones((5, 7), np.int8)))
    lower = jax.jit(lambda x: packed_ternary.packed_sums(x, packed, num_outputs=7)).lower
    x = jnp.ones((2, 5), jnp.int8)
    assert "quweit_ternary" in lower(x).as_text()
    with compiling_for("cpu", portable=True):
        assert "quweit_ternary" not in lower(x).as_text()


@needs_compiler
def test_units_it_does_not_take():
    rng = np.random.default_rng(0)
    arguments = glu_arguments(rng, 8, 10, 3, 1, 4)
    x, options = jnp.asarray(draw_int8(rng, 2, 8)), {"step": 5, "num_outputs": 3}
    expected = packed_glu.packed_glu(x, *arguments, **options, implementation="reference")
    np.testing.assert_array_equal(packed_glu.packed_glu(x, *arguments, **options), expected)
    with pytest.raises(InputError, match="multiples of 16"):
        packed_glu.packed_glu(x, *arguments, **options, implementation="native")


def test_turned_off(monkeypatch):
    packed = jnp.asarray(packed_ternary.pack_ternary(np.ones((5, 7), np.int8)))
    x = jnp.ones((2, 5), jnp.int8)
    monkeypatch.setenv(library.VARIABLE, "0")
    assert (packed_ternary.packed_sums(x, packed, num_outputs=7) == 5).all()
    with pytest.raises(InputError, match=r"native' is turned off.*xla"):
        packed_ternary.packed_sums(x, packed, num_outputs=7, implementation="native")
    monkeypatch.setenv(library.VARIABLE, "sse9")
    with pytest.raises(InputError, match="QUWEIT_NATIVE: expected 0, 1, or the widest"):
        packed_ternary.packed_sums(x, packed, num_outputs=7)


def test_without_a_compiler(monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING):
        assert "no C++ compiler (g++ or clang++)" in library._loaded.__wrapped__()
    assert len(caplog.records) == 1 and "XLA computes" in caplog.text


def test_a_compiler_that_fails(monkeypatch, caplog, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text(
        "#!/bin/sh\necho 'x.cc: In function f' >&2\necho 'x.cc:3: error: no' >&2\nexit 1\n"
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING):
        assert "broken failed: x.cc:3: error: no" in library._loaded.__wrapped__()
    assert len(caplog.records) == 1
    assert not list((tmp_path / "cache" / "quweit_jax").iterdir())  # nothing is left behind


# A compiler that is quick: it copies a library that was compiled before, whatever the sources.
COPIES = """#!/bin/sh
[ "$1" = --version ] && echo copies && exit
echo >> "{log}"
while [ "$1" != -o ]; do shift; done
sleep 0.2
cp "{compiled}" "$2"
"""


@pytest.fixture
def copying(monkeypatch, tmp_path):
    """The log of a compiler that copies, and an empty cache folder."""
    compiled, log = library.loaded().path, tmp_path / "log"
    compiler = tmp_path / "copies"
    compiler.write_text(COPIES.format(log=log, compiled=compiled))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return log


@needs_compiler
def test_compiled_once_and_again_if_damaged(copying):
    path, name = build.library()
    assert build.library() == (path, name) and len(copying.read_text()) == 1
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    assert build.library()[0].read_bytes() == whole and len(copying.read_text()) == 2
    path.with_suffix(".sha256").write_bytes(b"\xff\xfe")
    assert build.library()[0].read_bytes() == whole and len(copying.read_text()) == 3
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".sha256", ".so"]


@needs_compiler
def test_a_cache_folder_that_cannot_be_written(copying, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path, _ = build.library()
    assert path.is_file() and tmp_path not in path.parents
    made = tmp_path / "cache" / "quweit_jax"
    made.mkdir(parents=True)
    made.chmod(0o500)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, _ = build.library()
    assert path.is_file() and (os.geteuid() == 0 or made not in path.parents)
    made.chmod(0o700)


@needs_compiler
def test_several_compile_at_once(copying):
    with ThreadPoolExecutor(6) as pool:
        found = set(pool.map(lambda _: build.library(), range(6)))
    assert len(found) == 1
    (path, _) = found.pop()
    assert path.read_bytes() == library.loaded().path.read_bytes()
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".sha256", ".so"]


@needs_compiler
def test_processes_that_compile_at_once(copying):
    """Each loads and calls what one of them has made."""
    program = textwrap.dedent("""
        import jax.numpy as jnp, numpy as np
        from quweit_jax.ops import packed_ternary
        packed = packed_ternary.pack_ternary(np.ones((5, 7), np.int8))
        x = jnp.ones((2, 5), jnp.int8)
        sums = packed_ternary.packed_sums(
            x, jnp.asarray(packed), num_outputs=7, implementation="native"
        )
        print(int(sums.sum()))
    """)
    started = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=300)[0].strip() for process in started] == ["70", "70"]
