"""Write the golden values of tests/nets/test_linear_networks.py: a tiny random MiniMax, and Performer's two kernels.

Run it in an environment of its own with torch, transformers and performer-pytorch (none is a dependency of this
project):

    HF_HUB_OFFLINE=1 python tests/golden/make_linear.py

made with torch 2.13.0 (CPU), transformers 5.24.0 and performer-pytorch 1.1.4. In linear.npz
  minimax/param/PATH   parameters under our paths, of what save_pretrained wrote; float16, computed with as float32
  minimax/{ids, real, positions}, minimax/logits   a batch with padding on the left, [B, T], and [B, T, V]
  minimax/cotangents, minimax/grad/PATH   gradients of sum(logits * cotangents) over real tokens
  performer/{q, k, v, w}   [B, T, H, Dh] and [m, Dh]; performer/{softmax, relu}[_causal]   outputs, without the additive
  eps of the softmax kernel's features and of the causal denominator
"""

import tempfile
from pathlib import Path

import numpy as np
import performer_pytorch.performer_pytorch as performer
import torch
import transformers
from safetensors.numpy import load_file
from transformers import MiniMaxConfig, MiniMaxForCausalLM

LAYERS, HEADS, EXPERTS, WIDTH = 4, 4, 4, 16
TYPES = ["linear_attention", "full_attention"] * 2
ALPHA = 1.7


def part(i, name):
    """Our path and index of a layer's parameter."""
    return f"periods/{'layers' if i % 2 else 'linear_layers'}/{name}", i // 2


def paths(tensors):
    """Their tensors as ours; all matrices are [out, in] there."""
    found, stacks = {}, {}

    def put(i, name, array):
        path, at = part(i, name)
        stacks.setdefault(path, {})[at] = array

    for i in range(LAYERS):
        own = lambda name, i=i: tensors[f"model.layers.{i}.{name}.weight"]
        put(i, "attention_norm/scale", own("post_attention_layernorm"))
        following = f"model.layers.{i + 1}.input_layernorm" if i + 1 < LAYERS else "model.norm"
        put(i, "ffn_norm/scale", tensors[f"{following}.weight"])
        if i % 2:
            for name in "qkvo":
                put(i, f"attention/{name}/kernel", own(f"self_attn.{name}_proj").T)
        else:
            fused = own("self_attn.qkv_proj").reshape(HEADS, 3, -1, WIDTH)  # by head: query, key, value
            for n, name in enumerate("qkv"):
                put(i, f"attention/{name}/kernel", fused[:, n].reshape(-1, WIDTH).T)
            put(i, "attention/o/kernel", own("self_attn.out_proj").T)
            put(i, "attention/gate/kernel", own("self_attn.output_gate").T)
            put(i, "attention/out_norm/scale", own("self_attn.norm"))
        put(i, "moe/router/kernel", own("block_sparse_moe.gate").T)
        for name, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            each = [own(f"block_sparse_moe.experts.{e}.{theirs}").T for e in range(EXPERTS)]
            put(i, f"moe/{name}", np.stack(each))
    for path, arrays in stacks.items():
        found[path] = np.stack([arrays[n] for n in sorted(arrays)])[:, None]  # periods, layers of a run
    return found | {
        "embed/embedding": tensors["model.embed_tokens.weight"],
        "embed_norm/scale": tensors["model.layers.0.input_layernorm.weight"],
        "unembed/kernel": tensors["lm_head.weight"].T,
    }


def saved(model):
    """What save_pretrained writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def minimax():
    """The arrays of the network."""
    factors = [f"{kind}_{name}_factor" for kind in ("full_attn", "linear_attn", "mlp") for name in ("alpha", "beta")]
    config = MiniMaxConfig(
        vocab_size=32, hidden_size=WIDTH, intermediate_size=12, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=2, num_local_experts=EXPERTS, num_experts_per_tok=2, layer_types=TYPES, block_size=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, max_position_embeddings=64, rms_norm_eps=1e-5,
        attn_implementation="eager", experts_implementation="eager",
        **{name: ALPHA if "alpha" in name else 1.0 for name in factors},
    )  # fmt: skip
    model, draw = MiniMaxForCausalLM(config).float().eval(), np.random.default_rng(0)
    with torch.no_grad():
        for p in model.parameters():
            values = (p.ndim == 1) + draw.normal(0, 0.25, tuple(p.shape))
            p.copy_(torch.tensor(values.astype(np.float16).astype(np.float32)))
    ids = draw.integers(0, 32, (2, 11))
    real = np.array([[1] * 11, [0] * 4 + [1] * 7])
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    given = {"input_ids": ids, "attention_mask": real, "position_ids": positions}
    logits = model(**{name: torch.tensor(x) for name, x in given.items()}, use_cache=False).logits
    cotangents = draw.normal(size=logits.shape).astype(np.float32) * real[:, :, None]
    weights = paths(saved(model))
    (logits * torch.tensor(cotangents)).sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.grad)
    return {
        "ids": ids, "real": real, "positions": positions, "logits": logits.detach().numpy(), "cotangents": cotangents,
        **{f"param/{path}": x.astype(np.float16) for path, x in weights.items()},
        **{f"grad/{path}": x for path, x in paths(saved(model)).items()},
    }  # fmt: skip


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
    arrays = {f"minimax/{name}": x for name, x in minimax().items()}
    arrays |= {f"performer/{name}": x for name, x in performers().items()}
    path = Path(__file__).parent / "linear.npz"
    np.savez_compressed(path, **arrays)
    print(path.name, path.stat().st_size, sorted(arrays))


if __name__ == "__main__":
    main()
