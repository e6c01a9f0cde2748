# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Blocked attention
#
# Attention compares every query with every key. Its *result* is small, one vector for each query, but written down as
# the formula reads it passes through a table of all pairs. Here the table goes away, step by step, and nothing else
# changes: not a value, not a gradient.
#
# 1. the formula, and what it keeps in memory
# 2. online softmax: partial results that can be merged
# 3. the backward pass, from one number for each query
# 4. masks by tiles, drawn
# 5. memory and time, measured
# 6. completions that share a prompt: a tree in one row
# 7. the same on a TPU, in decoding, and round a ring of devices
#
# - **Hardware**: any machine, of which the CPU is used; written for 2 cores.
# - **Running time**: one to two minutes, compilation included.
# - **Smaller**: with `SMOKE=1` in the environment everything runs at toy size.

# %%
# Install, from a checkout of the repository (remove the #):
# # %pip install --quiet --editable "..[notebook]"

# %%
import functools
import io
import os
import time
from typing import NamedTuple

import IPython.display
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from matplotlib.patches import Patch, Rectangle

from jaxrl.kernels.attention import (
    BlockDiffusion,
    Causal,
    Segments,
    Tree,
    Window,
    attention,
    decode_attention,
    dense,
    ring_attention,
)
from jaxrl.kernels.attention.masks import Tile
from jaxrl.kernels.attention.tiles import FULL, LIVE, tile_kinds
from jaxrl.nets.language_model import language_model, logits
from jaxrl.nets.transformer import TransformerConfig

jax.config.update("jax_platforms", "cpu")  # also where there is an accelerator: what is measured is the CPU's
jax.config.update("jax_num_cpu_devices", 4)  # for the ring at the end; all else runs on the first

SMOKE = os.environ.get("SMOKE", "0") == "1"
LENGTHS = (256, 1024) if SMOKE else (256, 1024, 4096, 16384)  # of the memory curves; these are compiled, not run
TIMED = (256,) if SMOKE else (512, 1024, 2048, 4096)
REPEATS = 1 if SMOKE else 5
PROMPT, COMPLETION, GROUP = (256, 32, 8) if SMOKE else (1024, 128, 8)
plt.rcParams |= {"figure.dpi": 80, "figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3}
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "font.size": 10}
BLUE, ORANGE = plt.rcParams["axes.prop_cycle"].by_key()["color"][:2]


def show(figure):
    """Displays a figure in 256 colours, which keeps the notebook small."""
    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, bbox_inches="tight")
    plt.close(figure)
    PIL.Image.open(full).convert("RGB").quantize(256).save(small, "PNG", optimize=True)
    IPython.display.display(IPython.display.Image(small.getvalue()))


def apart(a, b):
    """The largest difference between two trees of arrays that should be equal up to rounding."""
    largest = max(jax.tree.leaves(jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), a, b)))
    assert largest < 1e-3, f"they are {largest} apart"
    return largest


def best_of(f, *arguments):
    """Seconds of the quickest of several calls, the first and its compilation not counted."""
    jax.block_until_ready(f(*arguments))
    taken = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        jax.block_until_ready(f(*arguments))
        taken.append(time.perf_counter() - begun)
    return min(taken)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


# %% [markdown]
# ## 1. The formula
#
# One head: queries $q_i$, keys $k_j$, values $v_j$. With the logits $s_{ij} = q_i \cdot k_j / \sqrt{D}$, where the mask
# allows the pair,
#
# $$p_{ij} = \frac{e^{s_{ij}}}{\sum_{j'} e^{s_{ij'}}}, \qquad o_i = \sum_j p_{ij} v_j .$$


# %%
def attend(q, k, v, allowed):
    """As the formula reads: q [T, D], k and v [S, D], allowed [T, S] -> [T, D]."""
    s = jnp.where(allowed, q @ k.T * q.shape[1] ** -0.5, -1e30)
    return jax.nn.softmax(s, axis=1) @ v


