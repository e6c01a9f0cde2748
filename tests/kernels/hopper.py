"""A Hopper multiprocessor in numpy: runs Mosaic GPU kernels, warpgroup by warpgroup, on any machine.

jax 0.10 cannot interpret these kernels on CPU. This machine takes the traced kernel (its jaxpr) and is as unkind as the
hardware may be. Warpgroups are interleaved at random. A copy into shared memory lands only when somebody waits for
it; until then the buffer holds NaN. A matrix product, and a copy out of shared memory, reads its operands only when
it is waited for. TMA reads zeros past the end of an array and writes nothing there; an ordinary load there is an error.
Errors are, too: a barrier that runs ahead of a waiting thread by two phases, a deadlock, a copy or product of shared
memory that was written but not committed, work that is never waited for, and global memory written twice.
What it cannot see: register layouts and descriptors, which the compiler checks (`kernels/aot_gpu.py`).
"""

from __future__ import annotations

import functools
import math
import random
from collections import Counter
from typing import Any

import jax
import numpy as np
from jax.extend import core

CALLS = {"custom_vjp_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vmap_call": "call", "jit": "jaxpr"}
IDENTITY = {"layout_cast", "optimization_barrier", "multiple_of"}
ELEMENTWISE: dict[str, Any] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.maximum, "min": np.minimum, "neg": np.negative,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "exp": np.exp, "exp2": np.exp2, "log": np.log, "tanh": np.tanh, "rem": np.fmod,
    "shift_right_logical": np.right_shift,
}  # fmt: skip
REDUCTIONS: dict[str, Any] = {"reduce_max": np.max, "reduce_min": np.min, "reduce_sum": np.sum}


def poison(shape, dtype) -> np.ndarray:
    """NaN, or for integers what is as good as an index out of range."""
    return np.full(shape, np.iinfo(dtype).min if np.issubdtype(dtype, np.integer) else np.nan, dtype)


class Memory:
    """An array in global memory, shared memory or registers."""

    def __init__(self, array: np.ndarray, space: str = "regs"):
        self.array, self.space, self.uncommitted = array, space, False
        self.tile = 1  # rows: TMA copies tiles to and from where one may start
        self.written = np.zeros(array.shape, bool)


class Barrier:
    """Completes a phase when all have arrived and the copies that it tracks have landed: not before somebody looks."""

    def __init__(self, arrivals: int):
        self.arrivals, self.missing, self.phases = arrivals, arrivals, 0
        self.copies: list[Any] = []

    def arrive(self, copy=None):
        self.phase()
        self.copies += [copy] if copy else []
        self.missing -= 1

    def phase(self) -> int:
        if not self.missing:
            for copy in self.copies:
                copy()
            self.copies, self.missing, self.phases = [], self.arrivals, self.phases + 1
        return self.phases


class View:
    """A rectangle of a memory: for each axis of the array an index, or (start, size)."""

    def __init__(self, memory: Memory, transforms):
        self.memory, self.turned = memory, False
        self.dims: list[Any] = [(0, n) for n in memory.array.shape]
        for transform in transforms:
            name = type(transform).__name__
            if name == "NDIndexer":
                axes = [a for a, d in enumerate(self.dims) if isinstance(d, tuple)]
                for axis, index in zip(axes, transform.indices, strict=True):
                    start = self.dims[axis][0]
                    if hasattr(index, "size") and hasattr(index, "start"):
                        self.dims[axis] = (start + int(index.start), int(index.size))
                    else:
                        self.dims[axis] = start + int(index)
            elif name == "TransposeTransform":
                self.turned = not self.turned
            elif name not in ("UnswizzleRef", "UntilingTransform"):  # how bytes lie, not what they mean
                raise NotImplementedError(name)

    def index(self, clip: bool) -> tuple[Any, ...]:
        spans = [(d, 1) if isinstance(d, int) else d for d in self.dims]
        for (start, size), n in zip(spans, self.memory.array.shape, strict=True):
            if start < 0 or (not clip and start + size > n):
                raise IndexError(f"{start} : {start + size} of {n} in an array {self.memory.array.shape}")
        return tuple(d if isinstance(d, int) else slice(d[0], d[0] + d[1]) for d in self.dims)

    def read(self, clip: bool = False) -> np.ndarray:
        """The values; with clip, zeros past the end."""
        values = self.memory.array[self.index(clip)]
        shape = [d[1] for d in self.dims if isinstance(d, tuple)]
        if list(values.shape) != shape:
            values = np.pad(values, [(0, n - m) for n, m in zip(shape, values.shape, strict=True)])
        return values.T if self.turned else values

    def write(self, values, clip: bool = False):
        index = self.index(clip)
        if self.memory.space == "gmem":
            assert not self.memory.written[index].any(), "global memory written twice"
            self.memory.written[index] = True
        target = self.memory.array[index]
        self.memory.array[index] = np.asarray(values)[tuple(slice(n) for n in target.shape)]


