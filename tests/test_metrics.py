"""The metrics file, its glossary, and the plot made from it."""

import json

import pytest

from jaxrl import metrics, plots


def test_rows_are_json_lines_and_resume_drops_what_comes_after(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = metrics.MetricsLog(path)
    for step in range(1, 6):
        log.write(step, {"reward/mean": step / 2, "train/loss": float("nan")})
    metrics.MetricsLog(path, after_step=3).write(4, {"reward/mean": 9.0})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0] == {"step": 1, "reward/mean": 0.5, "train/loss": None} and rows[-1]["reward/mean"] == 9.0


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "rew')
    assert list(metrics.read(path)) == [{"step": 1}]
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match="metrics.jsonl:2: not a JSON object: 'nonsense'"):
        list(metrics.read(path))


def test_curves_are_drawn_from_rows(tmp_path):
    rows = [{"step": i, "reward/mean": i / 9, "policy/entropy": 1 - i / 9} for i in range(10)]
    rows += [{"step": 0, "eval/accuracy": 0.4}, {"step": 9, "eval/accuracy": 0.9}]
    picture = plots.curves(rows, tmp_path / "curves.png", title="a run")
    assert picture is not None and picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 5000
    assert plots.curves([{"step": 1, "reward/mean": 1.0}], tmp_path / "none.png") is None
