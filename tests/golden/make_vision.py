"""Write the golden values of networks for pictures: tiny random classifiers and a VQ-GAN, their torch outputs.

Run it in an environment of its own with torch and transformers (they are not dependencies of this project):

    HF_HUB_OFFLINE=1 python tests/golden/make_vision.py

made with torch 2.13.0 (CPU) and transformers 5.24.0. In vit.npz, swin.npz and swinv2.npz
  weight/NAME   float16 parameters under the names that save_pretrained writes, computed with as float32
  CASE/images, CASE/logits   [B, H, W, C] float16 and [B, classes] float32; CASE names a size, or a setting
  plain/labels, plain/loss, plain/d_images, plain/grad/NAME   mean cross-entropy and its gradients; those of swinv2 in
                float64, as its sharp cosine attention amplifies rounding: plain/rounding is JSON, name (or d_images) ->
                how far torch's own in float32 are from them, in shares of the largest
  resized/images, resized/logits   swin: windows of 6 with tables by torch's bicubic interpolation
In vision_configs.npz the config.json that save_pretrained writes, by network: of the files above, of a tiny SAM, and of
published sizes with names of classes. In vqgan.npz, weights from a seed (drawn.py)
  names        JSON, name -> shape in the state_dict of `VQGAN`, as the released vqgan.ckpt has them
  pictures     [2, 3, 16, 16]; ids: what they are quantised to [2, 4, 4]; again: what is put together from these
  other, made  ids [2, 4, 4] of no picture, and the picture of them
`VQGAN` is written here from the structure of Esser et al. 2020 (arXiv:2012.09841) as taming-transformers builds it,
with the names of its modules; transformers has the encoder alone. Printed last: parameters of the published sizes.
"""

import copy
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from drawn import drawn
from safetensors.numpy import load_file, save_file
from torch import nn
from transformers import (
    SamConfig,
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
FILES = {  # class, config, the sizes of other images
    "vit": (ViTForImageClassification, ViTConfig(**VIT), {"resized": (24, 20)}),
    "swin": (SwinForImageClassification, SwinConfig(**SWIN), {"odd": (27, 30), "small": (16, 24)}),
    "swinv2": (Swinv2ForImageClassification, Swinv2Config(**SWIN), {"wide": (18, 31)}),
}
_SWINS = {"t": (96, (2, 2, 6, 2), (3, 6, 12, 24)), "s": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
          "b": (128, (2, 2, 18, 2), (4, 8, 16, 32)), "l": (192, (2, 2, 18, 2), (6, 12, 24, 48))}  # fmt: skip
_VITS = {"ti16": (16, 192, 12, 3), "s16": (16, 384, 12, 6), "s32": (32, 384, 12, 6), "b16": (16, 768, 12, 12),
         "b32": (32, 768, 12, 12), "l16": (16, 1024, 24, 16), "l32": (32, 1024, 24, 16),
         "h14": (14, 1280, 32, 16)}  # fmt: skip
NAMED = {"id2label": {0: "cat", 1: "dog", 2: "bird"}, "label2id": {"cat": 0, "dog": 1, "bird": 2}}
SAM_TINY = {  # of make_sam.py
    "vision_config": {"hidden_size": 8, "output_channels": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
                      "mlp_dim": 16, "image_size": 16, "patch_size": 4, "window_size": 3,
                      "global_attn_indexes": [1, 3], "num_pos_feats": 8},
    "prompt_encoder_config": {"hidden_size": 16, "image_size": 16, "patch_size": 4},
    "mask_decoder_config": {"hidden_size": 16, "num_attention_heads": 2, "mlp_dim": 16, "iou_head_hidden_dim": 8},
}  # fmt: skip
CONFIGS = {  # network -> its config, and the class that it is of
    **{kind: (config, cls.__name__) for kind, (cls, config, *_) in FILES.items()},
    "vit_b16": (ViTConfig(**NAMED), "ViTForImageClassification"),
    "vit_b32": (ViTConfig(patch_size=32), "ViTModel"),
    "swin_t": (SwinConfig(**NAMED), "SwinForImageClassification"),
    "swinv2_b_w16": (
        Swinv2Config(**NAMED, window_size=16, image_size=256, pretrained_window_sizes=[12, 12, 12, 6], embed_dim=128,
                     depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32]),
        "Swinv2ForImageClassification",
    ),
    "sam_tiny": (SamConfig(**SAM_TINY), "SamModel"),
    "sam_vit_b": (SamConfig(), "SamModel"),
}  # fmt: skip


