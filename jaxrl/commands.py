"""The commands of `jaxrl`: their flags, as frozen dataclasses, and what each calls; nothing here computes."""

import dataclasses
import difflib
import functools
import json
import os
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from tyro.conf import Positional

from jaxrl import config
from jaxrl.config import take
from jaxrl.posttrain.unmasking import Unmasking

Folder = Annotated[str, Positional]


@dataclasses.dataclass(frozen=True)
class Generate:
    """Sample completions from a run's model or a published one."""

    run: Folder = ""
    """Run folder, such as runs/demo."""
    model: str = ""
    """In place of a run: smollm2-135m, a Hugging Face folder or a .gguf file."""
    prompt: str = dataclasses.field(kw_only=True)
    """Text to continue, as it stands; `jaxrl chat` writes it as a message."""
    samples: int = 1
    """Completions to draw."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with this much probability."""
    min_p: float = 0.0
    """Keep tokens of at least this fraction of the top token's probability."""
    max_tokens: int = 0
    """New tokens at most; 0 takes the width the model was trained for."""
    seed: int = 0
    drafter: str = ""
    """A smaller model with the same tokens, run or published, that drafts; the completions are the model's own."""
    drafts: int = 4
    """Tokens it drafts for each pass of the model."""
    unmasking: Unmasking = dataclasses.field(default_factory=Unmasking)


@dataclasses.dataclass(frozen=True)
class Chat:
    """Talk to a model: a conversation where it has a chat template, else each line is continued."""

    run: Folder = ""
    """Run folder, such as runs/demo."""
    model: str = ""
    """In place of a run: smollm2-135m, a Hugging Face folder or a .gguf file."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with this much probability."""
    max_tokens: int = 0
    """New tokens at most; 0 takes the width the model was trained for, 256 for a published one."""
    drafter: str = ""
    """A smaller model with the same tokens, run or published, that drafts; the answers are the model's own."""
    drafts: int = 4
    """Tokens it drafts for each pass of the model."""
    unmasking: Unmasking = dataclasses.field(default_factory=Unmasking)


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a model as a folder that transformers opens: safetensors, config.json, tokenizer.json."""

    run: Folder
    """Run folder, or smollm2-135m, a Hugging Face folder or a .gguf file."""
    out: str = dataclasses.field(kw_only=True)
    """New folder."""
    dtype: Literal["float32", "bfloat16", "float16", "fp8"] = "float32"
    """Type of the weights in the files; fp8 is DeepSeek's, matrices in e4m3 with a scale for each 128 x 128 block."""
    adapter: bool = False
    """Of a run with --adapter.kind lora or dora: write the adapter alone, in PEFT's form."""
    shard_gb: float = 5.0
    """Gigabytes (10^9 bytes) one file holds at most."""


@dataclasses.dataclass(frozen=True)
class Film:
    """One greedy episode of an agent's run as moving pictures."""

    run: Folder
    """Run folder, such as runs/ppo-CartPole-v1."""
    out: str = ""
    """A .gif, or a .png for a strip of pictures; empty writes film.gif into the run folder."""
    member: int = 0
    """Which member of the run, from 0."""
    steps: int = 500
    """Pictures at most."""
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Nets:
    """The networks with their published sizes: parameters, gigabytes and a token's cache in bfloat16."""

    name: Annotated[str, Positional] = ""
    """One of them: its choices and its parameters by part."""
    family: str = ""
    """Only those of one family, such as decoder or vision."""


@dataclasses.dataclass(frozen=True)
class Envs:
    """The environments and what they observe and take."""


@dataclasses.dataclass(frozen=True)
class DataShow:
    """One tokenised example with its loss mask and EOS marked."""

    file: Annotated[str, Positional]
    """JSONL file."""
    index: int = 0
    """Which record, from 0."""
    tokenizer: str = "byte"
    """byte, char:ALPHABET or a tokenizer.json."""


@dataclasses.dataclass(frozen=True)
class Env:
    """Versions, machine and devices: paste it into a bug report."""

    metrics: bool = False
    """Print what each metric of metrics.jsonl means instead."""


