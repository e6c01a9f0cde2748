"""Networks: frozen configs, Flax linen modules, pure init and apply."""
