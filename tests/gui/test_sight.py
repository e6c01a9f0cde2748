"""Networks that see the screens: where the pixels go, what is learnt, and that other screens take no other program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl import gui
from jaxrl.envs import gui as env
from jaxrl.gui import history, sight, window
from jaxrl.nets.language_model import language_model
from jaxrl.nets.vision_language import SIZES
from jaxrl.posttrain import preference, sft
from jaxrl.posttrain.rollout import Sampling
from jaxrl.posttrain.score import log_probs_of

SCREEN = env.Screen(buttons=4, targets=2)
WORLD = window.window(SCREEN)
TOKENIZER = window.tokenizer(SCREEN, sight.PLACEHOLDER)
TINY = SIZES["tiny"]
CONFIG = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, vocab_size=TOKENIZER.vocab_size))
SIGHT = gui.Sight(CONFIG, length=36)
DECODER = language_model(CONFIG.text)
FEATURES, WIDTH = 9, 72  # of 24 x 24 pixels in patches of 4, merged 2 x 2; tokens of a row
PLACE = TOKENIZER.vocab_size - 1


def demonstrated(seed: int) -> list[gui.Trace]:
    respond = window.demonstrator(SCREEN, slip=0.7)
    return gui.play(WORLD, respond, jax.random.key(seed), episodes=6, steps=3)


TRACES = demonstrated(0)


def of_rows(seen: gui.Seen, tokens) -> list[list[int]]:
    """The bank's rows that each row of tokens names, in order, once its features stand in order."""
    found = []
    for row in np.asarray(tokens):
        ids = row[row >= TOKENIZER.vocab_size] - TOKENIZER.vocab_size
        ids = ids.reshape(-1, FEATURES)
        assert (ids % FEATURES == np.arange(FEATURES)).all()
        found.append((ids[:, 0] // FEATURES).tolist())
    assert max(len(set(row)) for row in found) <= seen.per_row
    return found


@pytest.fixture(scope="module")
def params():
    seen = sight.sft_batch(SIGHT, TRACES[:1], TOKENIZER, keep=1)
    return jax.jit(lambda seen: seen.model(CONFIG).init(jax.random.key(0)))(seen)


@pytest.mark.parametrize("keep", [1, 2])
def test_rows_name_the_screens_that_are_kept_and_learn_the_response(keep):
    seen = sight.sft_batch(SIGHT, TRACES, TOKENIZER, keep=keep, pad_to=WIDTH)
    plain = history.sft_batch(TRACES, TOKENIZER, show=SIGHT.show, keep=keep, pad_to=WIDTH)
    turns = [(trace, i) for trace in TRACES for i in range(len(trace.turns))]
    assert seen.batch.tokens.shape == (len(turns), WIDTH) and seen.per_row == keep
    np.testing.assert_array_equal(seen.batch.loss_mask, plain.loss_mask)
    np.testing.assert_array_equal(jnp.where(plain.tokens == PLACE, PLACE, seen.batch.tokens), plain.tokens)
    shown = of_rows(seen, seen.batch.tokens)
    for (trace, i), rows, tokens, mask in zip(turns, shown, seen.batch.tokens, seen.batch.loss_mask, strict=True):
        assert tokens[mask > 0].tolist() == [*TOKENIZER.encode(trace.turns[i].response), TOKENIZER.eos_id]
        screens = history.kept(trace.turns[:i], trace.turns[i].screen, keep=keep)
        assert len(rows) == len(screens) == min(i + 1, keep)
        for row, screen in zip(rows, screens, strict=True):
            pixels = np.asarray(screen, np.float32) / 127.5 - 1
            top_left = pixels[:4, :4].transpose(2, 0, 1).reshape(-1)
            np.testing.assert_allclose(seen.bank.values[row, 0], top_left, atol=1e-6)
            np.testing.assert_allclose(seen.bank.values[row].sum(), pixels.sum(), rtol=1e-4)
    screens = {np.asarray(turn.screen).tobytes() for trace in TRACES for turn in trace.turns}
    assert seen.bank.values.shape == (len(screens), 36, 48)


def test_packed_rows_are_the_same_examples(params):
    alone = sight.sft_batch(SIGHT, TRACES[:3], TOKENIZER, keep=2)
    packed = sight.sft_batch(SIGHT, TRACES[:3], TOKENIZER, keep=2, packed=2 * WIDTH)
    assert packed.batch.tokens.shape[0] < alone.batch.tokens.shape[0] and packed.per_row > 2
    of_rows(packed, packed.batch.tokens)

    @jax.jit
    def total(params, seen):
        log_probs, _, mask = log_probs_of(seen.model(CONFIG), params, seen.batch)
        return (log_probs * mask).sum(), mask.sum()

    np.testing.assert_allclose(total(params, packed), total(params, alone), rtol=1e-5)


def test_pairs_share_the_image_tokens():
    reflections = [one for trace in TRACES for one in window.reflections(trace)]
    seen = sight.pair_batch(SIGHT, reflections, TOKENIZER, keep=2)
    chosen, rejected = seen.batch.chosen, seen.batch.rejected
    assert len(reflections) > 1 and of_rows(seen, chosen.tokens) == of_rows(seen, rejected.tokens)
    for i, one in enumerate(reflections):
        for side, response in ((chosen, one.corrected), (rejected, one.wrong)):
            learnt = side.tokens[i][side.loss_mask[i] > 0].tolist()
            assert learnt == [*TOKENIZER.encode(response), TOKENIZER.eos_id]
        start = int(jnp.argmax(chosen.loss_mask[i] > 0))
        assert chosen.tokens[i, :start].tolist() == rejected.tokens[i, :start].tolist()


def test_sft_dpo_and_episodes_from_pixels_in_one_program_each(params):
    """A step of each on two sets of screens; the gradient reaches the tower, and nothing is compiled twice."""
    optimizer, programs = optax.sgd(0.1), []

    @jax.jit
    def tune(state, seen):
        programs.append("sft")
        return sft.make(sft.SFTConfig(batch=4), seen.model(CONFIG, DECODER), optimizer).step(state, seen.batch)

    @jax.jit
    def prefer(state, seen):
        programs.append("dpo")
        recipe = preference.make(preference.DPOConfig(batch=2), seen.model(CONFIG, DECODER), optimizer)
        data = recipe.reference(params, seen.batch)
        return recipe.step(state, data)

    both = [demonstrated(seed) for seed in (1, 2)]
    for traces in both:
        recipe = sft.make(sft.SFTConfig(batch=4), DECODER, optimizer)
        seen = sight.sft_batch(SIGHT, traces[:2], TOKENIZER, keep=2, pad_to=WIDTH, rows=8)
        seen = dataclasses.replace(seen, batch=jax.tree.map(lambda x: x[:4], seen.batch))
        state, metrics = tune(recipe.init(jax.random.key(1), params), seen)
        moved = jax.tree.map(lambda new, old: float(jnp.abs(new - old).max()), state.params["vision"], params["vision"])
        assert jnp.isfinite(metrics["train/loss"]) and moved["patches"]["kernel"] > 0
        assert metrics["throughput/tokens"] == seen.batch.loss_mask.sum()

        reflections = [one for trace in traces for one in window.reflections(trace)][:2]
        pairs = sight.pair_batch(SIGHT, reflections, TOKENIZER, keep=2, pad_to=WIDTH, rows=4)
        dpo = preference.make(preference.DPOConfig(batch=2), DECODER, optimizer)
        state, metrics = prefer(dpo.init(jax.random.key(2), params), pairs)
        moved = jax.tree.map(lambda new, old: float(jnp.abs(new - old).max()), state.params["vision"], params["vision"])
        np.testing.assert_allclose(metrics["train/loss"], np.log(2), rtol=1e-5)
        assert moved["patches"]["kernel"] > 0
    assert programs == ["sft", "dpo"]

    knobs = {"width": WIDTH, "sampling": Sampling(max_tokens=4), "keep": 2, "rows": 3}
    apply, traced = DECODER.apply, []

    def counted(*args, **options):
        traced.append(len(args))
        return apply(*args, **options)

    agent = gui.make_respond(DECODER._replace(apply=counted), TOKENIZER, show=SIGHT, **knobs)(params)
    patient = lambda *asked: ["Action: wait()" for _ in agent(*asked)]
    calls = []
    for seed in (3, 4):
        traces = gui.play(WORLD, patient, jax.random.key(seed), episodes=3, steps=2)
        assert [len(trace.turns) for trace in traces] == [2] * 3
        calls.append(len(traced))
    assert calls[0] == calls[1] > 0


def test_an_agent_sees(params):
    """Greedy answers are those of one pass over tokens and pixels, each row's of its own screens."""
    knobs = {"width": WIDTH, "sampling": Sampling(max_tokens=1, temperature=0.0), "keep": 2}
    agent = gui.make_respond(DECODER, TOKENIZER, show=SIGHT, **knobs)(params)
    traces = [trace for trace in TRACES if len(trace.turns) > 1][:3]
    asked = [trace.task for trace in traces], [trace.turns[:1] for trace in traces], [t.turns[1].screen for t in traces]
    said = agent(*asked, [None] * 3, jax.random.key(0))
    assert agent(*(part[1:2] for part in asked), [None], jax.random.key(0)) == said[1:2]
    seen = sight.sft_batch(SIGHT, traces, TOKENIZER, keep=2, learnt=lambda trace, turn: turn == 1)
    hidden, _ = jax.jit(lambda params, seen: seen.model(CONFIG, DECODER).apply(params, seen.batch.tokens))(params, seen)
    last = jnp.argmax(seen.batch.loss_mask > 0, axis=1) - 1
    logits = hidden[jnp.arange(3), last] @ DECODER.unembedding(params["text"])
    assert [TOKENIZER.decode([int(i)]) for i in logits.argmax(-1)] == said
    other = dataclasses.replace(seen, bank=seen.bank._replace(values=-seen.bank.values))
    moved, _ = jax.jit(lambda params, seen: seen.model(CONFIG, DECODER).apply(params, seen.batch.tokens))(params, other)
    assert jnp.abs(moved - hidden)[jnp.arange(3), last].max() > 1e-4


def test_a_placeholder_that_was_written_stands_for_nothing(params):
    """It would be one more feature than the screens of the next prompt have."""
    uniform = DECODER._replace(unembedding=lambda params: jnp.zeros_like(DECODER.unembedding(params)))
    knobs = {"width": 24, "sampling": Sampling(max_tokens=200), "keep": 1, "record": True}
    agent = gui.make_respond(uniform, TOKENIZER, show=SIGHT, **knobs)(params)
    asked = [TRACES[0].task] * 8, [()] * 8, [TRACES[0].turns[0].screen] * 8, [None] * 8
    said = agent(*asked, jax.random.key(0))
    assert any(PLACE in one.drawn.tokens for one in said)
    assert not any(sight.PLACEHOLDER in one.text for one in said)


def test_what_cannot_be_seen():
    forged = TRACES[0]._replace(task=f"press {sight.PLACEHOLDER}")
    with pytest.raises(ValueError, match="row 0 has 10 placeholders and its screens 9 features"):
        sight.sft_batch(SIGHT, [forged], TOKENIZER, keep=1)
    with pytest.raises(ValueError, match="'<eye>' is no token of the tokenizer"):
        sight.see(SIGHT._replace(placeholder="<eye>"), TOKENIZER, np.zeros((1, 1)), [[]])
    with pytest.raises(ValueError, match="the decoder's vocab_size is 64; expected at least the tokenizer's"):
        sight.see(gui.Sight(TINY, 36), TOKENIZER, np.zeros((1, 1)), [[]])
    with pytest.raises(ValueError, match="length is 16"):
        sight.sft_batch(SIGHT._replace(length=16), TRACES[:1], TOKENIZER)
