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
# # Attention, side by side
#
# Softmax attention compares each token with all before it, and keeps all of them. Much has been proposed to do less:
# look at fewer places, keep less of each, or keep a sum instead of the places. In the library these are settings of one
# Transformer. Here they stand beside each other, each measured by the same means.
#
# 1. the weights of each form, drawn
# 2. sparse patterns: how many pairs, how many tiles
# 3. Performer: the error of random features
# 4. rank and dilution
# 5. what must be kept of the past, in bytes
# 6. forms that must agree, and do
# 7. the time of a decoded token
# 8. a whole row with its gradient: time and memory against length
#
# - **Hardware**: any machine, of which the CPU is used; written for 2 cores.
# - **Running time**: about three minutes, most of it compilation.
# - **Smaller**: with `SMOKE=1` in the environment everything runs at toy size.

# %%
# Install, from a checkout of the repository (remove the #):
# # %pip install --quiet --editable "..[notebook]"

# %%
import functools
import io
import os
import statistics
import time

import IPython.display
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
from matplotlib.colors import PowerNorm

from jaxrl.kernels.attention import BigBird, Causal, Chunked, Fixed, Longformer, Strided, Window, attention, dense
from jaxrl.kernels.attention.tiles import tile_kinds
from jaxrl.kernels.linear_attention import linear_attention
from jaxrl.nets import presets
from jaxrl.nets.cache import init_cache
from jaxrl.nets.language_model import language_model
from jaxrl.nets.latent_attention import LatentConfig
from jaxrl.nets.linear_attention import MAPS, LinearConfig, log_decays, positive_features, random_projection

jax.config.update("jax_platforms", "cpu")

SMOKE = os.environ.get("SMOKE", "0") == "1"
T = 64 if SMOKE else 128  # of the pictures
FEATURES, DRAWS = ((16, 64), 4) if SMOKE else ((16, 64, 256, 1024), 40)
CACHED, ROUNDS = ((64,), 3) if SMOKE else ((256, 2048, 16384), 31)
LENGTHS, LAPS = ((64, 128), 2) if SMOKE else ((256, 512, 1024, 2048, 4096, 8192), 15)  # of whole rows
plt.rcParams |= {"figure.dpi": 80, "figure.constrained_layout.use": True, "font.size": 10}
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def show(figure):
    """Displays a figure in 256 colours, which keeps the notebook small."""
    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, bbox_inches="tight")
    plt.close(figure)
    PIL.Image.open(full).convert("RGB").quantize(256).save(small, "PNG", optimize=True)
    IPython.display.display(IPython.display.Image(small.getvalue()))


# %% [markdown]
# ## 1. The weights
#
# Every form computes $o_i = \sum_j A_{ij} v_j$ with weights of its own:
#
# - **softmax**: $e^{q_i \cdot k_j / \sqrt D}$, divided by their sum
# - **sparse** patterns: the same over some of the pairs (Child et al. 2019,
#   [arXiv 1904.10509](https://arxiv.org/abs/1904.10509): strided, fixed; Beltagy et al. 2020,
#   [arXiv 2004.05150](https://arxiv.org/abs/2004.05150); Zaheer et al. 2020,
#   [arXiv 2007.14062](https://arxiv.org/abs/2007.14062))
# - **latent**: the same, with keys and values of all heads made from one short vector (DeepSeek-V2 2024,
#   [arXiv 2405.04434](https://arxiv.org/abs/2405.04434))
# - **linear**: $\phi(q_i) \cdot \phi(k_j)$ with $\phi = \mathrm{elu} + 1$, divided by their sum (Katharopoulos et al.
#   2020, [arXiv 2006.16236](https://arxiv.org/abs/2006.16236))
# - **Performer**: the same with random features, whose products are $e^{q \cdot k / \sqrt D}$ on average (Choromanski
#   et al. 2020, [arXiv 2009.14794](https://arxiv.org/abs/2009.14794))
# - **TransNormer**: $\phi(q_i) \cdot \phi(k_j)$ as they are; a norm follows (Qin et al. 2022,
#   [arXiv 2210.10340](https://arxiv.org/abs/2210.10340))
# - **lightning**: $\lambda^{i - j}\, \mathrm{silu}(q_i) \cdot \mathrm{silu}(k_j)$, each head with its $\lambda$; a norm
#   follows (MiniMax 2025, [arXiv 2501.08313](https://arxiv.org/abs/2501.08313))
#
# The weights need not be written out a second time to be looked at: with the identity for the values, what any form
# returns *is* $A$. Queries and keys are the same for all: sines and cosines of the position, turned by a random
# rotation, so that near tokens are alike; each is given a little noise of its own.

