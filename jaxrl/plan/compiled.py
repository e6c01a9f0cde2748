"""The real programs of a step, compiled ahead of time for chips that need not be there, and what the compiler says."""

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl import parallel
from jaxrl.kernels import aot, aot_gpu
from jaxrl.nets.language_model import LanguageModel
from jaxrl.parallel.sharding import BATCH, rows_over
from jaxrl.plan import chips, hlo
from jaxrl.plan.work import Work
from jaxrl.posttrain import grpo, preference, sft, update
from jaxrl.posttrain.rollout import Sampling, advance, draw, prefill
from jaxrl.types import Pairs, Prompts, Rollout, TokenBatch


class Program(NamedTuple):
    """A function and the shapes of its arguments, placed on a mesh."""

    mesh: Mesh
    function: Callable
    arguments: tuple[Any, ...]
    options: dict[str, Any]  # of `jax.jit`


class Compiled(NamedTuple):
    """What the compiler says of one program, for one device."""

    name: str
    seconds: float  # that it took to lower and compile
    arguments: float  # bytes
    outputs: float  # bytes that take no argument's place
    temporaries: float  # for TPUs with those in on-chip memory
    code: float
    memory: float  # of all data, at the worst moment
    counts: hlo.Counts


def missing(place: chips.Topology) -> str | None:
    """Why nothing can be compiled for these chips here, or None."""
    if place.chip.kind == "tpu":
        return aot.missing()
    if place.chip.kind == "gpu":
        return aot_gpu.missing()
    if len(jax.devices("cpu")) < place.devices:
        return (
            f"{place.name} needs {place.devices} devices and JAX was started with {len(jax.devices('cpu'))}; set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={place.devices} before"
        )
    return None


def mesh_on(place: chips.Topology, sizes: Mapping[str, int]) -> Mesh:
    """A mesh on chips that need not be here; of several slices, the axis that crosses them has them outermost.

    Args:
      place: the chips.
      sizes: of all axes of `parallel.AXES`, in their order.

    Raises:
      ImportError: the compiler for the chips is not installed.
      ValueError: the compiler does not know the topology.
    """
    reason = missing(place)
    if reason:
        raise ImportError(reason)
    shape, axes = tuple(sizes.values()), tuple(sizes)
    if place.chip.kind == "gpu":
        hosts, each = place.shape
        devices = aot_gpu.gpu_mesh(aot_gpu.H100, f"1x{hosts}x{each}", shape, axes).devices
    elif place.chip.kind == "cpu":
        devices = np.array(jax.devices("cpu")[: place.devices]).reshape(shape)
    else:
        devices = _laid_out(place, sizes, _tpus(place))
    return Mesh(devices, axes, axis_types=(AxisType.Auto,) * len(axes))


def _tpus(place: chips.Topology) -> list:
    aot.tpu_mesh(place.chip.name)  # sets what libtpu reads when it is loaded
    name = f"{place.chip.name}:{'x'.join(map(str, place.shape))}"
    options: dict[str, Any] = dict(place.chip.options)
    if place.slices > 1:
        options["num_slices"] = place.slices
    try:
        return list(topologies.get_topology_desc(name, platform="tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology {place.name}: {str(error).splitlines()[0]}") from None


def _laid_out(place: chips.Topology, sizes: Mapping[str, int], devices: list) -> np.ndarray:
    shape, axis = tuple(sizes.values()), chips.over_slices(place, sizes)
    if axis is None:
        return mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
    outer = tuple(place.slices if name == axis else 1 for name in sizes)
    inner = tuple(n // m for n, m in zip(shape, outer, strict=True))
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices=devices, allow_split_physical_axes=True)


def programs(work: Work, place: chips.Topology) -> dict[str, Callable[[], Program]]:
    """The programs of a step: "train"; of grpo also "prefill" and "decode", one token of every row.

    They are those of `jaxrl train`: the step of `posttrain.sft`, `preference` or `grpo` with its optimizer, of a state
    under `parallel.state_shardings`, and the sampler's two parts. Nothing is allocated.
    """
    found = {"train": lambda: _train(work, mesh_on(place, work.mesh))}
    if work.task == "grpo":
        one = work.sampling
        found["prefill"] = lambda: _prefill(one, mesh_on(place, one.mesh))
        found["decode"] = lambda: _decode(one, mesh_on(place, one.mesh))
    return found


def _model(work: Work, mesh: Mesh) -> LanguageModel:
    length = max(work.config.max_length, work.length)
    return parallel.model_on(dataclasses.replace(work.config, max_length=length), mesh, zero=work.zero)


def _placed(tree: Any, places: Any) -> Any:
    place = lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
    return jax.tree.map(place, tree, places)


def _of_rows(mesh: Mesh, rows: int, *sizes: int, dtype: Any = jnp.int32, whole: bool = False) -> Any:
    """Shape of an array [rows, ...], its rows over the batch axes, or whole on every device."""
    sharding = NamedSharding(mesh, P() if whole else P(rows_over(mesh, rows)))
    return jax.ShapeDtypeStruct((rows, *sizes), dtype, sharding=sharding)


def _train(work: Work, mesh: Mesh) -> Program:
    model = _model(work, mesh)
    optimizer = update.make_optimizer(update.OptimizerConfig(state=work.optimizer))
    optimizer = parallel.place_gradients(optimizer, mesh, zero=work.zero)
    constrain = partial(parallel.shard_batch, mesh=mesh)
    if work.task == "grpo":
        recipe: Any = grpo.make(_grpo(work), model, optimizer, eos_id=0, pad_id=0, constrain=constrain)
        step, arguments = recipe.learn, _rollout(work, mesh)
    elif work.task == "dpo":
        config = preference.DPOConfig(batch=work.batch, micro_batches=work.micro_batches)
        recipe = preference.make(config, model, optimizer, constrain=constrain)
        pairs = Pairs(_tokens(work, mesh), _tokens(work, mesh))
        sums = _of_rows(mesh, work.batch, dtype=jnp.float32, whole=True)
        step, arguments = recipe.step, (preference.Referenced(pairs, sums, sums),)
    else:
        config = sft.SFTConfig(batch=work.batch, micro_batches=work.micro_batches)
        recipe = sft.make(config, model, optimizer, constrain=constrain)
        step, arguments = recipe.step, (_tokens(work, mesh),)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(recipe.init, key, jax.eval_shape(model.init, key))
    places = parallel.state_shardings(state, mesh, zero=work.zero)
    options = {"donate_argnums": 0, "out_shardings": (places, None)}
    return Program(mesh, step, (_placed(state, places), *arguments), options)


def _tokens(work: Work, mesh: Mesh) -> TokenBatch:
    """The rows that a step draws from, as `jaxrl train` holds them: whole on every device."""
    sizes = (work.batch, work.length)
    return TokenBatch(*(_of_rows(mesh, *sizes, dtype=dtype, whole=True) for dtype in (jnp.int32, jnp.float32)))


def _grpo(work: Work) -> grpo.GRPOConfig:
    return grpo.GRPOConfig(
        prompts=work.batch // work.group,
        group=work.group,
        micro_batches=work.micro_batches,
        kl_coef=0.04 if work.reference else 0.0,
        sampling=Sampling(max_tokens=work.completion),
    )


def _rollout(work: Work, mesh: Mesh) -> tuple[Rollout, Any]:
    rows = partial(_of_rows, mesh, work.batch)
    numbers = lambda: rows(work.completion, dtype=jnp.float32)
    completions = Rollout(
        rows(work.length), rows(), rows(), rows(), numbers(), numbers(), work.length - work.completion
    )
    return completions, rows(dtype=jnp.float32)


def _parameters(work: Work, model: LanguageModel, mesh: Mesh) -> Any:
    shapes = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)))
    return _placed(shapes, parallel.state_shardings(shapes, mesh, zero=work.zero))


