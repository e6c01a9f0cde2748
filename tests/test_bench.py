"""`jaxrl bench`: every subject at toy size, what it writes, and that one refusal stops nobody else."""

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import cli, commands
from jaxrl.bench import command, peers, report, subjects, timing
from jaxrl.bench.options import OPTIONS, Attention, Decode, GroupedMatmul, LinearAttention, LogProbs

ON_CPU = {
    "attention": Attention(lengths=(9, 32), heads=4, key_heads=2, size=8, masks=("causal", "full")),
    "log-probs": LogProbs(lengths=(5, 16), rows=2, size=8, vocabulary=33),
    "decode": Decode(lengths=(16, 32), rows=3, heads=4, size=8, page=8, ragged=True),
    "linear-attention": LinearAttention(lengths=(9, 32), heads=2, size=8),
    "grouped-matmul": GroupedMatmul(tokens=(3, 8), experts=4, width=16, hidden=8),
}
FORMS = {
    "attention": ["xla", "reference", "jax.nn"],
    "log-probs": ["ours", "reference", "naive"],
    "decode": ["dense", "paged", "attention", "jax.nn"],
    "linear-attention": ["chunked", "decayed", "softmax"],
    "grouped-matmul": ["tiles", "ragged_dot", "int8", "fp8", "dense"],
}


