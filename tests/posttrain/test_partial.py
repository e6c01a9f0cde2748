"""Partial rollouts: against whole ones, over iterations, through a checkpoint; and the search for repetition."""

import dataclasses
import shutil
from functools import partial as bind

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl import checkpoint, loop
from jaxrl import metrics as log
from jaxrl.posttrain import grpo, partial, recipes
from jaxrl.posttrain.rewards.host import Scored
from jaxrl.posttrain.rollout import Sampling, completion_log_probs, rollout
from jaxrl.types import Finish

EOS, PAD, WIDTH = 4, 0, 4  # a frequent token, so that completions end early and late
BUDGET = 10
SAMPLING = Sampling(max_tokens=BUDGET, temperature=1.5)
CONFIG = grpo.GRPOConfig(prompts=2, group=3, kl_coef=0.0, sampling=SAMPLING)


def share_of_even_tokens(completions, answers):
    """In 64ths: equal rewards have a standard deviation of exactly 0."""
    even = (completions.completions % 2 == 0) * completions.mask
    return jnp.round(64 * even.sum(axis=1) / completions.lengths) / 64 + answers


@pytest.fixture(scope="module")
def problems(prompts):
    return grpo.Problems(prompts, jnp.asarray([0.0, 0.5, -0.5, 2.0]))


def build(model, options, config=CONFIG, *, optimizer=None, eos=EOS):
    optimizer = optax.sgd(0.5) if optimizer is None else optimizer
    plain = grpo.make(config, model, optimizer, eos_id=eos, pad_id=PAD, max_grad_norm=0.0)
    options = partial.PartialConfig(**options)
    return plain, partial.make(options, config, plain, model, prompt_width=WIDTH, eos_id=eos, pad_id=PAD)


def three_steps(recipe, params, problems):
    step = grpo.fused(recipe, share_of_even_tokens, CONFIG)
    (last,) = loop.run(step, recipe.init(jax.random.key(1), params), problems, steps=3, chunk=3)
    return last


@pytest.fixture(scope="module")
def whole(model, params, problems):
    return three_steps(build(model, {})[0], params, problems)


@pytest.mark.parametrize("options", [{}, {"segment": 99}], ids=["whole", "longer"])
def test_a_long_segment_is_the_plain_step(options, whole, model, params, problems):
    last = three_steps(build(model, options)[1], params, problems)
    jax.tree.map(bind(np.testing.assert_allclose, atol=2e-5), whole.state.params, last.state.params)
    assert whole.state.drawn == last.state.drawn == 3
    for want, got in zip(whole.metrics, last.metrics, strict=True):
        assert got.pop("sampling/groups_ready") == 1 and got.pop("completion/repeated") == 0
        np.testing.assert_allclose([got[name] for name in sorted(want)], [want[n] for n in sorted(want)], atol=2e-5)


