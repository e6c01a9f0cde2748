"""A strict world: eight CPU devices, no silent rank promotion, no key used twice, warnings are errors."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what is tested is compiled now
os.environ.setdefault("NPROC", "64")  # as the command line does
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",  # nearly all of a test's time is compilation
    ]
)

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
