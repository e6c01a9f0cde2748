"""Sparse patterns: their dense form, their tiles, and attention under them by every implementation."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.kernels.attention import BigBird, Causal, Fixed, Longformer, Segments, Strided, dense
from jaxrl.kernels.attention.blocked import blocked_attention
from jaxrl.kernels.attention.masks import Tile


def load(path):
    path = pathlib.Path(__file__).parents[1] / path
    spec = importlib.util.spec_from_file_location(path.stem + "_for_patterns", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = load("oracles/patterns.py")
loops = load("oracles/attention.py")
harness = load("kernels/test_attention.py")
Case = load("kernels/cases.py").Case


@functools.cache
def drawn(n, block, count, seed):
    """The random blocks of each block of n tokens: what is left of the mask without its window and ends."""
    mask = BigBird(block, window=1, ends=0, random=count, seed=seed)
    seen = np.asarray(dense(mask, (1, 1, n, n)))[0, 0, ::block, ::block]
    return [set(np.flatnonzero(row)) - {q} for q, row in enumerate(seen)]


def big_bird(n, block, window, ends, count, seed=0):
    blocks = -(-n // block)
    return lambda b, h, q, k: oracle.big_bird(q, k, block, window, ends, blocks, drawn(n, block, count, seed))


N = 24
PATTERNS = {
    "strided": (Strided(5), lambda b, h, q, k: oracle.strided(q, k, 5)),
    "stride_1": (Strided(1), lambda b, h, q, k: k <= q),
    "fixed": (Fixed(6, 2), lambda b, h, q, k: oracle.fixed(q, k, 6, 2)),
    "all_summary": (Fixed(5, 5), lambda b, h, q, k: k <= q),
    "longformer": (Longformer(3, first=2), lambda b, h, q, k: oracle.longformer(q, k, 3, 2)),
    "near": (Longformer(4), lambda b, h, q, k: abs(q - k) <= 4),
    "big_bird": (BigBird(3, random=2), big_bird(N, 3, 3, 1, 2)),
    "ends": (BigBird(5, window=1, ends=2, random=0), big_bird(N, 5, 1, 2, 0)),
    "random": (BigBird(2, window=1, ends=0, random=3, seed=7), big_bird(N, 2, 1, 0, 3, seed=7)),
}
WHOLE = {name: loops.dense(predicate, 1, 1, N, N)[0, 0] for name, (_, predicate) in PATTERNS.items()}


@pytest.mark.parametrize("name", PATTERNS)
def test_dense_form_is_the_double_loop(name):
    mask, whole = PATTERNS[name][0], WHOLE[name]
    np.testing.assert_array_equal(dense(mask, (1, 1, N, N))[0, 0], whole)
    np.testing.assert_array_equal(jax.jit(lambda q: dense(mask, (1, 1, 4, N), q))(7)[0, 0], whole[7:11])


@pytest.mark.parametrize("name", PATTERNS)
def test_tiles_are_dead_exactly_where_nothing_is_seen(name):
    """On consecutive queries and keys; `full` may miss a tile, but on single pairs."""
    mask, whole = PATTERNS[name][0], WHOLE[name]
    for q_size, k_size in ((1, 1), (2, 3), (4, 4), (5, 2), (1, N)):

        def kind(q, k, sizes=(q_size, k_size)):
            tile = Tile(q, sizes[0], k, sizes[1], N, 0, 0)
            return jnp.asarray(mask.live(tile)), jnp.asarray(mask.full(tile))

        q, k = np.arange(N - q_size + 1), np.arange(N - k_size + 1)
        live, full = jax.jit(jax.vmap(jax.vmap(kind, (None, 0)), (0, None)))(q, k)
        parts = np.array([[whole[i : i + q_size, j : j + k_size] for j in k] for i in q])
        np.testing.assert_array_equal(live, parts.any((2, 3)))
        assert not (full & ~parts.all((2, 3))).any()
        if (q_size, k_size) == (1, 1):
            np.testing.assert_array_equal(full, whole)


def kinds(mask, n=128, block=16):
    """(live, full) tiles of n tokens in blocks."""
    tile = lambda i, j: Tile(i * block, block, j * block, block, n, 0, 0)
    both = lambda i, j: (jnp.asarray(mask.live(tile(i, j))), jnp.asarray(mask.full(tile(i, j))))
    over = jax.jit(jax.vmap(jax.vmap(both, (None, 0)), (0, None)))
    return tuple(int(x.sum()) for x in over(jnp.arange(n // block), jnp.arange(n // block)))


def test_how_many_tiles_are_visited():
    """8 x 8 tiles of 16."""
    # 0, 1, 2 tiles back the last 33 keys, 4 and 6 back a multiple of 32; wholly seen is the tile just before
    assert kinds(Strided(32)) == (8 + 7 + 6 + 4 + 2, 7)
    # own blocks of two tiles: 3 each; of earlier blocks the second tile, which holds the summary
    assert kinds(Fixed(32, 4)) == (4 * 3 + (6 + 4 + 2), 4)
    assert kinds(Fixed(32, 16)) == (4 * 3 + (6 + 4 + 2), 4 + (6 + 4 + 2))
    assert kinds(Longformer(16, first=16)) == (8 + 2 * 7 + 12, 8 + 14)
    assert kinds(BigBird(16, random=0)) == (44, 44)  # 22 around the diagonal, 28 at the ends, 6 of them both
    mask = BigBird(16, random=2, seed=3)
    seen = np.asarray(dense(mask, (1, 1, 128, 128)))[0, 0, ::16, ::16].sum()
    assert kinds(mask) == (seen, seen) and 44 < seen <= 44 + 6 * 2


def test_random_blocks_are_spread_and_follow_the_seed():
    tables = [drawn(64 * 4, 4, 3, seed) for seed in range(4)]
    assert tables[0] == drawn.__wrapped__(64 * 4, 4, 3, 0) and tables[0] != tables[1]
    counts = np.bincount([k for table in tables for row in table for k in row], minlength=64)
    assert counts.min() > 0 and counts.max() < 32  # 12 expected of each block


CASES = {
    "strided": Case(Strided(40), lambda b, h, q, k: oracle.strided(q, k, 40), b=1, h=2, s=150, q_offset=20, t=130),
    "fixed": Case(Fixed(33, 5), lambda b, h, q, k: oracle.fixed(q, k, 33, 5), b=1, h=2, sinks=True),
    "longformer": Case(Longformer(20, first=3), lambda b, h, q, k: oracle.longformer(q, k, 20, 3), b=1, h=2),
    "big_bird": Case(BigBird(16, random=1), big_bird(130, 16, 3, 1, 1), b=1, h=2, soft_cap=2.0),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", harness.IMPLEMENTATIONS)
def test_attention_under_patterns(implementation, name):
    case = CASES[name]
    harness.check(harness.IMPLEMENTATIONS[implementation], case, harness.expected_of(case, *harness.inputs(case)))


def test_in_bands():
    """Keys on both sides of a query, some blocks of them away."""
    case = Case(Longformer(20), lambda b, h, q, k: abs(q - k) <= 20, b=1, h=2)
    call = harness.direct(blocked_attention, band=16)
    harness.check(call, case, harness.expected_of(case, *harness.inputs(case)))


def test_patterns_are_values_and_combine():
    assert Strided(4) == Strided(4) != Strided(5) and hash(BigBird(4)) == hash(BigBird(4)) != hash(BigBird(4, seed=1))
    assert not jax.tree.leaves(BigBird(4)) and Longformer(3).reach() == 4 and Longformer(3, first=1).reach() is None
    ids = np.array([[0] * 9 + [1] * 15])
    both = np.asarray(dense(Longformer(3, first=2) & Causal() & Segments(jnp.asarray(ids)), (1, 1, N, N)))[0, 0]
    same = ids[0][:, None] == ids[0][None]
    np.testing.assert_array_equal(both, WHOLE["longformer"] & np.tri(N, dtype=bool) & same)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Strided(0), "Strided: stride = 0"),
        (lambda: Fixed(4, 5), "summary = 5, expected at most block = 4"),
        (lambda: Longformer(2, first=-1), "first = -1, expected an int of at least 0"),
        (lambda: BigBird(4, window=2), "window = 2 blocks, expected an odd number"),
    ],
)
def test_bad_numbers(make, message):
    with pytest.raises(ValueError, match=message):
        make()
