"""One attention compiled for one TPU: its schedule, forward and backward, as a JSON line.

python benchmarks/attention/schedule.py v5e ours --size 128 --mask causal
"""

import argparse
import functools
import json
import os
import re
import tempfile

from jaxrl.kernels import aot

LENGTH, HEADS = 8192, 2
ROWS = 16  # so many that arrays stay in HBM, and what a kernel has in VMEM is its own


def ours(mask: str, size: int, value_size: int, block: None):
    """The function and its blocks."""
    from jaxrl.kernels.attention import Causal, Full
    from jaxrl.kernels.attention.tpu import pallas_attention

    call = functools.partial(pallas_attention, mask=Causal() if mask == "causal" else Full(), scale=size**-0.5)
    return lambda q, k, v: call(q, k, v)[0]


def splash(mask: str, size: int, value_size: int, block: tuple[int, int]):
    """JAX's splash attention with its fused backward pass."""
    import jax
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    side, compute = block
    masks = {"causal": splash_attention_mask.CausalMask, "full": splash_attention_mask.FullMask}
    sizes = splash_attention_kernel.BlockSizes(
        **{f"block_{name}": side for name in ("q", "kv", "q_dkv", "kv_dkv")},
        block_kv_compute=compute,
        block_kv_dkv_compute=compute,
        use_fused_bwd_kernel=True,
    )
    of_heads = splash_attention_mask.MultiHeadMask([masks[mask]((LENGTH, LENGTH))] * HEADS)
    kernel = splash_attention_kernel.make_splash_mha_single_device(of_heads, block_sizes=sizes)
    return lambda q, k, v: jax.vmap(kernel)(*(x.swapaxes(1, 2) for x in (q, k, v))).swapaxes(1, 2)


def vmem_by_refusal(compile_with_limit) -> dict[str, int]:
    """Bytes of VMEM of kernels that the program does not state: what the compiler says it lacks, limit by limit."""
    found, limit = {}, 64
    while True:
        try:
            compile_with_limit(limit)
            return found
        except Exception as error:
            refused = re.search(r"on stack for %([\w]+)[\s\S]*?Scoped allocation with size ([\d.]+)([KM])", str(error))
            if not refused or limit > 2**17:
                raise
            limit = int((float(refused[2]) + 0.01) * {"K": 1, "M": 1024}[refused[3]]) + 1  # the size is rounded
            found[refused[1]] = limit * 1024


def main():
    """Prints one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("chip", choices=aot.TOPOLOGIES)
    parser.add_argument("library", choices=("ours", "splash"))
    parser.add_argument("--mask", choices=("causal", "full"), default="causal")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--value-size", type=int, default=128)
    parser.add_argument("--block", type=int, nargs=2, help="splash: side of a block, and keys worked on at a time")
    parser.add_argument("--vmem", action="store_true", help="splash: find out what VMEM it takes (more compilations)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(aot.dump_options(folder) | {"JAX_PLATFORMS": "cpu"})
        import jax
        import jax.numpy as jnp

        mesh = aot.tpu_mesh(options.chip)
        build = {"ours": ours, "splash": splash}[options.library]
        f = build(options.mask, options.size, options.value_size, options.block)
        loss = lambda q, k, v: f(q, k, v).astype(jnp.float32).sum()
        sizes = (options.size, options.size, options.value_size)
        arrays = [jax.ShapeDtypeStruct((ROWS, LENGTH, HEADS, size), jnp.bfloat16) for size in sizes]
        program = aot.compile_for(mesh, jax.grad(loss, (0, 1, 2)), *arrays)
        vmem = aot.kernel_vmem(program)
        if options.library == "splash" and options.vmem:
            limited = lambda kib: (
                jax.jit(jax.grad(loss, (0, 1, 2)))
                .lower(*placed)
                .compile(compiler_options={"xla_tpu_scoped_vmem_limit_kib": str(kib)})
            )
            placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=aot.replicated(mesh)) for x in arrays]
            vmem = vmem_by_refusal(limited)
        for name, schedule in aot.schedules(folder).items():
            which = "forward" if "fwd" in name or "forward" in name else "backward"
            print(json.dumps({"pass": which, "kernel": name, **schedule._asdict(), "vmem": vmem.get(name)}))
        print(json.dumps({"temporary_mb": program.memory_analysis().temp_size_in_bytes / 1e6}))


if __name__ == "__main__":
    main()
