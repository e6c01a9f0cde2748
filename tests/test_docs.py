"""What the documentation prints is true: its Python runs, commands and TOML are accepted, tables are the code's."""

import re
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxrl import cli, config
from jaxrl.agents import training
from jaxrl.kernels.attention import BlockDiffusion, Causal, Chunked, Full, Prefix, Segments, Tree, Window, dense
from jaxrl.losses import group, preference, reduce
from jaxrl.metrics import GLOSSARY
from jaxrl.posttrain import recipes, rewards

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {path.stem: path.read_text() for path in sorted(DOCS.glob("*.md")) if path.stem != "design"}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.M | re.S)


def table(page):
    """{first column: the other columns} of a page's rows whose first column is code."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGES[page].splitlines()]
    return {row[0].strip("`"): row[1:] for row in rows if len(row) > 1 and row[0].startswith("`")}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page}
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page}.md, block {number}", "exec"), names)


def test_commands_parse(capsys):
    lines = [line for text in PAGES.values() for line in re.findall(r"^    (jaxrl .*)$", text, flags=re.M)]
    commands = [line.split(" #")[0].split() for line in lines if "|" not in line and "   " not in line.split(" #")[0]]
    kinds = {name: getattr(recipes, options) for name, (_, options, *_) in cli.MODELS.items()}
    seen = 0
    for _, *words in commands:
        if words[0] in ("train", "sweep"):
            flags = words[2:]
            if "--resume" in flags:
                del flags[flags.index("--resume") : flags.index("--resume") + 2]
            config.parse(kinds[words[1]] if words[1] in kinds else training.options(words[1]), flags)
            seen += 1
        else:
            assert any(name.split() == words[: len(name.split())] for name in cli.COMMANDS), words
    assert seen >= 3
    assert capsys.readouterr().err == ""


def test_toml_fills_the_config():
    (text,) = blocks("runs", "toml")
    run = config.from_json(recipes.GRPORun, tomllib.loads(text))
    assert run.grpo.row == group.PRESETS["dapo"] and run.grpo.sampling.max_tokens == 12


def test_reward_file_loads_and_scores(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text(blocks("runs", "python")[0])
    close = rewards.load_reward(f"{file}:close")
    texts, expected = ["132", "131", "x", "132"], ["132"] * 4
    reasons = ["eos", "eos", "eos", "length"]
    given = {"prompts": ["47+85="] * 4, "completion_ids": [[]] * 4, "lengths": [3] * 4}
    assert close(completions=texts, answer=expected, finish_reasons=reasons, **given) == [1.0, 0.5, 0.0, 0.0]


def test_grpo_table_is_the_presets():
    rows = {name: row for name, row in table("grpo").items() if len(row) == 8}
    assert rows.keys() == group.PRESETS.keys()
    for name, (_, baseline, scale, level, form, clip, kl, reduction) in rows.items():
        variant = group.PRESETS[name]
        assert baseline == variant.baseline + ", whitened" * variant.whiten
        assert (scale, level, form, reduction) == (variant.scale, variant.level, variant.form, variant.reduction)
        if form in ("clip", "cispo"):
            low, high = (None if word == "none" else float(word) for word in clip.split(", "))
            assert (low, high) == (variant.clip_low, variant.clip_high)
        else:
            assert clip == ""
        where = " in reward" * variant.kl_in_reward
        assert kl == (f"{variant.kl}{where}, {variant.kl_coef:g}" if variant.kl_coef else "")


def test_gspo_and_cispo_on_policy_are_what_the_page_says():
    log_probs = jax.random.normal(jax.random.key(0), (4, 5)) - 2
    mask = jnp.arange(5)[None] < jnp.array([5, 3, 4, 1])[:, None]
    advantages = jnp.array([1.0, -1.0, 0.5, -0.5])

    def gradient(name):
        def loss(log_probs):
            variant = group.PRESETS[name]
            values, _ = group.loss(log_probs, None, None, advantages, mask, variant=variant, kl_coef=0)
            return reduce.by_name(variant.reduction)(values, mask).mean

        return jax.grad(loss)(log_probs)

    assert jnp.allclose(gradient("gspo"), gradient("grpo"), atol=1e-7)
    assert jnp.allclose(gradient("cispo"), gradient("dapo"), atol=1e-7)
    assert not jnp.allclose(gradient("grpo"), gradient("dapo"), atol=1e-3)


def test_preference_table_is_the_presets():
    rows = table("preference")
    assert rows.keys() == preference.PRESETS.keys()
    scores = {"log_ratio": "log pi / ref", "log_prob": "log pi", "log_odds": "log odds"}
    for name, (_, score, link, formula) in rows.items():
        variant = preference.PRESETS[name]
        per_token = " per token" * (variant.per_token or variant.score == "log_odds")
        assert (score, link) == (scores[variant.score] + per_token, variant.link)
        assert formula


PAIRED = [name for name, variant in preference.PRESETS.items() if variant.pairing == "pairs"]


@pytest.mark.parametrize("name", PAIRED)
def test_preference_formulas(name):
    """The table's formulas, evaluated as they stand there, are the losses."""
    variant = preference.PRESETS[name]
    chosen, rejected, lengths = jnp.array([-3.0]), jnp.array([-4.5]), jnp.array([3.0])
    refs = (jnp.array([-3.5]), jnp.array([-4.0])) if variant.score == "log_ratio" else (None, None)
    value, _ = preference.loss(
        chosen, rejected, *refs, variant=variant, chosen_lengths=lengths, rejected_lengths=lengths
    )
    score = {
        "log_ratio": lambda x, ref: x - ref,
        "log_prob": lambda x, ref: x / 3,
        "log_odds": lambda x, ref: x / 3 - jnp.log1p(-jnp.exp(x / 3)),
    }[variant.score]
    c, r = score(chosen, refs[0]), score(rejected, refs[1])
    letters = {"c": c, "r": r, "D": c - r, "b": variant.beta, "e": variant.label_smoothing}
    letters |= {"gamma": variant.target_margin, "nll": -chosen / 3}
    functions = {"S": jax.nn.sigmoid, "log": jnp.log, "max": jnp.maximum}
    assert jnp.allclose(value, eval(table("preference")[name][-1].strip("`"), functions, letters), rtol=1e-5)