# %%
SIZE = 32


def positions(length, noise=0.3, seed=0):
    """(q, k), each [1, length, 1, SIZE]."""
    half = SIZE // 2
    angle = np.arange(length)[:, None] * 10_000.0 ** (-np.arange(half) / half)
    plain = np.sqrt(2) * np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    draw = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(draw.normal(size=(SIZE, SIZE)))
    q, k = (plain @ rotation + noise * draw.normal(size=plain.shape) for _ in range(2))
    return tuple(jnp.asarray(x, jnp.float32)[None, :, None] for x in (q, k))


def softmax(q, k, v, mask=Causal()):  # noqa: B008  (immutable)
    return attention(q, k, v, mask=mask, implementation="reference")


def mapped(q, k, v, name="elu+1", normalise=True, log_decay=None):
    phi = MAPS[name]
    return linear_attention(phi(q), phi(k), v, normalise=normalise, log_decay=log_decay)


def performer(q, k, v, features=256, seed=1):
    w = random_projection(jax.random.key(seed), features, q.shape[-1])
    return linear_attention(positive_features(q, w, largest=True), positive_features(k, w), v, normalise=True)


def weights(form, q, k):
    """A [T, T] of a form that maps (q, k, v) to o."""
    return np.asarray(form(q, k, jnp.eye(q.shape[1])[None, :, None])[0, :, 0], np.float64)


SLOW, FAST = (log_decays("lightning", 8, 0, 2)[i : i + 1] for i in (4, 1))  # two of eight heads, first of two layers
FORMS = {
    "softmax": softmax,
    "window of 16": functools.partial(softmax, mask=Causal() & Window(16)),
    "strided, 12": functools.partial(softmax, mask=Strided(12)),
    "fixed, 16 and 2": functools.partial(softmax, mask=Fixed(16, 2)),
    "Longformer, 6 and 4": functools.partial(softmax, mask=Longformer(6, 4)),
    "BigBird, blocks of 8": functools.partial(softmax, mask=BigBird(8, random=2)),
    "elu + 1": mapped,
    "Performer, 256": performer,
    "TransNormer": functools.partial(mapped, normalise=False),
    "lightning, slow head": functools.partial(mapped, name="silu", normalise=False, log_decay=SLOW),
    "lightning, fast head": functools.partial(mapped, name="silu", normalise=False, log_decay=FAST),
    "blocks of 16": functools.partial(softmax, mask=Causal() & Chunked(16)),
}
q, k = positions(T)
found = {name: weights(form, q, k) for name, form in FORMS.items()}
figure, axes = plt.subplots(2, 6, figsize=(12, 4.5))
for axis, (name, a) in zip(axes.flat, found.items(), strict=True):
    share = np.abs(a) / np.abs(a).sum(1, keepdims=True)  # of forms that a norm follows: of the sum of sizes
    axis.imshow(share, cmap="magma_r", norm=PowerNorm(0.4, 0, 0.3), interpolation="nearest")
    axis.set_title(name, fontsize=10)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(True)
show(figure)
sums = {name: found[name].sum(1) for name in ("softmax", "elu + 1", "Performer, 256", "TransNormer")}
for name, total in sums.items():
    print(f"{name:16} the weights of a row sum to {total.min():.3f} to {total.max():.3f}")

