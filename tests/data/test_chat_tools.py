import pytest

from jaxrl.data.chat import chatml, jinja
from jaxrl.data.preferences import encode_pairs
from jaxrl.data.records import encode_example
from jaxrl.data.tokenizer import ByteTokenizer

TOOLS = [{"name": "add"}]
SOURCE = (
    "{% if tools %}<{% for t in tools %}{{ t.name }}{% endfor %}>{% endif %}"
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.tool_calls %}{{ m.tool_calls[0] }}{% else %}{{ m.content }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TALK = [
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": None, "tool_calls": ["add(1, 1)"]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "two"},
]


def test_tools_reach_a_jinja_template_and_their_results_are_read_not_trained():
    ids, mask = encode_example({"messages": TALK, "tools": TOOLS}, ByteTokenizer(), template=jinja(SOURCE))
    text = ByteTokenizer().decode(ids)
    assert text == "<add>[user]1+1\n[assistant]add(1, 1)\n[tool]2\n[assistant]two\n"
    trained = ByteTokenizer().decode([i for i, on in zip(ids, mask, strict=True) if on])
    assert trained == "add(1, 1)\ntwo\n"


def test_pairs_with_tools():
    record = {"prompt": TALK[:3], "chosen": "two", "rejected": "3", "tools": TOOLS}
    pairs = encode_pairs([record], ByteTokenizer(), template=jinja(SOURCE))
    assert ByteTokenizer().decode(pairs.chosen.tokens[0][pairs.chosen.loss_mask[0] == 1]) == "two\n"


def test_tools_that_would_not_be_read_are_refused():
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="this chat template writes none"):
        jinja(source)(TALK[:1], ByteTokenizer(), tools=TOOLS)
    with pytest.raises(ValueError, match="message 1 calls tools, which ChatML has no form for"):
        chatml(TALK, ByteTokenizer())
