"""Rejax 0.1.3, which needs gymnax 0.0.9, evaluation off: python benchmarks/agents/with_rejax.py ppo-4x128"""

import argparse
import json

import cases
import jax
import jax_timing
import rejax


def config(case: cases.Case) -> dict:
    """Our settings in its names. It anneals no learning rate."""
    own = case.settings
    common = {"env": case.env, "num_envs": own["envs"], "total_timesteps": case.steps, "eval_freq": case.steps}
    if case.agent == "ppo":
        return common | {
            "agent_kwargs": {"activation": "tanh"},
            "num_steps": own["steps"],
            "num_epochs": own["epochs"],
            "num_minibatches": own["minibatches"],
            "learning_rate": own["learning_rate"],
            "max_grad_norm": 0.5,
            "gamma": own["discount"],
            "gae_lambda": own["lambda_"],
            "clip_eps": own["clip"],
            "ent_coef": own["entropy"],
            "vf_coef": own["value"],
        }
    common |= {
        "buffer_size": own["capacity"],
        "fill_buffer": own["warmup"],
        "batch_size": own["batch"],
        "learning_rate": 1e-3,
        "num_epochs": own["updates"],
        "polyak": 1.0 - own["target_rate"],
    }
    if case.agent == "dqn":
        common |= {"agent": "DuelingQNetwork", "max_grad_norm": 10, "eps_end": 0.05, "exploration_fraction": 0.5}
    return common


def main():
    """Prints one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=cases.CASES)
    options = parser.parse_args()
    case = cases.CASES[options.case]
    algorithm = rejax.get_algo(case.agent).create(**config(case), skip_initial_evaluation=True)
    algorithm = algorithm.replace(eval_callback=lambda algorithm, state, key: ())
    timing, _ = jax_timing.time_training(algorithm.train, *map(jax.random.PRNGKey, range(3)))
    print(json.dumps(cases.line("rejax", options.case, **timing, steps=case.steps)))


if __name__ == "__main__":
    main()