def demo(argv: Sequence[str]) -> None:
    """`jaxrl demo`."""
    from jaxrl import demo

    demo.main(config.parse(demo.Demo, argv, prog="jaxrl demo"))


def train_model(name: str, argv: Sequence[str]) -> None:
    """`jaxrl train NAME`, with options and function of `jaxrl.posttrain.recipes`."""
    from jaxrl import runs
    from jaxrl.posttrain import recipes

    kind, options, function, _ = MODELS[name]
    options, train = getattr(recipes, options), getattr(recipes, function)
    next_steps = runs.next_steps
    if kind == "r1":  # a folder of runs
        from jaxrl.posttrain.recipes.r1 import next_steps
    _train(kind, options, train, argv, next_steps=next_steps, prog=f"jaxrl train {name}")


def train_agent(name: str, argv: Sequence[str], *, prog: str = "", **changes) -> None:
    """`jaxrl train AGENT`: the defaults are those tuned for the environment that the flags name."""
    from jaxrl.agents import training

    env = value(argv, "--env") or training.AgentRun.env
    options = dataclasses.replace(training.options(name, env), **changes)
    train = lambda run, resume: training.train(name, run, resume=resume)
    outcome = _train(name, options, train, argv, next_steps=training.next_steps, prog=prog)
    if len(outcome.summary["members"]) > 1:
        _table_of_groups(outcome.summary)


def value(argv: Sequence[str], flag: str) -> Any:
    """What follows `flag` in the arguments, or stands in the file of `--config` or the run folder of `--resume`."""
    from jaxrl import runs

    given, name = take(list(argv), flag)[0], flag.removeprefix("--")
    file, folder = take(list(argv), "--config")[0], take(list(argv), "--resume")[0]
    if given is None and file is not None:
        given = config.read_toml(file).get(name)
    if given is None and folder is not None:
        given = runs.read_config(folder)[1].get(name)
    return given


def sweep(argv: Sequence[str]) -> None:
    """`jaxrl sweep AGENT --grid ...`: `jaxrl train AGENT` with five seeds of every combination."""
    named = bool(argv) and not argv[0].startswith("-")
    name = argv[0] if named else "ppo"
    if name not in AGENTS or not (named or {"-h", "--help"} & set(argv)):
        near = difflib.get_close_matches(name, AGENTS, n=1, cutoff=0.0)[0]
        given = f"no agent {name!r}; did you mean {near!r}?" if named else "no agent given;"
        raise ValueError(f"{given} expected jaxrl sweep AGENT --grid learning_rate=1e-3,3e-4 with {', '.join(AGENTS)}")
    train_agent(name, argv[1:] if named else argv, prog=f"jaxrl sweep {name}", seeds=5)


def _table_of_groups(summary: dict[str, Any]) -> None:
    from jaxrl.display import Display

    rows = [
        (group["group"], str(group["seeds"]), f"{group['mean']:.4g}", f"{group['low']:.4g} .. {group['high']:.4g}")
        for group in sorted(summary["groups"], key=lambda group: -group["mean"])
    ]
    title = f"greedy return after {summary['env_steps']:,} environment steps"
    Display().table(title, ("members", "seeds", "mean", "95 % interval"), rows)


def _train(
    kind: str, options: Any, train: Callable, argv: Sequence[str], *, next_steps: Callable, prog: str = ""
) -> Any:
    """Parses, trains and says what comes next. `--resume FOLDER` takes its config from the folder; flags override."""
    from jaxrl import runs

    folder, flags = take(list(argv), "--resume")
    default = options
    if folder is not None:
        saved, values = runs.read_config(folder)
        if saved != kind:
            raise ValueError(f"{folder} is a run of {saved}; resume it with: jaxrl train {saved} --resume {folder}")
        default = dataclasses.replace(config.from_json(options, values, source=f"{folder}/{runs.CONFIG}"), out=folder)
    usage = f"{options.__doc__}\n\n--resume FOLDER continues a run from its newest intact checkpoint."
    run = config.parse(default, flags, prog=prog or f"jaxrl train {kind}", description=usage)
    outcome = train(run, resume=folder is not None)
    from jaxrl.parallel import processes

    if processes.is_main():
        print("\n" + next_steps(outcome.folder))
    return outcome