def flags(subject):
    """The options above as a person would type them, one size of two."""
    default, words = OPTIONS[subject](), []
    for name, value in vars(ON_CPU[subject]).items():
        if value != getattr(default, name):
            value = value[:1] if name in ("lengths", "tokens") else value
            values = value if isinstance(value, tuple) else (value,)
            words += ["--ragged"] if value is True else [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def call(capsys, *argv):
    try:
        status = cli.main(argv)
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(autouse=True)
def without_torch(monkeypatch):
    """The tests say the same with and without it."""
    monkeypatch.setattr(subjects.importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize("subject", OPTIONS)
def test_the_command_measures_every_form_and_writes(subject, tmp_path, capsys):
    folder = tmp_path / "out"
    status, out, err = call(capsys, "bench", subject, "--rounds", "1", "--out", str(folder), *flags(subject))
    assert status == 0, err
    results = json.loads((folder / "results.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == ["memory.png", "results.json", "results.md", "time.png"]
    options = ON_CPU[subject]
    axis = "tokens" if subject == "grouped-matmul" else "length"
    masks, passes = getattr(options, "masks", (None,)), getattr(options, "passes", ("forward",))
    size = vars(options)["tokens" if axis == "tokens" else "lengths"][0]
    expected = [(mask, size, which, form) for mask in masks for which in passes for form in FORMS[subject]]
    assert [(row.get("mask"), row[axis], row["pass"], row["form"]) for row in results["rows"]] == expected
    for row in results["rows"]:
        assert row["cpu_ms"] >= row["cpu_min_ms"] > 0 and row["wall_ms"] > 0 and row["compile_s"] > 0
        assert row["temporary_mb"] >= 0
    about = results["about"]
    assert about["finished"] and about["subject"] == subject and about["options"]["rounds"] == 1
    assert about["platform"] == "cpu" and about["device"] == jax.devices()[0].device_kind
    assert about["jax"] == jax.__version__ and about["options"]["dtype"] == "float32" and len(about["load_before"]) == 3
    text = (folder / "results.md").read_text()
    assert text.count("\n| " + str(size)) == len(expected) and "Interrupted" not in text
    assert all(form in out for form in FORMS[subject]) and "compiling xla" not in out


def test_what_the_machine_lacks_is_said_once(tmp_path, capsys):
    options = Attention(out=str(tmp_path), lengths=(4, 8), heads=1, size=4, passes=("forward",), rounds=1)
    results = command.run("attention", options)
    assert results.left_out == [
        {"form": "pallas", "reason": "only on tpu"},
        {"form": "mosaic_gpu", "reason": "only on gpu"},
        {"form": "cudnn", "reason": "only on gpu"},
        {"form": "splash", "reason": "only on tpu"},
        {"form": "torch", "reason": "torch is not installed"},
    ]
    assert capsys.readouterr().out.count("left out: splash: only on tpu") == 1
    assert "- torch: torch is not installed" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize("subject", ["attention", "log-probs", "decode", "grouped-matmul"])
def test_forms_compute_the_same(subject):
    for case in subjects.cases(subject, ON_CPU[subject])[::2]:  # the first size, with every mask
        arrays = jax.jit(case.draw)()
        found = {name: jax.jit(lambda a, form=case.forms[name]: form(a))(arrays) for name in FORMS[subject]}
        first = found.pop(FORMS[subject][0])
        for name, other in found.items():
            tolerance = {"int8": 0.1, "fp8": 0.3}.get(name, 2e-5)
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance, rtol=0), first, other)


def test_the_naive_forms_are_their_formulas():
    """Written in numpy float64, loop by loop."""
    (log_probs,) = subjects.cases("log-probs", LogProbs(lengths=(3,), size=4, vocabulary=5))
    draw = jax.jit(log_probs.draw)
    arrays = {name: np.asarray(x, np.float64) for name, x in draw().items()}
    chosen, entropy = log_probs.forms["naive"](draw())
    for t in range(3):
        p = np.exp(arrays["hidden"][0, t] @ arrays["unembedding"])
        p /= p.sum()
        assert abs(np.log(p[int(arrays["targets"][0, t])]) - chosen[0, t]) < 1e-5
        assert abs(-(p * np.log(p)).sum() - entropy[0, t]) < 1e-5
    (layer,) = subjects.cases("grouped-matmul", GroupedMatmul(tokens=(3,), experts=4, width=5, hidden=2))
    draw = jax.jit(layer.draw)
    a = {name: np.asarray(x, np.float64) for name, x in draw().items()}
    found = peers.dense_experts(draw())
    for t in range(3):
        y = np.zeros(5)
        for weight, e in zip(a["weights"][t], a["experts"][t].astype(int), strict=True):
            gate = a["x"][t] @ a["gate"][e]
            y += weight * (gate / (1 + np.exp(-gate)) * (a["x"][t] @ a["up"][e])) @ a["down"][e]
        np.testing.assert_allclose(found[t], y, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_splash_is_called_rightly(causal):
    from jax.experimental.pallas import tpu as pltpu

    q, k, v = (jax.random.normal(key, (1, 128, 1, 128)) for key in jax.random.split(jax.random.key(0), 3))
    with pltpu.force_tpu_interpret_mode():
        found = peers.splash({"q": q, "k": k, "v": v}, causal=causal)
    np.testing.assert_allclose(found, jax.nn.dot_product_attention(q, k, v, is_causal=causal), atol=1e-4)


def test_gradients_are_those_of_half_the_squared_norm():
    draw = lambda: {"x": jnp.arange(3.0), "y": jnp.ones(3)}
    program = timing.compile_form(lambda a: a["x"] * a["y"], jax.eval_shape(draw), ("x",))
    value, gradients = program.call(draw())
    assert float(value) == 2.5 and gradients.keys() == {"x"}
    np.testing.assert_array_equal(gradients["x"], draw()["x"])
    assert program.compile_s > 0 and program.needed > 0


def test_calls_take_turns(monkeypatch):
    seen, refused, clock = [], [], iter(range(1000))
    monkeypatch.setattr(time, "process_time", lambda: float(next(clock) ** 2))

    def one(name):
        def call():
            seen.append(name)
            if name == "c":
                raise RuntimeError("no")

        return call

    found = timing.in_turn({n: one(n) for n in "acb"}, rounds=3, refused=lambda n, e: refused.append((n, str(e))))
    assert "".join(seen) == "acb" + "ab" * 3 and refused == [("c", "no")]
    # calls begin at ticks 0, 4, 8 (a) and 2, 6, 10 (b), and end a tick later: n^2 grows by 2 n + 1
    assert {name: (row["cpu_ms"], row["cpu_min_ms"]) for name, row in found.items()} == {
        "a": (9e3, 1e3),
        "b": (13e3, 5e3),
    }


def with_forms(monkeypatch, **forms):
    """A subject whose second size is a hundred times the first."""
    draws = [lambda n=n: {"x": jnp.ones(n)} for n in (10, 1000)]
    cases = [subjects.Case({"length": n}, draw, (), dict(forms)) for n, draw in zip((10, 1000), draws, strict=True)]
    monkeypatch.setitem(subjects.SUBJECTS, "decode", lambda options: cases)


def test_a_refusal_stops_nobody_else(tmp_path, monkeypatch, capsys):
    def no(arrays):
        raise NotImplementedError("not [you]\nand more")

    def not_there(arrays, gradients):
        raise ModuleNotFoundError("No module named 'it'")

    with_forms(monkeypatch, no=no, yes=lambda a: a["x"] + 1, outside=peers.Outside(not_there))
    results = command.run("decode", Decode(out=str(tmp_path), rounds=1))
    assert [(row["length"], row["form"]) for row in results.rows] == [(10, "yes"), (1000, "yes")]
    reasons = ["NotImplementedError: not [you]", "ModuleNotFoundError: No module named 'it'"]
    assert [what["reason"] for what in results.left_out] == reasons * 2
    assert "left out: no (10, forward): NotImplementedError: not [you]" in capsys.readouterr().out


def test_another_library_is_timed_beside(tmp_path, monkeypatch):
    calls = []
    outside = peers.Outside(lambda arrays, gradients: lambda: calls.append((arrays["x"].shape, gradients)))
    with_forms(monkeypatch, ours=lambda a: a["x"] + 1, theirs=outside)
    results = command.run("decode", Decode(out=str(tmp_path), rounds=2))
    assert calls == [((10,), False)] * 3 + [((1000,), False)] * 3
    theirs = [row for row in results.rows if row["form"] == "theirs"]
    assert len(theirs) == 2 and all(row["compile_s"] is None and row["temporary_mb"] is None for row in theirs)


def test_what_is_too_big_is_left_out_before_it_runs(tmp_path, monkeypatch):
    with_forms(monkeypatch, small=lambda a: a["x"] + 1, big=lambda a: jnp.sort(jnp.outer(a["x"], a["x"])))
    results = command.run("decode", Decode(out=str(tmp_path), rounds=1, memory_gb=1e-4))
    assert [(row["length"], row["form"]) for row in results.rows] == [(10, "small"), (10, "big"), (1000, "small")]
    (what,) = results.left_out
    assert what["form"] == "big" and what["length"] == 1000 and what["reason"].endswith("GB, 0.0001 GB may be used")


def test_free_memory_is_a_plausible_number():
    assert 1e7 < timing.free_bytes() < 1e15


def test_an_interrupted_run_leaves_what_it_measured(tmp_path, monkeypatch, capsys):
    def stops(arrays):
        if arrays["x"].shape == (1000,):
            assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == 1  # a kill would leave it
            raise KeyboardInterrupt
        return arrays["x"] + 1

    with_forms(monkeypatch, ours=stops)
    assert call(capsys, "bench", "decode", "--out", str(tmp_path), "--rounds", "1")[0] == 130
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["length"] for row in results["rows"]] == [10] and results["about"]["finished"] is False
    assert "Interrupted" in (tmp_path / "results.md").read_text()


def test_nothing_measured_is_an_error(tmp_path, capsys):
    argv = ["bench", "attention", "--implementations", "cudnn", "--lengths", "8", "--out", str(tmp_path / "out")]
    status, _, err = call(capsys, *argv)
    assert status == 2 and "nothing was measured; cudnn" in err and "Traceback" not in err


def test_results_are_never_overwritten(tmp_path, capsys):
    (tmp_path / "results.json").write_text("mine")
    status, _, err = call(capsys, "bench", "decode", "--out", str(tmp_path))
    assert status == 2 and "choose another folder with --out" in err
    assert (tmp_path / "results.json").read_text() == "mine"


def test_without_matplotlib_the_rest_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with_forms(monkeypatch, ours=lambda a: a["x"] + 1)
    command.run("decode", Decode(out=str(tmp_path), rounds=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.md"]
    assert "pip install 'jaxrl[plot]'" in capsys.readouterr().out


def test_the_ratio_is_to_the_first_form():
    row = {"length": 8, "pass": "forward", "compile_s": 1.0, "wall_ms": 1.0, "temporary_mb": 0.5}
    rows = [row | {"form": "ours", "cpu_ms": 2.0}, row | {"form": "theirs", "cpu_ms": 5.0}]
    about = {"platform": "cpu", "subject": "decode"}
    head, lines = report.cells(report.Results(about, rows, []), rows)
    assert head[-1] == "CPU / ours" and [line[-1] for line in lines] == ["1", "2.5"]
    about["platform"] = "gpu"
    head, lines = report.cells(report.Results(about, rows, []), rows)
    assert head[-1] == "wall / ours" and [line[-1] for line in lines] == ["1", "1"]


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["bench", "attentoin"], "did you mean 'jaxrl bench attention'?"),
        (["bench", "attention", "--lenghts", "8"], "--lengths"),
        (["bench", "attention", "--implementations", "xlaa"], "xla"),
        (["bench", "attention", "--lengths"], "lengths is empty"),
        (["bench", "attention", "--lengths", "0"], "lengths is 0, expected at least 1"),
        (["bench", "attention", "--lengths", "8", "8"], "lengths 8 8 names a value twice"),
        (["bench", "attention", "--rounds", "0"], "rounds is 0, expected at least 1"),
        (["bench", "attention", "--heads", "4", "--key-heads", "3"], "a multiple of key_heads 3"),
        (["bench", "attention", "--memory-gb", "-1"], "memory_gb is -1.0, expected at least 0"),
        (["bench", "decode", "--lengths", "24"], "lengths has 24, expected a multiple of page 16"),
        (["bench", "grouped-matmul", "--chosen", "17"], "at most the 16 experts"),
    ],
)
def test_mistakes_are_answered_with_the_way_out(argv, hint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, _, err = call(capsys, *argv)
    assert status == 2 and hint in " ".join(err.replace("│", " ").split()) and "Traceback" not in err, err


def test_the_command_line_lists_the_subjects():
    assert list(commands.BENCHES) == list(OPTIONS) == list(subjects.SUBJECTS)