# %% [markdown]
# Dark is much weight. Softmax follows the likeness of tokens: the diagonal, and stripes where the sines come round
# again. The patterns of the first row (with the last one of the second) are the same weights with holes; Longformer and
# BigBird look both ways, as encoders do.
#
# elu + 1 is another picture: nearly even, and only thinner with every token. TransNormer has the same weights, but does
# not divide them (their sums grow into the thousands): a norm of what comes out takes care of the scale. Performer is
# softmax with noise, here with streaks where a drawn direction happens to fit. Lightning's heads look as far back as
# their decay lets them, so that locality comes from the decay and not from the features.
#
# ## 2. Sparse patterns: pairs and tiles
#
# A mask is a predicate on pairs, but a kernel works by tiles. What a pattern saves is what it leaves out in whole
# tiles: `tile_kinds` lists those that a kernel must visit. Causal attention at length $S$ has $S (S + 1) / 2$ pairs.

# %%
S, SIDE = (512, 64) if SMOKE else (8192, 128)
PATTERNS = {
    "causal": Causal(),
    "window of 256": Causal() & Window(256),
    "strided, 128": Strided(128),
    "fixed, 128 and 32": Fixed(128, 32),
    "Longformer, 128 and 16": Causal() & Longformer(128, 16),
    "BigBird, blocks of 64": BigBird(64),
    "blocks of 64": Causal() & Chunked(64),
}
causal_pairs, causal_tiles = S * (S + 1) / 2, (S // SIDE) * (S // SIDE + 1) / 2
print(f"at length {S:,}, in tiles of {SIDE} x {SIDE}, causal = 100 %")


@functools.partial(jax.jit, static_argnums=0)
def filled(mask):
    """Share of the pairs of each tile that the mask allows."""
    return jnp.mean(dense(mask, (1, 1, S, S)).reshape(S // SIDE, SIDE, S // SIDE, SIDE), axis=(1, 3))


shares_of = {name: np.asarray(filled(mask)) for name, mask in PATTERNS.items()}
for name, mask in PATTERNS.items():
    pairs = shares_of[name].sum() * SIDE**2
    tiles = int((tile_kinds(mask, (1, S, S), (SIDE, SIDE), 0) > 0).sum())
    print(f"{name:24} pairs {pairs / causal_pairs:7.2%}   tiles {tiles / causal_tiles:7.2%}")

figure, axes = plt.subplots(1, len(shares_of), figsize=(13, 2.1))
for axis, (name, share) in zip(axes, shares_of.items(), strict=True):
    axis.imshow(share, cmap="Blues", norm=PowerNorm(0.3, 0, 1), interpolation="nearest")
    axis.set_title(name, fontsize=8.5)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(True)
show(figure)

# %% [markdown]
# Pairs are what a pattern promises, tiles are what it keeps (the darker a tile, the fuller). The strided pattern has
# 3.87 % of the pairs, but some of them in every tile, and saves nothing; nor does the fixed one, as each tile holds the
# 32 summary columns of its block. With a stride or block of several tiles they would. A window and Longformer keep most
# of their promise. BigBird was built by blocks for that reason, but blocks of 64 fill a tile of 128 by a quarter.
#
# ## 3. Performer: the error of random features
#
# For a standard normal $w$, $\mathbb E\, e^{w \cdot q - |q|^2 / 2}\, e^{w \cdot k - |k|^2 / 2} = e^{q \cdot k}$. So $m$
# drawn directions give features whose products are the softmax's weights on average. All are positive, which keeps the
# sum of weights from vanishing. Directions that are orthogonal to each other waste less: their errors cancel. Below, 64
# queries and keys of 16 numbers, of two lengths; the error of the *output*, relative to it, over many draws.

# %%
COUNT, WIDE = 64, 16


@functools.partial(jax.jit, static_argnames=("m", "orthogonal"))
def output_error(norm, *, m, orthogonal):
    """Root of the mean squared error of the output over that of the output, for vectors of this length."""
    kq, kk, kv, kw = jax.random.split(jax.random.key(0), 4)
    draw = lambda key: jax.random.normal(key, (1, COUNT, 1, WIDE))
    scaled = lambda x: norm * WIDE**0.25 * x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    q, k, v = scaled(draw(kq)), scaled(draw(kk)), draw(kv)
    exact = attention(q, k, v, implementation="reference")

    def one(key):
        w = random_projection(key, m, WIDE, orthogonal=orthogonal)
        features = positive_features(q, w, largest=True), positive_features(k, w)
        return jnp.mean(jnp.square(linear_attention(*features, v, normalise=True) - exact))

    return jnp.sqrt(jax.lax.map(one, jax.random.split(kw, DRAWS)).mean() / jnp.mean(jnp.square(exact)))


figure, axis = plt.subplots(figsize=(6.2, 3.6))
print(f"{'relative error of the output, features':42}" + "".join(f"{m:8}" for m in FEATURES) + "   slope")
for colour, norm in (("C0", 1.0), ("C1", 2.0)):
    for orthogonal, style in ((False, "--"), (True, "-")):
        errors = [float(output_error(norm, m=m, orthogonal=orthogonal)) for m in FEATURES]
        kind = "orthogonal" if orthogonal else "independent"
        slope = np.polyfit(np.log(FEATURES), np.log(errors), 1)[0]
        print(f"{f'|q| = |k| = {norm:.0f}, {kind}':42}" + "".join(f"{e:8.3f}" for e in errors) + f"{slope:8.2f}")
        axis.loglog(FEATURES, errors, style, marker="o", markersize=4, color=colour, label=f"length {norm:.0f}, {kind}")
axis.set(xlabel="features", ylabel="relative error of the output", title="Performer's error")
axis.set_xticks(FEATURES, FEATURES)
axis.minorticks_off()
axis.grid(alpha=0.3)
axis.legend(fontsize=9)
show(figure)

# %% [markdown]
# Orthogonal directions are better, by 5 to 16 % at length 1, and at length 2 from 64 features on. More telling is the
# length of the vectors. At length 1 four times the features come near to half the error; the weights themselves would
# have a slope of -1/2, and the output, which divides by their sum, comes to it with many features. At length 2 even
# 1,024 leave an error of 0.51: the features' variance grows exponentially with the lengths, and a few large draws
# decide. A trained softmax that is sharp has long queries and keys.
#
# ## 4. Rank and dilution
#
# Two prices of a sum in the place of the places. The weights of linear attention are a product of two matrices with as
# many columns as there are features, so their rank is at most that, less the mask. And features that are nearly
# constant spread the weight over everything: *dilution* (Qin et al. 2022). Measured on 256 tokens without a mask, whose
# queries are their keys: the share of weight within 8 places, the rank, and how both change when queries and keys are
# made longer, which is how a trained softmax gets sharp.

# %%
LONG, NEAR = (64 if SMOKE else 256), 8
x, _ = positions(LONG, noise=0.0)
near = np.abs(np.subtract.outer(np.arange(LONG), np.arange(LONG))) <= NEAR


def shares(a):
    return a / a.sum(1, keepdims=True)


def unmasked(form, scale):
    """Weights [LONG, LONG] in float64 without a mask; q = k = x, scaled."""
    rows = np.asarray(x[0, :, 0], np.float64) * scale
    if form == "softmax":
        scores = rows @ rows.T / np.sqrt(SIZE)
        return shares(np.exp(scores - scores.max(1, keepdims=True)))
    if form == "elu + 1":
        phi = np.asarray(MAPS["elu+1"](jnp.asarray(rows, jnp.float32)), np.float64)
        return shares(phi @ phi.T)
    w = random_projection(jax.random.key(2), int(form.split(", ")[1]), SIZE)
    q, k = (np.asarray(positive_features(jnp.asarray(rows), w, largest=n), np.float64) for n in (True, False))
    return shares(q @ k.T)


SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.6))
even = near.mean()
print(f"{'at scale 1':18}{'within 8':>10}{'rank':>6}    (even weights: {even:.3f}, 1)")
for form in ("softmax", "Performer, 256", "Performer, 64", "elu + 1"):
    a = unmasked(form, 1.0)
    values = np.linalg.svd(a, compute_uv=False)
    print(f"{form:18}{(a * near).sum(1).mean():10.3f}{np.linalg.matrix_rank(a):6}")
    left.semilogy(np.arange(1, LONG + 1), np.maximum(values / values[0], 1e-18), label=form)
    right.plot(SCALES, [(unmasked(form, s) * near).sum(1).mean() for s in SCALES], marker="o", markersize=4, label=form)
left.set(title="singular values of the weights", xlabel="index", ylim=(1e-17, 2))
right.axhline(even, color="grey", linestyle=":", label="even")
right.set(title="weight within 8 places", xlabel="queries and keys times", ylim=(0, None))
for axis in (left, right):
    axis.grid(alpha=0.3)
right.legend(fontsize=9)
show(figure)

# %% [markdown]
# Ranks are what they must be: 32 for elu + 1 with heads of 32, 64 for 64 features, and full for softmax. (256 features
# have 255 of 256, but their singular values fall to nothing.) On the right, softmax goes from near even to all of the
# weight within 8 places as its queries and keys get longer. elu + 1 hardly moves, because the length of a query cancels
# when its weights are divided by their sum. Performer moves as far as its noise lets it. That is why the later linear
# forms bring locality from outside: TransNormer by blocks of softmax in its first layers, lightning by decays and a
# layer of softmax every so often.
#
# ## 5. What must be kept
#
# For each new token a decoder reads what it kept of all before. Softmax attention keeps a key and a value for each head
# and token, latent attention one short vector for all heads, linear attention one matrix for each head, whatever the
# length. Nothing needs to be allocated to know the sizes.

# %%
V3 = presets.deepseek_v3()
latent = V3.latent
print(f"DeepSeek-V3, numbers kept of a token in a layer: {latent.cached:,} "
      f"({latent.kv_rank} of the latent, {latent.rope} that turn)")  # fmt: skip
per_head = latent.nope + latent.value
print(f"keys and values of its {V3.heads} heads, without what turns: {V3.heads} x {per_head} = "
      f"{V3.heads * per_head:,}, {V3.heads * per_head / latent.cached:.0f} times as many")  # fmt: skip


def kept(config, length):
    """Bytes of the cache of one row."""
    shapes = jax.eval_shape(lambda: init_cache(config, 1, length))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((shapes.k, shapes.v)))


