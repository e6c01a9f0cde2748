"""PureJaxRL from a checkout (it is no package), with gymnax 0.0.9 and distrax:

python benchmarks/agents/with_purejaxrl.py ppo-4x128 --source purejaxrl/purejaxrl
"""

import argparse
import json
import sys
import types

import cases
import jax
import jax_timing


def main():
    """Prints one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=[name for name, case in cases.CASES.items() if case.agent == "ppo"])
    parser.add_argument("--source", required=True, help="its folder with ppo.py")
    options = parser.parse_args()
    for name in ("brax", "brax.envs", "brax.envs.wrappers", "brax.envs.wrappers.training", "navix"):
        sys.modules[name] = types.ModuleType(name)  # wrappers.py imports them whether they are used or not
    sys.modules["brax"].envs = sys.modules["brax.envs"]  # pyright: ignore
    for name in ("EpisodeWrapper", "AutoResetWrapper"):
        setattr(sys.modules["brax.envs.wrappers.training"], name, None)
    sys.path.insert(0, options.source)
    import ppo  # pyright: ignore

    case = cases.CASES[options.case]
    own = case.settings
    config = {
        "LR": own["learning_rate"],
        "NUM_ENVS": own["envs"],
        "NUM_STEPS": own["steps"],
        "TOTAL_TIMESTEPS": case.steps,
        "UPDATE_EPOCHS": own["epochs"],
        "NUM_MINIBATCHES": own["minibatches"],
        "GAMMA": own["discount"],
        "GAE_LAMBDA": own["lambda_"],
        "CLIP_EPS": own["clip"],
        "ENT_COEF": own["entropy"],
        "VF_COEF": own["value"],
        "MAX_GRAD_NORM": 0.5,
        "ACTIVATION": "tanh",
        "ENV_NAME": case.env,
        "ANNEAL_LR": True,
        "DEBUG": False,
    }
    keys = [jax.random.PRNGKey(seed) for seed in range(3)]
    timing, result = jax_timing.time_training(ppo.make_train(config), *keys)
    returns = result["metrics"]["returned_episode_returns"]
    last = float(returns[-max(1, len(returns) // 10) :].mean())
    print(json.dumps(cases.line("purejaxrl", options.case, **timing, steps=case.steps, last_return=last)))


if __name__ == "__main__":
    main()
