"""Supervised steps: the loss against numpy, padding that is EOS, packing, devices, streams and whole runs."""

import dataclasses
import itertools
import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl import loop, metrics, parallel, runs
from jaxrl.data import loader
from jaxrl.data.packing import best_fit, pack
from jaxrl.data.records import Examples
from jaxrl.losses import preference, reduce
from jaxrl.posttrain import recipes, sft
from jaxrl.posttrain.score import layout, log_probs_of
from jaxrl.posttrain.update import OptimizerConfig
from jaxrl.types import TokenBatch

EOS = 1


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(1)
    tokens = rng.integers(2, 13, size=(16, 7))
    lengths = rng.integers(3, 8, size=16)
    mask = (np.arange(7) < lengths[:, None]) & (np.arange(7) >= 2)
    tokens[np.arange(16), lengths - 1] = EOS
    tokens[np.arange(7) >= lengths[:, None]] = EOS  # padding and EOS share an id
    return TokenBatch(jnp.asarray(tokens), jnp.asarray(mask, jnp.float32))


def test_loss_is_the_mean_over_masked_tokens(model, params, data):
    value, metrics = jax.jit(lambda params, data: sft.loss(model, params, data))(params, data)
    hidden = jax.jit(model.apply)(params, data.tokens)[0]
    logits = np.asarray(hidden @ model.unembedding(params), np.float64)
    total = count = 0.0
    for row in range(16):
        for column in range(1, 7):
            if data.loss_mask[row, column]:
                before = logits[row, column - 1] - logits[row, column - 1].max()
                total -= before[data.tokens[row, column]] - np.log(np.exp(before).sum())
                count += 1
    np.testing.assert_allclose([value.total, value.weight], [total, count], rtol=1e-5)
    assert 0 < metrics["train/target_probability"].mean < 1


def test_z_loss_adds_the_squared_log_normaliser(model, params, data):
    loss = jax.jit(partial(sft.loss, model), static_argnames="z_loss")
    (plain, _), (value, metrics) = loss(params, data), loss(params, data, z_loss=0.5)
    hidden = jax.jit(model.apply)(params, data.tokens[:, :-1])[0]
    log_z = np.log(np.exp(np.asarray(hidden @ model.unembedding(params), np.float64)).sum(-1))
    want = (log_z**2 * data.loss_mask[:, 1:]).sum()
    np.testing.assert_allclose(value.total - plain.total, 0.5 * want, rtol=1e-4)
    np.testing.assert_allclose(metrics["train/log_z_squared"].total, want, rtol=1e-5)


def test_a_step_takes_z_loss_and_refuses_it_beside_another_objective(model, params, data):
    after = {}
    for weight in (0.0, 10.0):
        recipe = sft.make(sft.SFTConfig(batch=16, z_loss=weight), model, optax.sgd(0.1))
        after[weight] = jax.jit(recipe.step)(recipe.init(jax.random.key(0), params), data)[0].params
    squared = lambda params: sft.loss(model, params, data, z_loss=1.0)[1]["train/log_z_squared"].mean
    assert squared(after[10.0]) < 0.9 * squared(after[0.0])
    with pytest.raises(ValueError, match=r"z_loss is 0\.1 and an objective of its own"):
        sft.make(sft.SFTConfig(z_loss=0.1), model, optax.sgd(0.1), objective=sft.loss)


def test_the_end_is_trained_though_padding_shares_its_id(model, params, data):
    """What the last EOS of a row costs is in the loss; what the padding behind it costs is not."""
    value = lambda batch: jax.jit(lambda params, batch: sft.loss(model, params, batch)[0].total)(params, batch)
    whole, ends = value(data), np.asarray(data.loss_mask).cumsum(1).argmax(1)
    row = int(ends.argmin())  # a row with padding
    assert data.tokens[row, ends[row]] == EOS and ends[row] < 6
    without_end = data.replace(tokens=data.tokens.at[row, ends[row]].set(5))
    assert abs(value(without_end) - whole) > 1e-3
    other_padding = data.replace(tokens=data.tokens.at[row, ends[row] + 1 :].set(5))
    np.testing.assert_allclose(value(other_padding), whole, rtol=1e-6)


