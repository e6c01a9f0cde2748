"""Write the golden values of tests/nets/test_dit.py: tiny random BD3-LMs and an MDLM, by their authors' class.

Run it in an environment of its own with torch, transformers and einops (they are not dependencies of this project), and
with a clone, bare or not, of github.com/kuleshov-group/bd3lms:

    HF_HUB_OFFLINE=1 python tests/golden/make_dit.py REPOSITORY

made with torch 2.13.0 (CPU) and transformers 5.24.0 of models/hf/modeling_bd3lm.py and configuration_bd3lm.py as commit
1c3e8f43d88d has them, written to a temporary folder, unchanged. Attention is torch's sdpa, the class's own where
attn_backend is "sdpa". It warns of a CUDA autocast and computes in float32. MDLM's class (model type mdlm) is
not run: its network is this one with cross_attn=False. dit.npz holds
  weight/NAME            the checkpoint's tensors, float16-representable, none of them 0
  CASE/config            the config.json, as text; cases: whole (cross_attn=False), blocks, bare (adaln=False, whole)
  CASE/{ids, noisy, masked, t}   rows, with masks, where, and the share asked for in each row or block
  CASE/logits            [B, T, V] float32 of noisy, in blocks of [noisy ; ids]
  CASE/{loss, grad/NAME} -log p of masked tokens / t, the mask token ruled out, mean over all tokens, and its
                         gradients; cases whole and blocks
  blocks/read            [B, T, V] of noisy in the pass of sampling (sample_mode: a block sees itself and those before)
  published/{config, parameters}   of the released small size, as push_to_hf.py has it, and how many the class has
"""

import importlib
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers

MASK, T, BLOCK = 19, 12, 4
SIZES = {"vocab_size": MASK + 1, "model_length": T, "hidden_dim": 16, "cond_dim": 6, "n_blocks": 2, "n_heads": 2,
         "block_size": BLOCK, "attn_backend": "sdpa", "time_conditioning": False}  # fmt: skip
CASES = {"whole": {"cross_attn": False}, "blocks": {}, "bare": {"cross_attn": False, "adaln": False}}
PUBLISHED = {"block_size": 16, "vocab_size": 50258, "model_length": 1024, "hidden_dim": 768, "cond_dim": 128,
             "n_blocks": 12, "n_heads": 12, "dropout": 0.1, "time_conditioning": False,
             "return_dict": False}  # fmt: skip


def classes(repository):
    """(configuration, model) of the authors' files."""
    folder = Path(tempfile.mkdtemp()) / "published_dit"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    for name in ("configuration_bd3lm", "modeling_bd3lm"):
        command = ["git", "-C", repository, "show", f"HEAD:models/hf/{name}.py"]
        (folder / f"{name}.py").write_bytes(subprocess.run(command, check=True, capture_output=True).stdout)
    sys.path.insert(0, str(folder.parent))
    of = lambda name: importlib.import_module(f"published_dit.{name}")
    return of("configuration_bd3lm").BD3LMConfig, of("modeling_bd3lm").BD3LM


def drawn(model, draw):
    """float16-representable tensors for all parameters, about 1 where a norm has its scale."""
    centre = lambda name: 1.0 if ".norm" in name else 0.0
    return {
        name: draw.normal(centre(name), 0.25, p.shape).astype(np.float16)
        for name, p in sorted(model.named_parameters())
    }


def described(config):
    """Its config.json, as text."""
    config.architectures = ["BD3LM"]
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return (Path(folder) / "config.json").read_text()


def case(make, weights, **changes):
    """The arrays of a case."""
    configuration, network = make
    config = configuration(**SIZES | changes)
    model = network(config).eval()
    own = {name: torch.tensor(weights[name].astype(np.float32)) for name, _ in model.named_parameters()}
    model.load_state_dict(own, strict=False)
    assert all(torch.equal(p, own[name]) and p.abs().max() > 0 for name, p in model.named_parameters())
    blocks, draw = config.cross_attn, np.random.default_rng(5)
    ids = draw.integers(0, MASK, (2, T))
    t = draw.uniform(0.3, 0.9, (2, T // BLOCK if blocks else 1)).astype(np.float32)
    level = np.repeat(t, T // t.shape[1], axis=1)
    masked = draw.uniform(size=ids.shape) < level
    noisy = np.where(masked, MASK, ids)
    assert masked.any(1).all() and not masked.all()
    sigma = torch.tensor([0.3, 1.7])  # which the class sets to 0
    read = lambda tokens, **options: model(torch.tensor(tokens), sigma, return_dict=True, **options).logits
    logits = read(np.concatenate([noisy, ids], axis=1) if blocks else noisy)
    found = {"config": described(config), "ids": ids.astype(np.int32), "noisy": noisy.astype(np.int32)}
    found |= {"masked": masked, "t": t, "logits": logits.detach().numpy()}
    if blocks:
        with torch.no_grad():
            found["read"] = read(noisy, sample_mode=True).numpy()
    if config.adaln:
        scores = logits.masked_fill(torch.arange(MASK + 1) == MASK, -torch.inf).log_softmax(-1)
        picked = scores.gather(-1, torch.tensor(ids)[..., None])[..., 0]
        loss = -(picked * torch.tensor(masked / level)).mean()
        loss.backward()
        found["loss"] = loss.detach().numpy()
        found |= {f"grad/{name}": p.grad.numpy() for name, p in model.named_parameters()}
    return found


def main(repository):
    print("torch", torch.__version__, "transformers", transformers.__version__)
    print(
        subprocess.run(
            ["git", "-C", repository, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
        ).stdout
    )
    warnings.filterwarnings("ignore", ".*autocast.*")
    make = classes(repository)
    weights = drawn(make[1](make[0](**SIZES)), np.random.default_rng(1))
    arrays = {f"weight/{name}": value for name, value in weights.items()}
    for name, changes in CASES.items():
        arrays |= {f"{name}/{key}": value for key, value in case(make, weights, **changes).items()}
    with torch.device("meta"):
        config = make[0](**PUBLISHED | {"cross_attn": False})  # no mask of 2048 x 2048
        number = sum(p.numel() for p in make[1](config).parameters())
    arrays |= {"published/config": described(make[0](**PUBLISHED)), "published/parameters": number}
    path = Path(__file__).parent / "dit.npz"
    np.savez_compressed(path, **arrays)
    print(
        path.name, path.stat().st_size, f"{number:,}", {k: np.shape(v) for k, v in arrays.items() if "/grad" not in k}
    )
    print(json.loads(str(arrays["blocks/config"])))


if __name__ == "__main__":
    main(sys.argv[1])
