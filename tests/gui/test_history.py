"""What is shown of the past, where the loss lies, and that SFT and DPO take the batches as they are."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl import gui
from jaxrl.data.records import encode_examples
from jaxrl.data.tokenizer import CharTokenizer
from jaxrl.gui.history import correct, records
from jaxrl.nets import presets
from jaxrl.nets.language_model import language_model
from jaxrl.posttrain import preference, sft

TOKENIZER = CharTokenizer("0123456789abcdefT:A \n")
show = lambda screen: str(screen) * 3
TURNS = tuple(gui.Turn(i, response) for i, response in enumerate("abcdef"))
TRACE = gui.Trace("T", TURNS, True)


@pytest.mark.parametrize(
    ("keep", "text"), [(1, "T\na\nb\nc\n333"), (2, "T\na\nb\n222c\n333"), (4, "T\n000a\n111b\n222c\n333")]
)
def test_old_screens_drop_out_and_responses_stay(keep, text):
    assert gui.prompt("T", TURNS[:3], 3, show=show, keep=keep) == text
    assert gui.kept(TURNS[:3], 3, keep=keep) == [0, 1, 2, 3][-keep:]
    said = gui.messages("T", TURNS[:3], 3, show=show, keep=keep, system="s")
    assert said[:2] == [{"role": "system", "content": "s"}, {"role": "user", "content": "T"}]
    assert [m["content"] for m in said if m["role"] == "assistant"] == ["a", "b", "c"]
    assert "".join(m["content"] for m in said[1:]) == text.replace("\n", "")
    assert said[-1] == {"role": "user", "content": "333"}


def test_five_screens_by_default():
    text = gui.prompt("T", TURNS, 6, show=show)
    assert [str(i) * 3 in text for i in range(7)] == [False, False, True, True, True, True, True]
    assert gui.prompt("T", (), 0, show=show) == "T\n000"
    with pytest.raises(ValueError, match="keep is 0; expected at least 1, the present screen"):
        gui.prompt("T", (), 0, show=show, keep=0)


def test_only_the_present_response_is_trained():
    batch = gui.sft_batch([TRACE, TRACE._replace(turns=TURNS[:1])], TOKENIZER, show=show, keep=2)
    assert batch.tokens.shape[0] == 7
    for i, (tokens, mask) in enumerate(zip(np.asarray(batch.tokens), np.asarray(batch.loss_mask) > 0, strict=True)):
        turn = i % 6
        assert tokens[mask].tolist() == [*TOKENIZER.encode(TURNS[turn].response), TOKENIZER.eos_id]
        before = tokens[: np.argmax(mask)].tolist()
        assert before == TOKENIZER.encode(gui.prompt("T", TURNS[:turn], turn, show=show, keep=2))
    packed = gui.sft_batch([TRACE], TOKENIZER, show=show, keep=2, packed=40)
    assert packed.tokens.shape[0] < 6 and packed.segments is not None
    assert packed.loss_mask.sum() == batch.loss_mask[:6].sum()
    learnt = lambda trace, turn: turn != 1
    assert [row["completion"] for row in records(TRACE, show=show, learnt=learnt)] == list("acdef")


def test_pairs_share_all_tokens_before_the_response():
    reflections = [correct(TRACE, 3, "f0"), correct(TRACE, 0, "e")]
    assert reflections[0] == gui.Reflection("T", TURNS[:3], 3, "d", "f0")
    pairs = gui.pair_batch(reflections, TOKENIZER, show=show, keep=2)
    for i, (wrong, right) in enumerate([("d", "f0"), ("a", "e")]):
        start = TOKENIZER.encode(gui.prompt("T", TURNS[: 3 * (i == 0)], 3 * (i == 0), show=show, keep=2))
        for side, response in ((pairs.chosen, right), (pairs.rejected, wrong)):
            tokens, mask = np.asarray(side.tokens[i]), np.asarray(side.loss_mask[i]) > 0
            assert tokens[: np.argmax(mask)].tolist() == start
            assert tokens[mask].tolist() == [*TOKENIZER.encode(response), TOKENIZER.eos_id]
    with pytest.raises(ValueError, match="chosen and rejected are the same tokens"):
        gui.pair_batch([correct(TRACE, 0, "a")], TOKENIZER, show=show)


def test_the_steps_of_sft_and_dpo_take_them():
    config = presets.tiny(TOKENIZER.vocab_size, width=16, layers=1, heads=2, kv_heads=2, ffn=16)
    model, optimizer = language_model(config), optax.adam(1e-2)
    params = jax.jit(model.init)(jax.random.key(0))
    batch = gui.sft_batch([TRACE], TOKENIZER, show=show, keep=2)
    recipe = sft.make(sft.SFTConfig(batch=6), model, optimizer)
    state, step = recipe.init(jax.random.key(1), params), jax.jit(recipe.step)
    losses = []
    for _ in range(8):
        state, metrics = step(state, batch)
        losses.append(float(metrics["train/loss"]))
    assert losses[-1] < 0.8 * losses[0]
    pairs = gui.pair_batch([correct(TRACE, 3, "f0"), correct(TRACE, 0, "e")], TOKENIZER, show=show)
    dpo = preference.make(preference.DPOConfig(batch=2), model, optimizer)
    data = jax.jit(dpo.reference)(params, pairs)
    state, step = dpo.init(jax.random.key(2), params), jax.jit(dpo.step)
    for _ in range(5):
        state, metrics = step(state, data)
    assert metrics["rewards/margins"] > 0 and (jax.jit(dpo.margins)(state.params, data) > 0).all()


def test_the_loss_sees_the_response_alone():
    """Tokens of old screens and responses move the loss by what they tell, never as targets."""
    rows = encode_examples(records(TRACE, show=show, keep=2)[3:4], TOKENIZER)
    config = presets.tiny(TOKENIZER.vocab_size, width=16, layers=1, heads=2, kv_heads=2, ffn=16)
    model = language_model(config)
    params = jax.jit(model.init)(jax.random.key(0))
    hidden, _ = jax.jit(model.apply)(params, jnp.asarray(rows.tokens))
    logits = np.asarray(hidden[0] @ model.unembedding(params), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = rows.tokens[0, rows.lengths[0] - 2 : rows.lengths[0]]  # one letter and EOS
    wanted = -np.mean([log_probs[rows.lengths[0] - 3 + i, target] for i, target in enumerate(targets)])
    batch = gui.sft_batch([TRACE], TOKENIZER, show=show, keep=2, learnt=lambda trace, turn: turn == 3)
    value, _ = jax.jit(partial(sft.loss, model))(params, batch)
    np.testing.assert_allclose(value.mean, wanted, rtol=1e-5)