def _prefill(work: Work, mesh: Mesh) -> Program:
    model = _model(work, mesh)
    prompts, width = work.batch // work.group, work.length - work.completion
    given = Prompts(_of_rows(mesh, prompts, width), _of_rows(mesh, prompts))
    read = lambda params, prompts: prefill(model, params, prompts, work.length)
    return Program(mesh, read, (_parameters(work, model, mesh), given), {})


def _decode(work: Work, mesh: Mesh) -> Program:
    """One token for every row: read the last, draw the next."""
    model = _model(work, mesh)
    sampling = Sampling(max_tokens=work.completion)
    rows = partial(_of_rows, mesh, work.batch)

    def step(params, cache, token, start, key):
        hidden, cache = advance(model, params, cache, token, start, work.length)
        return draw(key, hidden, model.unembedding(params), sampling), cache

    cache = jax.eval_shape(partial(model.init_cache, work.batch, work.length))
    columns = NamedSharding(mesh, P(None, rows_over(mesh, work.batch, (*BATCH, "context")), "tensor"))
    places = cache._replace(
        k=jax.tree.map(lambda _: columns, cache.k),
        v=jax.tree.map(lambda _: columns, cache.v),
        length=NamedSharding(mesh, P()),
    )
    key = jax.ShapeDtypeStruct((), jax.eval_shape(lambda: jax.random.key(0)).dtype, sharding=NamedSharding(mesh, P()))
    arguments = (_parameters(work, model, mesh), _placed(cache, places), rows(), rows(), key)
    return Program(mesh, step, arguments, {"donate_argnums": 1})


def compile_program(name: str, program: Program, *, quick: bool = True) -> Compiled:
    """Lowers and compiles one program for the devices of its mesh.

    Args:
      name: of the program.
      program: of `programs`.
      quick: let the compiler try less hard (`JAX_OPTIMIZATION_LEVEL=O0`), for less than half the time and more memory.

    Raises:
      MemoryError: the program does not fit; the message is the compiler's.
    """
    begun = time.perf_counter()
    with _settings(quick):
        try:
            done = aot.compile_for(program.mesh, program.function, *program.arguments, **program.options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                text = re.sub(r"^.*?RESOURCE_EXHAUSTED: ", "", str(error).splitlines()[0])
                raise MemoryError(f"{name}: {text}") from None
            raise
    return read(name, done, program.mesh, seconds=time.perf_counter() - begun)


def read(name: str, done: jax.stages.Compiled, mesh: Mesh, *, seconds: float = 0.0) -> Compiled:
    """What the compiler says of a compiled program."""
    memory: Any = done.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    data = memory.argument_size_in_bytes + outputs + memory.temp_size_in_bytes
    if mesh.devices.flat[0].platform == "tpu":  # other compilers leave temporaries out of the peak
        data = memory.peak_memory_in_bytes
    return Compiled(
        name,
        seconds,
        memory.argument_size_in_bytes,
        outputs,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        data,
        hlo.count(done.as_text() or "", dict(mesh.shape)),
    )


@contextlib.contextmanager
def _settings(quick: bool) -> Iterator[None]:
    """No cache, which holds nothing for chips that are not here, and the compiler's effort."""
    wanted = {"jax_enable_compilation_cache": False, **({"jax_optimization_level": "O0"} if quick else {})}
    before = {name: getattr(jax.config, name) for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