@pytest.mark.parametrize("segment", [1, 4])
def test_segments_add_up_to_the_greedy_rollout(segment, model, params, prompts, problems):
    """Under frozen parameters and (all but) greedy sampling every completion ends as one whole rollout does."""
    sampling = Sampling(max_tokens=BUDGET, temperature=1e-4)
    generate = jax.jit(bind(rollout, model, sampling=sampling, eos_id=EOS, pad_id=PAD))
    greedy = generate(params, prompts, jax.random.key(0))
    _, recipe = build(model, {"segment": segment}, dataclasses.replace(CONFIG, sampling=sampling))
    sample, state, ended = jax.jit(recipe.sample), recipe.init(jax.random.key(2), params), set()
    for _ in range(3 * BUDGET // segment):
        state, made, rows = sample(state, problems)
        lengths, finish, begun = (np.asarray(x) for x in (made.lengths, made.finish, state.buffer.begun))
        assert (lengths - begun <= segment).all() and lengths.max() <= BUDGET
        assert ((finish >= 0) | (lengths == begun + segment)).all()
        for i, row in enumerate(np.repeat(np.asarray(rows), 3)):
            want = greedy.completions[row, : lengths[i]]
            np.testing.assert_array_equal(made.completions[i, : lengths[i]], want, err_msg=f"problem {row}")
            assert (np.asarray(made.completions)[i, lengths[i] :] == PAD).all()
            if finish[i] >= 0:
                assert (lengths[i], finish[i]) == (greedy.lengths[row], greedy.finish[row])
                ended.add(int(row))
        state = dataclasses.replace(state, step=state.step + 1)
    assert ended == {0, 1, 2, 3} and len(set(np.asarray(greedy.lengths).tolist())) > 2


def run(recipe, problems, state, steps, rewards=None):
    """Iterations one by one, with what each drew."""
    sample, learn = jax.jit(recipe.sample), jax.jit(recipe.learn)
    history = []
    for _ in range(steps):
        before = state
        state, made, rows = sample(state, problems)
        scores = share_of_even_tokens(made, jnp.repeat(problems.answers[rows], 3)) if rewards is None else rewards
        drawn = state
        state, metrics = learn(state, made, scores, rows)
        history.append((before, drawn, made, metrics, state))
    return history


@pytest.fixture(scope="module")
def history(model, params, problems):
    _, recipe = build(model, {"segment": 3, "loss_on": "last"})
    return run(recipe, problems, recipe.init(jax.random.key(4), params), 8)


def newest(history):
    """Where each row's newest segment begins, and which rows draw none, by the iteration before."""
    begun = np.zeros(6, int)
    for before, *_ in history:
        held = before.buffer.completions
        free = np.repeat((np.asarray(held.finish).reshape(2, 3) >= 0).all(axis=1), 3)
        waits = ~free & (np.asarray(held.finish) >= 0)
        begun = np.where(waits, begun, np.where(free, 0, np.asarray(held.lengths)))
        yield begun, waits


def test_log_probs_are_those_of_the_parameters_that_drew_each_segment(history, model):
    """New tokens: by one forward pass of the parameters of their iteration. Earlier ones: as they were."""
    log_probs = jax.jit(bind(completion_log_probs, model, temperature=SAMPLING.temperature))
    kept, several = None, 0
    for (before, _, made, _, _), (begun, waits) in zip(history, newest(history), strict=True):
        new = (np.arange(BUDGET)[None] >= begun[:, None]) & (np.asarray(made.mask) > 0) & ~waits[:, None]
        at_once, _ = log_probs(before.params, made)
        np.testing.assert_allclose(np.asarray(at_once)[new], np.asarray(made.behaviour_log_probs)[new], atol=3e-5)
        old = (np.asarray(made.mask) > 0) & ~new
        if kept is not None and old.any():
            np.testing.assert_array_equal(np.asarray(made.behaviour_log_probs)[old], kept[old])
            several += (np.abs(np.asarray(at_once)[old] - kept[old]) > 1e-3).sum()
        kept = np.asarray(made.behaviour_log_probs)
    assert several > 0, "no old segment was under other parameters: the test says nothing"


def test_groups_are_learnt_from_when_they_have_ended(history, model):
    """The update of an iteration is plain GRPO's on the groups that are ready, their newest segments unmasked."""
    plain = grpo.make(dataclasses.replace(CONFIG, prompts=1), model, optax.sgd(0.5), eos_id=EOS, pad_id=PAD,
                      max_grad_norm=0.0)  # fmt: skip
    learn, shares = jax.jit(plain.learn), []
    for (_, drawn, made, metrics, after), (begun, _) in zip(history, newest(history), strict=True):
        ready = np.flatnonzero(np.asarray(partial._ready(drawn.buffer, 3)))
        shares.append(len(ready) / 2)
        assert metrics["sampling/groups_ready"] == shares[-1] and after.step == drawn.step + 1
        if len(ready) == 0:
            jax.tree.map(np.testing.assert_array_equal, after.params, drawn.params)
            assert np.isnan(metrics["reward/mean"]) and metrics["throughput/tokens"] == 0
            continue
        if len(ready) > 1:
            continue
        rows = slice(3 * ready[0], 3 * ready[0] + 3)
        group = jax.tree.map(lambda x: x[rows], made)
        group = group.replace(given=jnp.arange(BUDGET)[None] < begun[rows][:, None])
        rewards = share_of_even_tokens(group.replace(given=None), np.float32(0))  # a constant moves no advantage
        fields = {f.name: getattr(drawn, f.name) for f in dataclasses.fields(drawn) if f.name != "buffer"}
        want, same = learn(grpo.update.TrainState(**fields), group, rewards)
        jax.tree.map(bind(np.testing.assert_allclose, atol=2e-5), after.params, want.params)
        for name in ("train/loss", "completion/length", "completion/truncated", "reward/std", "reward/zero_std"):
            np.testing.assert_allclose(metrics[name], same[name], atol=2e-5, err_msg=name)
    assert {0.0, 0.5} <= set(shares)


def test_a_shared_prompt_teaches_the_same(history, model, problems):
    """From the states and completions of the run above, where some groups are ready and others are not."""
    _, recipe = build(model, {"segment": 3, "loss_on": "last"}, dataclasses.replace(CONFIG, share_prompt=True))
    learn, learnt = jax.jit(recipe.learn), 0
    for _, drawn, made, metrics, after in history:
        scores = share_of_even_tokens(made, jnp.repeat(problems.answers[drawn.buffer.rows], 3))
        shared, _ = learn(drawn, made, scores)
        jax.tree.map(bind(np.testing.assert_allclose, atol=2e-5), shared.params, after.params)
        learnt += bool(metrics["train/grad_norm"] > 1e-3)
    assert learnt > 1


def test_all_segments_are_weighted_by_their_log_probs(model, params, problems):
    """With loss_on=all, an older segment's tokens count with pi / mu of the stored log-probs."""
    config = dataclasses.replace(CONFIG, importance_cap=100.0, variant="dapo")
    plain, recipe = build(model, {"segment": 3, "loss_on": "all"}, config)
    history = run(recipe, problems, recipe.init(jax.random.key(4), params), 8)
    seen = 0
    for _, drawn, made, metrics, _ in history:
        ready = np.asarray(partial._ready(drawn.buffer, 3))
        if not ready.any():
            continue
        now, _ = completion_log_probs(model, drawn.params, made, temperature=SAMPLING.temperature)
        mask = np.asarray(made.mask) * np.repeat(ready, 3)[:, None]
        weights = np.exp(np.asarray(now, np.float64) - np.asarray(made.behaviour_log_probs))
        np.testing.assert_allclose(metrics["sampler/importance"], (weights * mask).sum() / mask.sum(), rtol=1e-4)
        seen += abs(float(metrics["sampler/importance"]) - 1) > 1e-4
    assert seen


def test_problems_come_in_order_and_none_is_lost(history, problems):
    """Places are filled by the problems that epochs of plain draws give, one after the other."""
    order = []
    for before, drawn, *_ in history:
        free = np.asarray(partial._ready(before.buffer, 3))
        order += np.asarray(drawn.buffer.rows)[free].tolist()
    epochs = [order[i : i + 4] for i in range(0, len(order) - 3, 4)]
    assert epochs and all(sorted(epoch) == [0, 1, 2, 3] for epoch in epochs)


def test_python_reward_gives_the_same_run_and_sees_only_what_ended(model, params, problems):
    _, recipe = build(model, {"segment": 4, "repetition": 2, "repetition_times": 3})
    asked = []

    def on_host(completions, rows):
        """NaN for the groups that are asked about though they have not ended."""
        asked.append(len(rows))
        assert (completions.finish >= 0).all() and len(rows) * 3 == len(completions.lengths) > 0
        values = share_of_even_tokens(completions, np.repeat(np.asarray(problems.answers)[rows], 3))
        return Scored(np.asarray(values), {"mine": 1.0})

    (fused,) = loop.run(grpo.fused(recipe, share_of_even_tokens, CONFIG), recipe.init(jax.random.key(1), params),
                        problems, steps=5, chunk=5)  # fmt: skip
    hosted = grpo.hosted(recipe, partial.of_ready(on_host, group=3), CONFIG)
    (same,) = loop.run(hosted, recipe.init(jax.random.key(1), params), problems, steps=5, chunk=5, jit=False)
    jax.tree.map(bind(np.testing.assert_allclose, atol=1e-5), fused.state.params, same.state.params)
    shares = [row["sampling/groups_ready"] for row in same.metrics]
    assert asked == [max(int(2 * share), 1) for share in shares] and 0 in shares and max(shares) > 0
    np.testing.assert_array_equal([row["mine"] for row in same.metrics], [1.0 if x else np.nan for x in shares])


def test_repetition_ends_a_completion_and_costs(model, params, problems):
    """Rows stopped for it end with REPEAT, the Python search agrees, and their reward is lower by the penalty."""
    options = {"segment": 5, "repetition": 2, "repetition_times": 2}
    _, recipe = build(model, {**options, "repetition_penalty": 0.75}, eos=1)
    state = recipe.init(jax.random.key(3), params)
    state, made, rows = jax.jit(recipe.sample)(state, problems)
    finish = np.asarray(made.finish)
    for i, length in enumerate(np.asarray(made.lengths)):
        around = went_round(np.asarray(made.completions)[i, :length].tolist(), longest=2, times=2)
        assert finish[i] == (Finish.EOS if finish[i] == Finish.EOS else Finish.REPEAT if around else -1)
    assert (finish == Finish.REPEAT).any() and (finish == partial.UNFINISHED).any()
    ended = dataclasses.replace(state, buffer=dataclasses.replace(state.buffer, completions=(
        state.buffer.completions.replace(finish=jnp.maximum(state.buffer.completions.finish, 0)))))  # fmt: skip
    rewards = jnp.arange(6.0)
    _, metrics = jax.jit(recipe.learn)(ended, made.replace(finish=jnp.maximum(made.finish, 0)), rewards, rows)
    np.testing.assert_allclose(metrics["reward/mean"], 2.5 - 0.75 * (finish == Finish.REPEAT).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["completion/repeated"], (finish == Finish.REPEAT).mean())


def went_round(ids, *, longest, times):
    """By slices: the last `p * times` tokens are `times` copies of the last p."""
    return any(
        len(ids) >= p * times and ids[len(ids) - p * times :] == ids[len(ids) - p :] * times
        for p in range(1, longest + 1)
    )


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_repeats_against_slices(data):
    longest, times = data.draw(st.sampled_from([(1, 2), (3, 2), (4, 3)]))
    rows = []
    for _ in range(4):
        head = data.draw(st.lists(st.integers(0, 2), max_size=8))
        loop_ = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=5))
        rows.append((head + loop_ * data.draw(st.integers(0, 4)))[:16])
    tokens = np.full((4, 16), 7, np.int32)
    for place, row in zip(tokens, rows, strict=True):
        place[: len(row)] = row
    got = REPEATS(jnp.asarray(tokens), jnp.asarray([len(row) for row in rows]), longest=longest, times=times)
    np.testing.assert_array_equal(got, [went_round(row, longest=longest, times=times) for row in rows])


