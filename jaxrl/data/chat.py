"""Chat templates: messages -> (token ids, mask of the assistant's tokens).

A template is a function `(messages, tokenizer, *, add_generation_prompt=False) -> (ids, mask)`. `chatml` is
built in; `jinja(source)` makes one from the `chat_template` of a `tokenizer_config.json`. The mask is exact:
texts are tokenised piece by piece, as at sampling time, where the prompt is one piece and the model writes
the next.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Protocol

from jaxrl.data.tokenizer import Tokenizer

Message = dict[str, Any]
Tokens = tuple[list[int], list[bool]]


class Template(Protocol):
    """Renders messages as `(ids, which of them the assistant wrote)`; `chatml` is one."""

    def __call__(
        self, messages: Sequence[Message], tokenizer: Tokenizer, *, add_generation_prompt: bool = False
    ) -> Tokens: ...


def chatml(messages: Sequence[Message], tokenizer: Tokenizer, *, add_generation_prompt: bool = False) -> Tokens:
    """Render messages as ChatML: `<|im_start|>role\\ncontent<|im_end|>\\n` for each.

    messages: dictionaries with `role` (system | user | assistant | tool) and `content` (text).
    add_generation_prompt: end with the header of an assistant turn, for sampling.

    Returns (ids, mask): the mask is true on the content of each assistant turn and on the token that ends it.
    The two markers are single tokens, so no content can forge one; a tokeniser without `<|im_start|>` and
    `<|im_end|>` (bytes, characters) uses BOS and EOS instead. The last assistant turn's end is EOS where the
    tokeniser's EOS is `<|im_end|>`; elsewhere `encode_examples` appends EOS.

    Raises ValueError, naming the message, if a role or content is missing or of another kind.
    """
    check_messages(messages)
    start, end = tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")
    if start is None or end is None:
        start, end = tokenizer.bos_id, tokenizer.eos_id
        if start is None:
            raise ValueError("ChatML needs <|im_start|> and <|im_end|>, or BOS and EOS; this tokeniser has no BOS")
    pieces: list[tuple[list[int], bool]] = []
    for i, message in enumerate(messages):
        if message.get("tool_calls"):
            raise ValueError(f"message {i} calls tools, which ChatML has no form for; use the model's own template")
        content = tokenizer.encode(message["content"], special=False)
        pieces.append(([start, *tokenizer.encode(f"{message['role']}\n", special=False)], False))
        pieces.append(([*content, end], message["role"] == "assistant"))
        pieces.append((tokenizer.encode("\n"), False))
    if add_generation_prompt:
        pieces.append(([start, *tokenizer.encode("assistant\n")], False))
    return _join(pieces)


def jinja(source: str, *, bos_token: str = "", eos_token: str = "") -> Template:
    """Make a template from Jinja source, run in a sandbox (`pip install 'jaxrl[hf]'` brings jinja2).

    source: the `chat_template` of a `tokenizer_config.json`. bos_token, eos_token: texts it may write.

    The template made also takes `tools=`, a list of tool descriptions, if its source writes them.

    The assistant's spans are those inside `{% generation %}` tags if the source has them. Otherwise they are
    found by rendering the conversation up to each assistant turn with and without it; a template that
    rewrites earlier turns (dropping old reasoning, say) has no exact mask and is refused, unless only a prompt
    is asked for (`add_generation_prompt`), whose mask is then false throughout. A span ends with its EOS if it
    holds one.

    Raises ImportError with the command to run if jinja2 is missing; ValueError if the source does not parse.
    The template raises ValueError if it refuses the messages, or if the spans cannot be found.
    """
    rendered = _renderer(source, bos_token=bos_token, eos_token=eos_token)

    def template(
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> Tokens:
        check_messages(messages)
        if tools and "tools" not in source:
            raise ValueError("`tools` were given, and this chat template writes none: the model would not read of them")
        render = lambda messages, add_generation_prompt: rendered(messages, add_generation_prompt, tools)
        text = render(messages, add_generation_prompt)
        if _OPEN in text or "generation %}" in source:
            spans = _tagged(text)
        else:
            try:
                spans = _by_prefix(render, messages, text)
            except ValueError:
                if not add_generation_prompt:
                    raise
                spans = [(text, False)]
        pieces: list[tuple[list[int], bool]] = []
        for part, trained in spans:
            tail = ""
            if trained and eos_token and eos_token in part:
                head, _, tail = part.rpartition(eos_token)
                part = head + eos_token
            pieces += [(tokenizer.encode(part), trained), (tokenizer.encode(tail), False)]
        return _join(pieces)

    return template


def template_of(tokenizer: Tokenizer) -> Template | None:
    """The chat template that a Hugging Face tokeniser brings (`default` where there are several), or None."""
    config = getattr(tokenizer, "config", {})
    source = config.get("chat_template")
    if isinstance(source, list):
        named = {entry["name"]: entry["template"] for entry in source}
        source = named.get("default")
    if source is None:
        return None
    text = lambda name: getattr(tokenizer, name) or ""
    return jinja(source, bos_token=text("bos_token"), eos_token=text("eos_token"))


TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>")


def turn_ends(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids besides EOS that end a turn: those of `TURN_ENDS` that are in the vocabulary of a Hugging Face tokeniser.

    A model's files may name one token as EOS and end its turns with another.
    """
    if template_of(tokenizer) is None:
        return ()
    ids = (tokenizer.token_id(text) for text in TURN_ENDS)
    return tuple(i for i in ids if i is not None and i != tokenizer.eos_id)