def evaluate(argv: Sequence[str]) -> None:
    """`jaxrl eval PLACE`: by the kind of the run, answers of a model or episodes of an agent."""
    from jaxrl.posttrain import eval_command

    options = config.parse(eval_command.Eval, argv, prog="jaxrl eval")
    from jaxrl import runs

    if runs.is_run(options.run) and runs.read_config(options.run)[0] in AGENTS:
        return _evaluate_agent(options)
    eval_command.run(options)


def _evaluate_agent(options: Any) -> None:
    from jaxrl.agents import training

    agent = ("run", "episodes")
    plain = type(options)(run="")
    given = [f.name for f in dataclasses.fields(options) if getattr(options, f.name) != getattr(plain, f.name)]
    for name in (name for name in given if name not in agent):
        raise ValueError(
            f"--{name.replace('_', '-')} is for language models; {options.run} is evaluated where it was trained"
        )
    for member, returns in training.evaluate(options.run, episodes=options.episodes):
        name = ", ".join(f"{field} {value:g}" for field, value in member.items())
        print(f"{name}: return {returns.mean():.4g} +- {returns.std():.4g}  ({len(returns)} greedy episodes)")


def film(argv: Sequence[str]) -> None:
    """`jaxrl film RUN`."""
    from jaxrl.agents import training

    options = config.parse(Film, argv, prog="jaxrl film")
    path = options.out or f"{options.run}/film.gif"
    print(training.make_film(options.run, path, member=options.member, seed=options.seed, steps=options.steps))


def bench(subject: str, argv: Sequence[str]) -> None:
    """`jaxrl bench SUBJECT`."""
    from jaxrl.bench.options import OPTIONS

    options = config.parse(OPTIONS[subject], argv, prog=f"jaxrl bench {subject}")
    from jaxrl.bench import command

    command.run(subject, options)


def plan(argv: Sequence[str]) -> None:
    """`jaxrl plan`."""
    from jaxrl.plan.options import Plan

    options = config.parse(Plan, argv, prog="jaxrl plan")
    from jaxrl.plan import command

    command.run(options)


def nets(argv: Sequence[str]) -> None:
    """`jaxrl nets [NAME]`."""
    options = config.parse(Nets, argv, prog="jaxrl nets")
    from jaxrl import networks

    networks.show(options.name, family=options.family)


def list_envs(argv: Sequence[str]) -> None:
    """`jaxrl envs`."""
    config.parse(Envs, argv, prog="jaxrl envs")
    from jaxrl import envs

    made = {name: envs.make(name) for name in envs.ENVS}
    width = max(map(len, made))
    for name, env in made.items():
        print(f"{name:<{width}}  {_space(env.observation_space):<12} -> {_space(env.action_space)}")


def _space(space: Any) -> str:
    return f"{space.n} values" if hasattr(space, "n") else f"box {list(space.shape)}"


def generate(argv: Sequence[str]) -> None:
    """`jaxrl generate RUN` or `jaxrl generate --model PLACE`."""
    from jaxrl.posttrain import talk
    from jaxrl.posttrain.rollout import Sampling

    options = config.parse(Generate, argv, prog="jaxrl generate")
    place = _place("generate", options.run, options.model)
    sampling = Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        max_tokens=options.max_tokens or talk.TRAINED,
    )
    drafting = {"drafter": options.drafter, "drafts": options.drafts}
    speaker = talk.open_run(place, sampling=sampling, samples=options.samples, unmasking=options.unmasking, **drafting)
    completions = speaker.complete(options.prompt, seed=options.seed)
    for completion in completions:
        print(f"{options.prompt}{completion.text}" + ("" if completion.finish == "eos" else f"  [{completion.finish}]"))
    if (drafts := completions[0].drafts) is not None:
        print(f"[{drafts.kept} of {drafts.drafted} drafts kept, {drafts.passes} passes after the prompt]")


def chat(argv: Sequence[str]) -> None:
    """`jaxrl chat RUN` or `jaxrl chat --model PLACE`."""
    from jaxrl.posttrain import talk
    from jaxrl.posttrain.rollout import Sampling

    options = config.parse(Chat, argv, prog="jaxrl chat")
    sampling = Sampling(
        temperature=options.temperature, top_p=options.top_p, max_tokens=options.max_tokens or talk.TRAINED
    )
    place = _place("chat", options.run, options.model)
    drafting = {"drafter": options.drafter, "drafts": options.drafts}
    talk.chat(talk.open_run(place, sampling=sampling, unmasking=options.unmasking, **drafting))


def _place(command: str, run: str, model: str) -> str:
    """The one of the two that was given."""
    if bool(run) == bool(model):
        given = "neither a run nor --model was" if not run else f"both the run {run} and --model {model} were"
        raise ValueError(f"{given} given; expected jaxrl {command} runs/demo, or jaxrl {command} --model smollm2-135m")
    return run or model


def export(argv: Sequence[str]) -> None:
    """`jaxrl export RUN --out FOLDER`."""
    options = config.parse(Export, argv, prog="jaxrl export")
    from jaxrl import pretrained, runs

    if options.adapter:
        return _export_adapter(options)
    model = runs.load_model(options.run)
    if isinstance(model.params, dict) and "adapter" in model.params:
        raise ValueError(
            f"{options.run} is an adapter that cannot be merged into its base, so no published form has it"
        )
    files = pretrained.save_pretrained(model, options.out, dtype=options.dtype, shard_bytes=int(options.shard_gb * 1e9))
    size = sum(file.stat().st_size for file in files) / 1e6
    print(f"{options.out}: {len(files)} file{'s' if len(files) > 1 else ''} of weights, {size:,.1f} MB {options.dtype}")
    transformers = f"transformers.AutoModelForCausalLM.from_pretrained({options.out!r}), "
    print(f"open it: {transformers if model.mask_id is None else ''}jaxrl chat {options.out}")


def _export_adapter(options: Export) -> None:
    from jaxrl import runs
    from jaxrl.nets import adapters

    if options.dtype == "fp8":
        raise ValueError("--dtype fp8 is for whole models; an adapter is written in float32, bfloat16 or float16")
    given, params, base = runs.load_adapter(options.run)
    if given.kind not in ("lora", "dora"):
        raise ValueError(
            f"{options.run} holds an adapter of kind {given.kind}; PEFT's form is written of lora and dora"
        )
    published = base if os.path.isdir(base) and not runs.is_run(base) else ""
    adapters.save_peft(
        options.out, given.config(), params.get("model", params), base_model=published, dtype=options.dtype
    )
    print(f"{options.out}: the adapter of {options.run}, {given.kind} of rank {given.rank}, on {base}")
    print(f"open it: peft.PeftModel.from_pretrained(model, {options.out!r}), on the model of jaxrl export {base}")


def data_show(argv: Sequence[str]) -> None:
    """`jaxrl data show FILE`."""
    from rich.console import Console

    from jaxrl.data.show import show
    from jaxrl.data.tokenizer import load_tokenizer

    options = config.parse(DataShow, argv, prog="jaxrl data show")
    Console(highlight=False).print(show(options.file, load_tokenizer(options.tokenizer), options.index))


def env(argv: Sequence[str]) -> None:
    """`jaxrl env`."""
    options = config.parse(Env, argv, prog="jaxrl env")
    if options.metrics:
        from jaxrl.metrics import GLOSSARY

        width = max(map(len, GLOSSARY))
        print("\n".join(f"{name:<{width}}  {meaning}" for name, meaning in GLOSSARY.items()))
    else:
        from jaxrl import runs

        print(json.dumps(runs.environment(), indent=2))


