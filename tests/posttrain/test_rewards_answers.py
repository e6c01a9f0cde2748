"""Answers read from text: marks, numbers, formulas."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.posttrain import rewards

NUMBERS = [
    ("5", 5),
    ("The answer is 5.", 5),
    ("-5", -5),
    ("−5", -5),
    ("+5", 5),
    ("x=-3", -3),
    ("10-3", 3),  # an operator
    ("10 -3", -3),
    ("(2)-1", 1),
    ("pages 10–20", 20),
    ("1,234,567", 1234567),
    ("1_000", 1000),
    ("1\u202f000", 1000),
    ("1{,}234", 1234),
    ("12,34", 34),
    ("1,2345", 2345),
    ("1,5", 5),
    ("3, 4 and 5", 5),
    ("1,234.50", Fraction("1234.5")),
    (".5", Fraction(1, 2)),
    ("-.5", Fraction(-1, 2)),
    ("5.", 5),
    ("0.1", Fraction(1, 10)),
    ("007", 7),
    ("-0", 0),
    ("3/4", Fraction(3, 4)),
    ("-3 / 4", Fraction(-3, 4)),
    ("1.5/2", Fraction(3, 4)),
    (r"\frac{1}{2}", Fraction(1, 2)),
    (r"-\dfrac{1}{2}", Fraction(1, 2)),  # the sign does not touch a digit
    (r"\frac{-1}{2}", Fraction(-1, 2)),
    ("50%", Fraction(1, 2)),
    ("12.5 %", Fraction(1, 8)),
    (r"50\%", Fraction(1, 2)),
    ("$5", 5),
    ("-$5", -5),
    ("$-5", -5),
    ("€1,000.50", Fraction("1000.5")),
    ("1e3", 1000),
    ("2.5E-1", Fraction(1, 4)),
    (r"3.5 \times 10^{3}", 3500),
    ("3×10^-2", Fraction(3, 100)),
    ("2/3/2024", 2024),
    ("1/0", None),
    ("0/5", 0),
    ("no number", None),
    ("", None),
    ("inf nan", None),
    ("1e301", None),
    ("1e-301", None),
    ("1e999999999", None),
    ("9" * 300, int("9" * 300)),
    ("9" * 301, None),
    ("9" * 10_000, None),
    ("0." + "1" * 10_000, None),
    ("٣", None),  # other digits are not read
]


@pytest.mark.parametrize(("text", "number"), NUMBERS)
def test_number_table(text, number):
    start = time.perf_counter()
    assert rewards.last_number(text) == number
    assert time.perf_counter() - start < 1


def test_per_cent_as_it_stands():
    assert rewards.last_number("50%", percent=False) == 50


@given(
    st.integers(-(10**12), 10**12),
    st.integers(0, 4),
    st.sampled_from(["{}", "so {}.", "= {}", "${}$", "It is 7, no: {}", "{} apples", "**{}**", "\n{}\n"]),
)
def test_numbers_come_back(digits, places, frame):
    value = Fraction(digits, 10**places)
    text = f"{abs(digits) // 10**places:,}" + (f".{abs(digits) % 10**places:0{places}}" if places else "")
    text = ("-" if digits < 0 else "") + text
    assert rewards.last_number(frame.format(text)) == value
    assert rewards.last_number(frame.format(text + "%")) == value / 100
    assert rewards.last_number(frame.format(text + "/7")) == value / 7
    assert rewards.last_number(frame.format(text + "e-3")) == value / 1000


@given(st.text(alphabet="0123456789,._-+−eE/%$\\{}frac ×^()x", max_size=60) | st.text(max_size=60))
def test_any_text_is_read(text):
    number = rewards.last_number(text)
    assert number is None or isinstance(number, Fraction)
    assert rewards.number_reward()(completions=[text], answer=["1"])[0] == (number == 1)
    assert rewards.vote_key(rewards.vote_key(text)) == rewards.vote_key(text)


@pytest.mark.parametrize(
    ("text", "knobs", "found"),
    [
        (" a ", {}, "a"),
        ("1 #### 2 #### 3\n", {"marker": "####"}, "3"),
        ("1", {"marker": "####"}, None),
        ("#### ", {"marker": "####"}, ""),
        ("<answer>1</answer><answer> 2 </answer>3", {"tag": "answer"}, "2"),
        ("<answer>1</answer><answer>2", {"tag": "answer"}, "1"),
        ("<answer>1<answer>2</answer>", {"tag": "answer"}, "2"),
        ("</answer>1<answer>", {"tag": "answer"}, None),
        ("<answer>1", {"tag": "answer"}, None),
        ("<answer>x = 2</answer> = 3", {"tag": "answer", "marker": "="}, "2"),
    ],
)
def test_marks(text, knobs, found):
    assert rewards.marked(text, **knobs) == found


def test_boxes():
    assert rewards.boxed(r"\boxed{1} and \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert rewards.boxed(r"\boxed{\boxed{1}") == "1"
    assert rewards.boxed("none") is rewards.boxed(r"\boxed{1") is rewards.boxed(r"}\boxed{{1}") is None


def test_number_reward():
    def one(text, answer, **knobs):
        return rewards.number_reward(**knobs)(completions=[text], answer=[answer])[0]

    assert one("6 x 7 = 42.0", 42) == one("42", "so 6 x 7 = 42 #### 42") == one(r"\boxed{42} or 43?", "42") == 1
    assert one("43", "42") == one("no idea", "42") == 0
    assert one("42", "no number") is None
    assert one("42 #### 43", "#### 42", marker="####") == 0 and one("42", "42", marker="####") == 0
    assert one("7 <answer>42</answer> 8", 42, tag="answer") == 1
    assert one("0.99", "1", tolerance=0.01) == 1 and one("0.98999", "1", tolerance=0.01) == 0
    assert one("0.7", "1", tolerance=0.3) == 1  # exactly at the border, where binary fractions would be beyond it
    assert one("101", "100", relative=0.01) == 1 and one("101.1", "100", relative=0.01) == 0
    assert one("0.3333", "1/3") == 0 and one("0.3333", "1/3", tolerance=1e-3) == 1
    assert one("50%", "50") == 0 and one("50%", "50", percent=False) == 1 and one("50%", 0.5) == 1
    cut = rewards.number_reward()(completions=["42", "42"], answer=[42, 42], finish_reasons=["length", "stop"])
    assert cut == [0, 1]
    for knobs in ({"tolerance": -1}, {"relative": float("nan")}):
        with pytest.raises(ValueError, match="expected 0 or more"):
            rewards.number_reward(**knobs)


def test_vote_key():
    assert rewards.vote_key("1,000.0") == rewards.vote_key("1000.") == "1000"
    assert rewards.vote_key("0.50") == rewards.vote_key("1/2") == rewards.vote_key("50%") == "1/2"
    assert rewards.vote_key(" The  Cat ") == "the cat" != rewards.vote_key("5 cats")


@pytest.fixture(scope="module")
def maths():
    pytest.importorskip("math_verify", reason="math-verify is not installed: pip install 'jaxrl[reasoning]'")
    return rewards.math_reward(timeout=20)


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        (r"so it is \boxed{\frac{1}{2}}", "0.5", 1),
        (r"$\frac12$", "1/2", 1),
        ("The answer is 0.5", r"\frac{1}{2}", 1),
        ("50%", "1/2", 1),
        ("x+1", "1+x", 1),
        ("(x+1)^2", "x^2+2x+1", 1),
        ("(x+1)^2", "x^2+1", 0),
        (r"2\sqrt{3}", r"\sqrt{12}", 1),
        ("x=5", "5", 1),
        (r"\{1,2\}", r"\{2,1\}", 1),
        ("(1,2)", "(2,1)", 0),
        (r"\frac{\pi}{4}", r"0.25\pi", 1),
        ("1,234", "1234", 1),
        ("", "1", 0),
        ("yes", "yes", 1),
        ("\\", "1", 0),
        ("$" * 50, "1", 0),
        ("{" * 20, "1", 0),
    ],
)
def test_maths_table(maths, text, answer, value):
    assert maths(completions=[text], answer=[answer]) == [value]


PAIRS = [
    (r"\frac{3}{6}", r"\frac12"), (r"0.333333333333", r"\frac{1}{3}"), (r"3.14", r"\pi"), ("10^3", "1000"),
    (r"\sqrt[3]{8}", "2"), (r"\sin(\frac{\pi}{2})", "1"), (r"\tan x", r"\frac{\sin x}{\cos x}"), ("e^{2x}", "(e^x)^2"),
    (r"\ln(e^2)", "2"), (r"\log_{10} 1000", "3"), (r"\frac{x^2-1}{x-1}", "x+1"), ("(a+b)(a-b)", "a^2-b^2"),
    ("a/b", "b/a"), (r"x \in [0,1)", "[0,1)"), ("[0,1]", "[0,1)"), (r"(-\infty,3]", r"x \le 3"), ("x>3", "3<x"),
    (r"\{1,2,3\}", r"\{3,2,1\}"), ("1,2", r"\{1,2\}"), ("x=1, y=2", "x=1, y=2"), ("y=2x+1", "2x+1=y"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"), (r"\binom{5}{2}", "10"), ("5!", "120"),
    (r"\sum_{i=1}^{4} i", "10"), (r"\int_0^1 x dx", r"\frac12"), ("|{-3}|", "3"), ("3+4i", "4i+3"), (r"90^\circ", "90"),
    (r"\text{east}", r"\text{east}"), (r"\text{(B)}", "B"), (r"1\frac{1}{2}", "1.5"), (r"0.\overline{3}", r"\frac13"),
    (r"2.5\times 10^{-3}", "0.0025"), (r"\$5.00", "5"), (r"12\%", "0.12"), ("1{,}000", "1000"), (r"\pm 2", "2"),
    (r"x^{2y}", r"x^{y}\cdot x^{y}"), (r"\emptyset", r"\{\}"), (r"\lfloor 2.5 \rfloor", "2"), ("7 mod 3", "1"),
]  # fmt: skip


def test_maths_says_what_math_verify_says(maths):
    """Neither the grammar alone nor the missing evaluation of text changes an outcome."""
    from math_verify import parse, verify

    plain = [verify(parse(f"${right}$"), parse(f"${text}$")) for text, right in PAIRS]
    ours = maths(completions=[f"${text}$" for text, _ in PAIRS], answer=[f"${right}$" for _, right in PAIRS])
    assert [pair for pair, a, b in zip(PAIRS, plain, ours, strict=True) if a != b] == []
    assert 25 < sum(plain) < len(plain)


def test_maths_never_evaluates(maths, tmp_path):
    for code in (f"open({str(tmp_path / 'made')!r}, 'w')", f"__import__('os').system('touch {tmp_path / 'made'}')"):
        for text in (code, f"${code}$", rf"\boxed{{{code}}}", rf"\text{{{code}}}", f"1+{code}"):
            assert maths(completions=[text], answer=["1"]) == [0]
    assert not list(tmp_path.iterdir())


def test_maths_marks_and_cuts(maths):
    reward = rewards.math_reward(tag="answer", timeout=20)
    texts = ["<answer>1</answer> 2", "1", "<answer>1</answer>"]
    assert reward(completions=texts, answer=["1"] * 3, finish_reasons=["eos", "eos", "length"]) == [1, 0, 0]


def test_maths_is_cut_off(maths):
    reward = rewards.math_reward(timeout=1)
    start = time.perf_counter()
    with pytest.warns(RuntimeWarning, match="took longer than 1 s and was ended"):
        values = reward(completions=["2", "$9^{9^{9^9}}$", "2"], answer=["2", "1", "3"])
    assert values == [1, None, 0]
    assert time.perf_counter() - start < 40  # two starts of the process on a busy machine, and one second


def test_without_math_verify(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'jaxrl\[reasoning\]'"):
        rewards.math_reward()
