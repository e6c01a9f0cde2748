"""Finite Markov decision processes: dynamic programming, Monte Carlo, temporal differences; the oracles of the rest.

from jaxrl.tabular import dynamic_programming, gridworld

mdp = gridworld.grid_world()
solution = dynamic_programming.value_iteration(mdp, discount=0.9)
"""

from jaxrl.tabular.mdp import MDP as MDP
from jaxrl.tabular.mdp import make_mdp as make_mdp
