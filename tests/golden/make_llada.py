"""Write the golden values of tests/nets/test_llada.py: a tiny random LLaDA, computed as a Llama that sees everything.

Run it in an environment of its own with torch and transformers (they are not dependencies of this project):

    HF_HUB_OFFLINE=1 python tests/golden/make_llada.py

made with torch 2.13.0 (CPU) and transformers 5.24.0. LLaDA's own class is code of its repository; a block of it is a
Llama's without the causal mask, so transformers' Llama runs with a mask that hides nothing but padding, and the tensors
get LLaDA's names. llada.npz holds
  weight/NAME        the checkpoint's tensors, float16-representable
  CASE/config        the config.json that LLaDA's class would read, as text; cases: plain, padded, tied (without ff_out,
                     and with rows of the embedding that no token has)
  CASE/{ids, positions, real}   [B, T], real is 0 on left padding; CASE/logits   [B, T, V] float32, eager attention
  masked/{ids, noisy, masked, t}   a step of training: tokens, with masks, where, and the share asked for in each row
  masked/{loss, grad/NAME}   -log p of masked tokens / t, mean over all tokens (arXiv:2502.09992, algorithm 1)
  masked/{bound, bound_grad/NAME}   the same where the mask token has no probability
  drawn/{prompt, tokens}   greedy completions, two places of a block at a pass, the most probable first (algorithm 5)
"""

import json

import numpy as np
import torch
import transformers
from make_transformers import SIZES, checkpoint, rope, write
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

MASK, LENGTH, BLOCK = 61, 8, 4
LLAMA = LlamaConfig(**SIZES, **rope(theta=5e5), rms_norm_eps=1e-5, tie_word_embeddings=False)
PUBLISHED = {  # the fields of the released config.json, at other sizes
    "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
    "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": 32,
    "embedding_dropout": 0.0, "embedding_size": 64, "eos_token_id": 62, "flash_attention": False,
    "include_bias": False, "include_qkv_bias": False, "init_cutoff_factor": None, "init_device": "meta",
    "init_fn": "mitchell", "init_std": 0.02, "input_emb_norm": False, "layer_norm_type": "rms",
    "layer_norm_with_affine": True, "mask_token_id": MASK, "max_sequence_length": 64, "mlp_hidden_size": 48,
    "mlp_ratio": 4, "model_type": "llada", "multi_query_attention": None, "n_heads": 4, "n_kv_heads": 2,
    "n_layers": 2, "pad_token_id": 62, "precision": "amp_bf16", "residual_dropout": 0.0, "rms_norm_eps": 1e-5,
    "rope": True, "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False, "use_cache": False,
    "vocab_size": 64, "weight_tying": False,
}  # fmt: skip
OUTER = {"model.embed_tokens": "wte", "model.norm": "ln_f", "lm_head": "ff_out"}
INNER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm", "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj", "self_attn.v_proj": "v_proj", "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj", "mlp.up_proj": "up_proj", "mlp.down_proj": "ff_out",
}  # fmt: skip


def renamed(name):
    """A Llama's name as LLaDA has it."""
    plain = name.removesuffix(".weight")
    if plain in OUTER:
        return f"model.transformer.{OUTER[plain]}.weight"
    number, part = plain.removeprefix("model.layers.").split(".", 1)
    return f"model.transformer.blocks.{number}.{INNER[part]}.weight"


def network(weights, *, tied=False):
    """The Llama with these tensors."""
    model = LlamaForCausalLM(LLAMA).float().eval()
    tensors = {name: torch.tensor(w.astype(np.float32)) for name, w in weights.items()}
    if tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    return model


def logits(model, ids, real=None):
    """[B, T, V] with every real token seen from everywhere."""
    real = torch.ones(ids.shape) if real is None else torch.tensor(real)
    hidden = (1.0 - real.float())[:, None, None, :] * torch.finfo(torch.float32).min
    hidden = hidden.expand(-1, -1, ids.shape[1], -1).contiguous()
    positions = torch.clamp(real.long().cumsum(1) - 1, min=0)
    return model(torch.tensor(ids), attention_mask=hidden, position_ids=positions, use_cache=False).logits


def check(model):
    """Raise unless the first place sees the last one, which a causal mask would hide."""
    ids = np.arange(12)[None]
    other = np.where(ids == 11, 50, ids)
    moved = (logits(model, ids) - logits(model, other))[0].abs().amax(1)
    assert moved.min() > 1e-2, moved


def case(model, *, padded=False, **changes):
    """The arrays of a case."""
    ids = np.random.default_rng(1).integers(0, 60, (2, 12))
    real = np.ones_like(ids)
    if padded:
        real[1, :5] = 0
    found = {"ids": ids, "real": real, "positions": np.maximum(real.cumsum(1) - 1, 0)}
    return {
        "config": json.dumps(PUBLISHED | changes, sort_keys=True),
        "logits": logits(model, ids, real).detach().numpy(),
        **{name: x.astype(np.int32) for name, x in found.items()},
    }


def training(model):
    """The arrays of `masked`."""
    draw = np.random.default_rng(2)
    ids, t = draw.integers(0, 60, (3, 10)), np.array([0.3, 0.5, 0.9], np.float32)
    masked = draw.uniform(size=ids.shape) < t[:, None]
    assert masked.any(1).all() and not masked.all()
    noisy = np.where(masked, MASK, ids)
    found = {"ids": ids.astype(np.int32), "noisy": noisy.astype(np.int32), "masked": masked, "t": t}
    weight = torch.tensor(masked / t[:, None]).reshape(-1)
    for name, grad, without in (("loss", "grad", False), ("bound", "bound_grad", True)):
        model.zero_grad()
        scores = logits(model, noisy)
        if without:
            scores = scores.masked_fill(torch.arange(64) == MASK, -torch.inf)
        each = cross_entropy(scores.reshape(-1, 64), torch.tensor(ids).reshape(-1), reduction="none")
        loss = (weight * each).sum() / ids.size
        loss.backward()
        found[name] = loss.detach().numpy()
        found |= {f"{grad}/{renamed(key)}": p.grad.numpy().copy() for key, p in model.named_parameters()}
    return found


@torch.no_grad()
def drawn(model):
    """The arrays of `drawn`."""
    prompt = np.random.default_rng(3).integers(0, 60, (2, 5))
    tokens = np.concatenate([prompt, np.full((2, LENGTH), MASK)], axis=1)
    for begin in range(5, 5 + LENGTH, BLOCK):
        for _ in range(BLOCK // 2):
            scores = logits(model, tokens)
            scores[..., MASK] = -torch.inf
            sure, best = (x.numpy() for x in scores.softmax(-1).max(-1))
            for row in range(2):
                open_ = [i for i in range(begin, begin + BLOCK) if tokens[row, i] == MASK]
                for i in sorted(open_, key=lambda i: -sure[row, i])[:2]:
                    tokens[row, i] = best[row, i]
    return {"prompt": prompt.astype(np.int32), "tokens": tokens[:, 5:].astype(np.int32)}


def main():
    print("torch", torch.__version__, "transformers", transformers.__version__)
    weights = checkpoint(LlamaForCausalLM, LLAMA, seed=80)
    model, tied = network(weights), network(weights, tied=True)
    check(model)
    cases = {
        "plain": case(model),
        "padded": case(model, padded=True),
        "tied": case(tied, weight_tying=True, vocab_size=62, n_kv_heads=2),
        "masked": training(model),
        "drawn": drawn(model),
    }
    write("llada", {renamed(name): w for name, w in weights.items()}, cases)


if __name__ == "__main__":
    main()
