"""Write the golden values of tests/nets/test_golden.py: tiny random checkpoints and their torch logits.

Run it in an environment of its own with torch and transformers (they are not dependencies of this project):

    HF_HUB_OFFLINE=1 python tests/golden/make_transformers.py

made with torch 2.13.0 (CPU) and transformers 5.23.0, phi3 with 5.24.0. Each file holds
  weight/NAME    the checkpoint's tensors, float16-representable (they are computed with as float32); of phi3 under a
                 Llama's names, see `as_llama`
  CASE/config    the model's config.json, as text
  CASE/ids       token ids [B, T], CASE/positions [B, T] and CASE/real [B, T] (0 on left padding)
  CASE/logits    [B, T, V] float32, eager attention
  CASE/loss, CASE/grad/NAME   next-token cross-entropy, mean over all positions, and its gradients (one case)
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

HERE = Path(__file__).parent
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}


def rope(kind="default", theta=10_000.0, **rest):
    """The rope_parameters of a config."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **rest}}


def checkpoint(model_class, config, seed):
    """Random tensors under their checkpoint names, none of them trivial (norms and biases included)."""
    shapes = {name: p.shape for name, p in model_class(config).named_parameters()}
    draw = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes.items():
        mean = 1.0 if "norm" in name else 0.0
        weights[name] = (mean + draw.normal(0, 0.2, shape)).astype(np.float16)
    return weights


def run(model_class, config, weights, *, padded=False, gradients=False, length=12, seed=1):
    """One case: the arrays named in the docstring of this file, without their prefix."""
    model = model_class(config).float().eval()
    tensors = {name: torch.tensor(w.astype(np.float32)) for name, w in weights.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (2, length))
    real = np.ones_like(ids)
    if padded:
        real[1, :5] = 0
    positions = np.maximum(real.cumsum(1) - 1, 0)
    inputs = {"input_ids": ids, "attention_mask": real, "position_ids": positions}
    logits = model(**{k: torch.tensor(v) for k, v in inputs.items()}, use_cache=False).logits
    out = {
        "config": json.dumps(config.to_dict(), sort_keys=True, default=str),
        "ids": ids.astype(np.int32),
        "positions": positions.astype(np.int32),
        "real": real.astype(np.int32),
        "logits": logits.detach().numpy(),
    }
    if gradients:
        flat, targets = logits[:, :-1].reshape(-1, config.vocab_size), torch.tensor(ids[:, 1:]).reshape(-1)
        loss = torch.nn.functional.cross_entropy(flat, targets)
        loss.backward()
        out["loss"] = loss.detach().numpy()
        out |= {f"grad/{name}": p.grad.numpy() for name, p in model.named_parameters()}
    return out


def as_llama(weights, config):
    """Phi-3's tensors under a Llama's names, which keep apart what it fuses."""
    size = config.hidden_size // config.num_attention_heads
    ends = np.cumsum([config.num_attention_heads * size, config.num_key_value_heads * size])
    parts = {"qkv_proj": ("qkv", ends), "gate_up_proj": (("gate", "up"), [config.intermediate_size])}
    found = dict(weights)
    for fused, (names, at) in parts.items():
        for name in [name for name in found if fused in name]:
            pieces = zip(names, np.split(found.pop(name), at), strict=True)
            found |= {name.replace(fused, f"{part}_proj"): piece for part, piece in pieces}
    return found


def write(name, weights, cases):
    """One file per set of weights, shared by its cases."""
    arrays = {f"weight/{key}": value for key, value in weights.items()}
    for case, values in cases.items():
        arrays |= {f"{case}/{key}": value for key, value in values.items()}
    path = HERE / f"{name}.npz"
    np.savez_compressed(path, **arrays)
    print(path.name, path.stat().st_size, sorted(cases))


def main():
    print("torch", torch.__version__, "transformers", transformers.__version__)
    llama = LlamaConfig(**SIZES, **rope(), rms_norm_eps=1e-5, tie_word_embeddings=False)
    weights = checkpoint(LlamaForCausalLM, llama, seed=10)
    scaled = {
        "plain": rope(),
        "linear": rope("linear", factor=4.0),
        "dynamic": rope("dynamic", factor=2.0),
        "llama3": rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
        "yarn": rope("yarn", factor=4.0, original_max_position_embeddings=16),
    }
    cases = {}
    for name, parameters in scaled.items():
        # the dynamic base moves only past the trained length: 8 for that case
        sizes = SIZES | ({"max_position_embeddings": 8} if name == "dynamic" else {})
        config = LlamaConfig(**sizes, **parameters, rms_norm_eps=1e-5, tie_word_embeddings=False)
        cases[name] = run(LlamaForCausalLM, config, weights, length=24 if name in ("llama3", "yarn") else 12)
    cases["padded"] = run(LlamaForCausalLM, llama, weights, padded=True)
    write("llama", weights, cases)

    qwen2 = Qwen2Config(**SIZES, **rope(theta=1e6), rms_norm_eps=1e-6, tie_word_embeddings=True)
    weights = checkpoint(Qwen2ForCausalLM, qwen2, seed=20)
    windowed = Qwen2Config(
        **SIZES,
        **rope(theta=1e6),
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
    )
    cases = {
        "plain": run(Qwen2ForCausalLM, qwen2, weights),
        "window": run(Qwen2ForCausalLM, windowed, weights),
    }
    write("qwen2", weights, cases)

    qwen3 = Qwen3Config(**SIZES, **rope(theta=1e6), head_dim=12, rms_norm_eps=1e-6, tie_word_embeddings=True)
    weights = checkpoint(Qwen3ForCausalLM, qwen3, seed=30)
    write("qwen3", weights, {"plain": run(Qwen3ForCausalLM, qwen3, weights, gradients=True)})

    mistral = MistralConfig(
        **SIZES, **rope(), rms_norm_eps=1e-5, sliding_window=4, tie_word_embeddings=False, head_dim=8
    )
    weights = checkpoint(MistralForCausalLM, mistral, seed=40)
    write("mistral", weights, {"window": run(MistralForCausalLM, mistral, weights)})

    parameters = rope(theta=100.0, partial_rotary_factor=0.75)
    ids = {"pad_token_id": 0, "eos_token_id": 2}
    phi3 = Phi3Config(**SIZES, **parameters, **ids, rms_norm_eps=1e-5, tie_word_embeddings=False)
    weights = checkpoint(Phi3ForCausalLM, phi3, seed=50)
    write("phi3", as_llama(weights, phi3), {"plain": run(Phi3ForCausalLM, phi3, weights)})


if __name__ == "__main__":
    main()
