"""Initialises eight seeds at once, again and again: python benchmarks/agents/initialise.py [--flax]

With Flax's orthogonal initialiser, whose QR is a batched LAPACK call, XLA's CPU backend can wait for itself for ever
under `jit(vmap(init))`. A watchdog ends the process after `--patience` seconds without progress, with status 3.
"""

import argparse
import os
import threading
import time

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrl.nets.initializers import orthogonal


def main():
    """Prints how long the calls took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--flax", action="store_true", help="jax.nn.initializers.orthogonal instead of ours")
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--patience", type=float, default=20.0)
    options = parser.parse_args()
    kernel_init = nn.initializers.orthogonal() if options.flax else orthogonal()
    net = nn.Sequential([nn.Dense(64, kernel_init=kernel_init) for _ in range(6)])
    init = jax.jit(jax.vmap(net.init, (0, None)))
    x = jnp.zeros((1, 64))
    jax.block_until_ready(init(jax.random.split(jax.random.key(0), 8), x))
    call, last, done = 0, time.monotonic(), threading.Event()

    def watch():
        while not done.wait(1.0):
            if time.monotonic() - last > options.patience:
                print(f"no progress for {options.patience:g} s after {call} calls: deadlock", flush=True)
                os._exit(3)

    threading.Thread(target=watch, daemon=True).start()
    begun = time.perf_counter()
    for call in range(options.calls):
        jax.block_until_ready(init(jax.random.split(jax.random.key(call), 8), x))
        last = time.monotonic()
    done.set()
    print(f"{options.calls} calls in {time.perf_counter() - begun:.1f} s")


if __name__ == "__main__":
    main()
