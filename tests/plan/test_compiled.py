"""The real programs, compiled for eight fake CPU devices and for TPUs that are not here, against what was counted."""

import dataclasses
import io
import json
import math
import re

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from jaxrl import cli, parallel
from jaxrl.display import Display
from jaxrl.kernels import aot
from jaxrl.nets import presets
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.plan import chips, command, compiled, memory, traffic, work
from jaxrl.plan.options import Plan

CPU = chips.topology("cpu:8")
SMALL = TransformerConfig(
    vocab_size=512, width=64, layers=4, heads=8, kv_heads=4, ffn=256, remat="full", max_length=512
)


def a_work(task="sft", batch=16, length=129, config=SMALL, mesh=None, **changes):
    sizes = {axis: (mesh or {"fsdp": 4, "tensor": 2}).get(axis, 1) for axis in parallel.AXES}
    return work.Work(config, task, batch, length, sizes, **changes)


def build(one, name, place=CPU):
    return compiled.compile_program(name, compiled.programs(one, place)[name]())


def sent(found):
    """Bytes by (kind, axis) of collectives along one axis."""
    return {(x.kind, x.axes[0]): x.bytes for x in found if len(x.axes) == 1}


def test_the_train_step_does_what_was_counted():
    """Short rows take all pairs at once, so that every product is counted exactly; the CPU's collectives nearly so."""
    one = a_work()
    got = build(one, "train")
    held = sum(memory.held(one).values()) + memory.train_memory(one)["data"]
    assert held <= got.arguments <= held + 100
    assert got.counts.flops == sum(work.train_flops(one, dense=True).values()) / 8
    assert got.counts.unknown_loops == 0
    least, real = sent(traffic.train_traffic(one)), sent(got.counts.traffic)
    assert 1 <= real["all-gather", "fsdp"] / least["all-gather", "fsdp"] < 1.1
    reduced = real["reduce-scatter", "fsdp"] + real["all-reduce", "fsdp"] / 2  # a CPU reduces all of a layer's
    assert real["reduce-scatter", "fsdp"] > 0  # of the unembedding
    assert 1 <= reduced / least["reduce-scatter", "fsdp"] < 1.1
    assert real["all-to-all", "fsdp"] == least["all-to-all", "fsdp"]
    # a TPU adds up what q, k and v (gate and up) send back before it reduces that; a CPU reduces each: 8 for 5
    assert 1 <= real["all-reduce", "tensor"] / least["all-reduce", "tensor"] < 1.1 * 8 / 5


def test_memory_is_what_a_real_step_takes():
    """Live arrays of a device, exactly; with the compiler's temporaries, about: a CPU merges less than a TPU."""
    config = dataclasses.replace(SMALL, vocab_size=2048, width=128, ffn=384)
    one = a_work(config=config, length=257)
    program = compiled.programs(one, CPU)["train"]()
    step = aot.compile_for(program.mesh, program.function, *program.arguments, **program.options)
    got = compiled.read("train", step, program.mesh)
    places = jax.tree.map(lambda x: x.sharding, program.arguments)

    def draw():
        like = lambda x: (
            jax.random.key(0) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else jnp.ones(x.shape, x.dtype)
        )
        return jax.tree.map(like, program.arguments)

    arguments = jax.jit(draw, out_shardings=places)()
    live = lambda tree: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
    held = sum(memory.held(one).values()) + memory.train_memory(one)["data"]
    assert held <= live(arguments) <= held + 100
    state, metrics = step(*arguments)
    assert live(state) <= held and jnp.isfinite(metrics["train/loss"]) and int(state.step) == 2  # from ones
    assert abs(memory.peak(one) / got.memory - 1) < 0.25


@pytest.mark.parametrize("task", ["dpo", "grpo"])
def test_the_steps_of_the_other_tasks_lower(task):
    one = a_work(task, completion=64, group=4) if task == "grpo" else a_work(task)
    program = compiled.programs(one, CPU)["train"]()
    lowered = jax.jit(program.function, **program.options).lower(*program.arguments)
    assert lowered.cost_analysis() is not None
    held = sum(memory.held(one).values())
    own = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * (4 if x.dtype.itemsize == 4 else 8)
    assert held <= sum(own(x) for x in jax.tree.leaves(program.arguments[0])) <= held + 100