def check_tiles(in_global: View, in_shared: View):
    tile, spans = in_shared.memory.tile, [d for d in in_global.dims if isinstance(d, tuple)]
    assert tile == 1 or spans[-2][0] % tile == 0, f"a copy in tiles of {tile} rows starts at row {spans[-2][0]}"


def run(f, *args, seed: int = 0) -> tuple[Any, Counter]:
    """f(*args) with its kernels on the machine, and how often each primitive was executed in them."""
    closed, shape = jax.make_jaxpr(f, return_shape=True)(*args)
    machine = Machine(seed)
    outputs = jax.jit(functools.partial(machine.host, closed.jaxpr, closed.consts))(jax.tree.leaves(args))
    outputs = jax.block_until_ready(outputs)  # before the count is read
    return jax.tree.unflatten(jax.tree.structure(shape), outputs), machine.executed


class Machine:
    def __init__(self, seed: int):
        self.random, self.executed = random.Random(seed), Counter()

    def host(self, jaxpr, consts, args):
        """What surrounds the kernels stays as it is; the kernels become calls of `launch`."""
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        for eqn in jaxpr.eqns:
            values = [x.val if isinstance(x, core.Literal) else env[x] for x in eqn.invars]
            name = eqn.primitive.name
            if name == "mpmd_map":
                out = jax.pure_callback(functools.partial(self.launch, eqn), eqn.params["out_avals"], *values)
            elif name in CALLS:
                inner = eqn.params[CALLS[name]]
                out = self.host(inner.jaxpr, inner.consts, values)
            else:
                out = eqn.primitive.bind(*values, **eqn.params)
            env.update(zip(eqn.outvars, out if eqn.primitive.multiple_results else [out], strict=True))
        return [x.val if isinstance(x, core.Literal) else env[x] for x in jaxpr.outvars]

    def launch(self, eqn, *values):
        """Runs a kernel over its grid."""
        (mesh,), (jaxpr,) = eqn.params["meshes"], eqn.params["jaxprs"]
        inputs = [Memory(np.asarray(x), "gmem") for x in values]
        outputs = [Memory(poison(x.shape, x.dtype), "gmem") for x in eqn.params["out_avals"]]
        for block in np.ndindex(*mesh.grid):
            axes = dict(zip(mesh.grid_names, block, strict=True))
            shared: dict[Any, Any] = {}
            threads = [
                Thread(self, {**axes, mesh.thread_name: n}, shared).body(jaxpr, [*inputs, *outputs])
                for n in range(mesh.num_threads)
            ]
            self.interleave(threads)
        return [x.array for x in outputs]

    def interleave(self, threads):
        """Runs generators that yield functions which say whether they may go on."""
        waiting = {thread: lambda: True for thread in threads}
        while waiting:
            ready = [thread for thread, may in waiting.items() if may()]
            if not ready:
                raise RuntimeError("deadlock: every warpgroup waits")
            thread = self.random.choice(ready)
            try:
                waiting[thread] = next(thread)
            except StopIteration:
                del waiting[thread]


