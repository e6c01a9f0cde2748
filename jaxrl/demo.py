"""The main job end to end, nothing to download: imitate sloppy arithmetic, then let checked answers correct it."""

import dataclasses
import json
import shutil
import time
from pathlib import Path

from rich.text import Text

from jaxrl import runs
from jaxrl.data import arithmetic
from jaxrl.display import Display
from jaxrl.posttrain import grpo, recipes, sft, update
from jaxrl.posttrain.rollout import Sampling


@dataclasses.dataclass(frozen=True)
class Demo:
    """Post-train a small Transformer with GRPO on verifiable arithmetic, from nothing, on this machine."""

    out: str = "runs/demo"
    """Run folder; an existing run in it is continued (a finished one is only reported)."""
    seed: int = 0
    """Everything random follows from it."""
    fresh: bool = False
    """Delete the folder first and start anew."""


def warm_up(folder: Path, *, seed: int) -> recipes.SFTRun:
    """Supervised warm-up on sloppy workings: the model learns the method, and to be wrong more often than not."""
    return recipes.SFTRun(
        data="sloppy_arithmetic",
        out=str(folder / "warm_up"),
        seed=seed,
        steps=700,
        chunk=50,
        eval_every=100,
        save_every=100,
        max_tokens=arithmetic.MAX_COMPLETION,
        sft=sft.SFTConfig(batch=128),
        optimizer=update.OptimizerConfig(learning_rate=4e-3, warmup_steps=20, decay="cosine", decay_steps=700),
        model=recipes.ModelConfig(width=64, layers=2, heads=4, kv_heads=2, ffn=256),
    )


def reinforce(folder: Path, *, seed: int) -> recipes.GRPORun:
    """GRPO on the same problems with an exact-answer reward."""
    return recipes.GRPORun(
        data="arithmetic",
        init=str(folder / "warm_up"),
        out=str(folder),
        seed=seed,
        steps=100,
        chunk=5,
        eval_every=5,
        save_every=10,
        grpo=grpo.GRPOConfig(
            prompts=64, group=8, kl_coef=0.001, sampling=Sampling(max_tokens=arithmetic.MAX_COMPLETION)
        ),
        optimizer=update.OptimizerConfig(learning_rate=2e-4, warmup_steps=10),
    )


def main(options: Demo) -> dict:
    """Runs what is not done yet, prints what to do next, and returns the summary."""
    folder = Path(options.out)
    started = folder / "warm_up" / runs.CONFIG
    if options.fresh and started.exists():
        shutil.rmtree(folder)
    if started.exists() and runs.read_config(started.parent)[1]["seed"] != options.seed:
        raise ValueError(f"{folder} holds a demo with another seed; choose another --out, or delete it by --fresh")
    begun = time.perf_counter()
    with Display() as view:
        view.note("jaxrl demo: two-digit addition, worked out step by step, e.g. 47+85= is answered 120+12=132")
        view.note("1. imitate workings that mostly get the carry wrong   2. GRPO: reward only right answers\n")
        stages = ((recipes.train_sft, warm_up), (recipes.train_grpo, reinforce))
        summaries = []
        for train, configure in stages:
            run = configure(folder, seed=options.seed)
            out = Path(run.out)
            if not (out / runs.SUMMARY).exists():
                train(run, resume=(out / runs.CONFIG).exists(), display=view)  # pyright: ignore[reportArgumentType]
            summaries.append(json.loads((out / runs.SUMMARY).read_text()))
        warmed, summary = summaries
        if "warm_up" not in summary:
            summary["warm_up"] = {name: warmed[name] for name in ("steps", "seconds", "accuracy_after")}
            summary["seconds"] += warmed["seconds"]
            runs.write_json(folder / runs.SUMMARY, summary)
        view.note(
            f"\nheld-out accuracy {summary['accuracy_before']:.1%} -> [bold]{summary['accuracy_after']:.1%}[/bold] "
            f"in {summary['seconds']:.0f} s (this call: {time.perf_counter() - begun:.0f} s)"
        )
        view.note(Text("\n" + runs.next_steps(folder)))
    return summary
