"""Write tests/golden/peft.npz: adapters of PEFT on the tiny Llama of llama.npz, and their torch logits.

Run it in an environment of its own with torch, transformers and peft (they are not dependencies of this project),
after make_transformers.py:

    HF_HUB_OFFLINE=1 python tests/golden/make_peft.py

Made with torch 2.13.0 (CPU), transformers 5.24.0 and peft 0.21.2. It holds
  ids              token ids [2, 9]
  CASE/config      adapter_config.json as PEFT writes it, its empty fields left out
  CASE/tensor/NAME the tensors of adapter_model.safetensors, or, for prompts and prefixes, of the adapter's module
  CASE/logits      [2, 9, V] float32, of the real tokens
"""

import json
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

HERE = Path(__file__).parent
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TASK = {"task_type": "CAUSAL_LM"}
CASES = {
    "lora": peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], **TASK),
    "rslora": peft.LoraConfig(r=4, lora_alpha=6, target_modules=ALL, use_rslora=True, **TASK),
    "dora": peft.LoraConfig(r=3, lora_alpha=5, target_modules=ALL, use_dora=True, **TASK),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=5, **TASK),
    "mlp": peft.PromptEncoderConfig(
        num_virtual_tokens=5, encoder_reparameterization_type="MLP", encoder_hidden_size=6, **TASK
    ),
    "lstm": peft.PromptEncoderConfig(
        num_virtual_tokens=5, encoder_reparameterization_type="LSTM", encoder_hidden_size=6, encoder_dropout=0.0, **TASK
    ),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=5, **TASK),
    "prefix_mlp": peft.PrefixTuningConfig(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=6, **TASK),
}


def base():
    with np.load(HERE / "llama.npz") as arrays:
        weights = {k.removeprefix("weight/"): arrays[k] for k in arrays if k.startswith("weight/")}
        config = json.loads(str(arrays["plain/config"]))
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, attn_implementation="eager")).eval()
    model.load_state_dict({name: torch.tensor(w.astype(np.float32)) for name, w in weights.items()}, strict=False)
    return model


def main():
    print("torch", torch.__version__, "transformers", transformers.__version__, "peft", peft.__version__)
    draw = np.random.default_rng(0)
    ids = draw.integers(0, 64, (2, 9))
    arrays = {"ids": ids.astype(np.int32)}
    for name, config in CASES.items():
        model = peft.get_peft_model(base(), config).eval()
        low_rank = config.peft_type == "LORA"
        for parameter_name, parameter in model.named_parameters():
            if parameter.requires_grad:
                size = 0.1 if "magnitude" in parameter_name else 0.2
                noise = torch.tensor(draw.normal(0, size, tuple(parameter.shape)).astype(np.float32))
                parameter.data = parameter.data + noise if "magnitude" in parameter_name else noise
        if low_rank:
            tensors = peft.get_peft_model_state_dict(model)
        else:
            tensors = model.prompt_encoder["default"].state_dict()
        logits = model(input_ids=torch.tensor(ids), attention_mask=torch.ones(ids.shape, dtype=torch.int64)).logits
        plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items() if v not in (None, {})}
        arrays[f"{name}/config"] = np.array(json.dumps(plain, sort_keys=True, default=str))
        arrays |= {f"{name}/tensor/{k}": v.detach().numpy() for k, v in tensors.items()}
        arrays[f"{name}/logits"] = logits[:, -ids.shape[1] :].detach().numpy()
        print(name, {k: tuple(v.shape) for k, v in tensors.items()} if not low_rank else len(tensors), logits.shape)
    np.savez_compressed(HERE / "peft.npz", **arrays)


if __name__ == "__main__":
    main()
