import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.kernels.attention import (
    BlockDiffusion,
    Causal,
    Chunked,
    Dense,
    Full,
    Prefix,
    Segments,
    Span,
    Tree,
    Window,
    dense,
)
from jaxrl.kernels.attention.masks import Tile


def load(path):
    path = pathlib.Path(__file__).parents[1] / path
    spec = importlib.util.spec_from_file_location(path.stem + "_for_masks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = load("oracles/attention.py")
cases = load("kernels/cases.py")

N = 12
RNG = np.random.default_rng(1)
IDS, KV_IDS = RNG.integers(0, 3, (2, 2, N)).astype(np.int32)
LENGTHS = np.array([0, 5], np.int32)
END = np.minimum(np.arange(N) + RNG.integers(0, 6, (2, N)), N).astype(np.int32)
ARRAY = RNG.random((2, 3, N, N)) < 0.2
START = RNG.integers(-1, N, (2, N)).astype(np.int32)
STOP = START + RNG.integers(-1, N, (2, N)).astype(np.int32)


def block_diffusion(q, k):
    q_clean, k_clean, q_block, k_block = q >= 6, k >= 6, q % 6 // 2, k % 6 // 2
    if not k_clean:
        return not q_clean and q_block == k_block
    return k_block <= q_block if q_clean else k_block < q_block


MASKS = {
    "full": (Full(), lambda b, h, q, k: True),
    "causal": (Causal(), lambda b, h, q, k: k <= q),
    "window": (Window(3), lambda b, h, q, k: q - 3 < k <= q),
    "chunked": (Chunked(5), lambda b, h, q, k: q // 5 == k // 5),
    "prefix": (Prefix(LENGTHS), lambda b, h, q, k: k < LENGTHS[b]),
    "segments": (Segments(IDS), lambda b, h, q, k: IDS[b, q] == IDS[b, k]),
    "cross_segments": (Segments(IDS, KV_IDS), lambda b, h, q, k: IDS[b, q] == KV_IDS[b, k]),
    "tree": (Tree(END), lambda b, h, q, k: k <= q < END[b, k]),
    "span": (Span(START, STOP), lambda b, h, q, k: START[b, q] <= k < STOP[b, q]),
    "block_diffusion": (BlockDiffusion(2), lambda b, h, q, k: block_diffusion(q, k)),
    "dense": (Dense(ARRAY), lambda b, h, q, k: ARRAY[b, h, q, k]),
    "one_dense_for_all": (Dense(ARRAY[:1, :1]), lambda b, h, q, k: ARRAY[0, 0, q, k]),
    "and": (Causal() & Segments(IDS), lambda b, h, q, k: k <= q and IDS[b, q] == IDS[b, k]),
    "or": (Causal() | Prefix(LENGTHS), lambda b, h, q, k: k <= q or k < LENGTHS[b]),
    "nested": (
        Window(4) & (Segments(IDS) | Prefix(LENGTHS)),
        lambda b, h, q, k: q - 4 < k <= q and (IDS[b, q] == IDS[b, k] or k < LENGTHS[b]),
    ),
}
WHOLE = {name: oracle.dense(predicate, 2, 3, N, N) for name, (_, predicate) in MASKS.items()}


@pytest.mark.parametrize("name", MASKS)
def test_dense_form_is_the_double_loop(name):
    mask, whole = MASKS[name][0], WHOLE[name]
    np.testing.assert_array_equal(np.broadcast_to(dense(mask, (2, 3, N, N)), whole.shape), whole)
    part = jax.jit(lambda mask, offset: dense(mask, (2, 3, 4, N), offset))
    for offset in (0, 3, 8):
        rows = whole[:, :, offset : offset + 4]
        np.testing.assert_array_equal(np.broadcast_to(part(mask, offset), rows.shape), rows)
        np.testing.assert_array_equal(np.broadcast_to(dense(mask, (2, 3, 4, N), offset), rows.shape), rows)


@jax.jit(static_argnames=("q_size", "k_size"))
def of_tile(mask, q_first, k_first, row, head, *, q_size, k_size):
    tile = Tile(q_first, q_size, k_first, k_size, N, row, head)
    return jnp.broadcast_to(mask.allowed(tile), (1, 1, q_size, k_size))[0, 0], mask.live(tile), mask.full(tile)


@pytest.mark.parametrize("name", MASKS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_tiles_are_parts_of_the_whole_and_never_wrongly_dead_or_full(name, data):
    mask, whole = MASKS[name][0], WHOLE[name]
    q_size, k_size = data.draw(st.sampled_from([(1, 1), (2, 3), (4, 4), (1, N), (5, 2)]))
    q_first, k_first = data.draw(st.integers(0, N - q_size)), data.draw(st.integers(0, N - k_size))
    row, head = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 2))
    allowed, live, full = of_tile(mask, q_first, k_first, row, head, q_size=q_size, k_size=k_size)
    want = whole[row, head, q_first : q_first + q_size, k_first : k_first + k_size]
    np.testing.assert_array_equal(allowed, want)
    assert live or not want.any()
    assert not full or want.all()


@pytest.mark.parametrize("name", [name for name in MASKS if name not in ("full", "segments")])
def test_single_pairs_are_dead_or_full(name):
    """On tiles of one pair the tests are exact, but that block diffusion is `full` less often than it might be."""
    mask, whole = MASKS[name][0], WHOLE[name]
    one = lambda q, k: of_tile(mask, q, k, 1, 1, q_size=1, k_size=1)[1:]  # noqa: E731
    live, full = jax.vmap(jax.vmap(one, (None, 0)), (0, None))(jnp.arange(N), jnp.arange(N))
    np.testing.assert_array_equal(live, whole[1, 1])
    if "block" in name:
        assert not (full & ~whole[1, 1]).any() and full.any()
    else:
        np.testing.assert_array_equal(full, whole[1, 1])


def test_no_two_masks_have_the_same_structure():
    """Equal structures would let `jit` serve one mask with the program of another, at the whim of hashes."""
    masks = [Full(), Causal(), Window(3), Chunked(3), BlockDiffusion(3), Window(4)]
    masks += [Prefix(LENGTHS), Tree(END), Dense(ARRAY), Segments(IDS), Causal() & Full(), Causal() | Full()]
    structures = [jax.tree.structure(mask) for mask in masks]
    assert [[a == b for b in structures] for a in structures] == np.eye(len(masks)).tolist()


def test_no_pair_is_beyond_the_reach():
    reaches = {name: mask.reach() for name, (mask, _) in MASKS.items()}
    assert {name: n for name, n in reaches.items() if n is not None} == {"window": 3, "nested": 4}
    assert (Window(5) & Window(2) & Causal()).reach() == 2
    for name, n in reaches.items():
        if n is not None:
            *_, q, k = np.nonzero(WHOLE[name])
            assert np.abs(q - k).max() == n - 1


def live_tiles(mask, n, block):
    live = jax.jit(lambda mask, i, j: jnp.asarray(mask.live(Tile(i, block, j, block, n, 0, 0))))
    return sum(bool(live(mask, i, j)) for i in range(0, n, block) for j in range(0, n, block))


def test_how_many_tiles_need_no_mask():
    full = jax.jit(lambda mask, i, j: jnp.asarray(mask.full(Tile(i, 16, j, 16, 128, 0, 0))))
    count = lambda mask: sum(bool(full(mask, i, j)) for i in range(0, 128, 16) for j in range(0, 128, 16))
    ids = jnp.repeat(jnp.arange(4, dtype=jnp.int32), 32)[None]
    n = 8
    assert count(Full()) == n * n
    assert count(Causal()) == n * (n - 1) // 2
    assert count(Window(64)) == (n - 1) + (n - 2) + (n - 3)
    assert count(Chunked(32)) == count(Segments(ids)) == 4 * 4
    assert count(Causal() & Segments(ids)) == count(Tree(32 * (ids + 1))) == 4
    assert count(Causal() | Prefix(jnp.array([20]))) == n * (n - 1) // 2 + 1
    assert count(BlockDiffusion(16)) == 4 + (3 + 2 + 1) + (4 + 3 + 2 + 1)  # own noisy, earlier clean, clean
    assert count(Dense(jnp.ones((1, 1, 128, 128), bool))) == n * n


def test_how_many_tiles_live():
    n = 8  # blocks of 16
    assert live_tiles(Full(), 128, 16) == n * n
    assert live_tiles(Causal(), 128, 16) == n * (n + 1) // 2
    assert live_tiles(Window(16), 128, 16) == n + (n - 1)
    assert live_tiles(Window(1), 128, 16) == n
    assert live_tiles(Chunked(32), 128, 16) == 4 * 4
    assert live_tiles(Causal() & Chunked(32), 128, 16) == 4 * 3
    ids = jnp.repeat(jnp.arange(4, dtype=jnp.int32), 32)[None]
    assert live_tiles(Causal() & Segments(ids), 128, 16) == 4 * 3
    assert live_tiles(Tree(32 * (ids + 1)), 128, 16) == 4 * 3
    assert live_tiles(Prefix(jnp.array([20])), 128, 16) == n * 2
    assert live_tiles(BlockDiffusion(16), 128, 16) == 4 + (3 + 2 + 1) + (4 + 3 + 2 + 1)
    assert live_tiles(Dense(jnp.eye(128, dtype=bool)[None, None]), 128, 16) == n


def test_masks_are_pytrees_and_static_ones_are_values():
    mask = Causal() & Segments(jnp.zeros((2, 4), jnp.int32)) | Window(3)
    leaves, structure = jax.tree.flatten(mask)
    assert [x.shape for x in leaves] == [(2, 4)]
    assert isinstance(jax.tree.unflatten(structure, leaves), type(mask))
    assert Window(3) == Window(3) != Window(4) and hash(Causal()) == hash(Causal())
    over = jax.vmap(lambda ids: dense(Segments(ids), (1, 1, 4, 4)))(jnp.arange(12).reshape(3, 1, 4) // 2)
    assert over.shape == (3, 1, 1, 4, 4)


@pytest.mark.parametrize("make", [lambda n: Window(n), lambda n: Chunked(n), lambda n: BlockDiffusion(n)])
@pytest.mark.parametrize("n", [0, -1, 2.0])
def test_sizes_must_be_positive_integers(make, n):
    with pytest.raises(ValueError, match="expected an int of at least 1"):
        make(n)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Segments(jnp.zeros((2, 7), int)), r"q_ids, .*has shape \(2, 7\), expected \[B, S\] = \[2 or 1, 6\]"),
        (
            Segments(jnp.zeros((2, 4), int), jnp.zeros((2, 6), int)),
            r"\[B, q_offset \+ T\] = \[2 or 1, at least 5\]",
        ),
        (Prefix(jnp.zeros((3,), int)), r"Prefix: lengths has shape \(3,\)"),
        (Tree(jnp.zeros((2, 5), int)), r"Tree: end has shape \(2, 5\), expected \[B, S\]"),
        (Causal() | Tree(jnp.zeros((6,), int)), r"Tree: end has shape \(6,\)"),
        (Span(jnp.zeros((2, 5), int), jnp.zeros((2, 4), int)), r"Span: stop has shape \(2, 4\), expected .*at least 5"),
    ],
)
def test_arrays_that_do_not_fit(mask, message):
    with pytest.raises(ValueError, match=message):
        mask.check((2, 4, 3, 6), 2)


def test_block_diffusion_needs_two_halves():
    with pytest.raises(ValueError, match="S = 7 keys, expected an even number"):
        BlockDiffusion(2).check((1, 1, 7, 7), 0)