llama = functools.partial(presets.llama31_8b, rope_scaling=None, max_length=1 << 20, dtype="bfloat16")
MINIMAX = presets.LIGHTNING
KEEPS = {
    "32 kv heads": llama(kv_heads=32),
    "8 kv heads": llama(),
    "8 kv heads, 8 bits": llama(cache_dtype="int8"),
    "latent, 512 + 64": llama(kv_heads=32, latent=LatentConfig(512, 128, 64, 128)),
    "lightning 7 in 8": llama(linear=MINIMAX, linear_layers=tuple(i for i in range(32) if i % 8 != 7)),
    "Performer, 256": llama(kv_heads=32, linear=LinearConfig("performer")),
    "elu + 1": llama(kv_heads=32, linear=LinearConfig()),
}
STEPS = 2 ** np.arange(8, 21, 2)
print(f"\nGiB of one row, 32 layers of width 4096, {'length':>8}" + "".join(f"{n:>11,}" for n in STEPS[2::2]))
figure, axis = plt.subplots(figsize=(7.4, 4.0))
for name, config in KEEPS.items():
    sizes = np.array([kept(config, int(n)) for n in STEPS]) / 2**30
    print(f"{name:47}" + "".join(f"{size:11.3f}" for size in sizes[2::2]))
    axis.loglog(STEPS, sizes, marker="o", markersize=3, label=name)