def check_messages(messages: Any) -> None:
    """Raise ValueError unless `messages` is a non-empty list of {"role": text, "content": text}."""
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"messages is {messages!r}; expected a list of at least one {{'role': ..., 'content': ...}}")
    for i, message in enumerate(messages):
        found = sorted(message) if isinstance(message, dict) else repr(message)
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(f"message {i} has {found}; expected the keys 'role' and 'content'")
        if message["role"] not in ("system", "user", "assistant", "tool"):
            raise ValueError(f"message {i} has role {message['role']!r}; expected system, user, assistant or tool")
        if message["role"] == "assistant" and message.get("tool_calls") and not message["content"]:
            continue  # a turn that only calls tools
        if not isinstance(message["content"], str):
            raise ValueError(f"message {i} has content {message['content']!r}; expected text")
        if message["role"] == "assistant" and not message["content"].strip():
            raise ValueError(f"message {i}: the assistant's content is empty; it would teach the model to say nothing")


_OPEN, _CLOSE = "\x00generation\x00", "\x00end\x00"  # no JSON text a person writes holds these


def _tagged(text: str) -> list[tuple[str, bool]]:
    """Split a rendered text at the marks that the `generation` tags left."""
    spans = []
    for i, part in enumerate(text.split(_OPEN)):
        inside, closed, after = part.partition(_CLOSE)
        spans += [(inside, True), (after, False)] if i and closed else [(part, False)]
    return spans


def _by_prefix(render: Any, messages: Sequence[Message], text: str) -> list[tuple[str, bool]]:
    """Split a rendered text into (part, whether an assistant wrote it) by rendering its prefixes."""
    spans, written = [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(messages[:i], True), render(messages[: i + 1], False)
        if not (text.startswith(after) and after.startswith(before) and written <= len(before) < len(after)):
            raise ValueError(
                f"message {i}: the chat template writes this assistant turn differently when more follows, "
                "or not after its own generation prompt, so its tokens cannot be told apart. Use a template "
                "with {% generation %} tags, or the built-in ChatML, or `prompt` + `completion` records"
            )
        spans += [(text[written : len(before)], False), (after[len(before) :], True)]
        written = len(after)
    return [*spans, (text[written:], False)]


def _renderer(source: str, **tokens: str) -> Any:
    try:
        import jinja2
        from jinja2 import nodes
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError(
            "a Jinja chat template takes the package `jinja2`, which is not installed. "
            "Run: pip install 'jaxrl[hf]'   (or: pip install jinja2)"
        ) from error

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}` puts marks around what the assistant wrote."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller):
            return _OPEN + caller() + _CLOSE

    def refuse(message: str):
        raise ValueError(f"the chat template refuses these messages: {message}")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        template = environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template does not parse: line {error.lineno}: {error.message}") from None

    def render(messages: Sequence[Message], add_generation_prompt: bool, tools: Any) -> str:
        try:
            return template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, tools=tools or None, **tokens
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template failed on these messages: {error}") from None

    return render


def _join(pieces: Sequence[tuple[list[int], bool]]) -> Tokens:
    ids = [i for piece, _ in pieces for i in piece]
    return ids, [trained for piece, trained in pieces for _ in piece]
