"""Multi-token prediction on a deterministic sequence: python benchmarks/nets/mtp.py prints a table, writes mtp.json

Each symbol follows from the two before it by a random table, so a network that has learnt it can say the one after the
next, too. Asked for: does the module become as accurate as the head, how many of its drafts are kept, and how many
passes does decoding take (DeepSeek-AI 2024, arXiv:2412.19437, reports 85 to 90 % kept on text).
"""

import dataclasses
import json
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

from jaxrl.nets import presets
from jaxrl.nets.multi_token import multi_token_model
from jaxrl.posttrain import sft, update
from jaxrl.posttrain.rollout import Sampling
from jaxrl.posttrain.speculative import own_drafter, speculative_rollout
from jaxrl.types import Prompts, TokenBatch


@dataclasses.dataclass(frozen=True)
class Options:
    """What is run."""

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 400
    batch: int = 32
    length: int = 16
    symbols: int = 7
    width: int = 32
    weight: float = 0.3
    drafts: tuple[int, ...] = (1, 2)
    new_tokens: int = 24
    learning_rate: float = 5e-3
    out: Path = Path(__file__).with_suffix(".json")


def sequences(key, table, rows, length):
    """[rows, length] ids; the first two are drawn."""
    first = jax.random.randint(key, (rows, 2), 0, table.shape[0])

    def step(pair, _):
        after = table[pair[:, 0], pair[:, 1]]
        return jnp.stack([pair[:, 1], after], axis=1), after

    _, rest = jax.lax.scan(step, first, None, length - 2)
    return jnp.concatenate([first, rest.T], axis=1)


def network(options: Options):
    """The model, with one module."""
    length = options.length + options.new_tokens + 8
    return multi_token_model(presets.tiny(options.symbols, width=options.width, max_length=length))


def case(options: Options, seed):
    """(params, table) after training; pure, to be called inside `jax.jit`."""
    mtp = network(options)
    first, second, third = jax.random.split(jax.random.key(seed), 3)
    table = jax.random.randint(first, (options.symbols,) * 2, 0, options.symbols)
    rate = {"learning_rate": options.learning_rate, "warmup_steps": min(20, options.steps // 4)}
    optimizer = update.make_optimizer(update.OptimizerConfig(**rate, decay="linear", decay_steps=options.steps))
    objective = partial(sft.multi_token_loss, ahead=mtp.ahead, weight=options.weight)
    run = sft.make(sft.SFTConfig(batch=options.batch), mtp.model, optimizer, objective=objective)

    def step(state, key):
        ids = sequences(key, table, options.batch, options.length)
        mask = jnp.broadcast_to((jnp.arange(options.length) >= 2)[None], ids.shape).astype(jnp.float32)
        return run.step(state, TokenBatch(ids, mask))[0], None

    state = run.init(second, mtp.model.init(third))
    return jax.lax.scan(step, state, jax.random.split(second, options.steps))[0].params, table


def accuracies(mtp, params, ids):
    """Of the next token, and of the one after, where both follow from what is seen."""
    hidden, _ = mtp.model.apply(params, ids)
    further = mtp.ahead(params, hidden, ids)[0]
    guess = lambda hidden: jnp.argmax(hidden @ mtp.model.unembedding(params), axis=-1)
    return (guess(hidden)[:, 1:-1] == ids[:, 2:]).mean(), (guess(further)[:, 1:-2] == ids[:, 3:]).mean()


def main():
    """Measures and writes."""
    options = tyro.cli(Options)
    rows, mtp, train = [], network(options), jax.jit(partial(case, options))
    print("| seed | accuracy, next | one further | drafts | kept | passes for tokens | seconds |\n" + "|---" * 7 + "|")
    for seed in options.seeds:
        began = time.perf_counter()
        params, table = train(seed)
        ids = sequences(jax.random.key(seed + 100), table, 64, options.length)
        first, second = map(float, jax.jit(partial(accuracies, mtp))(params, ids))
        prompts = Prompts(ids[:, :6], jnp.full(64, 6))
        for drafts in options.drafts:
            sample = partial(speculative_rollout, drafter=own_drafter(mtp), drafts=drafts, eos_id=-1, pad_id=0)
            sampling = Sampling(max_tokens=options.new_tokens)
            _, found = jax.jit(lambda p, x, key, f=sample: f(mtp.model, p, x, key, sampling=sampling))(
                params, prompts, jax.random.key(seed)
            )
            kept, passes, seconds = float(found.acceptance), int(found.passes), time.perf_counter() - began
            rows.append({"seed": seed, "drafts": drafts, "kept": kept, "passes": passes, "tokens": options.new_tokens})
            rows[-1] |= {"accuracy": first, "accuracy_further": second, "seconds": seconds}
            figures = f"{first:.3f} | {second:.3f} | {drafts} | {kept:.3f} | {passes} for {options.new_tokens}"
            print(f"| {seed} | {figures} | {seconds:.0f} |", flush=True)
    setting = {name: value for name, value in vars(options).items() if name != "out"}
    options.out.write_text(json.dumps({"options": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
