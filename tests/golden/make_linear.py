"""Write the golden values of linear networks: tiny random MiniMaxes, and Performer's two kernels.

Run it in an environment of its own with torch, transformers and performer-pytorch (none is a dependency of this
project):

    HF_HUB_OFFLINE=1 python tests/golden/make_linear.py

made with torch 2.13.0 (CPU), transformers 5.24.0 and performer-pytorch 1.1.4. The files of `NETWORKS`, for
tests/nets/test_golden.py, hold what those of make_networks.py do; linear.npz, for test_linear_networks.py beside it,
  performer/{q, k, v, w}   [B, T, H, Dh] and [m, Dh]; performer/{softmax, relu}[_causal]   outputs, without the additive
  eps of the softmax kernel's features and of the causal denominator
"""

from pathlib import Path

import numpy as np
import performer_pytorch.performer_pytorch as performer
import torch
import transformers
from make_networks import decoder, on_disk, randomise
from make_transformers import write
from transformers import MiniMaxConfig, MiniMaxForCausalLM

NETWORKS = {  # their kinds of layers, and alpha of all sums
    "minimax": ("llfllf", 1.7),  # a period that comes round, with a run in it
    "minimax_odd": ("lfl", 1.0),
}
KINDS = {"l": "linear_attention", "f": "full_attention"}


def minimax(kinds, alpha, seed):
    """A tiny random one."""
    sums = ("full_attn", "linear_attn", "mlp")
    config = MiniMaxConfig(
        vocab_size=32, hidden_size=16, intermediate_size=12, num_hidden_layers=len(kinds), num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, num_local_experts=3, num_experts_per_tok=2, block_size=4,
        layer_types=[KINDS[kind] for kind in kinds], max_position_embeddings=64, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, tie_word_embeddings=False,
        attn_implementation="eager", experts_implementation="eager",
        **{f"{name}_alpha_factor": alpha for name in sums}, **{f"{name}_beta_factor": 1.0 for name in sums},
    )  # fmt: skip
    model = MiniMaxForCausalLM(config).float().eval()
    randomise(model, seed)
    return model


def padded(model):
    """A case with padding on the left of its second row."""
    case = decoder(model)
    case["real"][1, :5] = 0
    case["positions"] = np.maximum(np.cumsum(case["real"], axis=1) - 1, 0)
    given = {"input_ids": case["ids"], "attention_mask": case["real"], "position_ids": case["positions"]}
    logits = model(**{name: torch.tensor(x).long() for name, x in given.items()}, use_cache=False).logits
    return case | {"logits": logits.detach().numpy()}


def write_minimax(name, kinds, alpha, seed):
    """One file; the tables that follow from the config are among its weights, as in what save_pretrained writes."""
    model = minimax(kinds, alpha, seed)
    weights = {key: value.astype(np.float16) for key, value in on_disk(model).items()}
    cases = {"padded": padded(model), "plain": decoder(model, gradients=name == "minimax")}
    tables = {f"grad/{key}" for key, _ in model.named_buffers()}
    cases["plain"] = {key: value for key, value in cases["plain"].items() if key not in tables}
    write(name, weights, cases)


def performers():
    """The arrays of both kernels."""
    draw = np.random.default_rng(1)
    q, k, v = (draw.normal(size=(2, 9, 2, 8)).astype(np.float32) for _ in range(3))
    w = draw.normal(size=(12, 8)).astype(np.float32)
    theirs = [torch.tensor(x).transpose(1, 2) for x in (q, k, v)]
    w_theirs, found = torch.tensor(w), {"q": q, "k": k, "v": v, "w": w}
    softmax = lambda x, query: performer.softmax_kernel(x, projection_matrix=w_theirs, is_query=query, eps=0.0)
    relu = lambda x, query: performer.generalized_kernel(x, projection_matrix=w_theirs)
    for name, kernel in (("softmax", softmax), ("relu", relu)):
        mapped = kernel(theirs[0], True), kernel(theirs[1], False), theirs[2]
        found[name] = performer.linear_attention(*mapped).transpose(1, 2).numpy()
        causal = performer.causal_linear_attention_noncuda(*mapped, eps=0.0)
        found[f"{name}_causal"] = causal.transpose(1, 2).numpy()
    return found


def main():
    print("torch", torch.__version__, "transformers", transformers.__version__)
    for seed, (name, made) in enumerate(NETWORKS.items(), 70):
        write_minimax(name, *made, seed)
    arrays = {f"performer/{name}": x for name, x in performers().items()}
    path = Path(__file__).parent / "linear.npz"
    np.savez_compressed(path, **arrays)
    print(path.name, path.stat().st_size, sorted(arrays))


if __name__ == "__main__":
    main()
