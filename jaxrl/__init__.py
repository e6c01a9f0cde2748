"""jaxrl: reinforcement learning and language-model post-training as pure functions in JAX."""

__version__ = "0.1.0"