def temporary(f, *shapes):
    """Bytes that the compiled program needs beside its arguments and results."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(f).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


D = 64
print(f"{'T':>6} {'result':>9} {'temporary':>12} {'T^2 floats':>12}")
for T in LENGTHS[:3]:
    causal = lambda q, k, v: attend(q, k, v, dense(Causal(), (1, 1, T, T))[0, 0])
    size = temporary(causal, (T, D), (T, D), (T, D))
    print(f"{T:6} {4 * T * D / 2**20:6.2f} MB {size / 2**20:9.2f} MB {4 * T * T / 2**20:9.2f} MB")

# %% [markdown]
# One table of pairs or two, depending on what the compiler fuses: it grows with the square of the length, where the
# result grows with the length. And that is one head, one layer, one row of the batch.
#
# ## 2. Online softmax
#
# What must be known about *some* of the keys, so that the others can be added later? For a set $A$ of keys and one
# query, keep
#
# $$m_A = \max_{j \in A} s_j, \qquad \ell_A = \sum_{j \in A} e^{s_j - m_A}, \qquad
# a_A = \sum_{j \in A} e^{s_j - m_A} v_j .$$
#
# The maximum keeps the exponentials from overflowing. Over all keys, $o = a / \ell$, and the normaliser is
# $\mathrm{lse} = m + \log \ell$. Two disjoint sets are merged by bringing both to the larger maximum:
#
# $$m = \max(m_A, m_B), \qquad \ell = e^{m_A - m} \ell_A + e^{m_B - m} \ell_B, \qquad
# a = e^{m_A - m} a_A + e^{m_B - m} a_B .$$
#
# (Milakov and Gimelshein 2018, [arXiv 1805.02867](https://arxiv.org/abs/1805.02867); with the values, Rabe and Staats
# 2021, [arXiv 2112.05682](https://arxiv.org/abs/2112.05682), and Dao et al. 2022,
# [arXiv 2205.14135](https://arxiv.org/abs/2205.14135).) In code:

# %%
MASKED, SEEN = -1e30, -1e29  # a forbidden logit; a maximum below SEEN means that no key was seen


class Part(NamedTuple):
    """What queries know of some of the keys."""

    m: jax.Array  # [T]
    l: jax.Array  # noqa: E741  [T]
    a: jax.Array  # [T, D]


def look(q, k, v, allowed):
    """The part that a few keys make."""
    s = jnp.where(allowed, q @ k.T * q.shape[1] ** -0.5, MASKED)
    m = s.max(axis=1)
    p = jnp.exp(s - jnp.where(m < SEEN, 0.0, m)[:, None])
    return Part(m, p.sum(axis=1), p @ v)


def merge(x, y):
    m = jnp.maximum(x.m, y.m)
    by_x, by_y = jnp.exp(x.m - m), jnp.exp(y.m - m)
    return Part(m, by_x * x.l + by_y * y.l, by_x[..., None] * x.a + by_y[..., None] * y.a)


def finish(part):
    """(o, lse); zeros where no key was seen."""
    total = jnp.where(part.l > 0, part.l, 1.0)
    return part.a / total[..., None], jnp.where(part.l > 0, part.m + jnp.log(total), MASKED)


# %% [markdown]
# The mask is a small value, not an array: it evaluates itself on whatever rectangle it is asked about. So the loop over
# tiles of keys never holds more than one tile of pairs.


# %%
def tile_of(mask, q, j, block, s):
    """allowed [T, block]: all queries against tile j of the keys."""
    return jnp.broadcast_to(mask.allowed(Tile(0, len(q), j * block, block, s))[0, 0], (len(q), block))


def online(q, k, v, *, mask, block):
    """`attend`, one tile of keys at a time: (o, lse)."""
    k_tiles, v_tiles = k.reshape(-1, block, k.shape[1]), v.reshape(-1, block, v.shape[1])
    nothing = Part(jnp.full(len(q), MASKED), jnp.zeros(len(q)), jnp.zeros((len(q), v.shape[1])))

    def add(part, tile):
        j, kj, vj = tile
        return merge(part, look(q, kj, vj, tile_of(mask, q, j, block, len(k)))), None

    part, _ = jax.lax.scan(add, nothing, (jnp.arange(len(k_tiles)), k_tiles, v_tiles))
    return finish(part)


T, BLOCK = 96, 16
q, k, v = (normal(i, T, 32) for i in range(3))
for mask in (Causal(), Window(20), Causal() & Segments(jnp.repeat(jnp.arange(3), 32)[None])):
    expected = attend(q, k, v, dense(mask, (1, 1, T, T))[0, 0])
    o, lse = online(q, k, v, mask=mask, block=BLOCK)
    print(f"{type(mask).__name__:7} largest difference from the formula: {apart(o, expected):.1e}")

# %% [markdown]
# ### The order does not matter
#
# `merge` is associative and commutative, and `nothing` is its neutral element: the parts may be merged from the left,
# from the right, shuffled, or in pairs as a tree. In floats this holds up to rounding. One law, many uses: tiles one
# after another on one core, parts side by side for a long cache, parts that come round a ring of devices.

# %%
mask = Causal()
parts = [
    look(q, k[j * BLOCK : (j + 1) * BLOCK], v[j * BLOCK : (j + 1) * BLOCK], tile_of(mask, q, j, BLOCK, T))
    for j in range(T // BLOCK)
]
left = functools.reduce(merge, parts)
right = functools.reduce(lambda x, y: merge(y, x), reversed(parts))
shuffled = functools.reduce(merge, [parts[j] for j in (3, 0, 5, 1, 4, 2)])
stacked = jax.tree.map(lambda *x: jnp.stack(x), *parts)
tree = jax.tree.map(lambda x: x[-1], jax.lax.associative_scan(merge, stacked))
expected = attend(q, k, v, dense(mask, (1, 1, T, T))[0, 0])
for name, part in {"left": left, "right": right, "shuffled": shuffled, "tree": tree}.items():
    print(f"{name:9} from the formula {apart(finish(part)[0], expected):.1e}, "
          f"lse from the left one {apart(finish(part)[1], finish(left)[1]):.1e}")  # fmt: skip

# %% [markdown]
# Finished parts merge as well: from $(o_A, \mathrm{lse}_A)$ and $(o_B, \mathrm{lse}_B)$ alone,
# $\mathrm{lse} = \log(e^{\mathrm{lse}_A} + e^{\mathrm{lse}_B})$ and
# $o = e^{\mathrm{lse}_A - \mathrm{lse}}\, o_A + e^{\mathrm{lse}_B - \mathrm{lse}}\, o_B$. This form travels between
# devices and calls, since every implementation returns it.


# %%
def merge_finished(o_a, lse_a, o_b, lse_b):
    lse = jnp.logaddexp(lse_a, lse_b)
    return jnp.exp(lse_a - lse)[..., None] * o_a + jnp.exp(lse_b - lse)[..., None] * o_b, lse


halves = [finish(functools.reduce(merge, parts[a:b])) for a, b in ((0, 3), (3, 6))]
print(f"two finished halves: {apart(merge_finished(*halves[0], *halves[1]), finish(left)):.1e}")

# %% [markdown]
# ### Why -1e30 and not -inf
#
# A query may meet a tile in which it sees nothing. Then the maximum is the mask's own value, and with -inf the
# difference $s - m$ is $\infty - \infty$. With a finite value it is zero, and $e^0 = 1$: the forbidden keys count,
# until a real key comes and its merge multiplies them by $e^{-10^{30}} = 0$. A query that never sees a key would keep
# their average, hence the `SEEN` in `look`. The three, for one query that sees a key in the second tile and one that
# sees none (each value is 7):


# %%
def two_tiles(masked, guarded):
    part = Part(jnp.full(2, masked), jnp.zeros(2), jnp.zeros((2, 1)))
    for allowed in (jnp.array([[False, False], [False, False]]), jnp.array([[True, False], [False, False]])):
        s = jnp.where(allowed, 0.5, masked)
        m = s.max(axis=1)
        p = jnp.exp(s - (jnp.where(m < SEEN, 0.0, m) if guarded else m)[:, None])
        part = merge(part, Part(m, p.sum(axis=1), p @ jnp.full((2, 1), 7.0)))
    return finish(part)[0][:, 0]


for masked, guarded in ((-jnp.inf, False), (MASKED, False), (MASKED, True)):
    late, never = two_tiles(masked, guarded)
    print(
        f"{masked:8.0e}, {'guarded' if guarded else 'not guarded':11}: sees a key late {late:3.0f}, none {never:3.0f}"
    )

# %% [markdown]
# ## 3. The backward pass
#
# Automatic differentiation of `online` would be right, but the scan would keep every tile's weights for the way back:
# the table again, in pieces. Instead the weights are computed anew, tile by tile, from the log-sum-exp:
# $p_{ij} = e^{s_{ij} - \mathrm{lse}_i}$, no maximum and no sum needed.
#
# With $\dot o$ the gradient of $o$: $\dot v_j = \sum_i p_{ij} \dot o_i$, and $\dot p_{ij} = \dot o_i \cdot v_j$. The
# softmax's Jacobian gives
#
# $$\dot s_{ij} = p_{ij} \Bigl(\dot p_{ij} - \sum_{j'} p_{ij'} \dot p_{ij'}\Bigr), \qquad
# \sum_{j'} p_{ij'} \dot p_{ij'} = \dot o_i \cdot \sum_{j'} p_{ij'} v_{j'} = \dot o_i \cdot o_i =: \delta_i .$$
#
# The sum over *all* keys, which a tile cannot know, is one number for each query, known before the loop begins. Then
# $\dot q_i = \sum_j \dot s_{ij} k_j / \sqrt D$ and $\dot k_j = \sum_i \dot s_{ij} q_i / \sqrt D$. (Dao 2023,
# [arXiv 2307.08691](https://arxiv.org/abs/2307.08691).)


# %%
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def flash(q, k, v, mask, block):
    return online(q, k, v, mask=mask, block=block)[0]


def flash_forward(q, k, v, mask, block):
    o, lse = online(q, k, v, mask=mask, block=block)
    return o, (q, k, v, o, lse)


def flash_backward(mask, block, saved, do):
    q, k, v, o, lse = saved
    scale, delta = q.shape[1] ** -0.5, jnp.sum(do * o, axis=1)
    lse = jnp.where(lse < SEEN, 0.0, lse)

    def visit(dq, tile):
        j, kj, vj = tile
        s = jnp.where(tile_of(mask, q, j, block, len(k)), q @ kj.T * scale, MASKED)
        p = jnp.exp(s - lse[:, None])
        ds = p * (do @ vj.T - delta[:, None])
        return dq + ds @ kj * scale, (ds.T @ q * scale, p.T @ do)

    tiles = jnp.arange(len(k) // block), k.reshape(-1, block, k.shape[1]), v.reshape(-1, block, v.shape[1])
    dq, (dk, dv) = jax.lax.scan(visit, jnp.zeros_like(q), tiles)
    return dq, dk.reshape(k.shape), dv.reshape(v.shape)


flash.defvjp(flash_forward, flash_backward)

weight = normal(3, T, 32)
by_formula = lambda q, k, v: attend(q, k, v, dense(Window(20), (1, 1, len(q), len(q)))[0, 0])
by_scan = lambda q, k, v: online(q, k, v, mask=Window(20), block=BLOCK)[0]
by_flash = lambda q, k, v: flash(q, k, v, Window(20), BLOCK)
gradients = lambda f: jax.jit(jax.grad(lambda *x: jnp.sum(weight * f(*x)), argnums=(0, 1, 2)))
expected = gradients(by_formula)(q, k, v)
for name, g, e in zip("qkv", gradients(by_flash)(q, k, v), expected, strict=True):
    print(f"gradient of {name}: largest entry {jnp.abs(e).max():.2f}, largest difference {apart(g, e):.1e}")


def kept(f, shape):
    """Bytes that stand between the forward and the backward pass."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    pullback = jax.eval_shape(lambda q, k, v: jax.vjp(f, q, k, v)[1], x, x, x)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))