def test_micro_batches_and_devices_change_nothing(model, params, data):
    outcomes = []
    mesh = parallel.make_mesh("data=4,fsdp=2")
    for config, options in (
        (sft.SFTConfig(batch=8), {}),
        (sft.SFTConfig(batch=8, micro_batches=4), {}),
        (sft.SFTConfig(batch=8), {"constrain": partial(parallel.shard_batch, mesh=mesh)}),
    ):
        recipe = sft.make(config, model, optax.sgd(0.5), **options)
        state = recipe.init(jax.random.key(0), params)
        if options:
            state = jax.device_put(state, parallel.state_shardings(state, mesh))
        (result,) = loop.run(recipe.step, state, data, steps=4, chunk=4)
        outcomes.append((jax.device_get(result.state.params), result.metrics))
    for params_after, rows in outcomes[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), params_after, outcomes[0][0])
        for row, expected in zip(rows, outcomes[0][1], strict=True):
            np.testing.assert_allclose(list(row.values()), list(expected.values()), rtol=1e-5)
    losses = [row["train/loss"] for row in outcomes[0][1]]
    assert losses[-1] < losses[0]


# Packing


@pytest.fixture(scope="module")
def examples():
    """Twenty examples of 2 to 9 tokens; of some even the first token is masked in, as in plain text."""
    rng = np.random.default_rng(2)
    lengths = rng.integers(2, 10, size=20)
    tokens = rng.integers(2, 13, size=(20, 9))
    tokens[np.arange(20), lengths - 1] = EOS
    columns = np.arange(9)
    inside = columns < lengths[:, None]
    mask = inside & (columns >= np.minimum(rng.integers(0, 4, size=20), lengths - 1)[:, None])
    return Examples(np.where(inside, tokens, EOS).astype(np.int32), mask.astype(np.float32), lengths.astype(np.int32))


def whole(config, model, params, data, **options):
    """Loss, gradient and metrics of one step over all rows."""
    recipe = sft.make(dataclasses.replace(config, batch=data.tokens.shape[0]), model, optax.sgd(1.0), **options)
    state = recipe.init(jax.random.key(0), params)
    if options.get("constrain"):
        state = jax.device_put(state, parallel.state_shardings(state, options["constrain"].keywords["mesh"]))
    after, metrics = jax.jit(recipe.step)(state, data)
    return jax.device_get((jax.tree.map(jnp.subtract, params, jax.device_get(after.params)), metrics))


@pytest.fixture(scope="module")
def unpacked(model, params, examples):
    data, overlong = sft.arrange(sft.SFTConfig(), examples)
    assert overlong == 0 and data.segments is None
    return whole(sft.SFTConfig(), model, params, data, max_grad_norm=0.0)


@pytest.mark.parametrize(
    ("width", "micro_batches", "devices"), [(9, 1, 1), (16, 4, 1), (16, 1, 2), (9, 4, 2), (16, 1, 8), (9, 2, 8)]
)
def test_packed_step_is_the_unpacked_full_batch(model, params, examples, unpacked, width, micro_batches, devices):
    """Loss, every metric and the gradient, in micro-batches and over devices too."""
    config = sft.SFTConfig(packing=True, width=width, micro_batches=micro_batches)
    rows = pack(examples, width, multiple=micro_batches * devices)
    assert rows.segments.max() > 1 and rows.tokens.shape[0] < (20 if devices * micro_batches < 20 else 40)
    options = {"max_grad_norm": 0.0}
    if devices > 1:
        mesh = parallel.make_mesh(devices=jax.devices()[:devices])
        options["constrain"] = partial(parallel.shard_batch, mesh=mesh)
    gradient, metrics = whole(config, model, params, jax.tree.map(jnp.asarray, rows), **options)
    expected_gradient, expected = unpacked
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-7, rtol=2e-5), gradient, expected_gradient)
    for name in ("train/loss", "train/grad_norm", "train/target_probability", "policy/entropy"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=3e-6, err_msg=name)
    assert metrics["throughput/tokens"] == examples.loss_mask[:, 1:].sum()


