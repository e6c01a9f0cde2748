"""What one of several processes does in the tests: `python -m tests.parallel.worker TASK FOLDER [...]`.

Each task prints lines; a last one of JSON starting with `=`, which the test reads.
"""

import json
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl import checkpoint, loop, parallel, supervise
from jaxrl.data import loader
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.parallel import faults, processes
from jaxrl.posttrain import sft, update
from jaxrl.posttrain.sft import SFTConfig
from jaxrl.types import TokenBatch

CONFIG = TransformerConfig(vocab_size=16, width=16, layers=1, heads=2, kv_heads=2, ffn=16, max_length=16)


def prepare(spec: str, *, devices=None):
    """`(step, shapes with shardings, fresh state, data)` of supervised fine-tuning on a mesh."""
    mesh = parallel.make_mesh(spec, devices=devices)
    model = parallel.model_on(CONFIG, mesh)
    optimizer = update.make_optimizer(update.OptimizerConfig(learning_rate=1e-2))
    recipe = sft.make(SFTConfig(batch=16), model, optimizer, constrain=lambda batch: parallel.shard_batch(batch, mesh))
    fresh = jax.jit(recipe.init)
    shapes = jax.eval_shape(recipe.init, jax.random.key(1), jax.eval_shape(model.init, jax.random.key(0)))
    places = parallel.state_shardings(shapes, mesh)
    like = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)
    state = lambda: processes.everywhere(fresh(jax.random.key(1), jax.jit(model.init)(jax.random.key(0))), places)
    tokens = np.random.RandomState(0).randint(0, 16, (64, 12)).astype(np.int32)
    data = processes.everywhere(TokenBatch(tokens, np.ones((64, 12), np.float32)), NamedSharding(mesh, PartitionSpec()))
    return recipe.step, like, state, data


def train(spec: str, steps: int, *, state=None, devices=None):
    """`(state, losses)` after `steps` in all, from a fresh state or a given one."""
    step, _, fresh, data = prepare(spec, devices=devices)
    losses: list[float] = []
    state = fresh() if state is None else state
    for progress in loop.run(step, state, data, steps=steps, chunk=2):
        state, losses = progress.state, losses + [row["train/loss"] for row in progress.metrics]
    return state, losses


def total(state) -> list[float]:
    """Numbers that tell parameters apart."""
    return [float(x) for x in jax.jit(lambda p: [jnp.abs(x).sum() for x in jax.tree.leaves(p)])(state.params)]


def together(folder: Path) -> dict:
    """All that processes share: values, errors, batches, a training run, a checkpoint."""
    here = processes.initialise()  # a second time: nothing happens
    number = here.index
    said: dict = {"index": here.index, "count": here.count, "devices": jax.device_count()}
    said["gathered"] = processes.gather(np.float32([number, 1])).tolist()
    processes.barrier("test")
    said["from main"] = processes.on_main(lambda: {"index": here.index, "text": "x" * 5000})

    def refuse():
        raise FileNotFoundError(f"nothing here, says {here.index}")

    for name, error in {
        "on_main": lambda: processes.on_main(refuse),
        "same": lambda: processes.same("hat", number),
    }.items():
        try:
            error()
        except Exception as caught:
            said[name] = f"{type(caught).__name__}: {caught}"
    mesh = parallel.make_mesh("fsdp=8" if jax.device_count() == 8 else "auto")
    divided = NamedSharding(mesh, PartitionSpec("fsdp"))
    tree = {"x": np.arange(16.0, dtype=np.float32), "key": jax.random.key(3)}
    placed = processes.everywhere(tree, {"x": divided, "key": NamedSharding(mesh, PartitionSpec())})
    said["own shards"] = sorted(float(shard.data[0]) for shard in placed["x"].addressable_shards)
    said["fetched"] = processes.fetch(placed["x"]).tolist()
    said["drawn"] = float(jax.jit(jax.random.uniform)(placed["key"]))

    rows = loader.batches(
        list(range(32)), lambda x: np.asarray(x, np.int32), batch=16, seed=1, prefetch=0,
        process_index=here.index, process_count=here.count,
    )  # fmt: skip
    mine, _ = next(rows)
    said["mine"] = mine.tolist()
    said["batch"] = processes.fetch(processes.global_batch(mine, mesh)).tolist()

    state, said["losses"] = train("fsdp=8", 4)
    said["total"] = total(state)
    checkpoint.save(folder, 4, state)
    _, like, _, _ = prepare("data=2,fsdp=4")
    restored, step = checkpoint.restore(folder, like)
    said["restored"] = total(restored)
    state, said["onwards"] = train("data=2,fsdp=4", 6, state=restored)
    said["whole"] = len(jax.tree.leaves(checkpoint.restore(folder)[0])), step
    return said


def resume(folder: Path, spec: str) -> dict:
    """From the newest checkpoint, on another number of devices or processes."""
    _, like, _, _ = prepare(spec)
    state, step = checkpoint.restore(folder, like)
    before = total(state)
    _, losses = train(spec, step + 2, state=state)
    return {"step": step, "restored": before, "onwards": losses}


def save(folder: Path, spec: str) -> dict:
    state, _ = train(spec, 4)
    checkpoint.save(folder, 4, state)
    return {"total": total(state)}


def spin(folder: Path, when: str) -> dict:
    """Steps until something happens: `never`, or process 1 fails (`error`) or leaves its work aside (`slow`)."""
    mesh = parallel.make_mesh("fsdp=8")
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    x = processes.everywhere(np.ones((8, 64), np.float32), sharding)
    step = jax.jit(lambda x: x / jnp.sqrt((x * x).sum()), out_shardings=sharding)
    paces = []
    with faults.preemption() as told_to_stop:
        free = time.perf_counter()
        for number in range(10**9):
            if when == "slow" and not processes.is_main():
                time.sleep(1.0)
            start = time.perf_counter()
            x = jax.block_until_ready(step(x))
            pace = faults.meet(stop=told_to_stop(), host=start - free, chunk=time.perf_counter() - start)
            free = time.perf_counter()
            paces.append(pace)
            if number == 2:
                (folder / f"ready{jax.process_index()}").touch()
            if when == "error" and number == 3 and not processes.is_main():
                raise ValueError("this process has no data")
            if pace.stop or (when == "slow" and number == 5):
                break
    return {"stopped": number, "paces": [list(pace) for pace in paces[2:]]}


TASKS = {"together": together, "resume": resume, "save": save, "spin": spin}

if __name__ == "__main__":
    if supervise.is_due():
        sys.exit(supervise.supervise([sys.executable, "-m", "tests.parallel.worker", *sys.argv[1:]], again="COMMAND"))
    if os.environ.get(supervise.PARENT) != "0":
        supervise.follow()
    processes.initialise(timeout=60, heartbeat=float(os.environ["JAXRL_HEARTBEAT"]))
    name, folder, *rest = sys.argv[1:]
    print("=" + json.dumps(TASKS[name](Path(folder), *rest)), flush=True)
