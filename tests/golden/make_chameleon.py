"""Write tests/golden/chameleon.npz: torch outputs of tiny random Chameleons, weights from seeds (drawn.py).

Run it in an environment of its own with torch and transformers (they are not dependencies of this project):

    HF_HUB_OFFLINE=1 python tests/golden/make_chameleon.py

made with torch 2.13.0 (CPU) and transformers 5.24.0. It holds
  pictures         [2, 3, 16, 16]; codes: what the tokeniser makes of them [2, 64]; latent: before it is quantised
  ids              token ids [2, 12]
  CASE/config, CASE/logits   of the decoder, for the norms of the 7B ("pre") and of the 34B ("branch")
  CASE/loss, CASE/grad/NAME   next-token cross-entropy, mean over all positions, and its gradients
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from drawn import drawn
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

LETTERS = "ABCDEFGHIJ"
CODES = 16
NAMES = {"<image>": 3} | {"IMGIMG" + "".join(LETTERS[int(d)] for d in str(c)) + "Z": 8 + c for c in range(CODES)}
TEXT = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "attn_implementation": "eager"}  # fmt: skip
VQ = {"embed_dim": 8, "num_embeddings": CODES, "latent_channels": 8, "resolution": 16, "base_channels": 32,
      "channel_multiplier": [1, 2], "num_res_blocks": 1}  # fmt: skip


def main():
    print("torch", torch.__version__, "transformers", transformers.__version__)
    draw = np.random.default_rng(0)
    pictures = draw.uniform(-1, 1, (2, 3, 16, 16)).astype(np.float32)
    ids = draw.choice([5, 6, 7, 30, 31, 32], (2, 12))
    out = {"pictures": pictures, "ids": ids.astype(np.int32)}
    for case, swin in (("pre", False), ("branch", True)):
        config = ChameleonConfig(**TEXT, vq_config=VQ, vocabulary_map=NAMES, swin_norm=swin)
        model = ChameleonForConditionalGeneration(config).float().eval()
        state = {name: p for name, p in model.named_parameters()}
        for name, value in drawn({name: tuple(p.shape) for name, p in state.items()}, 7).items():
            state[name].data = torch.tensor(value)
        encoded = model.model.vqmodel.encode(torch.tensor(pictures))
        out |= {
            "latent": encoded.last_hidden_state.detach().numpy(),
            "codes": encoded.image_tokens.reshape(2, -1).numpy(),
        }
        hidden = model.model(input_ids=torch.tensor(ids), use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
        out[f"{case}/logits"] = logits.detach().numpy()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), torch.tensor(ids[:, 1:]).flatten())
        loss.backward()
        out[f"{case}/loss"] = loss.detach().numpy()
        out |= {f"{case}/grad/{name}": p.grad.numpy() for name, p in state.items() if p.grad is not None}
        out[f"{case}/config"] = json.dumps(config.to_dict(), sort_keys=True, default=str)
    path = Path(__file__).parent / "chameleon.npz"
    np.savez_compressed(path, **out)
    print(path.name, path.stat().st_size)


if __name__ == "__main__":
    main()
