"""Write the golden values of tests/nets/test_vision_language.py: tiny Qwen2-VL, Qwen2.5-VL, Kimi-VL.

Run it in an environment of its own with torch and transformers (they are not dependencies of this project):

    HF_HUB_OFFLINE=1 python tests/golden/make_vision_language.py [NAME ...]

made with torch 2.13.0 (CPU) and transformers 5.24.0, eager attention. In qwen2_vl.npz, qwen25_vl.npz and kimi_vl.npz
  weight/NAME   float16 tensors under the published names, computed with as float32
  CASE/config   the config.json, as text
  CASE/ids      [B, T] token ids, in which 38 stands for a feature of an image
  CASE/pixels   float16 [patches of all images, numbers of a patch], CASE/grids [images, 3], CASE/rows [images]: whose
  CASE/seconds [images], how much time a frame covers (qwen25_vl, video)
  CASE/positions [3, B, T] of M-RoPE, CASE/features [features of all images, D], CASE/logits [B, T, V]
  CASE/loss, CASE/grad/NAME   next-token cross-entropy of targets that are text, its gradients (the first case)
Kimi-VL has no class there: Kimi-K2.5's is the same for images. Its patches come row by row; those of Qwen in merged
order. What transformers writes for it is not what is published (5.24 turns the decoder's queries as if they were the
tower's), so the decoder is saved as the DeepSeek-V3 that it is, under Kimi-VL's prefix. Printed last: parameter counts.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from make_networks import on_disk, randomise
from make_transformers import rope

IMAGE, VIDEO = 38, 39
TEXT = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 64}  # fmt: skip
QWEN_TEXT = TEXT | {"rope_parameters": {**rope()["rope_parameters"], "mrope_section": [1, 1, 2]}}
KIMI_TEXT = TEXT | rope() | {
    "model_type": "deepseek_v3", "num_key_value_heads": 2, "moe_intermediate_size": 12, "num_experts_per_tok": 2,
    "kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
    "n_routed_experts": 4, "n_shared_experts": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
PATCHES = {"patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2}
MODELS = {  # transformers' names, vision_config, text_config, further fields
    "qwen2_vl": ("Qwen2VL", PATCHES | {"depth": 2, "embed_dim": 16, "hidden_size": 16, "mlp_ratio": 2}, QWEN_TEXT, {}),
    "qwen25_vl": (
        "Qwen2_5_VL",
        PATCHES | {"depth": 3, "hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 24, "window_size": 8,
                   "fullatt_block_indexes": [1], "tokens_per_second": 2},
        QWEN_TEXT, {},
    ),
    "kimi_vl": (
        "Kimi_K25",
        {"patch_size": 2, "pos_emb_height": 5, "pos_emb_width": 5, "hidden_size": 16, "num_attention_heads": 2,
         "num_hidden_layers": 2, "intermediate_size": 24},
        KIMI_TEXT, {"projection_hidden_size": 16},
    ),
}  # fmt: skip
CASES = {  # grids of the images of each row
    "images": [[(1, 4, 6), (1, 2, 4)], [(1, 6, 4)]],
    "large": [[(1, 6, 10)]],
    "video": [[(2, 4, 2), (1, 2, 2)]],
    "timed": [[(3, 8, 2), (2, 4, 4)]],  # frames at 0, 1, 3 and 0, 1
}
SECONDS = {"timed": [0.75, 0.5]}
OF = {"qwen2_vl": ("images", "video"), "qwen25_vl": ("large", "timed"), "kimi_vl": ("images",)}


def tokens(rows, draw):
    """Rows of equal length: words, the features of an image, words, ..."""
    parts = [[t * h * w // 4 for t, h, w in grids] for grids in rows]
    width = max(sum(sizes) + 3 * len(sizes) for sizes in parts) + 2
    ids = draw.integers(0, IMAGE, (len(rows), width))
    for row, sizes in zip(ids, parts, strict=True):
        at = 0
        for size in sizes:
            row[at + 3 : at + 3 + size] = IMAGE
            at += 3 + size
    return ids


def published(name, model, config):
    """The checkpoint as it is published."""
    if name != "kimi_vl":
        return on_disk(model)
    tower = {key: value for key, value in on_disk(model).items() if "language_model" not in key}
    decoder = transformers.DeepseekV3ForCausalLM(config.text_config)
    decoder.model.load_state_dict(model.model.language_model.state_dict())
    decoder.lm_head.load_state_dict(model.lm_head.state_dict())
    return tower | {f"language_model.{key}": value for key, value in on_disk(decoder).items()}


def run(name, case, model, config, draw):
    """The arrays of one case; with gradients the model's parameters become them."""
    rows = CASES[case]
    grids = torch.tensor([grid for row in rows for grid in row])
    ids = tokens(rows, draw)
    kimi = name == "kimi_vl"
    size = (3, 2, 2) if kimi else (24,)
    pixels = draw.normal(size=(int(grids.prod(1).sum()), *size)).astype(np.float16)
    values, given = torch.tensor(pixels.astype(np.float32)), torch.tensor(ids)
    timed = SECONDS.get(case)
    if timed:
        given = torch.where(given == IMAGE, VIDEO, given)
        where = {"video_grid_thw": grids, "second_per_grid_ts": torch.tensor(timed)}
        seen = {"pixel_values_videos": values, **where}
    else:
        where = {"image_grid_thw": grids}
        seen = {"pixel_values": values, **where}
    positions = torch.arange(ids.shape[1]).expand(3, *ids.shape)
    if not kimi:
        seen["mm_token_type_ids"] = (given == IMAGE).int() + 2 * (given == VIDEO).int()
        positions = model.model.get_rope_index(given, seen["mm_token_type_ids"], **where)[0]
    logits = model(input_ids=given, use_cache=False, **seen).logits
    of = model.model.get_video_features if timed else model.model.get_image_features
    found = of(values, grids).pooler_output
    out = {
        "config": json.dumps(config.to_dict(), sort_keys=True, default=str),
        "ids": ids.astype(np.int32),
        "pixels": pixels.reshape(len(pixels), -1),
        "grids": grids.numpy(),
        "rows": np.repeat(np.arange(len(rows)), [len(row) for row in rows]),
        "positions": positions.numpy(),
        "features": torch.cat(list(found)).detach().numpy(),
        "logits": logits.detach().numpy(),
    }
    if timed:
        out["seconds"] = np.array(timed, np.float32)
    if case == OF[name][0]:
        targets = given[:, 1:].masked_fill(given[:, 1:] == IMAGE, -100)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
        loss.backward()
        held = {key: p.detach().clone() for key, p in model.named_parameters()}
        for p in model.parameters():
            p.data = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        out["loss"] = loss.detach().numpy()
        out |= {f"grad/{key}": value for key, value in published(name, model, config).items() if "_bias" not in key}
        for key, p in model.named_parameters():
            p.data = held[key]
    return out


