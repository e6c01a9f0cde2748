"""Write the golden values of tests/nets/test_sam.py: a tiny random SAM, its torch outputs and gradients.

Run it in an environment of its own with torch and transformers (they are not dependencies of this project):

    HF_HUB_OFFLINE=1 python tests/golden/make_sam.py

made with torch 2.13.0 (CPU) and transformers 5.24.0. sam.npz holds, for the sizes of `SIZES["tiny"]`,
  names           JSON, checkpoint name -> shape, as save_pretrained writes them, in the order of the next two
  weights, grads  their values one after another, float16 (computed with as float64) and float32
  count/SIZE      parameters of the published sizes
  images          [2, 3, 16, 16]; embeddings [2, 16, 4, 4] of them
  CASE/points, CASE/labels, CASE/boxes, CASE/masks   prompts, those that the case has
  CASE/logits, CASE/ious     the single mask and the three, [B, P, 4, 16, 16] and [B, P, 4], P prompts of an image
  loss            whose gradients these are, of "point_mask" and "box": sum(cos(n) logits_n) / 10 + sum(cos(n) ious_n)
  resized         the single mask of "mask" brought to 64 x 64, cut to 64 x 40, brought to 50 x 31
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file
from transformers import SamConfig, SamModel

VISION = {"hidden_size": 8, "output_channels": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "mlp_dim": 16,
          "image_size": 16, "patch_size": 4, "window_size": 3, "global_attn_indexes": [1, 3],
          "num_pos_feats": 8}  # fmt: skip
PROMPT = {"hidden_size": 16, "image_size": 16, "patch_size": 4, "mask_input_channels": 16}
DECODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 16,
           "iou_head_hidden_dim": 8}  # fmt: skip
PUBLISHED = {"vit_b": (768, 12, 12), "vit_l": (1024, 24, 16), "vit_h": (1280, 32, 16)}


def count(width, layers, heads):
    """Parameters of a published size."""
    every = layers // 4
    vision = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    with torch.device("meta"):
        model = SamModel(
            SamConfig(vision_config=vision | {"global_attn_indexes": list(range(every - 1, layers, every))})
        )
    return sum(p.numel() for p in model.parameters())


def answer(model, images, prompts):
    """Logits and IoUs of the single mask and the three, under one axis."""
    given = {f"input_{name}": torch.tensor(x if name == "labels" else np.float64(x)) for name, x in prompts.items()}
    embeddings = model.vision_encoder(images).last_hidden_state
    single, several = (model(image_embeddings=embeddings, multimask_output=m, **given) for m in (False, True))
    logits = torch.cat([single.pred_masks, several.pred_masks], dim=2)
    return embeddings, logits, torch.cat([single.iou_scores, several.iou_scores], dim=2)


def waves(x):
    return torch.cos(torch.arange(x.numel(), dtype=torch.float64)).reshape(x.shape)


def main():
    print("torch", torch.__version__, "transformers", transformers.__version__)
    draw = np.random.default_rng(0)
    normal = lambda *shape: draw.normal(size=shape).astype(np.float16).astype(np.float32)
    config = SamConfig(vision_config=VISION, prompt_encoder_config=PROMPT, mask_decoder_config=DECODER)
    config._attn_implementation = "eager"
    model = SamModel(config).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            p.copy_(torch.tensor((centre + 0.4 * normal(*p.shape)).astype(np.float16).astype(np.float32)))
    arrays = {f"count/{name}": np.array(count(*size)) for name, size in PUBLISHED.items()}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        stored = load_file(Path(folder) / "model.safetensors")
    arrays["names"] = np.array(json.dumps({name: stored[name].shape for name in sorted(stored)}))
    arrays["weights"] = np.concatenate([stored[name].astype(np.float16).ravel() for name in sorted(stored)])
    arrays["images"] = normal(2, 3, 16, 16).astype(np.float16)
    images = torch.tensor(arrays["images"].astype(np.float64))

    points, labels = 15 * draw.random((2, 2, 3, 2)).astype(np.float32), np.array([[[1, 0, 1], [0, 1, 1]]] * 2)
    boxes, masks = np.array([[[2.0, 3.0, 9.5, 12.0]]], np.float32), 3 * normal(1, 1, 16, 16)
    first = {"points": points[:1, :1], "labels": labels[:1, :1]}
    cases = {
        "points": (slice(0, 2), {"points": points, "labels": labels}),
        "box": (slice(1, 2), {"boxes": boxes}),
        "points_box": (slice(0, 1), first | {"boxes": boxes}),
        "mask": (slice(0, 1), {"masks": masks}),
        "point_mask": (slice(0, 1), first | {"masks": masks}),
        "box_mask": (slice(1, 2), {"boxes": boxes, "masks": masks}),
    }
    total = 0.0
    for case, (rows, prompts) in cases.items():
        embeddings, logits, ious = answer(model, images[rows], prompts)
        arrays |= {f"{case}/{name}": value for name, value in prompts.items()}
        arrays |= {f"{case}/logits": logits.detach().numpy(), f"{case}/ious": ious.detach().numpy()}
        if case == "points":
            arrays["embeddings"] = embeddings.detach().numpy()
        if case in ("point_mask", "box"):
            total = total + (waves(logits) * logits).sum() / 10 + (waves(ious) * ious).sum()
    total.backward()
    arrays["loss"] = total.detach().numpy()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
    arrays["grads"] = np.concatenate([gradients[name].ravel() for name in sorted(stored)])
    resize = lambda x, size: torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)
    single = torch.tensor(arrays["mask/logits"][:, 0, :1])
    arrays["resized"] = resize(resize(single, (64, 64))[..., :40], (50, 31))[0, 0].numpy()
    arrays = {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in arrays.items()}
    path = Path(__file__).parent / "sam.npz"
    np.savez_compressed(path, **arrays)
    print(path.name, path.stat().st_size, [(k, v.shape) for k, v in arrays.items()])


if __name__ == "__main__":
    main()
