"""A small UI-TARS on a window of 24 x 24 pixels: python benchmarks/nets/ui_tars.py prints a row per seed

Three tables: `--tables letters`, `--tables pixels` or `--tables grpo` makes one of them, and leaves the others' numbers
in ui_tars.json.

Letters. The agent reads the task, what it has said so far and the present screen as 36 letters, one a patch; it writes
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

Pixels. A packed ViT of 2 layers sees the screen, nine features of 8 x 8 pixels, and a decoder of 2 layers with M-RoPE
writes the action, without a thought, as the published prompt for grounding has it. Grounding as above; a seed takes 3
minutes. The loss rests where the network knows the places of all buttons, but not which one is asked for (log 4 nats a
row), for some 40,000 screens. What helps it on was chosen by the loss on screens of another key: Muon, weights of
deviation 0.1 where 0.02 is right for great widths, norms of queries and keys, colours measured from the window's grey.

GRPO. From an agent that learnt the letters' traces of two steps, with Muon and weights as above: Adam's learns the
second click for some seeds only, and where nothing succeeds nothing is reinforced (0.03 stayed 0.03 on seed 0). It goes
on with its own episodes of two clicks, which leave no room for a slip: 16 tasks an iteration, eight episodes each.
Success within two and three clicks before and after, and while learning. A seed takes 3 minutes.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro

from jaxrl import gui
from jaxrl.envs import gui as env
from jaxrl.gui import actions, online, screens, sight, window
from jaxrl.nets import presets
from jaxrl.nets.language_model import language_model
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.nets.vision.packed import PackedViTConfig
from jaxrl.nets.vision.prepare import Preparation
from jaxrl.nets.vision_language import VisionLanguageConfig
from jaxrl.posttrain import grpo, preference, sft, update
from jaxrl.posttrain.rollout import Sampling

ONE, TWO = env.Screen(targets=1), env.Screen(targets=2)
TOKENIZER = window.tokenizer(TWO)
SHOW = screens.mosaic(TWO.palette, patch=TWO.cell)
SLIPS = 0.6
ROW, PROMPT, RESPONSE, KEEP = 168, 84, 16, 1  # tokens; of the screens only the present one is shown


@dataclasses.dataclass(frozen=True)
class Options:
    """Sizes of the experiment."""

    tables: tuple[Literal["letters", "pixels", "grpo"], ...] = ("letters", "pixels", "grpo")
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
    pixel_screens: int = 6400
    pixel_steps: int = 1200
    pixel_batch: int = 64
    pixel_rate: float = 5e-3
    grpo_steps: int = 100
    grpo_rate: float = 2e-4
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


def optimizer_of(steps: int, rate: float, **changes):
    """Adam with a warm-up and a cosine."""
    rule = {"warmup_steps": min(50, steps // 2), "decay": "cosine", "decay_steps": steps, "final_fraction": 0.05}
    return update.make_optimizer(update.OptimizerConfig(learning_rate=rate, b2=0.99, **rule, **changes))


def without_thoughts(trace: gui.Trace) -> gui.Trace:
    """The actions alone."""
    bare = lambda response: gui.format(gui.parse(response)._replace(thought=None))
    return trace._replace(turns=tuple(turn._replace(response=bare(turn.response)) for turn in trace.turns))


def tune(options: Options, model, params, traces, key, steps: int, *, rate: float = 2e-3, **changes):
    """Supervised steps on the traces."""
    batch = gui.sft_batch(traces, TOKENIZER, show=SHOW, keep=KEEP, packed=ROW)
    optimizer = optimizer_of(steps, rate, **changes)
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


def eyes(width: int) -> tuple[gui.Sight, screens.PieceTokenizer]:
    """A network that sees, and its tokeniser. The tower has learnt positions (MoonViT's): a rotation tells only how
    places differ."""
    tokenizer = window.tokenizer(ONE, sight.PLACEHOLDER, actions.ACTION)
    tower = PackedViTConfig(width=width, layers=2, heads=4, ffn=2 * width, out=width, patch=ONE.cell, grid=(6, 6))
    sizes = {"width": width, "kv_heads": 4, "ffn": 2 * width, "tie_embeddings": False, "qk_norm": True}
    sections = (width // 32, width // 32 * 3 // 2, width // 32 * 3 // 2)
    text = presets.tiny(tokenizer.vocab_size, rope_sections=sections, **sizes)
    colours = Preparation(None, mean=(0.9,) * 3, deviation=(0.25,) * 3)
    return gui.Sight(VisionLanguageConfig(text, tower), length=ONE.side**2, preparation=colours), tokenizer


def larger(params, factor: float):
    """Matrices, as they were initialised, times a factor."""
    matrix = lambda path, x: x.ndim >= 2 and jax.tree_util.keystr(path[-1:], simple=True) not in ("scale", "bias")
    return jax.tree_util.tree_map_with_path(lambda path, x: factor * x if matrix(path, x) else x, params)


def measure_pixels(options: Options, seed: int) -> dict:
    """One seed's grounding from pixels."""
    begun = time.time()
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    eye, tokenizer = eyes(options.width)
    shown = [without_thoughts(trace) for trace in demonstrations(ONE, next(keys), options.pixel_screens)]
    seen = sight.sft_batch(eye, shown, tokenizer, keep=1)
    optimizer = optimizer_of(options.pixel_steps, options.pixel_rate, kind="muon")
    recipe = lambda seen: sft.make(sft.SFTConfig(batch=options.pixel_batch), seen.model(eye.config), optimizer)
    params = larger(jax.jit(lambda seen, key: seen.model(eye.config).init(key))(seen, next(keys)), 5.0)
    step = lambda state, seen: recipe(seen).step(state, seen.batch)
    state, metrics = learn(step, recipe(seen).init(next(keys), params), seen, options.pixel_steps)
    knobs = {"sampling": Sampling(max_tokens=RESPONSE), "keep": 1, "rows": options.episodes}
    agent = gui.make_respond(language_model(eye.config.text), tokenizer, show=eye, width=24, **knobs)
    clicks = gui.play(window.window(ONE), agent(state.params), next(keys), episodes=options.episodes, steps=1)
    read = sum(trace.valid for trace in clicks) / len(clicks)
    loss = {"loss": metrics["train/loss"], "seconds": time.time() - begun}
    return {"seed": seed, "grounding": success(clicks), "read": read} | loss


def measure_grpo(options: Options, seed: int) -> dict:
    """One seed's success before and after GRPO."""
    begun = time.time()
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    model, two = model_of(options), window.window(TWO)
    traces = demonstrations(TWO, next(keys), options.traces, slip=SLIPS)
    start = larger(jax.jit(model.init)(next(keys)), 5.0)
    base, _ = tune(options, model, start, traces, next(keys), options.sft_steps, rate=5e-3, kind="muon")
    sampling, knobs = Sampling(max_tokens=RESPONSE), {"show": SHOW, "keep": KEEP, "width": PROMPT}
    config = grpo.GRPOConfig(prompts=16, group=8, kl_coef=0.0, sampling=sampling)
    optimizer = update.make_optimizer(update.OptimizerConfig(learning_rate=options.grpo_rate))
    run = online.make(config, two, model, TOKENIZER, optimizer, steps=2, **knobs)
    state, curve = run.init(next(keys), base), []
    for _ in range(options.grpo_steps):
        state, metrics = run.step(state)
        curve.append(metrics["episode/return"])
    agent = gui.make_respond(model, TOKENIZER, sampling=sampling, rows=options.episodes, **knobs)
    found: dict = {"seed": seed}
    test = next(keys)
    for name, params in {"sft": base, "grpo": state.params}.items():
        for steps in (2, 3):
            clicks = gui.play(two, agent(params), jax.random.clone(test), episodes=options.episodes, steps=steps)
            found[f"{name}, {steps} clicks"] = success(clicks)
    tenth = max(len(curve) // 10, 1)
    parts = {f"iterations {i + 1}": float(np.mean(curve[i : i + tenth])) for i in range(0, len(curve), 3 * tenth)}
    return found | parts | {"seconds": time.time() - begun}


def table(options: Options, measure: Callable[[Options, int], dict]):
    """Measures and prints; yields what it has after each seed."""
    rows = []
    for seed in options.seeds:
        rows.append(measure(options, seed))
        if len(rows) == 1:
            print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
        cells = (f"{x:.3f}" if isinstance(x, float) else str(x) for x in rows[-1].values())
        print("| " + " | ".join(cells) + " |", flush=True)
        yield {"options": {**vars(options), "out": options.out.name}, "rows": rows}


MEASURES = {"letters": measure, "pixels": measure_pixels, "grpo": measure_grpo}


def main(options: Options):
    """Measures, prints, writes."""
    for name in options.tables:
        for found in table(options, MEASURES[name]):
            written = json.loads(options.out.read_text()) if options.out.exists() else {}
            options.out.write_text(json.dumps(written | {name: found}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