axis.set(xlabel="tokens of the past", ylabel="GiB", title="kept of one row, 32 layers of width 4096")
axis.grid(alpha=0.3)
axis.legend(fontsize=9)
show(figure)

# %% [markdown]
# DeepSeek's 576 numbers against 32,768 are those of its paper. In the picture all networks have 32 layers of width 4096
# with 2 bytes a number, states in 4. At a million tokens 512 GiB become 128 by sharing heads, 36 by the latents, 16
# with softmax in every eighth layer only, and for pure states a constant, 0.06 or 0.13. The states are not small: at a
# thousand tokens the latents take less room. A window is not in the picture: the library's cache keeps all columns
# for it.
#
# ## 6. Forms that must agree
#
# Latent attention has two forms. In training, keys and values of all heads are laid out. In decoding, $q_h U_h^\top$
# meets the cached latents directly, and nothing is laid out. Linear attention has three: products of matrices by
# chunks, token by token, and the state carried from call to call. Here whole networks, over a row at once and then
# through a cache: a prompt, and token by token what follows.

# %%
SIZES = {"heads": 8, "kv_heads": 8}
NETS = {
    "softmax": {},
    "latent": {"latent": LatentConfig(kv_rank=64, nope=32, rope=16, value=32)},
    "linear": {"linear": LinearConfig()},
    "Performer": {"linear": LinearConfig("performer", random=256)},
    "lightning": {"linear": presets.LIGHTNING},
}


