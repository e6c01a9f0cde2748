"""Write tests/golden/reading.npz: what the published processors make of messages and pictures of odd sizes.

Run it in an environment of its own with torch and transformers (they are not dependencies of this project):

    HF_HUB_OFFLINE=1 python tests/golden/make_reading.py

made with torch 2.13.0 (CPU), transformers 5.24.0 and Pillow 13.0.0, the processors that resize by Pillow. It holds
  tokenizer     a tokenizer.json of bytes and marks, as text; template: a chat template, cut down from Qwen2-VL's
  picture0, ... uint8 [H, W, 3]
  qwen/preprocessor, qwen/messages   as text; qwen/ids [n], with <|image_pad|> for each feature; qwen/pixels, qwen/grids
  chameleon/preprocessor, chameleon/text   as text; chameleon/ids [n], with <image> for each code; chameleon/pixels
"""

import json
from pathlib import Path

import numpy as np
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil
from transformers.models.chameleon.processing_chameleon import ChameleonProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

MARKS = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
    *("<|video_pad|>", "<s>", "<image>", "<racm3:break>", "<eoss>", "<reserved08706>"),
    *("<|media_start|>", "<|media_content|>", "<|media_pad|>", "<|media_end|>"),
)
TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
MESSAGES = [
    {"role": "system", "content": "You see."},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "One: "},
            {"type": "image"},
            {"type": "text", "text": " two: "},
            {"type": "image"},
        ],
    },
]
SIZES = (9, 11), (31, 45), (37, 23)  # too small, too large, and between
QWEN = {"patch_size": 2, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 200, "max_pixels": 600}
CHAMELEON = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
TEXT = "What is <image>, and <image>?"


def tokenizer() -> Tokenizer:
    """Bytes, and the marks of three models."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    return found


def wrapped(words: Tokenizer, **names) -> transformers.PreTrainedTokenizerFast:
    """For transformers."""
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", **names}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **named)


def main():
    print("transformers", transformers.__version__)
    draw = np.random.default_rng(0)
    smooth = lambda size: Image.fromarray(draw.integers(0, 256, (5, 4, 3), dtype=np.uint8)).resize(size[::-1], 1)
    noise = lambda size: draw.integers(-40, 40, (*size, 3))
    pictures = [np.clip(np.asarray(smooth(s)).astype(int) + noise(s), 0, 255).astype(np.uint8) for s in SIZES]
    images = [Image.fromarray(picture) for picture in pictures]
    out = {f"picture{i}": picture for i, picture in enumerate(pictures)}
    out |= {"tokenizer": tokenizer().to_str(), "template": TEMPLATE}

    parts = Qwen2VLImageProcessorPil(**QWEN), wrapped(tokenizer()), Qwen2VLVideoProcessor()
    processor = Qwen2VLProcessor(*parts, chat_template=TEMPLATE)
    text = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
    seen = processor(images=images[:2], text=[text], return_tensors="np")
    out |= {
        "qwen/preprocessor": json.dumps(QWEN | {"image_processor_type": "Qwen2VLImageProcessor"}),
        "qwen/messages": json.dumps(MESSAGES),
        "qwen/ids": np.asarray(seen["input_ids"][0], np.int32),
        "qwen/pixels": np.asarray(seen["pixel_values"], np.float32),
        "qwen/grids": np.asarray(seen["image_grid_thw"], np.int32),
    }

    words = tokenizer()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", words.token_to_id("<s>"))]
    )
    names = {"bos_token": "<s>", "sep_token": "<reserved08706>"}
    processor = ChameleonProcessor(
        ChameleonImageProcessorPil(**CHAMELEON), wrapped(words, **names), image_seq_length=64
    )
    seen = processor(images=images[1:], text=TEXT, return_tensors="np")
    out |= {
        "chameleon/tokenizer": words.to_str(),
        "chameleon/preprocessor": json.dumps(CHAMELEON | {"image_processor_type": "ChameleonImageProcessor"}),
        "chameleon/text": TEXT,
        "chameleon/ids": np.asarray(seen["input_ids"][0], np.int32),
        "chameleon/pixels": np.asarray(seen["pixel_values"], np.float32),
    }
    path = Path(__file__).parent / "reading.npz"
    np.savez_compressed(path, **out)
    print(path.name, path.stat().st_size, {key: getattr(value, "shape", "") for key, value in out.items()})


if __name__ == "__main__":
    main()