def test_the_sampler_holds_its_cache_and_gathers_its_parameters():
    one = a_work("grpo", completion=64, group=4)
    got = build(one, "decode")
    held = memory.held(one)["parameters"] + memory.cache_bytes(one)
    assert held <= got.arguments <= held + 200
    least, real = sent(traffic.sample_traffic(one)), sent(got.counts.traffic)
    assert real["all-gather", "fsdp"] < 1.1 * least["all-gather", "fsdp"]
    assert 1 <= real["all-reduce", "tensor"] / least["all-reduce", "tensor"] < 1.2
    apart = dataclasses.replace(one, sampler_mesh={**dict.fromkeys(parallel.AXES, 1), "data": 4, "tensor": 2})
    assert not [x for x in build(apart, "decode").counts.traffic if x.kind == "all-gather" and "fsdp" in x.axes]
    prompts = memory.cache_bytes(one) / one.group  # one row each
    assert prompts <= build(one, "prefill").outputs <= 1.01 * prompts


def shown(options):
    """What the command prints, and returns."""
    console = Console(file=io.StringIO(), width=160, highlight=False)
    found = command.run(options, display=Display(console))
    return console.file.getvalue(), found


def test_the_command_compiles_and_prints(tmp_path):
    out = tmp_path / "plan.json"
    text, found = shown(
        Plan(model="tiny", topology="cpu:8", mesh="fsdp=4,tensor=2", batch=16, length=33, dtype="float32", out=str(out))
    )
    for word in (
        "parameters on 8 devices of cpu:8",
        "all, counted",
        "all, compiled",
        "all-gather fsdp",
        "fits",
        "bound",
    ):
        assert word in text, word
    assert found["fits"] and json.loads(out.read_text())["compiled"]["train"]["flops"] > 0
    parts = ("arguments", "outputs", "temporaries")
    assert found["compiled"]["train"]["memory"] == sum(found["compiled"]["train"][name] for name in parts)


def test_the_command_searches_and_counts_without_compilers(monkeypatch):
    monkeypatch.setattr(aot, "missing", lambda: "the TPU compiler is missing: pip install 'jaxrl[aot]'")
    text, found = shown(Plan(model="qwen3-0.6b", topology="v5e:4x4", search=True, batch=64))
    assert "counted, not compiled: the TPU compiler is missing" in text and "ways fit, counted" in text
    assert found["compiled"] == {} and len(found["candidates"]) == 3 and found["fits"]
    assert found["step_seconds"] == min(x["step_seconds"] for x in found["candidates"])
    text, found = shown(
        Plan(model="llama-70b", topology="v5e:16x16", mesh="fsdp=32,tensor=8", batch=4096, compile=False)
    )
    assert not found["fits"] and "does not fit" in text and 0 < found["largest_batch"] < 4096
    text, found = shown(
        Plan(model="llama-8b", topology="2xv5e:8x8", mesh="data=2,fsdp=16,tensor=4", task="grpo", batch=256,
             sampler_mesh="auto", reference=True, compile=False)
    )  # fmt: skip
    assert (
        "sampling on data=" in text and "reference" in text and set(found["phases"]) == {"train", "prefill", "decode"}
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "lama-8b"], "expected one of .*; did you mean 'llama-8b'"),
        (["--topology", "v5e:17x16"], "larger than one slice of v5e"),
        (["--mesh", "fsdp=3"], "has 3 places for the 256 devices of v5e:16x16"),
        (["--mesh", "fspd=256"], "unknown axis 'fspd'.*did you mean 'fsdp'"),
        (["--mesh", "fsdp=-1,data=-1"], "only one axis may be -1"),
        (["--mesh", "fsdp=x"], "expected a positive number, or -1 once"),
        (["--mesh", "tensor=16,fsdp=-1"], "kv_heads is 8, which the 16 devices of mesh axis 'tensor'"),
        (["--batch", "100"], "a batch of 100 does not divide over the 256 devices"),
        (["--search", "--model", "llama-70b", "--topology", "v5e:2x2", "--no-compile"], "no mesh of the 4 devices"),
    ],
)
def test_what_cannot_be_is_refused_with_one_line(argv, message, capsys):
    assert cli.main(["plan", *argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("jaxrl plan: ") and "Traceback" not in said
    assert re.search(message, said), said


@pytest.mark.parametrize("flags", [["--group", "3", "--task", "grpo"], ["--batch", "0"], ["--completion", "4096"]])
def test_options_that_contradict_each_other_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", *flags])
    assert stop.value.code == 2 and "expected" in capsys.readouterr().err


needs_tpu_compiler = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))


