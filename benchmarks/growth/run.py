"""How the cost of a training step grows: with the sequence, the batch, the depth, and with devices at the same work.

    export XLA_FLAGS=--xla_force_host_platform_device_count=8 NPROC=64
    python benchmarks/growth/run.py           # measures, in about ten minutes on two cores
    python benchmarks/growth/run.py --redraw  # tables and figure from results.json

Supervised steps of a decoder in float32 with AdamW, `remat="dots"`. Seconds are processor seconds of the whole process,
medians of five steps; memory is what the compiled program asks for beside its arguments (`temp`), on each device. Fake
devices share the same cores: with n of them the same batch ought to take as long, and what it takes more is the cost of
dividing. Bytes sent are counted in the compiled program, loops included (`jaxrl.plan.hlo`), beside the least that the
same layout must send (`jaxrl.plan.traffic`).
"""

import argparse
import dataclasses
import json
import math
import statistics
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

from jaxrl import parallel
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.plan import hlo, traffic
from jaxrl.plan.work import Work
from jaxrl.posttrain import sft
from jaxrl.types import TokenBatch

HERE = Path(__file__).parent
MODEL = TransformerConfig(vocab_size=4096, width=128, layers=4, heads=8, kv_heads=8, ffn=512, max_length=8192)
SWEEPS = {
    "length": [(dataclasses.replace(MODEL), 4, n) for n in (128, 256, 512, 1024, 2048, 4096)],
    "batch": [(MODEL, n, 256) for n in (1, 2, 4, 8, 16, 32)],
    "depth": [(dataclasses.replace(MODEL, layers=n), 4, 256) for n in (2, 4, 8, 16, 32, 64)],
}
MESHES = ["data=1", "data=2", "data=4", "data=8", "fsdp=2", "fsdp=4", "fsdp=8", "tensor=2", "tensor=4", "tensor=8",
          "context=2", "context=4", "stage=2", "stage=4", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2"]  # fmt: skip


def measure(config: TransformerConfig, batch: int, length: int, spec: str = "data=1") -> dict:
    """One compiled step: seconds to trace and compile, seconds to run, bytes."""
    sizes = parallel.mesh.mesh_sizes(spec, 1)
    mesh = parallel.make_mesh(spec, devices=jax.devices()[: math.prod(sizes.values())])
    model = parallel.model_on(config, mesh)
    optimizer = parallel.place_gradients(optax.adamw(1e-4), mesh)
    recipe = sft.make(sft.SFTConfig(batch=batch), model, optimizer, constrain=partial(parallel.shard_batch, mesh=mesh))
    state = recipe.init(jax.random.key(1), jax.jit(model.init)(jax.random.key(0)))
    places = parallel.state_shardings(state, mesh)
    state = jax.device_put(state, places)
    tokens = jax.random.randint(jax.random.key(2), (batch, length + 1), 0, config.vocab_size)
    data = TokenBatch(tokens, jnp.ones(tokens.shape))
    begun = time.perf_counter()
    program = jax.jit(recipe.step, donate_argnums=0, out_shardings=(places, None)).lower(state, data).compile()
    compiled = time.perf_counter() - begun
    seconds = []
    for _ in range(6):
        before = time.process_time()
        state, metrics = program(state, data)
        jax.block_until_ready((state, metrics))
        seconds.append(time.process_time() - before)
    sent = hlo.count(program.as_text(), sizes).traffic
    work = Work(config, "sft", batch, length + 1, sizes)
    return {
        "mesh": spec,
        "layers": config.layers,
        "batch": batch,
        "length": length,
        "compile_seconds": compiled,
        "seconds": statistics.median(seconds[1:]),
        "temp_bytes": program.memory_analysis().temp_size_in_bytes,
        "argument_bytes": program.memory_analysis().argument_size_in_bytes,
        "sent_bytes": sum(t.bytes for t in sent),
        "least_bytes": sum(t.bytes for t in traffic.train_traffic(work)),
    }


def write(results: dict[str, list[dict]]) -> None:
    """The tables and the figure."""
    lines = []
    for name in SWEEPS:
        key = {"length": "length", "batch": "batch", "depth": "layers"}[name]
        lines += [f"| {key} | step, s | temp, MB | compile, s |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {r[key]} | {r['seconds']:.3f} | {r['temp_bytes'] / 1e6:.1f} | {r['compile_seconds']:.1f} |"
            for r in results[name]
        ] + [""]
    alone = results["devices"][0]
    lines += ["| mesh | step, s | of one device | state, MB a device | temp, MB a device | sent, MB a device | least |",
              "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for r in results["devices"]:
        lines.append(
            f"| {r['mesh']} | {r['seconds']:.3f} | {r['seconds'] / alone['seconds']:.2f} | "
            f"{r['argument_bytes'] / 1e6:.1f} | {r['temp_bytes'] / 1e6:.1f} | {r['sent_bytes'] / 1e6:.1f} | "
            f"{r['least_bytes'] / 1e6:.1f} |"
        )
    (HERE / "results.md").write_text("\n".join(lines) + "\n")
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for axis, (name, key) in zip(axes, (("length", "length"), ("batch", "batch"), ("depth", "layers")), strict=True):
        rows = results[name]
        for field, label, colour in (
            ("seconds", "step", "#3b7dd8"),
            ("temp_bytes", "memory", "#e08a3c"),
            ("compile_seconds", "compile", "#6a9f58"),
        ):
            times = [r[field] / rows[0][field] for r in rows]
            axis.plot([r[key] for r in rows], times, "o-", label=label, color=colour)
        span = [r[key] / rows[0][key] for r in rows]
        axis.plot([r[key] for r in rows], span, "--", color="#aaaaaa", label="proportional")
        axis.set(xscale="log", yscale="log", xlabel=key, title=f"beside {key} {rows[0][key]}")
        axis.set_xscale("log", base=2)
    axes[0].set_ylabel("times the first")
    axes[0].legend(frameon=False)
    figure.savefig(HERE / "growth.png", dpi=130)


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--redraw", action="store_true", help="tables and figure from results.json")
    file = HERE / "results.json"
    if not options.parse_args().redraw:
        results: dict[str, list[dict]] = {}
        for name, cases in SWEEPS.items():
            results[name] = [measure(*case) for case in cases]
            print(name, *results[name], sep="\n")
        results["devices"] = [measure(MODEL, 8, 256, spec) for spec in MESHES]
        print("devices", *results["devices"], sep="\n")
        file.write_text(json.dumps(results, indent=1) + "\n")
    write(json.loads(file.read_text()))


if __name__ == "__main__":
    main()
