"""A small UI-TARS on a window of 24 x 24 pixels: python benchmarks/nets/ui_tars.py prints a row per seed

The agent reads the task, what it has said so far and the present screen as 36 letters, one a patch; it writes
"Thought: press red", then "Action: click(...)" with coordinates in thousandths, digit by digit. A network of 2 layers
learns from nothing. DPO's rate was chosen among five settings on one network of seed 0 and other screens. A seed takes
2 to 3 minutes.

  grounding   one button of four is to be pressed, one click is allowed: share of new screens on which it hits.
  two steps   "press red then blue", demonstrated by somebody whose first click is wrong in 60 % of the episodes, and
              who then regrets it. `sft` imitates the traces; `more sft` does so for as many more steps as DPO takes;
              `dpo` starts from `sft` and learns from the pairs of a wrong click and its correction on these traces.
              Success within two clicks, which leaves no room for a slip, and within three.
  bootstrap   one round from `sft`: own episodes of three clicks are rolled out, those that pass the rules (success, all
              read, nothing repeated) join the traces, and it learns from both for as many steps as DPO takes. Success
              within two clicks.
"""

import dataclasses
import json
import time
from pathlib import Path

import jax
import numpy as np
import tyro

from jaxrl import gui
from jaxrl.envs import gui as env
from jaxrl.gui import screens, window
from jaxrl.nets.language_model import language_model
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.posttrain import preference, sft, update
from jaxrl.posttrain.rollout import Sampling

ONE, TWO = env.Screen(targets=1), env.Screen(targets=2)
TOKENIZER = window.tokenizer(TWO)
SHOW = screens.mosaic(TWO.palette, patch=TWO.cell)
SLIPS = 0.6
ROW, PROMPT, RESPONSE, KEEP = 168, 84, 16, 1  # tokens; of the screens only the present one is shown


@dataclasses.dataclass(frozen=True)
class Options:
    """Sizes of the experiment."""

    seeds: tuple[int, ...] = (0, 1, 2)
    grounding_steps: int = 600
    traces: int = 3200
    sft_steps: int = 800
    dpo_steps: int = 100
    dpo_rate: float = 2e-5  # 2e-4 unlearns the second click, which no pair shows
    episodes: int = 192
    batch: int = 20  # rows, of three turns on average
    pairs: int = 32
    width: int = 64
    out: Path = Path(__file__).with_suffix(".json")


def model_of(options: Options):
    """The network. Positions are learnt, since places on the screen are places in the prompt."""
    sizes = {"heads": 4, "kv_heads": 4, "ffn": 2 * options.width, "max_length": 192, "positions": "learned"}
    return language_model(TransformerConfig(TOKENIZER.vocab_size, options.width, 2, **sizes))


def demonstrations(screen: env.Screen, key, number: int, *, slip: float = 0.0) -> list[gui.Trace]:
    """Traces of the demonstrator."""
    respond = window.demonstrator(screen, slip=slip)
    return gui.play(window.window(screen), respond, key, episodes=number, steps=screen.targets + 1)


def learn(step, state, data, steps: int):
    """The state after so many steps, in one program, and the mean of what was measured in the last tenth."""

    @jax.jit
    def run(state, data):
        return jax.lax.scan(lambda state, _: step(state, data), state, length=steps)

    state, metrics = run(state, data)
    return state, {name: float(np.mean(np.asarray(values)[-max(steps // 10, 1) :])) for name, values in metrics.items()}


def tune(options: Options, model, params, traces, key, steps: int, *, rate: float = 2e-3):
    """Supervised steps on the traces."""
    batch = gui.sft_batch(traces, TOKENIZER, show=SHOW, keep=KEEP, packed=ROW)
    rule = {"warmup_steps": min(50, steps // 2), "decay": "cosine", "decay_steps": steps, "final_fraction": 0.05}
    optimizer = update.make_optimizer(update.OptimizerConfig(learning_rate=rate, b2=0.99, **rule))
    recipe = sft.make(sft.SFTConfig(batch=options.batch), model, optimizer)
    state, metrics = learn(recipe.step, recipe.init(key, params), batch, steps)
    return state.params, metrics


def prefer(options: Options, model, params, reflections, key, steps: int):
    """DPO steps on the reflections, with a little likelihood of the chosen ones."""
    pairs = gui.pair_batch(reflections, TOKENIZER, show=SHOW, keep=KEEP)
    config = preference.DPOConfig(batch=options.pairs, beta=0.1, nll_coef=0.1)
    recipe = preference.make(
        config, model, update.make_optimizer(update.OptimizerConfig(learning_rate=options.dpo_rate))
    )
    data = jax.jit(recipe.reference)(params, pairs)
    state, metrics = learn(recipe.step, recipe.init(key, params), data, steps)
    return state.params, metrics


def success(traces) -> float:
    """Share of the episodes."""
    return sum(trace.success for trace in traces) / len(traces)


def measure(options: Options, seed: int) -> dict:
    """One seed's numbers."""
    begun = time.time()
    keys = iter(jax.random.split(jax.random.key(seed), 16))
    model = model_of(options)
    one, two = window.window(ONE), window.window(TWO)
    knobs = {"show": SHOW, "keep": KEEP, "sampling": Sampling(max_tokens=RESPONSE), "rows": options.episodes}
    agents = {width: gui.make_respond(model, TOKENIZER, width=width, **knobs) for width in (48, PROMPT)}
    run = lambda world, width, params, key, steps: gui.play(
        world, agents[width](params), key, episodes=options.episodes, steps=steps
    )

    params = jax.jit(model.init)(next(keys))
    shown = demonstrations(ONE, next(keys), options.traces)
    params, metrics = tune(options, model, params, shown, next(keys), options.grounding_steps)
    clicks = run(one, 48, params, next(keys), 1)
    found = {"seed": seed, "grounding": success(clicks), "read": sum(trace.valid for trace in clicks) / len(clicks)}

    traces = demonstrations(TWO, next(keys), options.traces, slip=SLIPS)
    pairs = [one for trace in traces for one in window.reflections(trace)]
    base, metrics = tune(options, model, params, traces, next(keys), options.sft_steps)
    more = options.dpo_steps
    agents_of = {"sft": base}
    agents_of["more sft"], _ = tune(options, model, base, traces, next(keys), more, rate=2e-4)
    agents_of["dpo"], metrics = prefer(options, model, base, pairs, next(keys), more)
    agents_of["bootstrap"], rounds = gui.bootstrap(
        lambda params, key: run(two, PROMPT, params, key, 3),
        lambda params, good, key: tune(options, model, params, traces + good, key, more, rate=2e-4)[0],
        base,
        next(keys),
        rounds=1,
    )
    test = next(keys)
    for name, params in agents_of.items():
        for steps in (2, 3) if name != "bootstrap" else (2,):
            found[f"{name}, {steps} clicks"] = success(run(two, PROMPT, params, jax.random.clone(test), steps))
    margins = {"pairs": len(pairs), "DPO accuracy": metrics["rewards/accuracies"], "kept": rounds[0]["kept"]}
    return found | margins | {"seconds": time.time() - begun}


def main(options: Options):
    """Measures, prints, writes."""
    rows = []
    for seed in options.seeds:
        rows.append(measure(options, seed))
        if len(rows) == 1:
            print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
        cells = (f"{x:.3f}" if isinstance(x, float) else str(x) for x in rows[-1].values())
        print("| " + " | ".join(cells) + " |", flush=True)
        sizes = {**vars(options), "out": options.out.name}
        options.out.write_text(json.dumps({"options": sizes, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