def said(config, name):
    """The config.json that a model of this class would come with."""
    config.architectures = [name]
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return (Path(folder) / "config.json").read_text()


def conv(old, new, size=3, **options):
    return nn.Conv2d(old, new, size, padding=size // 2, **options)


class Residual(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), x by a 1 x 1 convolution where channels change."""

    def __init__(self, old, new):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, old, eps=1e-6), conv(old, new)
        self.norm2, self.conv2 = nn.GroupNorm(32, new, eps=1e-6), conv(new, new)
        self.nin_shortcut = conv(old, new, 1) if old != new else nn.Identity()

    def forward(self, x):
        y = self.conv1(nn.functional.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(nn.functional.silu(self.norm2(y)))


class Attention(nn.Module):
    """x + one head over all places."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (conv(width, width, 1) for _ in range(4))

    def forward(self, x):
        normed = self.norm(x)
        q, k, v = (part(normed).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = torch.softmax(q @ k.transpose(1, 2) / x.shape[1] ** 0.5, dim=-1) @ v
        return x + self.proj_out(y.transpose(1, 2).reshape(x.shape))


def middle(width):
    parts = {"block_1": Residual(width, width), "attn_1": Attention(width), "block_2": Residual(width, width)}
    return nn.ModuleDict(parts)


def resampler(width, **options):
    return nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, **options)})


class Encoder(nn.Module):
    def __init__(self, channels, multipliers, blocks, latent):
        super().__init__()
        self.conv_in, self.down, width = conv(3, channels), nn.ModuleList(), channels
        for i, times in enumerate(multipliers):
            widths = [width, *[channels * times] * blocks]
            level = {"block": nn.ModuleList(map(Residual, widths[:-1], widths[1:]))}
            width = channels * times
            if i + 1 < len(multipliers):
                level["downsample"] = resampler(width, stride=2)
            self.down.append(nn.ModuleDict(level))
        self.mid, self.norm_out, self.conv_out = middle(width), nn.GroupNorm(32, width, eps=1e-6), conv(width, latent)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            for block in level["block"]:
                x = block(x)
            if "downsample" in level:
                x = level["downsample"]["conv"](nn.functional.pad(x, (0, 1, 0, 1)))
        for part in self.mid.values():
            x = part(x)
        return self.conv_out(nn.functional.silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, channels, multipliers, blocks, latent):
        super().__init__()
        width = channels * multipliers[-1]
        self.conv_in, self.mid, levels = conv(latent, width), middle(width), []
        for i, times in reversed(list(enumerate(multipliers))):  # the lowest resolution first, which is called last
            widths = [width, *[channels * times] * (blocks + 1)]
            level = {"block": nn.ModuleList(map(Residual, widths[:-1], widths[1:]))}
            width = channels * times
            if i:
                level["upsample"] = resampler(width, padding=1)
            levels.insert(0, nn.ModuleDict(level))
        self.up, self.norm_out, self.conv_out = nn.ModuleList(levels), nn.GroupNorm(32, width, eps=1e-6), conv(width, 3)

    def forward(self, x):
        x = self.conv_in(x)
        for part in self.mid.values():
            x = part(x)
        for level in reversed(self.up):
            for block in level["block"]:
                x = block(x)
            if "upsample" in level:
                x = level["upsample"]["conv"](nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(nn.functional.silu(self.norm_out(x)))


class VQGAN(nn.Module):
    def __init__(self, codes, width, channels, multipliers, blocks, latent):
        super().__init__()
        self.encoder, self.decoder = (cls(channels, multipliers, blocks, latent) for cls in (Encoder, Decoder))
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(codes, width)})
        self.quant_conv, self.post_quant_conv = conv(latent, width, 1), conv(width, latent, 1)

    def encode(self, pictures):
        z = self.quant_conv(self.encoder(pictures)).permute(0, 2, 3, 1)
        return torch.cdist(z.flatten(0, 2), self.quantize["embedding"].weight).argmin(1).reshape(z.shape[:3])

    def decode(self, ids):
        return self.decoder(self.post_quant_conv(self.quantize["embedding"](ids).permute(0, 3, 1, 2)))