print("\nbytes kept for the backward pass, D = 32")
print(f"{'':14}{'T = 96':>12}{'T = 960':>14}")
print(f"{'q, k, v and o':14}{4 * 96 * 32 * 4:12,}{4 * 960 * 32 * 4:14,}")
for name, f in {"formula": by_formula, "scan": by_scan, "flash": by_flash}.items():
    print(f"{name:14}{kept(f, (96, 32)):12,}{kept(f, (960, 32)):14,}")

# %% [markdown]
# ## 4. Masks by tiles
#
# A mask that forbids much should cost less. Each mask answers two more questions about a rectangle of pairs, from its
# corners and the extremes of its arrays, without looking at the pairs: may any be allowed (`live`)? Are all allowed
# (`full`)? Tiles that are not live are skipped; in full ones the mask is not even evaluated. `tile_kinds` asks for all
# tiles.
#
# Below, queries go down and keys to the right. The fifth is a group of eight completions behind one prompt; the
# sixth is the training mask of block diffusion (Arriola et al. 2025,
# [arXiv 2503.09573](https://arxiv.org/abs/2503.09573)): the noisy sequence, then the clean one.

# %%
SIDE, TILE = 96, 8
documents = jnp.repeat(jnp.arange(3), jnp.array([30, 20, 46]))[None]
branch_end = 24 + 9 * (1 + (jnp.arange(SIDE) - 24) // 9)
group_end = jnp.where(jnp.arange(SIDE) < 24, SIDE, branch_end)[None].astype(jnp.int32)
pictures = {
    "causal": Causal(),
    "window of 20": Window(20),
    "three packed documents": Causal() & Segments(documents),
    "documents and window": Window(20) & Segments(documents),
    "a prompt, 8 completions": Tree(group_end),
    "block diffusion": BlockDiffusion(6),
}


def draw(axis, mask, name):
    allowed = np.asarray(jnp.broadcast_to(dense(mask, (1, 1, SIDE, SIDE))[0, 0], (SIDE, SIDE)))
    kinds = np.asarray(tile_kinds(mask, (1, SIDE, SIDE), (TILE, TILE), 0)[0])
    axis.imshow(np.where(allowed[..., None], (0.42, 0.65, 0.87), (1.0, 1.0, 1.0)), extent=(0, SIDE, SIDE, 0))
    for (i, j), kind in np.ndenumerate(kinds):
        box = functools.partial(Rectangle, (j * TILE, i * TILE), TILE, TILE, linewidth=0)
        if kind == 0:
            axis.add_patch(box(facecolor="0.82"))
        elif not kind & FULL:
            axis.add_patch(box(fill=False, hatch="////", edgecolor="0.35"))
    axis.set_xticks(range(0, SIDE + 1, TILE), [])
    axis.set_yticks(range(0, SIDE + 1, TILE), [])
    axis.tick_params(length=0)
    axis.grid(color="0.45", linewidth=0.5, alpha=1.0)
    axis.spines[:].set_visible(False)
    visited = np.mean(kinds > 0)
    axis.set_title(f"{name}\n{visited:.0%} of the tiles visited, {np.mean(kinds & FULL > 0):.0%} full", fontsize=10)
    truth = allowed.reshape(SIDE // TILE, TILE, SIDE // TILE, TILE)
    needed, whole = truth.any(axis=(1, 3)), truth.all(axis=(1, 3))
    assert not (needed & (kinds == 0)).any() and not (~whole & (kinds & FULL > 0)).any()
    return allowed.mean(), visited, needed.mean(), np.mean(kinds & FULL > 0), whole.mean()


with plt.rc_context({"hatch.linewidth": 0.5}):
    figure, axes = plt.subplots(2, 3, figsize=(9.6, 7.2))
    rows = {name: draw(axis, mask, name) for axis, (name, mask) in zip(axes.flat, pictures.items(), strict=True)}
    legend = [
        Patch(facecolor="0.82", label="dead: skipped"),
        Patch(facecolor=(0.42, 0.65, 0.87), label="allowed"),
        Patch(facecolor="white", edgecolor="0.35", hatch="////", label="partial: the mask is evaluated"),
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=3)
    show(figure)

# %%
print(f"{'':24} pairs allowed   tiles visited (needed)   full by `full` (in truth)")
for name, (pairs, visited, needed, full, whole) in rows.items():
    print(f"{name:24} {pairs:13.1%}   {visited:13.1%} ({needed:6.1%})   {full:14.1%} ({whole:.1%})")

print("\ntiles visited, by side of the tile")
print(f"{'':24}" + "".join(f"{side:8}" for side in (4, 8, 16, 32)))
for name, mask in pictures.items():
    kinds = [tile_kinds(mask, (1, SIDE, SIDE), (side, side), 0) for side in (4, 8, 16, 32)]
    print(f"{name:24}" + "".join(f"{float(jnp.mean(x & LIVE > 0)):8.1%}" for x in kinds))

# %% [markdown]
# No tile that holds an allowed pair was skipped, and none was called full that is not (the assertion in `draw`). The
# other way round the answers may be cautious, which costs time, never correctness. Small tiles follow a mask more
# closely, but each visit has its price; this library's CPU form takes sides of up to 256.
#
# ## 5. Memory and time, measured
#
# The same call through the library, one head of 64, causal. `"reference"` is the formula, `"xla"` the tiles above with
# queries cut as well, dead tiles skipped and the backward pass of section 3. First the temporary bytes of the compiled
# program, forward alone and with gradients.


# %%
def forward(implementation, mask):
    return lambda q, k, v: attention(q, k, v, mask=mask, implementation=implementation)


def with_gradients(implementation, mask):
    f = forward(implementation, mask)
    return jax.grad(lambda q, k, v: jnp.sum(f(q, k, v)), argnums=(0, 1, 2))


bytes_of = {}
for implementation in ("reference", "xla"):
    for pass_, program in {"forward": forward, "gradient": with_gradients}.items():
        f = program(implementation, Causal())
        bytes_of[implementation, pass_] = [temporary(f, *[(1, n, 1, D)] * 3) for n in LENGTHS]

print(f"{'temporary MB at T =':20}" + "".join(f"{n:10}" for n in LENGTHS) + "   last slope")
slopes = {}
for which, sizes in bytes_of.items():
    slopes[which] = np.log(sizes[-1] / sizes[-2]) / np.log(LENGTHS[-1] / LENGTHS[-2])
    print(f"{' '.join(which):20}" + "".join(f"{size / 2**20:10.2f}" for size in sizes) + f"{slopes[which]:13.2f}")

# %% [markdown]
# A slope of 2 in the log-log plot is the table of pairs; a slope of 1 is a few vectors for each token, plus a constant
# for the tile at hand. Then the time: the best of several calls, of forward and gradient together. What is *skipped*
# shows as well: with a window, the tiles visited grow in number with $T$, not with $T^2$.

# %%
seconds_of = {}
for name, implementation, mask in (
    ("reference, causal", "reference", Causal()),
    ("xla, causal", "xla", Causal()),
    ("xla, window of 256", "xla", Window(256)),
):
    f = jax.jit(with_gradients(implementation, mask))
    seconds_of[name] = [best_of(f, *(normal(i, 1, n, 2, D) for i in range(3))) for n in TIMED]

print(f"{'ms at T =':20}" + "".join(f"{n:10}" for n in TIMED))
for name, taken in seconds_of.items():
    print(f"{name:20}" + "".join(f"{1e3 * x:10.1f}" for x in taken))
print("tiles of 256 x 256 visited, one head")
for mask in (Causal(), Window(256)):
    visited = [int(jnp.sum(tile_kinds(mask, (1, n, n), (256, 256), 0) > 0)) for n in TIMED]
    print(f"{type(mask).__name__:20}" + "".join(f"{x:10}" for x in visited))

# %%
figure, (left_axis, right_axis) = plt.subplots(1, 2, figsize=(9.6, 3.9))
for (implementation, pass_), sizes in bytes_of.items():
    left_axis.loglog(
        LENGTHS,
        np.array(sizes) / 2**20,
        color=ORANGE if implementation == "reference" else BLUE,
        linestyle="-" if pass_ == "gradient" else "--",
        marker="o",
        markersize=4,
        label=f"{implementation}, {pass_}: slope {slopes[implementation, pass_]:.2f}",
    )
left_axis.set(title="temporary memory (MB), one head, D = 64", xlabel="T")
left_axis.set_xticks(LENGTHS, LENGTHS)
left_axis.minorticks_off()
left_axis.legend(fontsize=9)
for (name, taken), color, style in zip(seconds_of.items(), (ORANGE, BLUE, BLUE), ("-", "-", ":"), strict=True):
    right_axis.loglog(TIMED, 1e3 * np.array(taken), color=color, linestyle=style, marker="o", markersize=4, label=name)
right_axis.set(title="forward and gradient (ms), two heads, D = 64", xlabel="T")
right_axis.set_xticks(TIMED, TIMED)
right_axis.minorticks_off()
right_axis.legend(fontsize=9)
show(figure)

# %% [markdown]
# ## 6. A tree in one row
#
# GRPO draws a group of completions to one prompt. Trained as separate rows, the prompt goes through the network once
# for each. Put into one row instead, depth first, with `Tree(end)`: key $k$ is seen by $k \le q < \mathrm{end}_k$. The
# prompt's end is the row's, a completion's end its own. Each completion's positions go on from the prompt's, as in a
# row of its own.


# %%
def group_row(prompt, completion, group):
    """(end, positions, parent) of completions of one length behind their prompt, each [prompt + group completion]."""
    index = jnp.arange(prompt + group * completion, dtype=jnp.int32)
    which, step = jnp.divmod(index - prompt, completion)
    inside = index >= prompt
    end = jnp.where(inside, prompt + (which + 1) * completion, len(index))
    positions = jnp.where(inside, prompt + step, index)
    parent = jnp.where(inside & (step == 0), prompt - 1, index - 1)  # the token before
    return end, positions, parent


def to_rows(x, prompt, group):
    """[1, prompt + group completion, ...] -> [group, prompt + completion, ...]: the prompt once for each."""
    own = x[0, prompt:].reshape(group, -1, *x.shape[2:])
    return jnp.concatenate([jnp.broadcast_to(x[:, :prompt], (group, prompt, *x.shape[2:])), own], axis=1)


def completions_of(o, prompt):
    """The completions' part of separate rows, as in the one row."""
    return o[:, prompt:].reshape(1, -1, *o.shape[2:])


end, positions, parent = group_row(96, 16, GROUP)
q, k, v = (normal(i, 1, len(end), 2, 32) for i in range(3))
weight = normal(3, 1, GROUP * 16, 2, 32)


def in_one_row(q, k, v):
    return attention(q, k, v, mask=Tree(end[None]), implementation="xla")[:, 96:]


def in_separate_rows(q, k, v):
    q, k, v = (to_rows(x, 96, GROUP) for x in (q, k, v))
    return completions_of(attention(q, k, v, implementation="xla"), 96)


results = [
    jax.jit(jax.value_and_grad(lambda *x: (jnp.sum(weight * f(*x)), f(*x)), argnums=(0, 1, 2), has_aux=True))(q, k, v)
    for f in (in_one_row, in_separate_rows)
]
((_, o_tree), g_tree), ((_, o_rows), g_rows) = results
print(f"completions' outputs: largest difference {apart(o_tree, o_rows):.1e}")
for name, a, b in zip("qkv", g_tree, g_rows, strict=True):
    print(f"gradient of the prompt's {name}: largest entry {jnp.abs(b[:, :96]).max():.2f}, "
          f"largest difference {apart(a[:, :96], b[:, :96]):.1e}")  # fmt: skip

# %% [markdown]
# The prompt's gradient is the sum over its eight copies: the one row adds it up by itself. (The prompt's queries get
# none from one layer, as only the completions' outputs count here.) The same with a whole decoder, where the prompt's
# hidden states feed the next layer, and each token is predicted at its parent: the loss is a policy gradient's, minus
# each completion's log-probability times its advantage.

# %%
model = language_model(TransformerConfig(vocab_size=32, width=32, layers=2, heads=4, kv_heads=2, ffn=64))
params = jax.jit(model.init)(jax.random.key(0))
params = jax.tree.map(lambda x: 3.0 * x, params)  # attention less even than at first, so that positions count
tokens = jax.random.randint(jax.random.key(1), (1, len(end)), 0, 32)
advantages = jnp.repeat(normal(2, GROUP), 16)[None]


def log_probs(params, tokens, parent, **how):
    """Of each token, predicted at its parent: [B, T]. The first token has none; its value means nothing."""
    hidden, _ = model.apply(params, tokens, **how)
    of_all = jax.nn.log_softmax(logits(hidden[:, parent], model.unembedding(params)))
    return jnp.take_along_axis(of_all, tokens[..., None], axis=2)[..., 0]


def tree_loss(params):
    values = log_probs(params, tokens, parent, positions=positions[None], mask=Tree(end[None]))[:, 96:]
    return -jnp.sum(advantages * values), values


def rows_loss(params):
    rows = to_rows(tokens, 96, GROUP)
    values = completions_of(log_probs(params, rows, jnp.arange(rows.shape[1]) - 1), 96)
    return -jnp.sum(advantages * values), values


(_, tree_values), tree_gradient = jax.jit(jax.value_and_grad(tree_loss, has_aux=True))(params)
(_, rows_values), rows_gradient = jax.jit(jax.value_and_grad(rows_loss, has_aux=True))(params)
largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(rows_gradient))
print(f"log-probs: largest difference {apart(tree_values, rows_values):.1e}")
print(f"gradient of all parameters: largest entry {largest:.1f}, "
      f"largest difference {apart(tree_gradient, rows_gradient):.1e}")  # fmt: skip

# %% [markdown]
# And the work. Tokens are what projections, feed-forward layers and the head pay for; pairs and tiles are what
# attention pays for; the time is attention's alone, forward and gradient.

# %%
end, _, _ = group_row(PROMPT, COMPLETION, GROUP)
length, row = len(end), PROMPT + COMPLETION
mask = Tree(end[None])
side = 64
pairs = jnp.sum(end - jnp.arange(length))  # a key is seen from its own position to its end
tiles = jnp.sum(tile_kinds(mask, (1, length, length), (side, side), 0) > 0)
row_pairs = GROUP * row * (row + 1) // 2
row_tiles = GROUP * jnp.sum(tile_kinds(Causal(), (1, row, row), (side, side), 0) > 0)
timed = {}
for name, kind, batch, n in (("tree", mask, 1, length), ("rows", Causal(), GROUP, row)):
    f = jax.jit(with_gradients("xla", kind))
    timed[name] = 1e3 * best_of(f, *(normal(i, batch, n, 2, D) for i in range(3)))

print(f"prompt of {PROMPT}, {GROUP} completions of {COMPLETION}")
print(f"{'':22}{'one tree':>12}{'separate rows':>15}{'ratio':>8}")
for name, a, b in (
    ("tokens", length, GROUP * row),
    ("pairs allowed", pairs, row_pairs),
    (f"tiles of {side} x {side}", tiles, row_tiles),
    ("attention, ms", timed["tree"], timed["rows"]),
):
    print(f"{name:22}{float(a):12,.0f}{float(b):15,.0f}{float(b) / float(a):8.1f}")

# %% [markdown]
# ## 7. The same elsewhere
#
# **TPU.** `implementation="pallas"` is the same algorithm as a kernel: its grid runs over the list of live tiles. On a
# CPU it is interpreted, slowly, which is enough to compare.

# %%
q, k, v = normal(0, 1, 256, 2, 32), normal(1, 1, 256, 1, 32), normal(2, 1, 256, 1, 32)


def sum_and_gradients(f):
    return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(f(*x))), argnums=(0, 1, 2)))


