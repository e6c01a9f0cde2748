"""Which keys a query sees in the published sparse patterns, pair by pair, from the papers' definitions."""


def strided(q, k, stride):
    """Sparse Transformers, section 4.2: A1 = {t, t-1, ..., t-l}, A2 = {j <= t : (t - j) mod l = 0}; their union."""
    return k in range(q - stride, q + 1) or (k <= q and (q - k) % stride == 0)


def fixed(q, k, block, summary):
    """The same section: A1 = {j <= t : floor(j / l) = floor(t / l)}, A2 = {j <= t : j mod l in {l - c, ..., l - 1}}."""
    return k <= q and (q // block == k // block or k % block in range(block - summary, block))


def longformer(q, k, near, first):
    """Longformer, section 3.1: a window on both sides; global tokens attend to all, and all attend to them."""
    return q in range(first) or k in range(first) or k in range(q - near, q + near + 1)


def big_bird(q, k, block, window, ends, blocks, drawn):
    """BigBird, section 2 and appendix D, on blocks; drawn[block of the query] lists its random blocks."""
    q, k = q // block, k // block
    outer = [*range(ends), *range(blocks - ends, blocks)]
    return abs(q - k) <= (window - 1) / 2 or q in outer or k in outer or k in drawn[q]
