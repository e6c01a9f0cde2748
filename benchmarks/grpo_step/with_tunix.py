"""The same step by Tunix's GRPOLearner with its own sampler, a model made on the spot."""

import os

os.environ |= {"JAX_PLATFORMS": "cpu", "WANDB_MODE": "disabled"}

import contextlib
import sys
from importlib.metadata import version

import cases
import jax
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen2 import model as qwen2
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout


class Words:
    """A tokenizer of the words "t0", "t1", ..."""

    def __init__(self, case: cases.Case):
        self.case = case

    def encode(self, text: str, **_) -> list[int]:
        """Ids of the words."""
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids, **_) -> str:
        """Words of the ids."""
        return " ".join(f"t{int(i)}" for i in ids)

    def bos_id(self) -> int:
        """The first word of every prompt, so that Tunix adds none."""
        return 1

    def eos_id(self) -> int:
        """Never drawn."""
        return self.case.eos

    def pad_id(self) -> int:
        """Padding."""
        return 0


def main():
    """Prints one JSON line."""
    options = cases.arguments()
    case = cases.CASES[options.case]
    sizes = qwen2.ModelConfig(
        num_layers=case.layers,
        vocab_size=case.vocabulary,
        embed_dim=case.width,
        hidden_dim=case.ffn,
        num_heads=case.heads,
        head_dim=case.width // case.heads,
        num_kv_heads=case.kv_heads,
        rope_theta=10_000,
        norm_eps=1e-6,
    )
    words, watch, lengths = Words(case), cases.Stopwatch(), []

    def reward(prompts, completions, **_):
        watch.lap()  # called once a step: from one call to the next is one whole step
        ids = [words.encode(text) for text in completions]
        lengths.append(sum(map(len, ids)))
        return [cases.reward(row) for row in ids]

    steps = 1 + options.warm_up + options.steps
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    cluster = rl_cluster.ClusterConfig(
        role_to_mesh={
            role: mesh for role in (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
        },
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=optax.chain(
                optax.clip_by_global_norm(case.clip_norm), optax.adamw(case.learning_rate, b2=0.95, weight_decay=0.0)
            ),
            mini_batch_size=case.prompts,
            train_micro_batch_size=case.prompts,
            eval_every_n_steps=10**6,
            max_steps=steps,
        ),
        rollout_config=base_rollout.RolloutConfig(
            max_tokens_to_generate=case.new_tokens,
            max_prompt_length=case.prompt_tokens,
            kv_cache_size=case.prompt_tokens + case.new_tokens,
            temperature=1.0,
        ),
    )
    texts = [words.decode(ids) for ids in case.prompt_ids(case.prompts * steps)]
    data = [{"prompts": np.array(texts[i : i + case.prompts])} for i in range(0, len(texts), case.prompts)]
    with contextlib.redirect_stdout(sys.stderr), mesh:
        make = lambda: qwen2.Qwen2(sizes, rngs=nnx.Rngs(0))
        engine = rl_cluster.RLCluster(actor=make(), reference=make(), tokenizer=words, cluster_config=cluster)
        learner = grpo_learner.GRPOLearner(
            engine,
            grpo_learner.GRPOConfig(num_generations=case.group, beta=case.beta, kl_loss_mode="low_var_kl"),
            reward,
        )
        watch.laps.clear()
        start = cases.Stopwatch()
        learner.train(data)
        start.lap()
    first = start.laps[0][1] - sum(wall for _, wall in watch.laps[2:])
    cases.report(
        "tunix",
        options.case,
        watch.laps[-options.steps :],
        first,
        tokens=lengths[-1],
        versions={"google-tunix": version("google-tunix"), "jax": jax.__version__, "flax": version("flax")},
    )


if __name__ == "__main__":
    main()
