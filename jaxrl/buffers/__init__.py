"""Replay: fixed-size memories of what happened, as pure functions of one pytree.

    buffer = ring.init(transition, slots=5_000, streams=10)
    buffer = ring.add(buffer, transitions)           # [streams, ...]: what 10 environments did in one step
    batch = ring.sample(buffer, key, 256)            # uniform, with replacement
    sequences = ring.sample_sequences(buffer, key, 32, length=16)

`prioritised` samples the same memory in proportion to priorities.
"""

from jaxrl.buffers import prioritised as prioritised
from jaxrl.buffers import ring as ring
