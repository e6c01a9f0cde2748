"""Attention and the fused pieces around it: JAX only, no Flax."""
