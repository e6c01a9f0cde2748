"""Write the golden values of tests/nets/test_vit.py and test_swin.py: tiny random classifiers, their torch outputs.

Run it in an environment of its own with torch and transformers (they are not dependencies of this project):

    HF_HUB_OFFLINE=1 python tests/golden/make_vision.py

made with torch 2.13.0 (CPU) and transformers 5.24.0. In vit.npz, swin.npz and swinv2.npz
  weight/NAME   float16 parameters under the names that save_pretrained writes, computed with as float32
  CASE/images, CASE/logits   [B, H, W, C] float16 and [B, classes] float32; CASE names a size, or a setting
  plain/labels, plain/loss, plain/d_images, plain/grad/NAME   mean cross-entropy and its gradients (grad: vit, swin)
Printed last: parameter counts of the published sizes.
"""

import copy
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers import (
    SwinConfig,
    SwinForImageClassification,
    Swinv2Config,
    Swinv2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
        "mlp_ratio": 2.0, "num_labels": 10}  # fmt: skip
VIT = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
       "intermediate_size": 48, "num_labels": 10}  # fmt: skip
FILES = {  # class, config, the sizes of other images, whether gradients of parameters are stored
    "vit": (ViTForImageClassification, ViTConfig(**VIT), {"resized": (24, 20)}, True),
    "swin": (
        SwinForImageClassification,
        SwinConfig(**SWIN),
        {"odd": (27, 30), "small": (16, 24)},
        True,
    ),
    "swinv2": (Swinv2ForImageClassification, Swinv2Config(**SWIN), {"wide": (18, 31)}, False),
}
_SWINS = {"t": (96, (2, 2, 6, 2), (3, 6, 12, 24)), "s": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
          "b": (128, (2, 2, 18, 2), (4, 8, 16, 32)), "l": (192, (2, 2, 18, 2), (6, 12, 24, 48))}  # fmt: skip
_VITS = {"ti16": (16, 192, 12, 3), "s16": (16, 384, 12, 6), "s32": (32, 384, 12, 6), "b16": (16, 768, 12, 12),
         "b32": (32, 768, 12, 12), "l16": (16, 1024, 24, 16), "l32": (32, 1024, 24, 16),
         "h14": (14, 1280, 32, 16)}  # fmt: skip


def checkpoint(model, draw):
    """Random weights in the model, and as float16 under the names on disk."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        path = f"{folder}/model.safetensors"
        weights = {}
        for name, old in sorted(load_file(path).items()):
            spread = 1.0 if name.endswith(("table", "mlp.2.weight")) else 0.3
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            weights[name] = draw.normal(centre, spread, old.shape).astype(np.float16)
            if name.endswith("logit_scale"):  # on both sides of the limit, log 100
                weights[name] = np.linspace(1, 6, old.size, dtype=np.float16).reshape(old.shape)
        save_file({k: v.astype(np.float32) for k, v in weights.items()}, path, metadata={"format": "pt"})
        return type(model).from_pretrained(folder, attn_implementation="eager").eval(), weights


def on_disk(model, gradients):
    """Gradients by parameter name as a checkpoint names them: saved in the parameters' place."""
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for name, parameter in model.named_parameters():
            parameter.copy_(gradients[name])
        model.save_pretrained(folder)
        return load_file(f"{folder}/model.safetensors")


def run(kind, seed):
    """The arrays of one file."""
    cls, config, sizes, with_gradients = FILES[kind]
    draw = np.random.default_rng(seed)
    model, weights = checkpoint(cls(config), draw)
    out = {f"weight/{name}": value for name, value in weights.items()}
    options = {"interpolate_pos_encoding": True} if kind == "vit" else {}

    def images(height, width):
        drawn = draw.normal(size=(2, height, width, 3)).astype(np.float16)
        return torch.tensor(drawn.astype(np.float32), requires_grad=True)

    def stored(case, images, logits):
        pixels = images.detach().numpy().astype(np.float16)  # exact
        return {f"{case}/images": pixels, f"{case}/logits": logits.detach().numpy()}

    def logits(model, images):
        return model(images.permute(0, 3, 1, 2), **options).logits

    for case, size in sizes.items():
        x, fresh = images(*size), copy.deepcopy(model)  # Swin's layers remember that a map was small
        out |= stored(case, x, logits(fresh, x))
    x, labels = images(config.image_size, config.image_size), torch.tensor([3, 8])
    if kind == "swinv2":  # the same weights where offsets are measured by other windows
        other = cls(Swinv2Config(**SWIN, pretrained_window_sizes=[6, 3])).eval()
        other.load_state_dict(model.state_dict())
        out |= stored("pretrained", x, logits(other, x))
    y = logits(model, x)
    loss = torch.nn.functional.cross_entropy(y, labels)
    loss.backward()
    out |= stored("plain", x, y)
    out |= {"plain/labels": labels.numpy(), "plain/loss": loss.detach().numpy(), "plain/d_images": x.grad.numpy()}
    if with_gradients:
        gradients = on_disk(model, {name: p.grad for name, p in model.named_parameters()})
        out |= {f"plain/grad/{name}": value for name, value in gradients.items()}
    return out


def counts():
    """Parameters of the published sizes, with 1,000 classes."""
    with torch.device("meta"):
        for name, (patch, width, layers, heads) in _VITS.items():
            config = ViTConfig(patch_size=patch, hidden_size=width, num_hidden_layers=layers,
                               num_attention_heads=heads, intermediate_size=4 * width, num_labels=1000)  # fmt: skip
            yield f"vit_{name}", ViTForImageClassification(config)
        for name, (width, depths, heads) in _SWINS.items():
            sizes = {"embed_dim": width, "depths": depths, "num_heads": heads, "num_labels": 1000}
            yield f"swin_{name}", SwinForImageClassification(SwinConfig(**sizes))
            if name in "bl":
                wide = SwinConfig(**sizes, window_size=12, image_size=384)
                yield f"swin_{name}_384", SwinForImageClassification(wide)
            if name != "l":
                for window in (8, 16):
                    config = Swinv2Config(**sizes, window_size=window, image_size=256)
                    suffix = "" if window == 8 else "_w16"
                    yield f"swinv2_{name}{suffix}", Swinv2ForImageClassification(config)


def main():
    print("torch", torch.__version__, "transformers", transformers.__version__)
    for kind, seed in {"vit": 0, "swin": 1, "swinv2": 3}.items():  # draws whose gradients amplify rounding least
        path = Path(__file__).parent / f"{kind}.npz"
        arrays = run(kind, seed)
        np.savez_compressed(path, **arrays)
        print(path.name, path.stat().st_size, {k: v for k, v in arrays.items() if k.endswith("logits")})
    for name, model in counts():
        print(f'    "{name}": {sum(p.numel() for p in model.parameters()):_},')


if __name__ == "__main__":
    main()