def where_they_stand(rows, lengths):
    """{example: (row, segment - 1, first column)} of packed rows."""
    return {
        example: (r, s, sum(int(lengths[i]) for i in row[:s]))
        for r, row in enumerate(rows)
        for s, example in enumerate(row)
    }


def test_log_probs_of_packed_rows_agree_token_by_token(model, params, examples):
    plain = TokenBatch(jnp.asarray(examples.tokens), jnp.asarray(examples.loss_mask))
    log_probs, entropy, mask = map(np.asarray, jax.jit(partial(log_probs_of, model))(params, plain))
    rows = best_fit(examples.lengths, 16)
    packed = jax.tree.map(jnp.asarray, pack(examples, 16, rows=rows))
    ours = [np.asarray(x) for x in jax.jit(partial(log_probs_of, model))(params, packed)]
    seen = np.zeros(ours[2].shape, bool)
    for example, (row, _, start) in where_they_stand(rows, examples.lengths).items():
        length = int(examples.lengths[example])
        span = slice(start, start + length - 1)
        seen[row, span] = True
        for a, b in zip(ours, (log_probs, entropy, mask), strict=True):
            np.testing.assert_allclose(a[row, span], b[example, : length - 1], atol=2e-5, rtol=1e-6)
    assert not ours[2][~seen].any() and ours[2].sum() == mask.sum()


def test_positions_begin_anew_and_first_tokens_are_no_targets(model, params):
    """Whatever the loss mask says: rotary positions are relative, so log-probs would not show the former."""
    segments = jnp.asarray([[1, 1, 1, 2, 2, 3, 0, 0], [1, 2, 2, 2, 2, 2, 2, 0]])
    _, positions = layout(segments)
    np.testing.assert_array_equal(positions, [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 0]])
    batch = TokenBatch(jnp.full((2, 8), 5), jnp.asarray(segments > 0, jnp.float32), segments)
    mask = jax.jit(partial(log_probs_of, model))(params, batch)[2]
    np.testing.assert_array_equal(mask, [[1, 1, 0, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1, 0]])


def test_preference_losses_are_the_same_packed(model, params, examples):
    """Examples 0 to 9 against 10 to 19, each side packed on its own: values of three losses, and their gradient."""
    half = [Examples(*(x[part] for x in examples)) for part in (slice(10), slice(10, None))]
    plain = [TokenBatch(jnp.asarray(side.tokens), jnp.asarray(side.loss_mask)) for side in half]
    rows = [best_fit(side.lengths, 16) for side in half]
    packed = [jax.tree.map(jnp.asarray, pack(side, 16, rows=r)) for side, r in zip(half, rows, strict=True)]
    places = [where_they_stand(r, side.lengths) for side, r in zip(half, rows, strict=True)]
    finds = [tuple(np.array([place[i][:2] for i in range(10)]).T) for place in places]

    def loss(params, sides, finds):
        sums, lengths = [], []
        for batch, find in zip(sides, finds, strict=True):
            log_probs, _, mask = log_probs_of(model, params, batch)
            segments = None if batch.segments is None else batch.segments[:, 1:]
            total, length = preference.sequence_log_probs(log_probs, mask, segment_ids=segments)
            sums.append(total if find is None else total[find])
            lengths.append(length if find is None else length[find])
        reference = [jax.lax.stop_gradient(s) * 0.9 for s in sums]
        sizes = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
        values = [
            preference.loss(*sums, *reference, variant=preference.PRESETS[name], **sizes)[0]
            for name in ("dpo", "simpo", "orpo")
        ]
        return reduce.elements(jnp.stack(values)).mean, values

    evaluate = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, expected), gradient = evaluate(params, plain, [None, None])
    (_, values), packed_gradient = evaluate(params, packed, finds)
    np.testing.assert_allclose(values, expected, rtol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-4), packed_gradient, gradient)


