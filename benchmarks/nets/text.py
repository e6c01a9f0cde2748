"""Tokenisers, n-gram models and word vectors: python benchmarks/nets/text.py prints tables and writes text.json

Tokens: bytes per token against the size of the vocabulary, on the help topics of Python's standard library: learnt from
the first 90 %, measured on the rest; Unigram's pieces beside those that `tokenizers` trains. n-grams: perplexity of
a Markov source whose own is known, and on those topics.
Words: 3CosAdd on a corpus of 12 stems times 4 attributes (chance is 1 in 45).
"""

import dataclasses
import json
import pydoc_data.topics
import time
from pathlib import Path

import jax
import numpy as np
import tyro
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from jaxrl import text
from jaxrl.data import markov
from jaxrl.text import ngram, word2vec
from jaxrl.text.tokenizer import SPECIAL

TRAIN = {
    "bpe": text.train_bpe,
    "unigram": text.train_unigram,
    "wordpiece, count": lambda corpus, size: text.train_wordpiece(corpus, size, score="count"),
    "wordpiece, likelihood": lambda corpus, size: text.train_wordpiece(corpus, size, min_count=5),
}
VECTORS = {
    "skip-gram, negatives": {},
    "skip-gram, negatives, even noise": {"power": 0.0},
    "skip-gram, hierarchical softmax": {"negatives": 0},
    "cbow, negatives": {"cbow": True},
    "cbow, hierarchical softmax": {"cbow": True, "negatives": 0},
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is run."""

    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: tuple[int, ...] = (260, 512, 1024, 2048, 4096)
    tokens: int = 5000
    steps: int = 3000
    out: Path = Path(__file__).with_suffix(".json")


def corpus() -> tuple[str, str]:
    """The topics in two parts."""
    whole = "\n".join(pydoc_data.topics.topics.values())
    return whole[: len(whole) * 9 // 10], whole[len(whole) * 9 // 10 :]


def bytes_per_token(options: Options) -> list[dict]:
    """One row per tokeniser and size."""
    train, test = corpus()
    rows = []
    for name, learn in TRAIN.items():
        for size in options.sizes:
            if name.startswith("wordpiece") and size < 512:
                continue  # its alphabet alone has more
            begin = time.process_time()
            tokenizer = learn(train, size)
            seconds = time.process_time() - begin
            ids = tokenizer.encode(test)
            found = len(test.encode()) / len(ids)
            rows.append({"tokens": name, "vocabulary": size, "bytes per token": found, "CPU s": seconds})
    return rows


def unigram_trainers(options: Options) -> list[dict]:
    """Share of `train_unigram`'s pieces that `tokenizers` trains too; seconds of both, the least of three in turn."""
    train, _ = corpus()
    rows = []
    for size in (size for size in options.sizes if size >= 512):
        seconds: dict[str, list[float]] = {"ours": [], "tokenizers": []}
        for _ in range(3):
            started = time.perf_counter()
            ours = text.train_unigram(train, size, pre="metaspace")
            seconds["ours"].append(time.perf_counter() - started)
            theirs = Tokenizer(models.Unigram())
            theirs.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
            special = {"special_tokens": ["<unk>", *SPECIAL], "unk_token": "<unk>"}
            started = time.perf_counter()
            theirs.train_from_iterator(
                [train], trainers.UnigramTrainer(vocab_size=size, show_progress=False, **special)
            )
            seconds["tokenizers"].append(time.perf_counter() - started)
        common = len(set(ours.tokens) & set(theirs.get_vocab())) / size
        rows.append({"vocabulary": size, "common": common, **{name: min(took) for name, took in seconds.items()}})
    return rows


def source_perplexity(options: Options) -> list[dict]:
    """One row per model and order on order-2 sources, a perplexity per seed."""
    streams = []
    for seed in options.seeds:
        first, second = jax.random.split(jax.random.key(seed))
        table = markov.chain(first, symbols=20, order=2, scale=2.75)
        tokens = np.asarray(markov.sample(second, table, rows=1, length=2 * options.tokens))[0]
        streams.append((tokens[: options.tokens], tokens[options.tokens :], np.exp(markov.entropy_rate(table))))
    rows = [{"model": "the source", "perplexity": [float(least) for _, _, least in streams]}]
    cases = [(order, "add-k", {"k": k}) for k in (1.0, 0.01) for order in (1, 2, 3)]
    cases += [(order, method, {}) for method in ngram.METHODS[1:] for order in (2, 3, 4)]
    for order, method, knobs in cases:
        found = [ngram.ngram_perplexity(a, b, order, method, vocab_size=20, **knobs) for a, b, _ in streams]
        rows.append({"model": " ".join([method, *map(str, knobs.values())]), "order": order, "perplexity": found})
    return rows


def topic_perplexity() -> list[dict]:
    """One row per model and order on the topics as BPE tokens; seconds are those of training and reading."""
    train, test = corpus()
    tokenizer = text.train_bpe(train, 1024)
    a, b = np.array(tokenizer.encode(train)), np.array(tokenizer.encode(test))
    rows = []
    for method in ngram.METHODS:
        for order in (1, 2, 3, 5):
            begin = time.process_time()
            found = ngram.ngram_perplexity(a, b, order, method, vocab_size=1024, k=0.01)
            seconds = time.process_time() - begin
            rows.append({"model": method, "order": order, "perplexity": found, "tokens": len(a), "CPU s": seconds})
    return rows


def analogies(options: Options) -> list[dict]:
    """One row per kind of training, an accuracy per seed."""
    rows = []
    for name, knobs in VECTORS.items():
        found, begin = [], time.perf_counter()
        for seed in options.seeds:
            tokens, questions = word2vec.analogies(np.random.default_rng(seed), 8000)
            config = word2vec.Word2VecConfig(width=24, steps=options.steps, **knobs)
            sentences, key = np.repeat(np.arange(8000), 9), jax.random.key(seed)
            vectors, _ = word2vec.train(key, tokens.ravel(), config, vocab_size=48, sentences=sentences)
            answers = word2vec.analogy(vectors.words, questions[:, :3])
            found.append(float((answers == questions[:, 3]).mean()))
        seconds = (time.perf_counter() - begin) / len(found)
        rows.append({"vectors": name, "accuracy": found, "questions": len(questions), "wall s": seconds})
    return rows


def show(rows: list[dict]) -> None:
    """Prints rows as a table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    number = lambda x: f"{x:.3f}" if isinstance(x, float) else str(x)
    cell = lambda x: " ".join(map(number, x)) if isinstance(x, list) else number(x)
    print("\n| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for row in rows:
        print("| " + " | ".join(cell(row.get(name, "")) for name in names) + " |", flush=True)


def main(options: Options):
    """Measures, prints, writes."""
    parts = {
        "bytes per token": lambda: bytes_per_token(options),
        "unigram beside tokenizers": lambda: unigram_trainers(options),
        "perplexity of sources": lambda: source_perplexity(options),
        "perplexity of topics": topic_perplexity,
        "analogies": lambda: analogies(options),
    }
    results = {}
    for name, measure in parts.items():
        results[name] = measure()
        show(results[name])
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
