"""Stable-Baselines3 on PyTorch with gymnasium, a part of the steps: python benchmarks/agents/with_sb3.py ppo-4x128"""

import argparse
import json
import time

import cases
import stable_baselines3 as sb3
import torch
from stable_baselines3.common.env_util import make_vec_env

PART = {"ppo": 10, "dqn": 20, "td3": 4, "sac": 4}  # once it learns, its steps all take the same time


def model(case: cases.Case):
    """Our settings in its names."""
    own = case.settings
    env = make_vec_env(case.env, n_envs=own["envs"], seed=0)
    if case.agent == "ppo":
        return sb3.PPO(
            "MlpPolicy",
            env,
            n_steps=own["steps"],
            batch_size=own["envs"] * own["steps"] // own["minibatches"],
            n_epochs=own["epochs"],
            learning_rate=lambda left: own["learning_rate"] * left,
            gamma=own["discount"],
            gae_lambda=own["lambda_"],
            clip_range=own["clip"],
            ent_coef=own["entropy"],
            vf_coef=own["value"],
        )
    common = {
        "env": env,
        "learning_rate": 1e-3,
        "buffer_size": own["capacity"],
        "learning_starts": own["warmup"],
        "batch_size": own["batch"],
        "train_freq": 1,
        "gradient_steps": own["updates"],
        "tau": own["target_rate"],
        "policy_kwargs": {"net_arch": [64, 64]},
    }
    if case.agent == "dqn":
        common |= {"target_update_interval": own["target_every"], "exploration_fraction": 0.5}
    return {"dqn": sb3.DQN, "td3": sb3.TD3, "sac": sb3.SAC}[case.agent]("MlpPolicy", **common)


def main():
    """Prints one JSON line; the times of the warm-up and of a part of the rest are scaled to all steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=cases.CASES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    case = cases.CASES[options.case]
    learner, warmup = model(case), case.settings.get("warmup", 0)
    cpu, wall, done = [0.0], [0.0], [0]
    for steps in (warmup, (case.steps - warmup) // PART[case.agent]):
        begun = time.process_time(), time.perf_counter()
        if steps:
            learner.learn(steps, reset_num_timesteps=False)
        cpu.append(time.process_time() - begun[0])
        wall.append(time.perf_counter() - begun[1])
        done.append(learner.num_timesteps)
    scale = (case.steps - done[1]) / (done[2] - done[1])
    run = (cpu[1] + scale * cpu[2], wall[1] + scale * wall[2])
    measured = {"steps": case.steps, "steps_measured": learner.num_timesteps}
    print(json.dumps(cases.line("sb3", options.case, trace=0.0, compile=0.0, runs=[run], **measured)))


if __name__ == "__main__":
    main()