def build(name, vision=None, text=None, **options):
    """(model, config)."""
    kind, sizes, own, more = MODELS[name]
    own = own if text is None else text
    config = getattr(transformers, f"{kind}Config")(
        vision_config=sizes if vision is None else vision, text_config=own, attn_implementation="eager",
        **{"image_token_id": IMAGE, "video_token_id": VIDEO, "tie_word_embeddings": False, **more, **options},
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config), config


def counts():
    """Parameters of published sizes; Kimi-VL's without the decoder."""
    mrope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
    text = lambda *sizes: mrope | dict(zip(("hidden_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "intermediate_size", "vocab_size"), sizes, strict=True))  # fmt: skip
    seven = text(3584, 28, 28, 4, 18944, 152064)
    second = lambda out: {"hidden_size": out}
    third = lambda out: {"hidden_size": 1280, "out_hidden_size": out, "intermediate_size": 3420}
    sizes = {
        "qwen2_vl_2b": ("qwen2_vl", second(1536), text(1536, 28, 12, 2, 8960, 151936), True),
        "qwen2_vl_7b": ("qwen2_vl", second(3584), seven, False),
        "qwen2_vl_72b": ("qwen2_vl", second(8192), text(8192, 80, 64, 8, 29568, 152064), False),
        "qwen25_vl_3b": ("qwen25_vl", third(2048), text(2048, 36, 16, 2, 11008, 151936), True),
        "qwen25_vl_7b": ("qwen25_vl", third(3584), seven, False),
    }
    with torch.device("meta"):
        for size, (name, vision, words, tied) in sizes.items():
            yield size, build(name, vision, words, tie_word_embeddings=tied)[0]
        kimi = build("kimi_vl", {}, KIMI_TEXT | {"hidden_size": 2048}, projection_hidden_size=1152)[0].model
        yield "moonvit_so_400m", torch.nn.ModuleList([kimi.vision_tower, kimi.mm_projector])


def main(names):
    print("torch", torch.__version__, "transformers", transformers.__version__)
    for seed, name in enumerate(MODELS, 70):
        if names and name not in names:
            continue
        torch.manual_seed(0)
        model, config = build(name)
        model = model.float().eval()
        randomise(model, seed)
        out = {f"weight/{key}": value.astype(np.float16) for key, value in published(name, model, config).items()}
        draw = np.random.default_rng(seed)
        for case in OF[name]:
            out |= {f"{case}/{key}": value for key, value in run(name, case, model, config, draw).items()}
        path = Path(__file__).parent / f"{name}.npz"
        np.savez_compressed(path, **out)
        print(path.name, path.stat().st_size, [key for key in out if key.startswith("weight")][:4])
    if not names:
        for name, model in counts():
            print(f'    "{name}": {sum(p.numel() for p in model.parameters()):_},')


if __name__ == "__main__":
    main(sys.argv[1:])