reference = sum_and_gradients(forward("reference", Window(100)))(q, k, v)
kernel = sum_and_gradients(forward("pallas", Window(100)))(q, k, v)
print(f"pallas and reference: sums {kernel[0]:.4f} and {reference[0]:.4f}, "
      f"gradients differ by at most {apart(kernel[1], reference[1]):.1e}")  # fmt: skip

# %% [markdown]
# **Decoding.** One query for each row, over a cache of which each row has filled a part. It is the last row of causal
# attention; and a long cache may be cut into parts that are merged by section 2's law.

# %%
lengths = jnp.array([200])
last = decode_attention(q[:, 199:200], k, v, lengths)
print(f"decoding and the causal row: {apart(last, attention(q, k, v)[:, 199:200]):.1e}")

some = decode_attention(q[:, 199:200], k[:, :128], v[:, :128], jnp.array([128]), return_lse=True)
rest = decode_attention(q[:, 199:200], k[:, 128:], v[:, 128:], jnp.array([72]), return_lse=True)
print(f"the cache in two parts, merged: {apart(merge_finished(*some, *rest)[0], last):.1e}")

# %% [markdown]
# **A ring of devices.** Each device keeps its queries, and the keys travel. What comes out of each step is merged by
# the same law, and the gradients need nothing but the final log-sum-exp (Liu et al. 2023,
# [arXiv 2310.01889](https://arxiv.org/abs/2310.01889)). Here on four devices, which are threads of this process.

# %%
mesh = jax.make_mesh((4,), ("ring",), axis_types=(AxisType.Auto,))
spread = P(None, "ring")
ring = functools.partial(ring_attention, axis_name="ring", mask=Window(100))
ring = jax.shard_map(ring, mesh=mesh, in_specs=(spread,) * 3, out_specs=spread, check_vma=False)
travelled = sum_and_gradients(ring)(q, k, v)
print(f"ring of {mesh.size} and reference: sums {travelled[0]:.4f} and {reference[0]:.4f}, "
      f"gradients differ by at most {apart(travelled[1], reference[1]):.1e}")  # fmt: skip

# %% [markdown]
# ## Try
#
# - A mask of your own in section 4: `Causal() | Prefix(...)`, `Chunked(16)`, or a tree of two levels.
# - `BLOCK = 2` in section 2: what happens to the time of `online`, and why?
# - Prompts shorter than their completions in section 6: when does the tree stop paying?
#
# The library's own forms are `kernels/attention/blocked.py` (section 5's `"xla"`), `tpu.py`, `decode.py` and `ring.py`;
# [docs/attention.md](../docs/attention.md) says which one runs when.