REPEATS = jax.jit(partial.repeats, static_argnames=("longest", "times"))


def test_prioritised_problems_keep_their_rates(model, params, problems):
    """Only problems whose group was learnt from get a new success rate."""
    config = dataclasses.replace(CONFIG, prioritised=True, solved=0.5)
    _, recipe = build(model, {"segment": 3}, config)
    sample, learn = jax.jit(recipe.sample), jax.jit(recipe.learn)
    state, known = recipe.init(jax.random.key(4), params, 4), set()
    for _ in range(6):
        state, made, rows = sample(state, problems)
        known |= set(np.asarray(rows)[np.asarray(partial._ready(state.buffer, 3))].tolist())
        state, _ = learn(state, made, jnp.ones(6), rows)
        assert set(np.flatnonzero(np.asarray(state.success)).tolist()) == known
    assert known


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        ({"loss_on": "first"}, {}, "loss_on is 'first'; expected last or all"),
        ({"segment": -1}, {}, "segment is -1; expected at least 0"),
        ({"repetition_times": 1}, {}, "repetition_times is 1; expected at least 2"),
        ({"loss_on": "all"}, {}, "importance_cap is not set"),
        ({}, {"dynamic_rounds": 2}, "dynamic_rounds is 2; partial rollouts take 1"),
    ],
)
def test_bad_options_are_refused(options, config, message, model):
    with pytest.raises(ValueError, match=message):
        build(model, options, dataclasses.replace(CONFIG, **config))


