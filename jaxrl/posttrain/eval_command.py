"""`jaxrl eval` of a language model: its flags, and what it prints."""

import dataclasses
import os
from typing import Annotated

from tyro.conf import Positional

from jaxrl.posttrain.unmasking import Unmasking


@dataclasses.dataclass(frozen=True)
class Eval:
    """Measure a model: greedy accuracy, or pass@k and maj@k of samples, or its win rate against another; an agent's run
    by its returns."""

    run: Annotated[str, Positional]
    """Run folder, such as runs/demo, or smollm2-135m, a Hugging Face folder or a .gguf file."""
    data: str = ""
    """JSONL with prompt and answer; empty takes the run's own held-out problems."""
    samples: int = 1
    """Completions of each problem."""
    pass_at: str = ""
    """Numbers k of pass@k, such as 1,4,8: the chance that one of k completions is right."""
    maj_at: str = ""
    """Numbers k of maj@k: the chance that the most frequent answer of k completions is right."""
    temperature: float | None = None
    """0 is greedy; none takes 0 for one sample and 1 for several."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with this much probability."""
    max_tokens: int = 0
    """New tokens at most; 0 takes the width the model was trained for, 256 for a published one."""
    reward: str = ""
    """What is right, as in `jaxrl train grpo`: number, path/to/file.py:function, ...; from 1 on a completion is. Empty
    compares answers exactly."""
    against: str = ""
    """Another model, for a win rate on the same prompts."""
    judge: str = ""
    """What decides between the two: path/to/file.py:function of (prompts, completions), or a reward, of which the
    higher wins; empty takes --reward."""
    chat: bool = False
    """Write each text prompt as a user's message, as `jaxrl chat` does."""
    tools: str = ""
    """What the model may call: calculator, path/to/file.py:function, several with commas; empty is no tools."""
    turns: int = 4
    """How often the model writes in a completion with tools: one more than the calls it may make."""
    tool_form: str = "tags"
    """Form of a call: tags, <tool>47*85</tool>, or hermes, <tool_call>{"name": ..., "arguments": ...}</tool_call>."""
    out: str = ""
    """New JSONL file for the completions with answer, reward and finish."""
    batch: int = 512
    """Completions drawn at once."""
    seed: int = 0
    """Of the sampler."""
    episodes: int = 100
    """Greedy episodes of each member, for an agent's run."""
    unmasking: Unmasking = dataclasses.field(default_factory=Unmasking)

    def __post_init__(self):
        if self.samples < 1 or self.batch < 1:
            raise ValueError(f"samples is {self.samples} and batch {self.batch}; expected at least 1 of each")
        for name in self.metrics[1:-1]:
            if not 1 <= int(name.partition("@")[2]) <= self.samples:
                raise ValueError(f"{name} needs as many completions, and --samples is {self.samples}; raise it")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"temperature 0 is greedy, and {self.samples} greedy samples are all equal")
        if self.judge and not self.against:
            raise ValueError(f"--judge {self.judge} compares two models and one was given; name the other by --against")
        if self.against and self.samples > 1:
            raise ValueError(f"--against compares one completion of each model; leave --samples {self.samples} out")
        if self.out and (os.path.exists(self.out) or not os.path.isdir(os.path.dirname(self.out) or ".")):
            why = "exists already" if os.path.exists(self.out) else "is in a folder that does not exist"
            raise ValueError(f"--out {self.out} {why}; expected a new file in a folder that is there")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names for `judge.evaluate`."""
        named = [(kind, k.strip()) for kind in ("pass", "maj") for k in getattr(self, f"{kind}_at").split(",")]
        for kind, k in named:
            if k and not k.isdecimal():
                raise ValueError(f"--{kind}-at has {k!r}; expected numbers with commas between them, such as 1,4,8")
        return ("accuracy", *(f"{kind}@{k}" for kind, k in named if k), "length")


def run(options: Eval) -> None:
    """Evaluates a model, prints its figures, and writes the completions where that is asked for."""
    from jaxrl.posttrain import evaluation, talk
    from jaxrl.posttrain.rollout import Sampling

    temperature = float(options.samples > 1) if options.temperature is None else options.temperature
    width = options.max_tokens or talk.TRAINED
    result = evaluation.evaluate(
        options.run,
        data=options.data,
        metrics=options.metrics,
        sampling=Sampling(temperature=temperature, top_p=options.top_p, max_tokens=width),
        samples=options.samples,
        reward=options.reward,
        against=options.against,
        judge=options.judge,
        chat=options.chat,
        tools=options.tools,
        turns=options.turns,
        tool_form=options.tool_form,
        batch=options.batch,
        seed=options.seed,
        unmasking=options.unmasking,
    )
    drawn = "greedy" if temperature == 0 else f"{options.samples} at temperature {temperature:g}"
    sides = [(options.run, result), *([(options.against, result.other)] if result.other else [])]
    for place, side in sides:
        print(f"{place}: {len(side.completions.problems)} problems, {drawn}")
        for name, (mean, low, high) in side.figures.items():
            print(f"  {name:<9} {mean:.4g}  (95 %: {low:.4g} .. {high:.4g})")
    if result.win_rate is not None:
        rate = result.win_rate
        interval = f"(95 %: {rate.low:.4g} .. {rate.high:.4g})"
        counts = f"{rate.wins} won, {rate.ties} tied, {rate.losses} lost, {rate.unjudged} unjudged"
        print(f"win rate {rate.rate:.4g}  {interval}  {counts}; the order swayed {rate.swayed:.0%}")
    if options.out:
        evaluation.write_table(options.out, [(place, side.completions) for place, side in sides])
        print(f"completions: {options.out}")