@needs_tpu_compiler
def test_a_step_for_four_tpus():
    """With the real compiler and kernels: products exact, traffic of tensor and memory near what was counted."""
    config = TransformerConfig(
        vocab_size=8192, width=512, layers=2, heads=4, kv_heads=2, ffn=1024, remat="full", dtype="bfloat16"
    )
    one = a_work(config=config, batch=8, length=513, mesh={"fsdp": 2, "tensor": 2})
    got = build(one, "train", chips.topology("v5e:2x2"))
    assert got.counts.flops == work.train_flops(one)["layers"] / 4
    assert {"attention_forward", "attention_backward", "log_probs_forward"} <= set(got.counts.kernels)
    assert got.counts.kernels["attention_forward"] == 4  # two layers, and again in the backward pass
    least, real = sent(traffic.train_traffic(one)), sent(got.counts.traffic)
    assert 0.9 < real["all-reduce", "tensor"] / least["all-reduce", "tensor"] < 1.2
    held = sum(memory.held(one).values()) + memory.train_memory(one)["data"]
    assert abs(got.arguments / held - 1) < 0.02  # arrays are padded to tiles
    assert 0.7 < memory.peak(one) / got.memory < 1.2


@needs_tpu_compiler
@pytest.mark.parametrize("name", ["v4:4x4x4", "v5e:4x8", "v5p:2x2x1", "v6e:4x4", "tpu7x:2x2x1", "2xv5e:4x4"])
def test_the_compiler_knows_the_chips(name):
    place = chips.topology(name)
    sizes = dict.fromkeys(parallel.AXES, 1) | {"data": 2, "fsdp": place.devices // 2}
    mesh = compiled.mesh_on(place, sizes)
    assert mesh.size == place.devices and dict(mesh.shape) == sizes
    if place.slices > 1:  # the outer axis crosses
        assert [{x.slice_index for x in half.flat} for half in mesh.devices[0]] == [{0}, {1}]


@needs_tpu_compiler
def test_a_topology_that_only_the_compiler_refuses():
    sizes = dict.fromkeys(parallel.AXES, 1) | {"fsdp": 15}
    with pytest.raises(ValueError, match="topology v5e:3x5: .*not divisible"):
        compiled.mesh_on(chips.topology("v5e:3x5"), sizes)


def test_without_a_compiler_meshes_say_what_to_install(monkeypatch):
    monkeypatch.setattr(aot, "missing", lambda: "the TPU compiler is missing: pip install 'jaxrl[aot]'")
    with pytest.raises(ImportError, match="pip install"):
        compiled.mesh_on(chips.topology("v5e:4x4"), dict.fromkeys(parallel.AXES, 1) | {"fsdp": 16})
    assert "needs 64 devices and JAX was started with 8" in str(compiled.missing(chips.topology("cpu:64")))


@needs_tpu_compiler
def test_what_does_not_fit_is_said_by_the_compiler():
    program = compiled.Program(
        compiled.mesh_on(chips.topology("v5e:2x2"), a_work(mesh={"fsdp": 4}).mesh),
        lambda x: jnp.sort(x[:, None] + x[None]).sum(),
        (jax.ShapeDtypeStruct((2**18,), jnp.float32),),
        {},
    )
    with pytest.raises(MemoryError, match="big: .*memory"):
        compiled.compile_program("big", program)


@pytest.mark.slow
@needs_tpu_compiler
def test_an_8b_model_for_256_tpus():
    one = a_work(config=presets.llama31_8b(dtype="bfloat16", remat="full"), batch=256, length=2049,
                 mesh={"fsdp": 32, "tensor": 8})  # fmt: skip
    got = build(one, "train", chips.topology("v5e:16x16"))
    assert got.counts.flops == work.train_flops(one)["layers"] / 256
    least, real = sent(traffic.train_traffic(one)), sent(got.counts.traffic)
    assert 1 <= real["all-reduce", "tensor"] / least["all-reduce", "tensor"] < 1.1
    assert abs(memory.peak(one) / got.memory - 1) < 0.25