class Thread:
    """One warpgroup."""

    def __init__(self, machine: Machine, axes, shared):
        self.machine, self.axes, self.shared = machine, axes, shared
        self.phases, self.products, self.stores = Counter(), [], []

    def body(self, jaxpr, args):
        yield from self.evaluate(jaxpr, args)
        if self.products or self.stores:
            raise RuntimeError("a warpgroup ended with work that it never waited for")

    def flush(self, work, keep: int = 0):
        while len(work) > keep:
            work.pop(0)()

    def evaluate(self, jaxpr, args, consts=()):
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        for eqn in jaxpr.eqns:
            values = [np.asarray(x.val) if isinstance(x, core.Literal) else env[x] for x in eqn.invars]
            name = eqn.primitive.name
            self.machine.executed[name] += 1
            rule = getattr(self, f"do_{name.removesuffix('_p')}", None)
            if rule is not None:
                out = yield from rule(values, eqn)
            else:
                out = arithmetic(name, values, eqn)
            env.update(zip(eqn.outvars, out, strict=True))
        return [np.asarray(x.val) if isinstance(x, core.Literal) else env[x] for x in jaxpr.outvars]

    # control flow

    def do_jit(self, values, eqn):
        return (yield from self.evaluate(eqn.params["jaxpr"].jaxpr, values, eqn.params["jaxpr"].consts))

    def do_cond(self, values, eqn):
        branches = eqn.params["branches"]
        branch = branches[min(max(int(values[0]), 0), len(branches) - 1)]
        return (yield from self.evaluate(branch.jaxpr, values[1:], branch.consts))

    def do_while(self, values, eqn):
        n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        carry = values[n + m :]
        while True:
            (go,) = yield from self.evaluate(eqn.params["cond_jaxpr"].jaxpr, [*values[:n], *carry])
            if not go:
                return carry
            carry = yield from self.evaluate(eqn.params["body_jaxpr"].jaxpr, [*values[n : n + m], *carry])

    def do_scan(self, values, eqn):
        p = eqn.params
        consts, carry = values[: p["num_consts"]], values[p["num_consts"] :]
        assert len(carry) == p["num_carry"], "only loops without inputs along the axis"
        for _ in range(p["length"]):
            carry = yield from self.evaluate(p["jaxpr"].jaxpr, [*consts, *carry])
        return carry

    def do_axis_index(self, values, eqn):
        yield from ()
        return [np.int32(self.axes[eqn.params["axis_name"]])]

    def do_run_scoped(self, values, eqn):
        jaxpr, transforms = eqn.params["jaxpr"], eqn.params["ref_transforms"]
        scoped = [self.allocate(v, t) for v, t in zip(jaxpr.invars, transforms, strict=True)]
        return (yield from self.evaluate(jaxpr, scoped, values))

    def allocate(self, variable, transforms):
        aval = variable.aval
        space, shape = str(aval.memory_space), aval.shape
        if space == "regs":
            return Memory(np.zeros(shape, aval.dtype))
        if variable not in self.shared:
            if "barrier" in str(aval):
                self.shared[variable] = [Barrier(aval.dtype.num_arrivals) for _ in range(shape[0])]
            else:
                tiled = any(type(t).__name__ == "UntilingTransform" for t in transforms)
                tile = shape[-2] if tiled else 1
                if tiled:
                    shape = (*shape[:-4], shape[-4] * shape[-2], shape[-3] * shape[-1])
                self.shared[variable] = Memory(poison(shape, aval.dtype), "smem")
                self.shared[variable].tile = tile
        return self.shared[variable]

    def do_run_state(self, values, eqn):
        memories = [x if isinstance(x, Memory | list) else Memory(np.array(x)) for x in values]
        yield from self.evaluate(eqn.params["jaxpr"], memories)
        self.flush(self.products)
        return [m if m is x else m.array for m, x in zip(memories, values, strict=True)]

    # memory

    def view(self, memory, tree, leaves):
        return View(memory, jax.tree.unflatten(tree, leaves) if tree is not None else ())

    def do_get(self, values, eqn):
        yield from ()
        view = self.view(values[0], eqn.params["tree"], values[1:])
        return [view.read().copy()]

    do_load = do_get

    def do_swap(self, values, eqn):
        yield from ()
        view = self.view(values[0], eqn.params["tree"], values[2:])
        old = view.read().copy()
        assert view.memory.space != "gmem", "no ordinary stores to global memory"
        view.write(values[1])
        view.memory.uncommitted = True
        return [old]

    def do_commit_smem(self, values, eqn):
        yield from ()
        for memory in self.shared.values():
            if isinstance(memory, Memory):
                memory.uncommitted = False
        return []

    def do_copy_gmem_to_smem(self, values, eqn):
        p = eqn.params
        trees = [p[f"{x}_transforms_treedef"] for x in ("src", "dst", "barrier")]
        leaves = values[3:]
        views = []
        for memory, tree in zip(values[:2], trees[:2], strict=True):
            views.append(self.view(memory, tree, leaves[: tree.num_leaves]))
            leaves = leaves[tree.num_leaves :]
        source, target = views
        check_tiles(source, target)
        target.write(poison(target.read().shape, target.memory.array.dtype))
        barrier = self.barrier(values[2], trees[2], leaves)
        barrier.arrive(lambda: target.write(source.read(clip=True)))
        yield lambda: True
        return []

    def do_copy_smem_to_gmem(self, values, eqn):
        p = eqn.params
        assert not p["has_user_predicate"] and p["reduction_op"] is None
        n = p["src_transforms_treedef"].num_leaves
        source = self.view(values[0], p["src_transforms_treedef"], values[2 : 2 + n])
        target = self.view(values[1], p["dst_transforms_treedef"], values[2 + n :])
        assert not source.memory.uncommitted, "copy of shared memory that is not committed"
        check_tiles(target, source)
        self.stores.append(lambda: target.write(source.read(), clip=True))
        yield lambda: True
        return []

    def do_wait_smem_to_gmem(self, values, eqn):
        yield from ()
        self.flush(self.stores)
        return []

    # barriers and matrix products

    def barrier(self, barriers, tree, leaves) -> Barrier:
        transforms = jax.tree.unflatten(tree, leaves)
        return barriers[int(np.asarray(transforms[0].indices[0]))] if transforms else barriers[0]

    def do_barrier_arrive(self, values, eqn):
        self.barrier(values[0], eqn.params["transforms_treedef"], values[1:]).arrive()
        yield lambda: True
        return []

    def do_barrier_wait(self, values, eqn):
        barrier = self.barrier(values[0], eqn.params["transforms_treedef"], values[1:])
        yield lambda: barrier.phase() > self.phases[barrier]
        assert barrier.phase() == self.phases[barrier] + 1, "the barrier is two phases ahead of a thread that waits"
        self.phases[barrier] += 1
        return []

    def do_set_max_registers(self, values, eqn):
        yield from ()
        return []

    def do_wgmma_ref(self, values, eqn):
        p, leaves, operands = eqn.params, values[3:], []
        assert p["acc_transforms_tree"] is None
        for value, tree in ((values[1], p["a_transforms_tree"]), (values[2], p["b_transforms_tree"])):
            n = tree.num_leaves if tree is not None else 0
            if isinstance(value, Memory):
                view = self.view(value, tree, leaves[:n])
                assert not value.uncommitted, "product of shared memory that is not committed"
                operands.append(view.read)
            else:
                operands.append(lambda value=value: value)
            leaves = leaves[n:]
        a, b = operands

        def multiply(accumulator=values[0].array):
            with np.errstate(invalid="ignore"):
                accumulator += a().astype(np.float32) @ b().astype(np.float32)

        self.products.append(multiply)
        yield lambda: True
        return []

    def do_wgmma_accumulator_deref(self, values, eqn):
        yield from ()
        if eqn.params["wait_n"] is not None:
            self.flush(self.products, eqn.params["wait_n"])
        return [values[0].array.copy()]

    def do_wgmma_wait(self, values, eqn):
        yield from ()
        self.flush(self.products, eqn.params["n"] if "n" in eqn.params else int(values[0]))  # jax 0.11, 0.10
        return []


