"""Write the golden values of tests/nets/test_moe.py: tiny random expert layers, their torch outputs and gradients.

Run it in an environment of its own with torch and transformers (they are not dependencies of this project):

    HF_HUB_OFFLINE=1 python tests/golden/make_moe.py

made with torch 2.13.0 (CPU) and transformers 5.24.0. In moe.npz each case (mixtral, ...) holds
  CASE/param/PATH   parameters under our paths (router/kernel, gate, ...), float16, computed with as float32
  CASE/x, CASE/y    input and output of the layer, [B, T, D] float32
  CASE/dx, CASE/grad/PATH   gradients of sum(y * cos(x)) + 0.3 B T aux, the balance loss of models that have one; for
    switch + 0.1 B T z, the z-loss of its router
"""

import re
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    SwitchTransformersConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.models.switch_transformers import modeling_switch_transformers as switch

WIDTH, FFN, COEFFICIENT = 8, 6, 0.3
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
DEEPSEEK = {"moe_intermediate_size": FFN, "n_shared_experts": 2, "n_routed_experts": 12, "num_experts_per_tok": 4,
            "n_group": 4, "topk_group": 2}  # fmt: skip
QWEN = {"moe_intermediate_size": FFN, "num_experts": 6, "num_experts_per_tok": 3}
CASES = {  # block, config, whether the model has a balance loss
    "mixtral": (
        MixtralSparseMoeBlock,
        MixtralConfig(**SIZES, intermediate_size=FFN, num_local_experts=6, num_experts_per_tok=2),
        True,
    ),
    "qwen_moe": (
        Qwen2MoeSparseMoeBlock,
        Qwen2MoeConfig(**SIZES, **QWEN, shared_expert_intermediate_size=10, norm_topk_prob=False),
        True,
    ),
    "qwen3_moe": (Qwen3MoeSparseMoeBlock, Qwen3MoeConfig(**SIZES, **QWEN, norm_topk_prob=True), True),
    "deepseek_v2": (
        DeepseekV2Moe,
        DeepseekV2Config(**SIZES, **DEEPSEEK, topk_method="group_limited_greedy", routed_scaling_factor=16.0),
        False,
    ),
    "deepseek_v3": (DeepseekV3MoE, DeepseekV3Config(**SIZES, **DEEPSEEK, routed_scaling_factor=2.5), False),
    "switch": (
        switch.SwitchTransformersSparseMLP,
        SwitchTransformersConfig(
            d_model=WIDTH, d_ff=FFN, num_experts=5, expert_capacity=3, router_jitter_noise=0.0, dropout_rate=0.0
        ),
        True,
    ),
}
OURS = {
    "gate.weight": "router/kernel",
    "router.classifier.weight": "router/kernel",
    "gate.e_score_correction_bias": "bias",
    "experts.down_proj": "down",
    "shared_expert_gate.weight": "shared_gate/kernel",
    **{
        f"{shared}.{name}_proj.weight": f"shared/{name}/kernel"
        for shared in ("shared_expert", "shared_experts")
        for name in ("gate", "up", "down")
    },
}


def paths(name, array):
    """A tensor of theirs as {our path: array}; all of theirs are [out, in]."""
    array = np.ascontiguousarray(np.swapaxes(array, -1, -2)) if array.ndim > 1 else array
    if name == "experts.gate_up_proj":
        return dict(zip(("gate", "up"), np.split(array, 2, axis=-1), strict=True))
    if one := re.fullmatch(r"experts\.expert_(\d+)\.w([io])\.weight", name):  # of each expert, stacked last
        return {f"{'up' if one[2] == 'i' else 'down'}/{one[1]}": array}
    return {OURS[name]: array}


def stacked(arrays):
    """{path: array} with those of single experts, PATH/0, PATH/1, ..., as one array PATH."""
    single = {key: array for key, array in arrays.items() if key.rpartition("/")[2].isdigit()}
    rest = {key: array for key, array in arrays.items() if key not in single}
    found = {key.rpartition("/")[0] for key in single}
    return rest | {key: np.stack([single[f"{key}/{e}"] for e in range(5)]) for key in sorted(found)}


def run(block_class, config, has_loss, seed):
    """The arrays of one case."""
    config._experts_implementation = "eager"
    block, draw = block_class(config).float(), np.random.default_rng(seed)
    tensors = dict(block.named_parameters()) | dict(block.named_buffers())
    weights = {name: draw.normal(0, 0.3, p.shape).astype(np.float16) for name, p in tensors.items()}
    block.load_state_dict({name: torch.tensor(w.astype(np.float32)) for name, w in weights.items()}, strict=True)
    x = torch.tensor(draw.normal(size=(2, 9, WIDTH)).astype(np.float32), requires_grad=True)
    y = block(x)
    y = y[0] if isinstance(y, tuple) else y
    loss = (y * torch.cos(x.detach())).sum()
    if isinstance(block, switch.SwitchTransformersSparseMLP):
        logits = block.router.classifier(x)
        probabilities = torch.softmax(logits, dim=-1)
        aux = switch.load_balancing_loss_func(probabilities, probabilities.argmax(-1))
        loss = loss + 18 * (COEFFICIENT * aux + 0.1 * switch.router_z_loss_func(logits))
    elif has_loss:
        logits = (x.reshape(-1, WIDTH) @ block.gate.weight.T,)
        loss = loss + COEFFICIENT * 18 * load_balancing_loss_func(
            logits, block.gate.weight.shape[0], config.num_experts_per_tok
        )
    loss.backward()
    out = {"x": x.detach().numpy(), "y": y.detach().numpy(), "dx": x.grad.numpy()}
    for name, value in weights.items():
        out |= {f"param/{path}": array for path, array in paths(name, value).items()}
    for name, p in block.named_parameters():
        out |= {f"grad/{path}": array for path, array in paths(name, p.grad.numpy()).items()}
    return stacked(out)


def main():
    print("torch", torch.__version__, "transformers", transformers.__version__)
    arrays = {}
    for seed, (case, given) in enumerate(CASES.items()):
        arrays |= {f"{case}/{key}": value for key, value in run(*given, seed=seed).items()}
    path = Path(__file__).parent / "moe.npz"
    np.savez_compressed(path, **arrays)
    print(path.name, path.stat().st_size, sorted(arrays))


if __name__ == "__main__":
    main()