def network(form, length, layers=2):
    return language_model(presets.llama_like(256, 256, layers, max_length=length, **SIZES, **NETS[form]))


row = jax.random.randint(jax.random.key(3), (1, 48), 0, 256)
parameters = {form: jax.jit(network(form, 48).init)(jax.random.key(0)) for form in NETS}
for form, params in parameters.items():
    model = network(form, 48)
    whole = jax.jit(model.apply)(params, row)[0]
    step = jax.jit(lambda params, tokens, cache, model=model: model.apply(params, tokens, cache=cache))
    parts, cache = [], model.init_cache(1, 48)
    for tokens in (row[:, :40], *jnp.split(row[:, 40:], 8, axis=1)):
        hidden, cache = step(params, tokens, cache)
        parts.append(hidden)
    apart = jnp.abs(jnp.concatenate(parts, axis=1) - whole).max()
    print(f"{form:10} largest difference {apart:.1e}, of values up to {jnp.abs(whole).max():.1f}")
    assert apart < 1e-3

# %% [markdown]
# ## 7. The time of a decoded token
#
# One step of decoding with a cache of so many columns, all but one filled. All forms and lengths take turns, so that
# what else the machine does falls on all alike; the median of their CPU time.


# %%
def decoding(form, length):
    """(compiled step, cache)."""
    model = network(form, length)
    step = jax.jit(lambda params, token, cache: model.apply(params, token, cache=cache), donate_argnums=2)
    cache = model.init_cache(1, length)._replace(length=jnp.int32(length - 1))
    return step.lower(parameters[form], jnp.zeros((1, 1), jnp.int32), cache).compile(), cache


token = jnp.zeros((1, 1), jnp.int32)
programs = {(form, length): decoding(form, length) for length in CACHED for form in NETS}
caches = {which: cache for which, (_, cache) in programs.items()}
laps = {which: [] for which in programs}
for _ in range(ROUNDS):
    for (form, length), (step, _) in programs.items():
        cache = caches[form, length]._replace(length=jnp.int32(length - 1))
        begun = time.process_time()
        caches[form, length] = jax.block_until_ready(step(parameters[form], token, cache))[1]
        laps[form, length].append(1e3 * (time.process_time() - begun))
took = {form: [statistics.median(laps[form, length][2:]) for length in CACHED] for form in NETS}

print(f"{'CPU ms of a token, columns':28}" + "".join(f"{n:>9,}" for n in CACHED))
for form, times in took.items():
    print(f"{form:28}" + "".join(f"{ms:9.2f}" for ms in times))

# %% [markdown]
# ## 8. A whole row: time and memory
#
# Now one head of 64 numbers over a row at once, forward and gradient, as in training. The compiler says how much room a
# program needs beside its arguments and results, without running it. All but two are then run in turns as well.


# %%
def compiled(form, length):
    """Forward and gradient of a form; it takes q, k and v, each [1, length, 1, 64]."""
    gradient = jax.grad(lambda q, k, v: jnp.sum(jnp.square(form(q, k, v))), argnums=(0, 1, 2))
    return jax.jit(gradient).lower(*[jax.ShapeDtypeStruct((1, length, 1, 64), jnp.float32)] * 3).compile()