def arithmetic(name: str, values, eqn):
    """Arithmetic on registers."""
    p = eqn.params
    if name in IDENTITY:
        return values
    with np.errstate(all="ignore"):
        if name in ELEMENTWISE:
            out = ELEMENTWISE[name](*values)
        elif name in REDUCTIONS:
            out = REDUCTIONS[name](values[0], axis=p["axes"])
        elif name == "div":
            whole = np.issubdtype(values[0].dtype, np.integer)
            out = np.trunc(np.divide(*values, dtype=np.float64)) if whole else np.divide(*values)
        elif name == "select_n":
            out = np.where(values[0], values[2], values[1])
        elif name == "convert_element_type":
            out = values[0]
        elif name == "broadcast_in_dim":
            shape = [1] * len(p["shape"])
            for axis, n in zip(p["broadcast_dimensions"], np.shape(values[0]), strict=True):
                shape[axis] = n
            out = np.broadcast_to(np.reshape(values[0], shape), p["shape"])
        elif name == "iota":
            shape = [1] * len(p["shape"])
            shape[p["dimension"]] = p["shape"][p["dimension"]]
            out = np.broadcast_to(np.arange(math.prod(shape)).reshape(shape), p["shape"])
        elif name == "slice":
            out = values[0][tuple(slice(*ends) for ends in zip(p["start_indices"], p["limit_indices"], strict=True))]
        elif name in ("squeeze", "reshape"):
            out = np.reshape(values[0], eqn.outvars[0].aval.shape)
        else:
            raise NotImplementedError(name)
    return [np.asarray(out, eqn.outvars[0].aval.dtype)]
