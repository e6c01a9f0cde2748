"""Agents: one file each."""

from jaxrl.agents.agent import Agent as Agent
