"""A whole training of jaxrl as one program, evaluation off: python benchmarks/agents/ours.py ppo-4x128"""

import argparse
import json

import cases
import jax
import jax_timing

from jaxrl import envs
from jaxrl.agents import catalogue


def main():
    """Prints one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=cases.CASES)
    options = parser.parse_args()
    case = cases.CASES[options.case]
    entry = catalogue.find(case.agent)
    agent = entry.make(entry.config(**case.settings), envs.make(case.env))
    updates = case.steps // agent.env_steps

    def train(key):
        state, rows = jax.lax.scan(lambda state, _: agent.step(state), agent.init(key), length=updates)
        return state.params, rows["episode/return"]

    timing, (_, returns) = jax_timing.time_training(train, jax.random.key(0), jax.random.key(1), jax.random.key(2))
    tenth = returns[-max(1, len(returns) // 10) :]
    last = float(jax.numpy.nanmean(tenth))
    print(json.dumps(cases.line("jaxrl", options.case, **timing, steps=updates * agent.env_steps, last_return=last)))


if __name__ == "__main__":
    main()
