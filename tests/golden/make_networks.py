"""Write the golden values of tests/nets/test_golden.py for networks whose checkpoints are not laid out as in memory.

Run it in an environment of its own with torch and transformers (they are not dependencies of this project):

    HF_HUB_OFFLINE=1 python tests/golden/make_networks.py [NAME ...]

made with torch 2.13.0 (CPU) and transformers 5.24.0. The files hold what those of make_transformers.py do; tensors and
gradients have the names and shapes that `save_pretrained` writes.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from make_transformers import SIZES, rope, write
from safetensors.numpy import load_file

MOE = {"moe_intermediate_size": 12, "num_experts_per_tok": 2}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
DEEPSEEK = {"n_routed_experts": 8, "n_shared_experts": 2, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}
SMALL = (
    SIZES
    | {"num_key_value_heads": 4, "num_hidden_layers": 3, "hidden_size": 16, "vocab_size": 32, "intermediate_size": 20}
    | MOE
)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.8)
CASES = {  # name -> model class, and for each case its config; the cases of a file share weights
    "mixtral": (
        "Mixtral",
        {"plain": SIZES | rope() | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 10}},
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {"plain": SIZES | rope() | MOE | {"num_experts": 4, "shared_expert_intermediate_size": 20}},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {"plain": SIZES | rope() | MOE | {"num_experts": 4, "head_dim": 12, "norm_topk_prob": True}},
    ),
    "deepseek_v2": (
        "DeepseekV2",
        {
            "plain": SMALL | rope() | DEEPSEEK | LATENT | {"topk_method": "group_limited_greedy"},
            "yarn": SMALL | YARN | DEEPSEEK | LATENT | {"topk_method": "group_limited_greedy"},
        },
    ),
    "deepseek_v3": ("DeepseekV3", {"plain": SMALL | YARN | DEEPSEEK | LATENT}),
    "moonlight": ("DeepseekV3", {"plain": SMALL | rope() | DEEPSEEK | LATENT | {"q_lora_rank": None, "n_group": 1}}),
}
CASES["moonlight"][1]["plain"]["topk_group"] = 1
WITH_GRADIENTS = ("mixtral", "deepseek_v3")


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Draw all parameters and the routers' biases; float16-representable, none of them trivial."""
    draw = np.random.default_rng(seed)
    state = {**dict(model.named_parameters()), **{k: v for k, v in model.named_buffers() if "correction_bias" in k}}
    for name in sorted(state):
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        value = (mean + draw.normal(0, 0.2, state[name].shape)).astype(np.float16)
        state[name].data = torch.tensor(value.astype(np.float32))
    model.tie_weights()


def on_disk(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The tensors under the names and in the shapes of a saved checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def decoder(model: torch.nn.Module, *, gradients: bool = False, length: int = 12, seed: int = 1) -> dict:
    """One case of a causal language model: the arrays of make_transformers.py."""
    config = model.config
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (2, length))
    positions = np.broadcast_to(np.arange(length), ids.shape)
    logits = model(input_ids=torch.tensor(ids), use_cache=False).logits
    out = {
        "config": json.dumps(config.to_dict(), sort_keys=True, default=str),
        "ids": ids.astype(np.int32),
        "positions": positions.astype(np.int32),
        "real": np.ones_like(ids, dtype=np.int32),
        "logits": logits.detach().numpy(),
    }
    if gradients:
        flat, targets = logits[:, :-1].reshape(-1, config.vocab_size), torch.tensor(ids[:, 1:]).reshape(-1)
        loss = torch.nn.functional.cross_entropy(flat, targets)
        loss.backward()
        for p in model.parameters():
            p.data = torch.zeros_like(p) if p.grad is None else p.grad
        out["loss"] = loss.detach().numpy()
        out |= {f"grad/{name}": grad for name, grad in on_disk(model).items() if "correction_bias" not in name}
    return out


def main(names):
    print("torch", torch.__version__, "transformers", transformers.__version__)
    for seed, (name, (kind, configs)) in enumerate(CASES.items(), 50):
        if names and name not in names:
            continue
        cases, weights = {}, {}
        for case, options in configs.items():
            torch.manual_seed(0)
            config = getattr(transformers, f"{kind}Config")(**options, tie_word_embeddings=False)
            model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
            randomise(model, seed)
            weights = {key: value.astype(np.float16) for key, value in on_disk(model).items()}
            cases[case] = decoder(model, gradients=name in WITH_GRADIENTS)
        write(name, weights, cases)


if __name__ == "__main__":
    main(sys.argv[1:])
