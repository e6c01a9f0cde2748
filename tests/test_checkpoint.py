"""Checkpoints: what comes back, what is kept, and what happens to torn and damaged ones."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl import checkpoint, parallel
from jaxrl.posttrain import update


@pytest.fixture
def state():
    params = {"norm": {"scale": jnp.arange(8.0)}, "unembed": {"kernel": jnp.ones((8, 4), jnp.bfloat16)}}
    return update.init_state(params, optax.adamw(1e-3), jax.random.key(7), reference=None)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    raw = lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(raw(x), raw(y))


def damage(folder):
    """Flips one bit in the middle of the largest file."""
    file = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def test_round_trip_keeps_structure_types_and_bits(state, tmp_path):
    checkpoint.save(tmp_path, 4, state)
    restored, step = checkpoint.restore(tmp_path, jax.eval_shape(lambda: state))
    assert step == 4
    same(restored, state)


def test_without_a_template_the_saved_tree_comes_back(state, tmp_path):
    checkpoint.save(tmp_path, 0, state)
    restored, _ = checkpoint.restore(tmp_path)
    same(jax.tree.map(jnp.asarray, restored["params"]), state.params)


def test_only_the_newest_are_kept(state, tmp_path):
    for step in (1, 5, 10, 20):
        checkpoint.save(tmp_path, step, state, keep=2)
    assert checkpoint.steps(tmp_path) == [10, 20]
    assert checkpoint.restore(tmp_path, state, step=10)[1] == 10


def test_damaged_one_is_passed_over_with_a_warning(state, tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state)
    damage(tmp_path / "2")
    with pytest.warns(UserWarning, match="2 is damaged: .* missing or changed; trying the checkpoint before it"):
        restored, step = checkpoint.restore(tmp_path, state)
    assert step == 1
    same(restored, state)
    with pytest.raises(checkpoint.CorruptCheckpoint):
        checkpoint.restore(tmp_path, state, step=2)


def test_torn_write_is_never_looked_at(state, tmp_path):
    """What a kill in the middle of a save leaves behind: a folder with a temporary name, removed by the next save."""
    checkpoint.save(tmp_path, 1, state)
    torn = tmp_path / "2.tmp"
    torn.mkdir()
    (torn / "half").write_text("x")
    assert checkpoint.restore(tmp_path, state)[1] == 1
    checkpoint.save(tmp_path, 3, state)
    assert not torn.exists() and checkpoint.steps(tmp_path) == [1, 3]


def test_missing_file_and_missing_manifest_count_as_damage(state, tmp_path):
    checkpoint.save(tmp_path, 1, state)
    checkpoint.save(tmp_path, 2, state)
    (tmp_path / "2" / checkpoint.MANIFEST).unlink()
    with pytest.warns(UserWarning, match="no readable manifest"):
        assert checkpoint.restore(tmp_path, state)[1] == 1
    damage(tmp_path / "1")
    with pytest.warns(UserWarning), pytest.raises(FileNotFoundError, match="no intact checkpoint"):
        checkpoint.restore(tmp_path, state)


def test_another_configuration_is_named(state, tmp_path):
    checkpoint.save(tmp_path, 1, state)
    other = state.replace(params={"norm": {"scale": jnp.arange(9.0)}, "unembed": {"bias": jnp.ones(3)}})
    with pytest.raises(ValueError, match="does not fit this configuration") as error:
        checkpoint.restore(tmp_path, other)
    for fault in (
        "params/norm/scale: saved (8,), expected (9,)",
        "params/unembed/bias: not in the checkpoint",
        "params/unembed/kernel: in the checkpoint only",
    ):
        assert fault in str(error.value)


@pytest.mark.parametrize(("saved_on", "restored_on"), [("fsdp=8", ""), ("", "fsdp=8"), ("data=2,fsdp=4", "fsdp=8")])
def test_restores_onto_another_number_of_devices(saved_on, restored_on, state, tmp_path):
    def laid_out(tree, spec):
        if not spec:
            return tree
        places = parallel.state_shardings(tree, parallel.make_mesh(spec))
        return jax.tree.map(jax.device_put, tree, places)

    checkpoint.save(tmp_path, 1, laid_out(state, saved_on))
    target = laid_out(state, restored_on)
    restored, _ = checkpoint.restore(tmp_path, target)
    same(restored, state)
    assert restored.params["unembed"]["kernel"].sharding == target.params["unembed"]["kernel"].sharding


def test_a_process_with_one_device_opens_what_eight_devices_saved(state, tmp_path):
    """With and without a template; in a process of its own, where the saving mesh does not exist."""
    places = parallel.state_shardings(state, parallel.make_mesh("fsdp=8"))
    checkpoint.save(tmp_path, 1, jax.tree.map(jax.device_put, state, places))
    script = (
        "import jax, sys; from jaxrl import checkpoint; assert jax.device_count() == 1\n"
        "bare, _ = checkpoint.restore(sys.argv[1])\n"
        "like = jax.eval_shape(lambda: bare)\n"
        "again, _ = checkpoint.restore(sys.argv[1], like)\n"
        "print(bare['params']['norm']['scale'].sum(), again['params']['norm']['scale'].sum())\n"
    )
    environment = {**os.environ, "XLA_FLAGS": ""}
    out = subprocess.run(
        [sys.executable, "-c", script, tmp_path], env=environment, capture_output=True, text=True, check=True
    )
    assert out.stdout.split() == ["28.0", "28.0"]


def test_going_back_removes_what_came_after(state, tmp_path):
    """A save after falling back from a damaged checkpoint removes that one, not the new one."""
    for step in (25, 50):
        checkpoint.save(tmp_path, step, state, keep=2)
    damage(tmp_path / "50")
    checkpoint.save(tmp_path, 30, state, keep=1)
    assert checkpoint.steps(tmp_path) == [30]


def test_errors(state, tmp_path):
    with pytest.raises(FileNotFoundError, match="start the run anew in another folder"):
        checkpoint.restore(tmp_path, state)
    with pytest.raises(FileNotFoundError, match="no checkpoint 9"):
        checkpoint.restore(tmp_path, state, step=9)
    with pytest.raises(ValueError, match="keep is 0; at least 1"):
        checkpoint.save(tmp_path, 1, state, keep=0)
