"""Whole runs: data, model, loop, evaluation, checkpoints and a run folder, from one frozen config.

    from jaxrl.posttrain.recipes import GRPORun, train_grpo

    outcome = train_grpo(GRPORun(data="problems.jsonl", init="runs/demo", out="runs/mine", steps=100))
    print(outcome.summary["accuracy_before"], outcome.summary["accuracy_after"])

The pure steps these are made of are in `jaxrl.posttrain`; write your own loop around them where a recipe is too narrow.
"""

from jaxrl.posttrain.recipes.common import ModelConfig as ModelConfig
from jaxrl.posttrain.recipes.common import Outcome as Outcome
from jaxrl.posttrain.recipes.common import RunOptions as RunOptions
from jaxrl.posttrain.recipes.distill import DistillRun as DistillRun
from jaxrl.posttrain.recipes.distill import train_distill as train_distill
from jaxrl.posttrain.recipes.grpo import GRPORun as GRPORun
from jaxrl.posttrain.recipes.grpo import train_grpo as train_grpo
from jaxrl.posttrain.recipes.kimi import KIMI_RUN as KIMI_RUN
from jaxrl.posttrain.recipes.online import OnlineRun as OnlineRun
from jaxrl.posttrain.recipes.online import train_online as train_online
from jaxrl.posttrain.recipes.ppo import PPO_MAX_RUN as PPO_MAX_RUN
from jaxrl.posttrain.recipes.ppo import PPORun as PPORun
from jaxrl.posttrain.recipes.ppo import train_ppo as train_ppo
from jaxrl.posttrain.recipes.preference import DPORun as DPORun
from jaxrl.posttrain.recipes.preference import KTORun as KTORun
from jaxrl.posttrain.recipes.preference import train_dpo as train_dpo
from jaxrl.posttrain.recipes.preference import train_kto as train_kto
from jaxrl.posttrain.recipes.r1 import R1Run as R1Run
from jaxrl.posttrain.recipes.r1 import train_r1 as train_r1
from jaxrl.posttrain.recipes.reward_model import RMRun as RMRun
from jaxrl.posttrain.recipes.reward_model import train_rm as train_rm
from jaxrl.posttrain.recipes.sft import SFTRun as SFTRun
from jaxrl.posttrain.recipes.sft import train_sft as train_sft