def test_arrange_takes_the_width_of_the_longest_and_counts_what_it_drops(examples):
    data, _ = sft.arrange(sft.SFTConfig(packing=True), examples)
    assert data.tokens.shape[1] == examples.lengths.max() and isinstance(data.tokens, jax.Array)
    data, overlong = sft.arrange(sft.SFTConfig(packing=True, width=6, overlong="drop"), examples)
    assert overlong == (examples.lengths > 6).sum() > 0
    assert (data.segments > 0).sum() == examples.lengths[examples.lengths <= 6].sum()
    data, overlong = sft.arrange(sft.SFTConfig(width=6, overlong="cut"), examples)
    assert data.tokens.shape == (20, 6) and data.segments is None
    with pytest.raises(ValueError, match="examples are longer than width = 6"):
        sft.arrange(sft.SFTConfig(width=6), examples)


@pytest.mark.parametrize("packing", [False, True])
def test_streamed_batches_give_the_run_of_resident_data_steps(model, params, examples, packing):
    """A batch as large as `config.batch` is trained on whole, so a loader can feed the same step."""
    rows = [dict(zip(("tokens", "loss_mask", "lengths"), row, strict=True)) for row in zip(*examples, strict=True)]

    def encode(part):
        chosen = Examples(*(np.stack([row[name] for row in part]) for name in ("tokens", "loss_mask", "lengths")))
        data = pack(chosen, 16, multiple=8) if packing else TokenBatch(chosen.tokens, chosen.loss_mask)
        return jax.tree.map(jnp.asarray, data)

    recipe = sft.make(sft.SFTConfig(batch=8), model, optax.sgd(0.1))
    step = jax.jit(recipe.step)

    def run(steps, state, place):
        batches = loader.batches(rows, encode, batch=8, state=place)
        for batch, after in itertools.islice(batches, steps):
            state, _ = step(state, batch)
            place = after
        return state, place

    begin = lambda: recipe.init(jax.random.key(0), params)
    straight, _ = run(5, begin(), None)
    half, place = run(2, begin(), None)
    resumed, _ = run(3, half, place)
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (resumed.params, straight.params)))


def write_records(path):
    lines = ({"prompt": f"{a}=", "completion": str(a)[-1] * (1 + a % 5)} for a in range(100, 160))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


SMALL = {
    "model": recipes.ModelConfig(width=16, layers=1, heads=2, kv_heads=1, ffn=16),
    "tokenizer": "char:0123456789=",
    "held_out": 10,
    "chunk": 2,
    "eval_every": 0,
    "save_every": 2,
    "max_tokens": 4,
}


def test_a_packed_run_trains(tmp_path):
    """Rows three times as wide as the longest example: the model's context grows with them."""
    run = recipes.SFTRun(
        **SMALL,
        data=write_records(tmp_path / "data.jsonl"),
        out=str(tmp_path / "run"),
        steps=4,
        sft=sft.SFTConfig(batch=4, packing=True, width=30, micro_batches=2),
        optimizer=OptimizerConfig(learning_rate=1e-2),
    )
    outcome = recipes.train_sft(run)
    losses = [row["train/loss"] for row in metrics.read(outcome.folder / "metrics.jsonl") if "train/loss" in row]
    assert losses[-1] < losses[0] and len(losses) == 4
    assert runs.load_model(outcome.folder).transformer.max_length == 30


def test_a_run_says_how_many_examples_it_dropped(tmp_path, capsys):
    run = recipes.SFTRun(**SMALL, data=write_records(tmp_path / "data.jsonl"), out=str(tmp_path / "run"), steps=1)
    short = dataclasses.replace(run, sft=sft.SFTConfig(batch=4, width=8, overlong="drop"))
    recipes.train_sft(short)
    assert re.search(r"^\d+ examples are longer than 8 tokens and were dropped$", capsys.readouterr().out, flags=re.M)
    with pytest.raises(ValueError, match="examples are longer than width = 8"):
        recipes.train_sft(dataclasses.replace(short, out=str(tmp_path / "no"), sft=sft.SFTConfig(batch=4, width=8)))
    assert not (tmp_path / "no").exists()
