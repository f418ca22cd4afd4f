"""The reward of a file of problems: a wrong final answer never, a right one however it is written."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from gac_kernels.train import answers, values
from gac_kernels.train.answers import check_reward, ends_with_answer, normalise, plain
from gac_kernels.train.values import number, same_value

# (completion, answer)
WRONG = [
    (r"so the answer is \boxed{\frac{1}{5}}", "5"), (r"x = \sqrt{5}", "5"), (r"\boxed{x^{2}}", "2"),
    ("the answer is 3*5", "5"), ("x = - 5", "5"), (r"\boxed{-(5)}", "5"), ("answer: 5²", "52"), ("5", "5!"),
    ("3 x 10^(5)", "5"), ("142", "42"), ("-42", "42"), ("0.42", "42"), ("42 apples", "42"), ("", "42"),
    ("anything", "..."), ("5!", "5"), ("5 or 6", "6"), ("5 or 6", "5"), ("not 5", "5"), ("the answer is not 5", "5"),
    ("it isn't 5", "5"), ("The answer is not: 5", "5"), ("It is not\n5", "5"),
    (r"\boxed{5}. Actually the answer is 6", "5"), (r"\boxed{5} or \boxed{6}", "6"), (r"not \boxed{5}", "5"),
    (r"-\boxed{5}", "5"), (r"2\cdot\boxed{5}", "5"), ("\\boxed{5}\nNo, \\boxed{6}", "5"), ("1½", "11/2"),
    ("1½", "1/2"), ("1 1/2", "1/2"), ("x10", "10"), ("-(5)", "5"), ("- (5)", "5"), ("10^5", "5"), ("2^{5}", "5"),
    ("5^2", "2"), ("x_5", "5"), ("the ratio is 2:3", "3"), ("ratio 2 : 3", "3"), ("x ≠ 5", "5"), ("x != 5", "5"),
    ("x >= 5", "5"), ("x<=5", "5"), ("x > 5", "5"), (r"x \neq 5", "5"), (r"x \leq 5", "5"), ("x ≈ 5", "5"),
    ("± 5", "5"), (r"\pm 5", "5"), (r"x = \pm 5", "5"), ("x = 5 or x = 6", "6"), ("x = 5, y = 6", "6"),
    ("between 4 and 5", "5"), ("4 to 5", "5"), ("4-5", "5"), ("4–5", "5"), ("less than 5", "5"), ("at least 5", "5"),
    ("Paris, Texas", "Paris"), ("Paris, Texas", "Texas"), ("unparis", "Paris"), ("New York", "York"),
    ("not Paris", "Paris"), ("the capital is not Paris", "Paris"), ("blue whale", "whale"),
    ("Paris or London", "London"), ("I don't know whether it is Paris", "Paris"), ("(1,2)", "(2,1)"),
    ("(2,1)", "(3,1)"), ("(1,2)", "[1,2]"), (r"\{1,2\}", "(1,2)"), ("[1,2)", "[1,2]"), ("1,2", "2,1"),
    ("(1,234)", "1234"), ("1,5", "1.5"), ("1.234", "1,234"), ("1,23", "123"), ("0.333333", "1/3"), ("3.14", r"\pi"),
    ("50%", "50"), ("50", "50%"), ("5 km", "5000 m"), ("5 cm", "5"), ("5 cm", "5 m"), (r"30^\circ", "30"),
    ("5i", "5"), ("2x", "2"), ("X", "Y"), ("9^9^9^9", "9"), ("9^{9^{9^{9}}}", "5"), ("99999999999!", "5"),
    ("((9^{9999})^{9999})^{9999}", "5"), ("(x+1)^{9999}", "5"), (r"\sum_{k=1}^{10^9} k", "5"),
    ("the sum is 3 +\n5", "5"), ("1/5", "5"), (r"\frac{1}{5}", "5"), (r"\frac15", "5"), ("1e5", "5"), ("5e3", "5"),
    ("5e3", "3"), ("10¹²", "12"), ("x²", "2"), ("H₂", "2"), ("5 5", "10"), ("5 5", "5"), ("007", "7"), ("7", "007"),
    ("(5)(6)", "6"), ("f(5)", "5"), ("|−5|", "-5"), ("−5", "5"), ("–5", "5"), ("— 5", "5"), ("2,5", "5"), ("A5", "5"),
    ("5A", "5"), ("5?", "6"), ("Is it 5?", "5"), ("x=-5", "5"), ("y=5", "x=5"), ("5", "x=6"), ("a,b", "b"),
    ("=> -5", "5"), ("3×5", "5"), ("3·5", "5"), ("3 ** 5", "5"), ("5**2", "2"), ("5*", "5*6"), ("1:5", "5"),
    ("#5 of 10", "10"), ("No. 15", "5"), ("six", "6"), ("5 5/6", "5/6"), ("5\n+6", "5"), (r"\boxed{}", "5"),
    (r"\boxed{5", "5"), (r"\boxed{5}{6}", "5"), (r"\boxed{5}{6}", "6"), (r"\boxed{5}^2", "5"), (r"\boxed{5}!", "5"),
    (r"\frac{\boxed{5}}{2}", "5"), (r"\sqrt{\boxed{5}}", "5"), ("The answer is either 4 or 5.", "5"),
    ("neither 4 nor 5", "5"), ("wrong answer: 5", "5"), ("The wrong answer is 5", "5"), ("5 is wrong", "5"),
    ("answer is 5 is wrong", "wrong 5"), ("True or False", "False"), ("yes and no", "no"), ("not true", "true"),
    ("Untrue", "true"), ("false", "true"), ("The answer is $-$5", "5"), ("minus 5", "5"), ("negative 5", "5"),
    ("-$5$", "5"), ("- **5**", "5"), ("twenty 5", "5"), ("12 345", "345"), ("1 234", "234"), ("0.5", "5"),
    (".5", "5"), ("5.0.1", "5"), ("5e", "5"), ("5^", "5"), ("√5", "5"), ("∛5", "5"), ("⁻5", "5"), ("⁵", "5"),
    ("₅", "5"), ("6⁵", "5"), ("5′", "5"), ("5°", "5"), ("5'", "5'1"), ("B) 6", "6 B"), ("(5)(6)", "11"),
    ("2(3)", "5"), (r"2\frac{x}{3}", r"\frac{2x}{3}"), (r"\frac{1}{2}(3)", "3.5"), ("(2)3", "5"), ("2 3", "5"),
    ("2x", "x+2"), (r"2\sqrt{3}", r"2+\sqrt{3}"), (r"2\pi", r"2+\pi"), ("3x", "x^3"), ("xx", "x^2"), ("5x", "x+5"),
    ("3!4", "7"), (r"5\%3", "3"), ("10<sup>5</sup>", "5"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\4&3\end{pmatrix}"), (r"5 \text{ cm}", "5 cm"),
    (r"x \in (1,2)", "(1,2)"), (r"(1,2)\cup(3,4)", r"(1,2)\cup(3,5)"), ("a^2-b^2", "(a+b)(a+b)"), (r"e^{i\pi}", "-1"),
    ("1e400", "5"), (r"\sqrt{x^2}", "x"),
]  # fmt: skip
RIGHT = [
    (r"\boxed{5}", "5"), ("1,234", "1234"), ("−5", "-5"), ("The answer is **42**.", "42"), ("5\n", "5"),
    ("$$5$$", "5"), ("The answer is 5</answer>", "5"), ("½", "1/2"), ("5 .", "5"), ("«5»", "5"), ("“Paris”", "Paris"),
    ("is:5", "5"), ("Answer: 5 ", "5"), ("5;", "5"), ("x = 42", "42"), ("#### 42\n", "42"),
    ("It is  New\nYork!", "new york"), ("４２", "42"), (r"\boxed{42}", "42"), (r"\boxed{4} no, \boxed{42}", "42"),
    (r"thus $x=\frac{1}{2}$.", "1/2"), (r"thus $x=\dfrac{1}{2}$.", "0.5"), (r"\frac12", r"\frac{1}{2}"),
    ("1½", "3/2"), (r"1\frac{1}{2}", "1.5"), ("1 1/2", "1.5"), (r"\boxed{\text{Paris}}", "Paris"),
    (r"\boxed{\mathrm{Paris}}.", "paris"), (r"\boxed{1,234}", "1234"), ("1{,}234", "1234"), ("$1,234.50", "1234.5"),
    (r"50\%", "50%"), ("50%", "0.5"), ("1e3", "1000"), ("3 x 10^5", "300000"), (r"3 \times 10^{5}", "300000"),
    ("3×10⁵", "300000"), ("10²", "100"), ("10^2", "100"), ("5!", "120"), ("3*5", "15"), (r"\sqrt{25}", "5"),
    (r"2\sqrt{3}", r"\sqrt{12}"), ("x+1", "1+x"), ("(x+1)^2", "x^2+2x+1"), (r"\pi/2", r"\frac{\pi}{2}"),
    ("π/2", r"\frac{\pi}{2}"), ("(1, 2)", "(1,2)"), ("(1/2, 2)", "(0.5, 2)"), (r"\{2,1\}", r"\{1,2\}"),
    ("[0, 1)", "[0,1)"), (r"\left(1,2\right)", "(1,2)"), ("x = 5", "x=5"), ("5", "x = 5"),
    ("The answer is (C).", "C"), ("(C)", "C"), ("c", "C"), ("5 cm", "5 cm"), ("5cm", "5 cm"), ("5.0 cm", "5 cm"),
    ("<answer>5</answer>", "5"), ("<think>6</think>5", "5"), ("<think>6</think>\n\n5<|im_end|>", "5"),
    ("I think 6.\n5", "5"), ("**Answer:** 5", "5"), ("**Answer: 5**", "5"),
    (r"The final answer is: $\boxed{5}$", "5"), (r"\[ \boxed{5} \]", "5"), (r"\( 5 \)", "5"), (r"So \(x = 5\).", "5"),
    ("`5`", "5"), ('"Paris".', "Paris"), ("'Paris'", "Paris"), ("The capital of France is Paris.", "Paris"),
    ("It's Paris", "Paris"), ("so 3", "3"), ("2+3 is 5", "5"), ("+5", "5"), ("- 5", "-5"), ("x = - 5", "-5"),
    ("(-5)", "-5"), ("-(5)", "-5"), ("5.", "5"), ("5.0", "5"), ("5,", "5"), ("x^{2}", "x^2"), ("sin(x)", r"\sin x"),
    ("e^{2}", "e^2"), ("Since 2 is not 3, the answer is 5", "5"), ("A\n\nB", "B"), ("True.", "true"), ("ﬁne", "fine"),
    ("co\xadoperate", "cooperate"), ("\u200b5", "5"), ("x → 5", "5"), ("=> 5", "5"), ("⇒ 5", "5"),
    ("3x+2=8, so x=2", "2"), ("x < 5", "5 > x"), ("100,000", "100000"), ("12,345,678", "12345678"), ("0", "0"),
    ("-0", "0"), ("1+1=2", "2"), (r"\frac{x}{2}", "x/2"), ("0.1+0.2", "0.3"), ("8/4", "2"), ("a", "A"),
    ("It is 5 o'clock", "5 o'clock"), ("Answer: 12:30", "12:30"), ("12:30", "12:30"), ("C++", "C++"), ("C++", "c++"),
    ("#", "#"), ("5*", "5*"), ("yes", "Yes."), ("naïve", "NAÏVE"), ("2:3", "2:3"), ("the ratio is 2:3", "2:3"),
    ("30°", "30°"), (r"30^\circ", "30°"), ("7/1", "7"), ("Final answer: x = 7", "7"), ("5\r\n", "5"),
    ("Thus, 5", "5"), ("(5)(6)", "30"), ("2(3)", "6"), ("x(x+1)", "x^2+x"), (r"\log_2(8)", "3"), (r"\log_{2}8", "3"),
    ("|−5|", "5"), ("1 + 1", "2"), ("2+-3", "-1"), ("--5", "5"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
    (r"\cos(\pi/7)+\cos(3\pi/7)+\cos(5\pi/7)", "1/2"), (r"(1,2) \cup (3,4)", r"(1,2) \cup (3,4)"),
    ("a^2-b^2", "(a+b)(a-b)"), (r"\frac{x^2-1}{x-1}", "x+1"), ("2.50", "2.5"), ("1.0E3", "1000"),
]  # fmt: skip
# Each would take minutes to for ever, or all memory, if it were computed or proved symbolically.
ENDLESS = [
    "9^9^9^9", "9**9**9**9", "9^{9^{9^{9}}}", "((9^{9999})^{9999})^{9999}", "99999999999!", "(99!)!",
    r"\exp(\exp(\exp(9)))", r"\exp(10^{39})", r"(\sqrt{2}+\sqrt{3})^{9999}", "(x+y+z+w+a+b)^{12}", "(x+1)^{9999}",
    r"\sum_{k=1}^{10^9} k", r"\binom{10^{9}}{500}", "(" * 300, "1" * 5000, "9^" * 50 + "9",
]  # fmt: skip


def test_a_wrong_final_answer_is_never_rewarded():
    assert [pair for pair in WRONG if ends_with_answer(*pair)] == []


def test_right_answers_are_rewarded_however_they_are_written():
    assert [pair for pair in RIGHT if not ends_with_answer(*pair)] == []


def test_nothing_takes_for_ever():
    same_value("x + 1", "1 + x")  # imports math-verify
    began = time.perf_counter()
    for text in ENDLESS:
        for answer in ("5", r"\sqrt{2} + \pi", "x^2 + y"):
            assert not ends_with_answer(f"The answer is {text}", answer)
    for text in ("$" * 10**6, "=" * 10**6, "x = 5 is " * 10**5, r"\boxed{" * 10**5, "* " * 10**5, " " * 10**6):
        assert not ends_with_answer(text, "7")
    assert time.perf_counter() - began < 60  # some 3 s


def test_other_threads_and_a_clock_of_ones_own_are_left_alone():
    """math-verify's time limit sets SIGALRM, which only the main thread may, and which a test runner may have set."""
    import signal

    found, before = [], signal.getsignal(signal.SIGALRM)
    thread = threading.Thread(target=lambda: found.append(ends_with_answer("x^2 - 1", "(x+1)(x-1)")))
    thread.start()
    thread.join()
    assert found == [True] and signal.getsignal(signal.SIGALRM) is before


