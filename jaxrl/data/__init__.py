"""Text in, padded arrays out: tokenisers, JSON Lines records, chat templates, splits. NumPy only, no JAX."""