def test_pictures_of_masks():
    """Every picture on the attention page is the mask it names."""
    picture = "\n".join(re.findall(r"^ {4}(?:[x.] .*|\S.*)$", PAGES["attention"], flags=re.M))
    lines = [line for line in picture.splitlines() if re.fullmatch(r"[ x.]+", line) and line.strip()]
    first, second = lines[:6], lines[6:12]
    ids = jnp.array([[1, 1, 1, 2, 2, 2]])
    named = [
        [Causal(), Window(3), Chunked(3), Full()],
        [
            Causal() | Prefix(jnp.array([2])),
            Causal() & Segments(ids),
            Tree(jnp.array([[6, 6, 4, 4, 6, 6]])),
            BlockDiffusion(1),
        ],
    ]
    for rows, masks in zip((first, second), named, strict=True):
        drawn = jnp.array([[mark == "x" for mark in row if mark in "x."] for row in rows])
        assert drawn.shape == (6, 24)
        for number, mask in enumerate(masks):
            expected = jnp.broadcast_to(dense(mask, (1, 1, 6, 6)), (1, 1, 6, 6))[0, 0]
            assert (drawn[:, 6 * number : 6 * number + 6] == expected).all(), mask


def test_links_and_metrics_exist():
    for text in PAGES.values():
        for target in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (DOCS / target).exists(), target
    groups = {name.split("/")[0] for name in GLOSSARY}
    named = re.findall(r"`([a-z]+/[a-z_]+)`", PAGES["grpo"])
    assert named
    for name in named:
        assert name.split("/")[0] not in groups or name in GLOSSARY, name
