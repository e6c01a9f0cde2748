"""Pairs and labelled responses: what is trained, where the prompt ends, in text and in chat form."""

import json

import numpy as np
import pytest

from jaxrl.data.chat import chatml, jinja
from jaxrl.data.preferences import encode_labelled, encode_pairs, with_prompt
from jaxrl.data.records import encode_examples, encode_prompts
from jaxrl.data.sources import Line
from jaxrl.data.tokenizer import ByteTokenizer, CharTokenizer, HuggingFaceTokenizer

DIGITS = CharTokenizer("0123456789+=")
EOS, PAD = 13, 14
BYTES = ByteTokenizer()
PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def says(role, content):
    return {"role": role, "content": content}


TALK = [says("system", "be brief"), says("user", "hi"), says("assistant", "ho"), says("user", "bye")]


def trained(batch, row, tokenizer=BYTES):
    """The trained tokens of a row, as text with special tokens shown."""
    return "".join(tokenizer.token_text(int(t)) for t in batch.tokens[row][batch.loss_mask[row] == 1])


def read(batch, row, tokenizer=BYTES):
    """What stands before the trained tokens of a row."""
    start = int(batch.loss_mask[row].argmax())
    return "".join(tokenizer.token_text(int(t)) for t in batch.tokens[row][:start])


# Pairs


