import random

import pytest

from jaxrl.data.split import problem_hash, split_by_problem

PROBLEMS = [{"prompt": f"{a}+{b}=", "answer": a + b} for a in range(20) for b in range(20)]


def prompts(records):
    return {record["prompt"] for record in records}


@pytest.mark.parametrize("held_out", [0.2, 80])
def test_no_problem_stands_on_both_sides_even_if_it_is_repeated(held_out):
    repeated = PROBLEMS + [record | {"answer": "another"} for record in PROBLEMS]
    training, kept_back = split_by_problem(repeated, held_out=held_out)
    assert not prompts(training) & prompts(kept_back)
    assert len(training) + len(kept_back) == len(repeated)
    assert prompts(training) | prompts(kept_back) == prompts(PROBLEMS)


def test_a_fraction_is_about_kept_and_a_count_exactly():
    assert 50 < len(split_by_problem(PROBLEMS, held_out=0.2)[1]) < 110  # 80 expected, standard deviation 8
    assert len(split_by_problem(PROBLEMS, held_out=37)[1]) == 37
    assert len(split_by_problem(PROBLEMS * 2, held_out=37)[1]) == 74, "distinct problems are counted"


@pytest.mark.parametrize("held_out", [0.2, 37])
def test_the_split_does_not_depend_on_the_order(held_out):
    shuffled = random.Random(0).sample(PROBLEMS, len(PROBLEMS))
    training, kept_back = split_by_problem(PROBLEMS, held_out=held_out)
    assert prompts(split_by_problem(shuffled, held_out=held_out)[1]) == prompts(kept_back)
    assert training == [record for record in PROBLEMS if record["prompt"] in prompts(training)], "order is kept"


def test_a_fraction_keeps_every_problem_on_its_side_when_the_data_grows():
    few, many = split_by_problem(PROBLEMS[:100], held_out=0.3), split_by_problem(PROBLEMS, held_out=0.3)
    assert prompts(few[0]) <= prompts(many[0]) and prompts(few[1]) <= prompts(many[1])


def test_the_hash_is_fixed_for_ever():
    """Another hash would move held-out problems of existing runs into training."""
    assert problem_hash("1+1=") == problem_hash(" 1+1=\n") == 0.14947825774476564
    assert problem_hash([{"role": "user", "content": "1"}]) == problem_hash([{"content": "1", "role": "user"}])
    assert problem_hash("1+1=", salt="x") != problem_hash("1+1=")


def test_another_salt_is_another_split():
    a, b = (split_by_problem(PROBLEMS, held_out=0.2, salt=salt)[1] for salt in ("", "x"))
    assert prompts(a) != prompts(b)


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        (0, "expected a fraction in"),
        (1.0, "expected a fraction in"),
        (True, "expected a fraction in"),
        (-3, "expected a fraction in"),
        (400, "of 400 distinct problems leaves 0 records for training and 400 held out"),
        (1e-9, "leaves 400 records for training and 0 held out"),
    ],
)
def test_a_bad_amount_is_refused(held_out, message):
    with pytest.raises(ValueError, match=message):
        split_by_problem(PROBLEMS, held_out=held_out)


def test_a_record_without_the_column_is_named():
    with pytest.raises(ValueError, match=r"record 1: no column 'prompt' to split by; found \['text'\]"):
        split_by_problem([{"prompt": "1"}, {"text": "1"}], held_out=0.5)