def vqgan():
    """The arrays of vqgan.npz."""
    model, draw = VQGAN(12, 6, 32, (1, 2, 1), 1, 4), np.random.default_rng(0)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict({name: torch.tensor(value) for name, value in drawn(shapes, 8).items()})
    pictures, other = draw.uniform(-1, 1, (2, 3, 16, 16)).astype(np.float32), draw.integers(0, 12, (2, 4, 4))
    with torch.no_grad():
        ids = model.encode(torch.tensor(pictures))
        again, made = model.decode(ids).numpy(), model.decode(torch.tensor(other)).numpy()
    return {"names": json.dumps(shapes), "pictures": pictures, "ids": ids.numpy(), "again": again, "other": other,
            "made": made}  # fmt: skip


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


def rewindowed(model, window):
    """A Swin with other windows, its tables interpolated as the authors' load_pretrained does."""
    other = SwinForImageClassification(SwinConfig(**SWIN | {"window_size": window, "image_size": 4 * window})).eval()
    weights = {name: value for name, value in model.state_dict().items() if "relative_position_index" not in name}
    for name, table in weights.items():
        if name.endswith("table"):
            old, side = round(len(table) ** 0.5), 2 * window - 1
            grid = table.T.reshape(1, -1, old, old)
            grid = nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
            weights[name] = grid.reshape(-1, side * side).T
    other.load_state_dict(weights, strict=False)
    return other


def run(kind, seed):
    """The arrays of one file."""
    cls, config, sizes = FILES[kind]
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
    out |= {"plain/labels": labels.numpy(), "plain/loss": loss.detach().numpy()}
    if kind == "swin":
        with torch.no_grad():
            out |= stored("resized", z := images(24, 24), logits(rewindowed(model, 6), z))
    found = {name: p.grad for name, p in model.named_parameters()} | {"d_images": x.grad}
    if kind == "swinv2":
        exact, wide = copy.deepcopy(model).double(), x.detach().double().requires_grad_()
        exact.zero_grad()
        torch.nn.functional.cross_entropy(logits(exact, wide), labels).backward()
        rough, found = found, {name: p.grad for name, p in exact.named_parameters()} | {"d_images": wide.grad}
        far = {name: float((rough[name] - g).abs().max() / g.abs().max()) for name, g in found.items()}
        out["plain/rounding"] = json.dumps(far)
    out["plain/d_images"] = found.pop("d_images").numpy().astype(np.float32)
    return out | {f"plain/grad/{name}": value for name, value in on_disk(model, found).items()}


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
            else:
                first = Swinv2Config(**sizes | {"num_labels": 21841}, window_size=12, image_size=192)
                yield "swinv2_l_w12", Swinv2ForImageClassification(first)
                later = {"window_size": 24, "image_size": 384, "pretrained_window_sizes": [12, 12, 12, 6]}
                yield "swinv2_l_w24_384", Swinv2ForImageClassification(Swinv2Config(**sizes, **later))


def main():
    print("torch", torch.__version__, "transformers", transformers.__version__)
    for kind, seed in {"vit": 0, "swin": 1, "swinv2": 3}.items():  # draws whose gradients amplify rounding least
        path = Path(__file__).parent / f"{kind}.npz"
        arrays = run(kind, seed)
        np.savez_compressed(path, **arrays)
        print(path.name, path.stat().st_size, {k: v for k, v in arrays.items() if k.endswith("logits")})
    np.savez_compressed(Path(__file__).parent / "vision_configs.npz", **{k: said(*v) for k, v in CONFIGS.items()})
    arrays = vqgan()
    np.savez_compressed(Path(__file__).parent / "vqgan.npz", **arrays)
    print("vqgan", {name: np.shape(value) for name, value in arrays.items()}, np.unique(arrays["ids"]))
    for name, model in counts():
        print(f'    "{name}": {sum(p.numel() for p in model.parameters()):_},')


if __name__ == "__main__":
    main()