def test_responses_are_trained_with_their_eos_in_one_width():
    records = [{"prompt": "1+1=", "chosen": "2", "rejected": "345"}, {"prompt": "2=", "chosen": "2", "rejected": "3"}]
    pairs = encode_pairs(records, DIGITS)
    np.testing.assert_array_equal(
        pairs.chosen.tokens, [[1, 10, 1, 11, 2, EOS, PAD, PAD], [2, 11, 2, EOS, PAD, PAD, PAD, PAD]]
    )
    np.testing.assert_array_equal(pairs.chosen.loss_mask, [[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(pairs.rejected.tokens[0], [1, 10, 1, 11, 3, 4, 5, EOS])
    np.testing.assert_array_equal(pairs.rejected.loss_mask[0], [0, 0, 0, 0, 1, 1, 1, 1])
    assert pairs.margin is None and pairs.chosen.segments is None
    assert pairs.chosen.tokens.dtype == np.int32 and pairs.chosen.loss_mask.dtype == np.float32
    assert encode_pairs(records, DIGITS, pad_to=9).rejected.tokens.shape == (2, 9)


def test_eos_is_trained_where_padding_is_eos():
    class PadIsEos(CharTokenizer):
        pad_id = EOS  # pyright: ignore

    pairs = encode_pairs([{"prompt": "1", "chosen": "2", "rejected": "34"}], PadIsEos("0123456789+="))
    np.testing.assert_array_equal(pairs.chosen.tokens, [[1, 2, EOS, EOS]])
    np.testing.assert_array_equal(pairs.chosen.loss_mask, [[0, 1, 1, 0]])


def test_margins_are_kept():
    records = [{"prompt": "1", "chosen": "2", "rejected": "3", "margin": margin} for margin in (1, 0.5, -2.0)]
    margin = encode_pairs(records, DIGITS).margin
    np.testing.assert_array_equal(margin, [1.0, 0.5, -2.0])
    assert margin.dtype == np.float32


@pytest.mark.parametrize("form", ["explicit", "implicit", "text prompt", "text responses"])
def test_every_way_to_write_a_conversation_gives_the_same_pair(form):
    """Of a conversation only the last answer is trained, not the assistant's turn inside the prompt."""
    chosen, rejected = says("assistant", "see you"), says("assistant", "go")
    record = {
        "explicit": {"prompt": TALK, "chosen": [chosen], "rejected": [rejected]},
        "implicit": {"chosen": [*TALK, chosen], "rejected": [*TALK, rejected]},
        "text prompt": {"prompt": "bye", "chosen": [*TALK, chosen], "rejected": [*TALK, rejected]},
        "text responses": {"prompt": TALK, "chosen": "see you", "rejected": "go"},
    }[form]
    pairs = encode_pairs([record], BYTES)
    assert trained(pairs.chosen, 0) == "see you<eos>" and trained(pairs.rejected, 0) == "go<eos>"
    prompt = chatml(TALK, BYTES, add_generation_prompt=True)[0]
    for side in (pairs.chosen, pairs.rejected):
        assert side.tokens[0][: len(prompt)].tolist() == prompt and not side.loss_mask[0][: len(prompt)].any()


def test_of_a_response_of_several_turns_the_assistants_are_trained():
    tail = [says("user", "more"), says("assistant", "all")]
    record = {"prompt": TALK, "chosen": [says("assistant", "a"), *tail], "rejected": [says("assistant", "b"), *tail]}
    pairs = encode_pairs([record], BYTES)
    assert trained(pairs.chosen, 0) == "a<eos>all<eos>" and trained(pairs.rejected, 0) == "b<eos>all<eos>"
    assert pairs.chosen.tokens[0][-1] == BYTES.eos_id


@pytest.mark.parametrize("source", [PLAIN, TAGGED])
def test_templates_agree_on_what_is_trained(folder, source):
    """In every form, the sampler's prompt is the beginning, and the rest is the response with its EOS."""
    tokenizer = HuggingFaceTokenizer(str(folder))
    template = jinja(source, eos_token="<|im_end|>")
    record = {"prompt": TALK, "chosen": [says("assistant", "see")], "rejected": [says("assistant", "go")]}
    labelled = {"prompt": TALK, "completion": [says("assistant", "see")], "label": True}
    pairs = encode_pairs([record], tokenizer, template=template)
    examples = encode_examples(
        [{"messages": [*TALK, says("assistant", "see")]}, labelled], tokenizer, template=template
    )
    judged = encode_labelled([labelled], tokenizer, template=template)
    prompt = encode_prompts([record], tokenizer, template=template)[0][0].tolist()
    answer = {PLAIN: "see\n<|im_end|>", TAGGED: "see<|im_end|>"}[source]
    for batch, row in ((pairs.chosen, 0), (examples, 1), (judged.examples, 0)):
        assert trained(batch, row, tokenizer) == answer
        assert batch.tokens[row][: len(prompt)].tolist() == prompt
        assert int(batch.loss_mask[row].argmax()) == len(prompt)
    assert trained(examples, 0, tokenizer).endswith(answer) and "ho" in trained(examples, 0, tokenizer)


def test_the_tokenisers_own_template_is_the_default(folder):
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": "<|im_end|>", "pad_token": "<|pad|>", "chat_template": PLAIN}))
    tokenizer = HuggingFaceTokenizer(str(folder))
    record = {"prompt": TALK[1:2], "chosen": "see", "rejected": "go"}
    pairs = encode_pairs([record], tokenizer)
    assert read(pairs.chosen, 0, tokenizer) == "[user]hi\n[assistant]"
    assert read(encode_pairs([record], tokenizer, template=chatml).chosen, 0, tokenizer).startswith("<|im_start|>user")


def test_tools_go_to_a_template_that_takes_them():
    seen = []

    def template(messages, tokenizer, *, add_generation_prompt=False, tools=None):
        seen.append(tools)
        return chatml(messages, tokenizer, add_generation_prompt=add_generation_prompt)

    tools = [{"type": "function", "function": {"name": "add"}}]
    record = {"prompt": TALK, "chosen": "a", "rejected": "b", "tools": tools}
    encode_pairs([record], BYTES, template=template)
    encode_examples([{"messages": TALK[:3], "tools": tools}], BYTES, template=template)
    assert seen and all(given == tools for given in seen)
    seen.clear()
    encode_examples([{"messages": TALK[:3], "tools": None}], BYTES, template=template)
    assert seen == [None]


def test_a_template_that_rewrites_its_prompt_is_refused():
    source = (
        "{% for m in messages %}{{ loop.length }}{% if m.role == 'assistant' %}:{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    record = {"prompt": [says("user", "hi")], "chosen": "a", "rejected": "b"}
    with pytest.raises(
        ValueError, match="record 0: the chat template writes the prompt differently once 'chosen' foll"
    ):
        encode_pairs([record], BYTES, template=jinja(source))


def test_a_template_that_marks_nothing_is_refused():
    silent = lambda messages, tokenizer, *, add_generation_prompt=False: (
        [len(m["content"]) for m in messages],
        [False] * len(messages),
    )
    record = {"prompt": [says("user", "hi")], "chosen": "a", "rejected": "b"}
    with pytest.raises(ValueError, match="'chosen' trains on nothing"):
        encode_pairs([record], BYTES, template=silent)


def test_with_prompt_leaves_other_records_alone_and_keeps_the_line():
    plain = {"prompt": "1", "chosen": "2", "rejected": "3"}
    assert with_prompt(plain) is plain
    record = Line({"chosen": [*TALK, says("assistant", "a")], "rejected": [*TALK, says("assistant", "b")]}, "x.jsonl:7")
    explicit = with_prompt(record)
    assert explicit == {"prompt": TALK, "chosen": [says("assistant", "a")], "rejected": [says("assistant", "b")]}
    assert explicit.where == "x.jsonl:7"


# Labelled responses


def test_labels_and_masks():
    records = [
        {"prompt": "1+1=", "completion": "2", "label": True},
        {"prompt": "1=", "completion": "3", "label": np.bool_(False)},
    ]
    labelled = encode_labelled(records, DIGITS)
    np.testing.assert_array_equal(labelled.desirable, [True, False])
    assert labelled.desirable.dtype == bool
    expected = encode_examples(records, DIGITS)
    np.testing.assert_array_equal(labelled.examples.tokens, expected.tokens)
    np.testing.assert_array_equal(labelled.examples.loss_mask, expected.loss_mask)
