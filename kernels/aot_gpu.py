"""Programs compiled for GPUs that are not there, and what the compiler says of their kernels.

NVIDIA's back end runs on any x86-64 Linux machine: it needs the packages jax-cuda13-plugin, jax-cuda13-pjrt (of jax's
version), nvidia-cuda-nvcc and nvidia-nvvm, no GPU, no driver and no CUDA. Install them without their dependencies,
which are the CUDA libraries, and set JAX_PLATFORMS=cpu. Nothing can be executed.

    mesh = gpu_mesh()
    program, kernels = compile_kernels(mesh, f, jax.ShapeDtypeStruct((4096, 128), jnp.bfloat16))

`Kernel` says what decides a kernel's speed before it ever ran: registers, spills, shared memory, the number of
asynchronous products and copies, and the assembler's warnings.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxrl.kernels.aot import compile_for

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  device_memory_size: 84942979072  clock_rate_ghz: 1.98
  cuda_compute_capability { major: 9 minor: 0 }  device_address_bits: 64  ecc_enabled: true
  name: "NVIDIA H100 80GB HBM3"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""The H100 SXM as XLA describes it (figures of NVIDIA's data sheet)."""

SHARED_PER_BLOCK, SHARED_PER_CORE = 232448, 233472  # bytes on Hopper
REGISTERS_PER_CORE, THREADS_PER_CORE = 65536, 2048
MODULES = ("jax_plugins.xla_cuda13", "jax_cuda13_plugin", "nvidia.cu13")


class Kernel(NamedTuple):
    """What the compiler says of one kernel."""

    name: str
    registers: int  # a thread's, at the launch
    spill_stores: int  # bytes
    spill_loads: int
    shared: int  # bytes of a block
    threads: int  # of a block
    products: int  # wgmma instructions
    copies: int  # TMA instructions
    warnings: tuple[str, ...]

    @property
    def blocks_per_core(self) -> int:
        """How many blocks one multiprocessor of Hopper holds at a time."""
        registers = -(-max(self.registers, 1) // 8) * 8 * self.threads
        limits = REGISTERS_PER_CORE // registers, THREADS_PER_CORE // self.threads
        return min(32, *limits, SHARED_PER_CORE // (self.shared + 1024))


def missing() -> str | None:
    """Why nothing can be compiled here, or None if it can."""
    if all(_path(module) for module in MODULES):
        return None
    return "NVIDIA's compiler is missing: pip install 'jaxrl[aot]'"


def _path(module: str) -> Path | None:
    """Where a module lies, without importing what it imports."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def gpu_mesh(
    target: str = H100, hosts: str = "1x1x1", shape: Sequence[int] = (1,), axes: Sequence[str] = ("x",)
) -> Mesh:
    """A mesh of GPUs that need not exist.

    Args:
      target: the GPU, in XLA's text form.
      hosts: slices x hosts x GPUs of a host.
      shape, axes: of the mesh; it takes the first GPUs.

    Raises:
      ImportError: the compiler is not installed.
      ValueError: there are fewer GPUs than the mesh takes.
    """
    reason = missing()
    if reason:
        raise ImportError(reason)
    devices = topologies.get_topology_desc(platform="cuda", target_config=target, topology=hosts).devices
    count = math.prod(shape)
    if count > len(devices):
        raise ValueError(f"gpu_mesh: {hosts} has {len(devices)} GPUs, the mesh {tuple(shape)} needs {count}.")
    return Mesh(np.array(devices[:count]).reshape(shape), axes)


def compile_kernels(mesh: Mesh, f: Callable, *args: Any) -> tuple[jax.stages.Compiled, list[Kernel]]:
    """`compile_for`, and what the compiler says of the program's Mosaic and Triton kernels, by name."""
    with tempfile.TemporaryDirectory() as directory:
        wanted = {"MOSAIC_GPU_DUMP_TO": directory, "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
        with _environment(wanted):
            program = compile_for(mesh, f, *args, compiler_options={"xla_dump_to": directory})
        found = [kernel for path in Path(directory).glob("*.ptx") for kernel in _read(path)]
    return program, sorted(found)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _read(path: Path) -> Iterator[Kernel]:
    """The kernels of a file of PTX. Mosaic leaves the assembler's words beside it; for others it is asked here."""
    text = path.read_text()
    beside, passes = path.with_suffix(".ptxas"), path.with_suffix(".mlir-passes.log")
    words = beside.read_text() if beside.exists() else _assemble(path)
    launched = re.findall(r"dynamic_shared_memory_size %c(\d+)_i32", passes.read_text() if passes.exists() else "")
    for name, body in re.findall(r"\.entry (\w+)\((.*?)^}", text, re.DOTALL | re.MULTILINE):
        said = re.search(rf"Compiling entry function '{name}'(.*?)(?=Compiling entry|\Z)", words, re.DOTALL)
        said = said.group(1) if said else ""

        def number(pattern, said=said) -> int:
            got = re.search(pattern, said)
            return int(got.group(1)) if got else 0

        yield Kernel(
            name=name.removesuffix("_mosaic_gpu_kernel"),
            registers=number(r"Used (\d+) registers"),
            spill_stores=number(r"(\d+) bytes spill stores"),
            spill_loads=number(r"(\d+) bytes spill loads"),
            shared=max(number(r"(\d+) bytes smem"), *(int(x) for x in launched), 0),
            threads=math.prod(int(x) for x in re.findall(r"\.(?:max|req)ntid ([\d, ]+)", body)[0].split(",")),
            products=len(re.findall(r"wgmma\.mma_async", body)),
            copies=len(re.findall(r"cp\.async\.bulk\.tensor", body)),
            warnings=tuple(re.findall(r"\((C\d{4}\) [^\n]*)", words)),
        )


def _assemble(path: Path) -> str:
    """What ptxas says of a file."""
    folder = _path("nvidia.cu13")
    command = [f"{folder}/bin/ptxas", "-v", "-arch=sm_90a", str(path), "-o", os.devnull]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr
