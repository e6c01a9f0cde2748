"""What every run is made of: its options, data and model, and how it is evaluated."""

import contextlib
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrl import parallel, runs
from jaxrl.data.tokenizer import same_tokens
from jaxrl.nets import presets
from jaxrl.nets.adapters import RULES, Adapter
from jaxrl.nets.language_model import LanguageModel, language_model
from jaxrl.nets.transformer import TransformerConfig
from jaxrl.parallel import processes
from jaxrl.posttrain import adapter as adapting
from jaxrl.posttrain import apart, rewards, task, update
from jaxrl.posttrain.adapter import AdapterOptions
from jaxrl.posttrain.filling import DiffusionOptions, Filling, filling_of
from jaxrl.posttrain.rollout import Sampling
from jaxrl.posttrain.task import score_texts as score_texts
from jaxrl.posttrain.unmasking import Unmasking


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder to start from nothing. Vocabulary and context follow from the data. Of a model from `init`, remat and
    dtype change what they are set to; the rest is its own."""

    like: str = ""
    """A network of `jaxrl nets`, such as deepseek-v3, whose choices it has at the sizes below; of a vision-language
    network its decoder; empty: a Llama."""
    width: int = 64
    """Width of the residual stream."""
    layers: int = 2
    heads: int = 4
    kv_heads: int | None = None
    """Key and value heads; divides `heads`. None: as many, or with `like` the network's share."""
    ffn: int = 256
    """Inner width of the feed-forward layers."""
    tie_embeddings: bool | None = None
    """None: yes, or with `like` the network's own."""
    qk_norm: bool | None = None
    """None: no, or with `like` the network's own."""
    remat: str = ""
    """Recompute in the backward pass: none, full or dots; empty: none, or the network's own."""
    dtype: str = "float32"
    """Compute type; parameters stay float32."""


def network(options: ModelConfig, vocab_size: int, max_length: int) -> TransformerConfig:
    """The decoder that the options describe.

    One that fills in masks has one token more than the vocabulary, the last.

    Raises:
      ValueError: `like` names no decoder.
    """
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name != "like"}
    given = {name: value for name, value in given.items() if value not in (None, "")}
    if not options.like:
        plain = {"kv_heads": options.heads, "tie_embeddings": True, "remat": "none"}
        return TransformerConfig(vocab_size=vocab_size, max_length=max_length, **(plain | given))
    from jaxrl import networks

    found = networks.find(options.like)
    config = getattr(found.config, "text", found.config)
    if not isinstance(config, TransformerConfig):
        raise ValueError(
            f"--model.like {options.like} is no decoder but of the family {found.family}; `jaxrl nets --family "
            "decoder` lists what a run can be like, and of vision-language networks it takes the decoder"
        )
    if config.rope_sections:  # in a row of text all three are the column
        config = dataclasses.replace(config, rope_sections=None)
    vocab_size += not config.causal  # the mask
    return presets.shrunk(config, vocab_size, max_length=max_length, **given)


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What every run needs."""

    data: str = "arithmetic"
    """A JSONL file, several with commas between them, a pattern, or built-in data: arithmetic, sloppy_arithmetic."""
    out: str = ""
    """Run folder; empty chooses runs/<kind>."""
    init: str = ""
    """Run folder, smollm2-135m, Hugging Face folder or .gguf file to start from; empty starts from nothing."""
    tokenizer: str = ""
    """byte, char:ALPHABET or a tokenizer.json; empty takes that of `init` or of the built-in data, else byte."""
    marker: str = ""
    """Text after whose last occurrence in a completion the answer stands; empty is the data's own or none."""
    held_out: int = 0
    """Problems kept out of training for evaluation; 0 takes a fifth of the data, at most 512."""
    seed: int = 0
    """Everything random follows from it."""
    steps: int = 200
    """Steps in all, those before a resume included."""
    chunk: int = 10
    """Steps compiled into one program; metrics and checkpoints come between."""
    eval_every: int = 50
    """Steps between evaluations on the held-out problems, 0 for only first and last."""
    save_every: int = 50
    """Steps between checkpoints, 0 for only the last."""
    keep: int = 2
    """Checkpoints kept."""
    patience: int = 10
    """Skipped (non-finite) updates in a row after which the run stops."""
    mesh: str = ""
    """Devices, such as data=2,fsdp=4; auto is all of them on fsdp, empty is one device."""
    zero: int = 3
    """What fsdp divides: 1 the optimizer state, 2 gradients too, 3 parameters too."""
    cache: str = ""
    """Type of the sampler's keys and values: float32, bfloat16 or int8; empty is the type the model computes in."""
    adapter: AdapterOptions = dataclasses.field(default_factory=AdapterOptions)
    """What is trained in the place of all parameters of `init`."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: update.OptimizerConfig = dataclasses.field(default_factory=update.OptimizerConfig)

    def __post_init__(self):
        least = dict.fromkeys(("steps", "chunk", "keep", "patience"), 1)
        for name, number in (least | dict.fromkeys(("held_out", "eval_every", "save_every"), 0)).items():
            if getattr(self, name) < number:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {number}")


class Outcome(NamedTuple):
    """What a run made: its folder, what `summary.json` holds, and the final train state (`Over` with an adapter)."""

    folder: Path
    summary: dict[str, Any]
    state: Any


class Setup(NamedTuple):
    """A run's data and model, the mesh they live on (None: one device), and the adapter (None: all is trained).

    `sampler`: the mesh to sample on, where it is another.

    `filling`: of a network that fills in masks; None: it writes from left to right.

    `base`: the functions of the model that is started from, `initial` makes its parameters. `origin`: what
    `runs.load_model` must know to put an adapter's base back.
    """

    task: task.Task
    base: LanguageModel
    transformer: TransformerConfig
    initial: Callable[[], Any]
    mesh: Any
    adapter: Adapter | None = None
    origin: dict[str, Any] | None = None
    zero: int = 3
    sampler: Any = None
    filling: Filling | None = None

    @property
    def model(self) -> LanguageModel:
        """The functions of the model that is trained, of parameters as `adapter.whole` gives them."""
        return self.base if self.adapter is None else adapting.carried(self.base, self.adapter)

    def recipe(
        self, run: "RunOptions", make: Callable, *, rows: int, updates: int = 1, moving_reference: bool = False
    ) -> Any:
        """A recipe's functions, of all parameters or over a frozen base.

        Args:
          run: its options.
          make: `(model, optimizer, *, max_grad_norm, constrain) -> NamedTuple of functions`.
          rows: that go through the network at a time, mini- and micro-batches taken into account.
          updates: of a step.
          moving_reference: whether it changes `state.reference`.
        """
        optimizer = run.adapter.optimizer(update.make_optimizer(run.optimizer), updates=run.steps * updates)
        if self.mesh is not None:
            parallel.check_rows("the batch, in its mini- and micro-batches,", rows, self.mesh)
            optimizer = parallel.place_gradients(optimizer, self.mesh, rules=self.rules, zero=self.zero)
        of = partial(make, optimizer=optimizer, max_grad_norm=run.optimizer.max_grad_norm, constrain=self.constrain)
        if self.adapter is None:
            return of(self.base)
        return adapting.over(of, self.base, self.adapter, moving_reference=moving_reference)

    def reference(self) -> Any:
        """Parameters for `model` of what the run starts from, without its adapter."""
        return self.initial() if self.adapter is None else adapting.join(self.initial(), None)

    @property
    def rules(self) -> tuple:
        """Of sharding."""
        return parallel.RULES if self.adapter is None else (*RULES, *parallel.RULES)

    def shardings(self, tree: Any) -> Any:
        """Where the leaves of a tree lie on the mesh, or on the two of them."""
        if isinstance(tree, apart.Apart):
            return apart.shardings(tree, self.shardings, self.sampler_shardings, self.sampler)
        return parallel.state_shardings(tree, self.mesh, rules=self.rules, zero=self.zero)

    def report(self, shapes: Any) -> str:
        """What each leaf of a state on the mesh got."""
        return parallel.report(shapes, self.mesh, rules=self.rules, zero=self.zero)

    def sampler_shardings(self, tree: Any) -> Any:
        """Where the leaves of a tree lie on the mesh to sample on."""
        return parallel.state_shardings(tree, self.sampler, rules=self.rules)

    def constrain(self, batch):
        return batch if self.mesh is None else parallel.shard_batch(batch, self.mesh)


class Evaluation(NamedTuple):
    """Greedy completions of the held-out problems and their scores."""

    name: str
    score: Callable[[Any], tuple[float, list[str], np.ndarray]]


def prepare(
    run: RunOptions,
    *,
    columns: tuple[str, ...],
    max_tokens: int,
    supervised: bool = False,
    sampler_mesh: str = "",
) -> Setup:
    """Reads data and model; everything that can be wrong with them is found here."""
    adapter = run.adapter.build()
    if adapter is not None and not run.init:
        raise ValueError(
            f"adapter kind is {run.adapter.kind}, which stands on a trained base, and there is none; name it: --init"
        )
    with parallel.on_host() if run.mesh else contextlib.nullcontext():  # no device need hold all of a model
        start = runs.load_model(run.init) if run.init else None
    if start and isinstance(start.params, dict) and "adapter" in start.params:
        raise ValueError(
            f"{run.init} is an adapter that cannot be merged into its base, and no base for another run; use it as it "
            "is, or start from what it was trained on"
        )
    tokenizer = start.tokenizer if start and not run.tokenizer else run.tokenizer
    marker = run.marker or (start.marker if start and run.data not in task.BUILT_IN else "")
    work = task.load_task(run.data, tokenizer=tokenizer, marker=marker, held_out=run.held_out, columns=columns)
    longest = _longest(work, max_tokens, supervised=supervised)
    if start is None:
        transformer = network(run.model, work.tokenizer.vocab_size, longest)
    else:
        given = {name: getattr(run.model, name) for name in ("dtype", "remat")}
        changes = {name: value for name, value in given.items() if value != getattr(ModelConfig, name)}
        transformer = dataclasses.replace(start.transformer, **changes).with_room(longest)
        if run.tokenizer and not same_tokens(work.tokenizer, start.tokenizer):
            raise ValueError(
                f"--tokenizer {run.tokenizer} is not that of the model of {run.init}, whose ids mean something else; "
                "leave it out to use the model's own"
            )
    filling = _filling(run, start, transformer)
    if run.cache:
        transformer = dataclasses.replace(transformer, cache_dtype=run.cache)
    mesh, sampler = parallel.make_mesh(run.mesh) if run.mesh and not sampler_mesh else None, None
    if sampler_mesh:
        mesh, sampler = apart.two_meshes(run.mesh, sampler_mesh)
    model, key = _model(transformer, mesh, run.zero), jax.random.key(run.seed)
    origin = runs.origin(run.adapter, run.init, start.params) if start and adapter is not None else None
    # one program in both cases, so that a resumed run gets the very same numbers
    begin = lambda: jax.jit(model.init)(key)
    setup = Setup(work, model, transformer, begin, mesh, adapter, origin, run.zero, sampler, filling)
    if start:
        params = run.adapter.frozen(start.params)
        laid_out = lambda: processes.everywhere(params, setup.shardings(params))
        return setup._replace(initial=(lambda: params) if mesh is None else laid_out)
    if mesh is not None:
        places = setup.shardings(jax.eval_shape(model.init, key))
        return setup._replace(initial=lambda: jax.jit(model.init, out_shardings=places)(key))
    return setup


def _filling(run: RunOptions, start: runs.Model | None, transformer: TransformerConfig) -> Filling | None:
    """How the network writes, by the options of runs that know of both ways."""
    options = getattr(run, "diffusion", None)
    mask_id, block = (start.mask_id, start.block) if start else (None, None)
    if start is None and not transformer.causal:
        mask_id = transformer.vocab_size - 1
    if mask_id is not None and options is None:
        raise ValueError(
            "the network fills in masks, and this training is of networks that write from left to right; expected one "
            "of jaxrl train sft, dpo and grpo"
        )
    if options is not None and mask_id is None and options != DiffusionOptions():
        raise ValueError("diffusion is for networks that fill in masks, and this one writes from left to right")
    block = (options.block or block) if options else block
    return filling_of(transformer, mask_id, block, getattr(run, "unmasking", Unmasking()))


def _model(transformer: TransformerConfig, mesh: Any, zero: int) -> LanguageModel:
    return language_model(transformer) if mesh is None else parallel.model_on(transformer, mesh, zero=zero)


def with_context(setup: Setup, length: int) -> Setup:
    """The setup with a model that takes rows of `length` tokens; errors of `TransformerConfig.with_room`.

    Block diffusion reads a row twice at once, noisy and clean, and may read its last block to the end.
    """
    if setup.filling and setup.filling.block:
        length = 2 * -(-length // setup.filling.block) * setup.filling.block
    if length <= setup.transformer.max_length:
        return setup
    transformer = setup.transformer.with_room(length)
    return setup._replace(transformer=transformer, base=_model(transformer, setup.mesh, setup.zero))


def _longest(work: task.Task, max_tokens: int, *, supervised: bool) -> int:
    """Context needed: the longest prompt and the completion width, or the longest example that is learnt from."""
    lengths = [0]
    for records in (work.training, work.held_out):
        if all("prompt" in record for record in records):
            lengths.append(task.prompts_of(records, work.tokenizer).tokens.shape[1] + max_tokens)
        if supervised:
            lengths.append(task.longest_of(records, work.tokenizer))
    return max(lengths)


def answers_by_token(work: task.Task) -> bool:
    """Whether equal text means equal tokens: one token for each byte or character."""
    return work.tokenizer.to_json()["kind"] in ("byte", "char") and (not work.marker or marker_id(work) is not None)


def marker_id(work: task.Task) -> int | None:
    """The marker's token; None without a marker, or where it is no single token."""
    return work.tokenizer.token_id(work.marker) if work.marker else None


def exact_evaluation(setup: Setup, max_tokens: int) -> Evaluation:
    """Share of held-out problems whose greedy completion ends in the right answer."""
    if not answers_by_token(setup.task):
        return text_evaluation(setup, max_tokens, partial(rewards.exact_text, marker=setup.task.marker), exact=True)
    held_out, tokenizer = setup.task.held_out, setup.task.tokenizer
    answers, marker = task.answers_of(held_out, tokenizer), marker_id(setup.task)
    compare = jax.jit(lambda completions: rewards.exact_answer(completions, answers, marker=marker))
    return greedy_evaluation("eval/accuracy", setup, max_tokens, compare)


def text_evaluation(setup: Setup, max_tokens: int, reward: rewards.Reward, *, exact: bool) -> Evaluation:
    """Mean Python reward of greedy completions of the held-out problems; `exact`: it is an accuracy."""
    held_out, tokenizer = setup.task.held_out, setup.task.tokenizer
    score = lambda completions: score_texts(reward, completions, held_out, tokenizer, samples=1).values
    return greedy_evaluation("eval/accuracy" if exact else "eval/reward", setup, max_tokens, score)


def greedy_evaluation(
    name: str, setup: Setup, max_tokens: int, score: Callable, *, generate: Callable | None = None
) -> Evaluation:
    """Mean score of greedy completions of the held-out problems.

    Args:
      name: of the metric.
      setup, max_tokens: model, problems, and the width of a completion.
      score: `(Rollout on the host) -> [N]` numbers, NaN where there is none.
      generate: `(params, prompts, key) -> Rollout`; None is the plain sampler.
    """
    prompts = task.prompts_of(setup.task.held_out, setup.task.tokenizer)
    greedy = Sampling(temperature=0.0, max_tokens=max_tokens)
    generate = generate or task.make_generate(setup.model, setup.task.tokenizer, greedy, filling=setup.filling)

    def evaluate(params):
        completions = processes.fetch(generate(params, prompts, jax.random.key(0)))
        scores = processes.on_main(lambda: np.asarray(score(completions), np.float32).tolist())
        scores = np.asarray(scores, np.float32)
        known = scores[~np.isnan(scores)]
        return float(known.mean() if known.size else np.nan), task.text_of(completions, setup.task.tokenizer), scores

    return Evaluation(name, evaluate)