RUN = recipes.GRPORun(
    model=recipes.ModelConfig(width=16, layers=1, heads=2, kv_heads=1, ffn=16),
    **{"held_out": 8, "chunk": 2, "eval_every": 0, "save_every": 2, "steps": 4, "segment": 3, "repetition": 2},
    grpo=grpo.GRPOConfig(prompts=2, group=2, sampling=Sampling(max_tokens=8)),
)


def test_a_run_resumes_with_what_was_half_drawn(tmp_path):
    """`jaxrl train grpo --segment`: a run resumed after two of four steps ends bitwise alike."""
    whole = recipes.train_grpo(dataclasses.replace(RUN, out=str(tmp_path / "whole")))
    shutil.copytree(whole.folder, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "4")
    between, _ = checkpoint.restore(tmp_path / "half" / "checkpoints")
    assert (between["buffer"]["completions"]["finish"] < 0).any()
    half = recipes.train_grpo(dataclasses.replace(RUN, out=str(tmp_path / "half")), resume=True)
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(raw(a), raw(b)), half.state, whole.state)
    rows = [row for row in log.read(whole.folder / "metrics.jsonl") if "sampling/groups_ready" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert (whole.state.buffer.completions.lengths <= 8).all()


def test_a_run_with_a_python_reward(tmp_path):
    """Groups that have not ended are never scored, and every step has the metrics of the parts."""
    run = dataclasses.replace(RUN, reward="number + format", steps=2, out=str(tmp_path / "run"))
    folder = recipes.train_grpo(run).folder
    rows = [row for row in log.read(folder / "metrics.jsonl") if "sampling/groups_ready" in row]
    assert len(rows) == 2 and all("rewards/number/mean" in row for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment": 4, "tools": "calculator"}, "segment and repetition are for completions in one turn"),
        ({"segment": 4, "grpo": grpo.GRPOConfig(slots=2)}, "grpo.slots takes completions drawn whole"),
        ({"repetition": 4, "mesh": "data=2"}, "work on one device"),
        ({"tool_form": "xml"}, "tool_form is 'xml'; expected one of tags, hermes"),
        ({"segment": 4, "loss_on": "first"}, "loss_on is 'first'"),
    ],
)
def test_bad_runs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        recipes.GRPORun(**options)