MEASURED = {
    "softmax, by tiles": functools.partial(attention, implementation="xla"),
    "window of 256, by tiles": functools.partial(attention, mask=Causal() & Window(256), implementation="xla"),
    "elu + 1, by chunks": mapped,
    "Performer, 256": performer,
    "lightning": functools.partial(mapped, name="silu", normalise=False, log_decay=SLOW),
    "softmax, the formula": softmax,
    "elu + 1, token by token": lambda q, k, v: linear_attention(
        MAPS["elu+1"](q), MAPS["elu+1"](k), v, normalise=True, implementation="recurrent"
    ),
}
TIMED = tuple(MEASURED)[:5]
whole = {(name, n): compiled(form, n) for name, form in MEASURED.items() for n in LENGTHS}
room = {name: [whole[name, n].memory_analysis().temp_size_in_bytes / 2**20 for n in LENGTHS] for name in MEASURED}
laps = {(name, n): [] for n in LENGTHS for name in TIMED}  # short ones after short ones
inputs = {n: [jax.random.normal(key, (1, n, 1, 64)) for key in jax.random.split(jax.random.key(4), 3)] for n in LENGTHS}
for _ in range(LAPS):
    for (name, n), times in laps.items():
        begun = time.process_time()
        jax.block_until_ready(whole[name, n](*inputs[n]))
        times.append(1e3 * (time.process_time() - begun))
spent = {name: [statistics.median(laps[name, n][1:]) for n in LENGTHS] for name in TIMED}

for title, table in (("CPU ms at length", spent), ("temporary MB at length", room)):
    print(f"{title:28}" + "".join(f"{n:>10,}" for n in LENGTHS))
    for name, values in table.items():
        print(f"{name:28}" + "".join(f"{value:10.2f}" for value in values))
    print()

figure, axes = plt.subplots(1, 3, figsize=(13.5, 4.2))
for form, times in took.items():
    axes[0].loglog(CACHED, times, marker="o", markersize=4, label=form)
axes[0].set(title="CPU ms of a decoded token (section 7)", xlabel="columns of the cache")
axes[0].set_xticks(CACHED, CACHED)
for axis, table, title in ((axes[1], spent, "CPU ms, a whole row"), (axes[2], room, "temporary MB, a whole row")):
    for i, (name, values) in enumerate(table.items()):
        axis.loglog(LENGTHS, values, marker="o", markersize=4, color=f"C{i}", label=name)
    axis.set(title=title, xlabel="length")
    axis.set_xticks(LENGTHS, LENGTHS)
for axis in axes:
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
show(figure)

# %% [markdown]
# On the left, one decoded token of two layers. The linear forms take 0.62 to 0.98 ms at every length. Softmax goes
# from 0.69 to 25.74 ms, latent attention from 0.75 to 5.69: it reads 64 + 16 numbers for each column and layer, where
# softmax reads 2 x 8 x 32. At 256 columns there is nothing to be gained.
#
# In the middle, a whole row. From 2,048 on softmax takes nearly four times as long for twice the length; the time of
# the others about doubles, but for one leap of Performer's. At 8,192 softmax takes 216 ms, elu + 1 takes 15,
# lightning and the window 20. Performer's 256 features, four times as many as the 64 numbers of a head, cost as much
# as softmax between 1,024 and 2,048 tokens, and a third of it at 8,192. At 256 tokens all but Performer are alike:
# rows have to be long before another form saves time.
#
# On the right, the formula's table of pairs grows with the square, to 768 MB for one head at length 8,192. By tiles
# softmax needs 8.06 MB, and 4.58 with a window, the least of all: softmax's memory in training is no argument for
# linear attention, its arithmetic and its cache are. Linear attention by chunks keeps one state for each chunk (18.36
# MB), token by token one for each token (150.22 MB), and 256 features make states four times as large as 64 numbers
# (72.53 MB).
#
# Not shown: what each form *learns*. A state of fixed size must forget something, and which tasks notice is a matter of
# training runs, not of these pictures.
#
# ## Try
#
# - `row_norms="sqrt"` in `random_projection`: all directions of one length. Which kernel is that now?
# - A head with `log_decays("retention", 8, 0, 1)`: how far back does each see?
# - `Fixed(128, 32) | Window(256)` in section 2: masks combine.
# - Every eighth layer with softmax, the rest linear, in section 7: `linear_layers=` of the config.
#
# The forms are `nets/attention.py`, `nets/latent_attention.py` and `nets/linear_attention.py`; the kernels under them
# `kernels/attention` and `kernels/linear_attention.py`. `dilution.py`, `performer.py` and `decode_cost.py` in
# `benchmarks/nets` go further.