MODELS = {
    "grpo": ("grpo", "GRPORun", "train_grpo", "GRPO and its family on prompts with verifiable answers"),
    "sft": ("sft", "SFTRun", "train_sft", "supervised fine-tuning"),
    "rm": ("rm", "RMRun", "train_rm", "a reward model, from comparisons or from steps"),
    "ppo-rlhf": ("ppo-rlhf", "PPORun", "train_ppo", "PPO with a critic, on a learned, Python or exact reward"),
    "ppo-max": ("ppo-rlhf", "PPO_MAX_RUN", "train_ppo", "the same with the switches of PPO-max on"),
    "dpo": ("dpo", "DPORun", "train_dpo", "DPO and its family on comparisons"),
    "online-dpo": ("online-dpo", "OnlineRun", "train_online", "DPO on comparisons of the model's own completions"),
    "kto": ("kto", "KTORun", "train_kto", "KTO on responses judged one by one"),
    "kimi": ("grpo", "KIMI_RUN", "train_grpo", "Kimi k1.5: mirror descent, a reward for short answers"),
    "distill": ("distill", "DistillRun", "train_distill", "on-policy distillation of a teacher"),
    "r1": ("r1", "R1Run", "train_r1", "the pipeline of DeepSeek-R1, stage by stage"),
}
"""Runs of language models: their kind, and options and function in `jaxrl.posttrain.recipes`."""

SHARED = ("grpo", "sft", "rm", "ppo-rlhf", "ppo-max", "dpo", "kto", "kimi")
"""Those of them that several processes can run together."""

AGENTS = {
    "reinforce": "Monte-Carlo policy gradient, with or without a baseline",
    "qac": "actor-critic with action values by Sarsa",
    "a2c": "advantage actor-critic",
    "off_policy_actor_critic": "actor-critic with importance weights",
    "trpo": "trust region policy optimisation",
    "ppo": "proximal policy optimisation",
    "dqn": "deep Q-learning: double, dueling, n-step, prioritised",
    "dpg": "deterministic policy gradient, plain",
    "ddpg": "deep deterministic policy gradient",
    "td3": "twin delayed DDPG",
    "sac": "soft actor-critic with a learned temperature",
}
"""The agents of `jaxrl.agents.catalogue`, repeated here so that help does not wait for JAX."""

BENCHES = {
    "attention": "attention beside jax.nn and others",
    "log-probs": "log-probabilities of tokens, beside all logits at once",
    "decode": "one token over a dense or paged cache",
    "linear-attention": "linear attention beside softmax attention",
    "grouped-matmul": "expert layers: grouped products, all experts, 8 bits",
}
"""The subjects of `jaxrl.bench.options`."""

COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "demo": (demo, "post-train a small model with GRPO, from nothing, in minutes"),
    **{f"train {name}": (functools.partial(train_model, name), text) for name, (*_, text) in MODELS.items()},
    **{f"train {name}": (functools.partial(train_agent, name), text) for name, text in AGENTS.items()},
    "sweep": (sweep, "an agent over seeds and hyper-parameters, in one program"),
    "eval": (evaluate, "accuracy, pass@k, maj@k and win rate of a model, or returns of an agent"),
    "generate": (generate, "sample completions from a run's model or a published one"),
    "chat": (chat, "talk to a run's model or a published one"),
    "export": (export, "write a model as safetensors, config and tokenizer, as transformers reads them"),
    "film": (film, "an episode of an agent as GIF or PNG"),
    **{
        f"bench {name}": (functools.partial(bench, name), f"time and memory of {text}")
        for name, text in BENCHES.items()
    },
    "plan": (plan, "memory, FLOPs, traffic and time of a step on TPUs or GPUs that need not be here"),
    "nets": (nets, "the networks: sizes, parameters and memory"),
    "envs": (list_envs, "the environments"),
    "data show": (data_show, "one tokenised example with its loss mask"),
    "env": (env, "versions and devices, for bug reports"),
}
