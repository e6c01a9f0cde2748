"""Messages with pictures as tokens, and the bank of pictures that the tokens name.

from jaxrl.pretrained import load_vision_language
from jaxrl.reading import batch_of, prompts_of, read

opened = load_vision_language("Qwen2.5-VL-3B-Instruct", dtype="bfloat16")
said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
seen = read(opened, [said], [[picture]], add_generation_prompt=True)
model = with_images(opened.config, seen.bank)
rollout(model, opened.params, prompts_of(seen, opened.tokenizer), key, ...)

Chameleon's pictures are tokens of its own: `read_chameleon`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.data.chat import Message, Template, template_of
from jaxrl.data.records import pad
from jaxrl.data.tokenizer import Tokenizer
from jaxrl.nets.vision.packed import Patches, pack
from jaxrl.nets.vision.prepare import Preparation, prepare, prepare_native
from jaxrl.nets.vision_language import VisionLanguageConfig, image_ids
from jaxrl.nets.weights.chameleon import PLACEHOLDER
from jaxrl.pretrained import Chameleon, VisionLanguage
from jaxrl.types import Prompts, TokenBatch


class Reading(NamedTuple):
    """Conversations as a network with images reads them.

    tokens: of each, in which features are ids after the vocabulary. learnt: of each, which of them an assistant wrote.
    bank: its pictures, a row for each conversation; what `with_images` takes.
    """

    tokens: list[list[int]]
    learnt: list[list[bool]]
    bank: Patches


def read(
    opened: VisionLanguage,
    conversations: Sequence[Sequence[Message]],
    pictures: Sequence[Sequence[Any]],
    *,
    add_generation_prompt: bool = False,
    length: int | None = None,
    template: Template | None = None,
) -> Reading:
    """Tokens and pictures as the published processors of Qwen2-VL, Qwen2.5-VL and Kimi-VL make them. No videos.

    Args:
      opened: the model.
      conversations: messages, whose `content` is a text, or a list of {"type": "image"} and {"type": "text", "text"}.
        A text may also hold `opened.placeholder` where a picture goes.
      pictures: of each conversation, in their order, uint8 [height, width, 3].
      add_generation_prompt: end with the header of an assistant's turn, for sampling.
      length: patches of a row of the bank, so that banks have one shape; None: as many as the longest row has.
      template: in place of the tokenizer's own chat template.

    Raises:
      ValueError: pictures that are not as many as the messages name, are not bytes, or do not fit into `length`; a
        folder that does not say how pictures are prepared, or has no chat template.
    """
    template = template or template_of(opened.tokenizer)
    if template is None:
        raise ValueError("the tokenizer has no chat template: give one, template=jaxrl.data.chat.jinja(source)")
    if len(conversations) != len(pictures):
        raise ValueError(f"{len(conversations)} conversations and pictures of {len(pictures)}; expected as many")
    bank = bank_of(opened.config, opened.preparation, pictures, length)
    tokens, learnt = [], []
    for i, (messages, ids) in enumerate(zip(conversations, image_ids(opened.config, bank), strict=True)):
        flat = [message | {"content": written(message.get("content"), opened.placeholder)} for message in messages]
        row, wrote = template(flat, opened.tokenizer, add_generation_prompt=add_generation_prompt)
        if (named := row.count(opened.image_token)) != len(ids):
            raise ValueError(f"conversation {i} names {named} pictures, and {len(ids)} are given for it")
        whole, origin = expanded(row, opened.image_token, ids)
        tokens.append(whole)
        learnt.append([wrote[at] for at in origin])
    return Reading(tokens, learnt, bank)


def written(content: Any, placeholder: str) -> Any:
    """A message's content as one text: parts that are images are placeholders.

    Raises:
      ValueError: a part that is neither text nor image.
    """
    if not isinstance(content, list | tuple):
        return content
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("image", "text") or (kind == "text" and "text" not in part):
            raise ValueError(
                f"a message holds {part!r}; expected {{'type': 'image'}} or {{'type': 'text', 'text': ...}}"
            )
        parts.append(placeholder if kind == "image" else part["text"])
    return "".join(parts)


def expanded(tokens: Sequence[int], token: int, images: Sequence[Any]) -> tuple[list[int], list[int]]:
    """Each placeholder becomes the ids of its image.

    Args:
      tokens: of one row.
      token: the placeholder, there as often as there are images.
      images: of each the ids, as `image_ids` gives them.

    Returns:
      (the row, at which of `tokens` each stood).
    """
    of = iter(images)
    parts = [[int(i) for i in next(of)] if found == token else [found] for found in tokens]
    return [i for part in parts for i in part], [at for at, part in enumerate(parts) for _ in part]


def bank_of(
    config: VisionLanguageConfig,
    how: Preparation | None,
    pictures: Sequence[Sequence[Any]],
    length: int | None = None,
) -> Patches:
    """The bank of pictures, a row for each sequence of them; as `read` takes them."""
    if how is None:
        raise ValueError("the folder has no preprocessor_config.json, which says how pictures are prepared")
    if how.area is None and how.patches is None:
        raise ValueError(
            "the preparation does not say how large pictures become (no do_resize, or Kimi-K2.5): prepare and pack "
            "them yourself"
        )
    tower = config.vision
    rows = [[prepare_native(how, tower, as_bytes(picture)) for picture in row] for row in pictures]
    counts = [sum(x.shape[0] * x.shape[1] // tower.patch**2 for x in row) for row in rows]
    longest = max(max(counts, default=0), tower.merge**2)
    length = longest if length is None else length
    if longest > length:
        raise ValueError(f"a row of pictures has {longest} patches, expected at most length = {length}")
    # a row without pictures is one of padding
    empty = jax.tree.map(jnp.zeros_like, pack(tower, [jnp.zeros((tower.side, tower.side, tower.channels))], length))
    empty = empty._replace(grids=jnp.ones_like(empty.grids))
    packed = [pack(tower, row, length) if row else empty for row in rows]
    return jax.tree.map(lambda *rows: jnp.concatenate(rows), *packed)


def as_bytes(picture: Any) -> Any:
    """The picture.

    Raises:
      ValueError: floats, of which nobody knows the scale.
    """
    if np.result_type(picture) != np.uint8:
        raise ValueError(f"a picture is of {np.result_type(picture)}, expected uint8, 0 ... 255")
    return picture


def prompts_of(seen: Reading, tokenizer: Tokenizer, width: int | None = None) -> Prompts:
    """For `rollout`; width: of the prompts, None: of the longest."""
    tokens, lengths = pad(seen.tokens, tokenizer, width, left=True)
    return Prompts(jnp.asarray(tokens), jnp.asarray(lengths))


def batch_of(seen: Reading, tokenizer: Tokenizer, width: int | None = None) -> TokenBatch:
    """For `sft`, where what assistants wrote is learnt; width: of the rows, None: of the longest."""
    tokens, lengths = pad(seen.tokens, tokenizer, width, left=False)
    mask = np.zeros(tokens.shape, np.float32)
    for row, learnt in zip(mask, seen.learnt, strict=True):
        row[: len(learnt)] = learnt
    return TokenBatch(jnp.asarray(tokens), jnp.asarray(mask))


def read_chameleon(
    opened: Chameleon, texts: Sequence[str], pictures: Sequence[Sequence[Any]], *, chat: bool = True
) -> list[list[int]]:
    """Tokens of each text, as the published processor makes them: begin, codes row by row, end.

    Args:
      opened: the model.
      texts: with "<image>" where a picture goes.
      pictures: of each text, in their order, uint8 [height, width, 3].
      chat: end with the separator, after which the model answers; without, it goes on with the text.

    Raises:
      ValueError: pictures that are not as many as the text names, or are not bytes; a folder that does not say how
        pictures are prepared.
    """
    words, how = opened.tokenizer, opened.preparation
    if how is None:
        raise ValueError("the folder has no preprocessor_config.json, which says how pictures are prepared")
    token, separator = words.token_id(PLACEHOLDER), getattr(words, "config", {}).get("sep_token")
    if token is None or (chat and separator is None):
        raise ValueError(
            f"the tokenizer lacks {PLACEHOLDER if token is None else 'a sep_token, which chat=True needs'}"
        )
    ending = str(separator["content"] if isinstance(separator, dict) else separator) if chat else ""
    begin = [words.bos_id] if words.bos_id is not None and getattr(words, "adds_bos", False) else []
    found = []
    for i, (text, own) in enumerate(zip(texts, pictures, strict=True)):
        row = begin + words.encode(text + ending)
        if (named := row.count(token)) != len(own):
            raise ValueError(f"text {i} names {named} pictures, and {len(own)} are given for it")
        found.append(expanded(row, token, [chameleon_tokens(opened, how, picture) for picture in own])[0])
    return found


def chameleon_tokens(opened: Chameleon, how: Preparation, picture: Any) -> np.ndarray:
    """One picture as tokens."""
    x = prepare(how, as_bytes(picture))[None]
    codes = jax.jit(_codes, static_argnums=0)(opened.vq, opened.vq_params, x)
    return np.asarray(opened.pictures.embed(codes)[0])


def _codes(vq, params, x):
    return vq.apply({"params": params}, x, method="encode").ids