def test_what_unicode_folds_keeps_its_meaning():
    assert plain("5²") == "5^(2)" and plain("10¹²") == "10^(12)" and plain("x₁") == "x_(1)"
    assert plain("1½") == "1 1/2" and plain("−５\u200b") == "-5"
    assert normalise("  **New\n York.** ") == "new york" and normalise("...") == normalise("*") == ""


def test_numbers_are_exact():
    assert number("0.1") * 10 == 1 and number("1,234.50") == 1234.5 and number("-1 1/2") == -1.5
    for text in ("1,23", "007", "1/0", "5 6", "1e9999", "", ".", "-", "1,234,5", "٣x"):
        assert number(text) is None, text


def test_without_math_verify_a_run_with_mathematical_answers_does_not_begin(monkeypatch):
    monkeypatch.setattr(answers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    check_reward(["Paris", "yes"])
    for answer in ("5", r"\frac{x}{2}"):
        with pytest.raises(ImportError, match=r"math-verify.*gac-kernels\[train\]"):
            check_reward(["Paris", answer])


def test_plain_answers_need_no_parser(monkeypatch):
    """Thousands of completions are judged in a step; math-verify takes milliseconds for one and seconds to load."""
    monkeypatch.setattr(values, "_math_verify", lambda: pytest.fail("called"))
    assert ends_with_answer("The sum is 1,234.", "1234") and ends_with_answer("It is Paris", "paris")
    assert not ends_with_answer("so 5", "6") and not ends_with_answer("It is 3/4", "2/3")
