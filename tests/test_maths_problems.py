"""The maths problems: every equation holds, every answer is what the question asks for."""

import collections
import datetime
import doctest
import importlib
import itertools
import math
import re
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
maths = importlib.import_module("maths_problems")
words = importlib.import_module("maths_words")
clocks = importlib.import_module("maths_time")

EQUATION = re.compile(r"(-?[$(]*\d[\d.$()+*/ -]*?) = (-?\$?\d+(?:\.\d+)?)")
DAY = datetime.timedelta(days=1)
MONDAY = datetime.date(2024, 1, 1)

# Each answer from the numbers of the question, where possible by another way than the solution's.
FORMULAS = {
    "age_multiple": lambda years, times, now: Fraction(now - years, times) + years,
    "ages_in_years": lambda young, gap, years: 2 * (young + years) + gap,
    "bill_with_tip": lambda bill, percent, people: Fraction(bill * (100 + percent), 100 * people),
    "bus_stops": lambda start, off1, on1, off2, on2: start + on1 + on2 - off1 - off2,
    "catching_up": lambda lead, slow, fast: Fraction(lead, fast - slow),
    "change_from_bill": lambda n, x, m, y, bill: bill - sum([x] * n) - sum([y] * m),
    "cheaper_pack": lambda pack, single, price, packs: packs * pack * single - packs * price,
    "coins": lambda quarters, dimes, nickels: Fraction(5 * quarters + 2 * dimes + nickels, 20),
    "consecutive_numbers": lambda sum, largest: Fraction(sum, 3) + (1 if largest else -1),
    "cutting_rope": lambda metres, piece: math.floor(Fraction(metres * 100, piece)),
    "day_of_the_week": lambda today, later: (MONDAY + (today + later) * DAY).weekday(),
    "discount": lambda price, percent: Fraction(price * (100 - percent), 100),
    "distance_of_trip": lambda v, w, h, k: sum([v] * h + [w] * k),
    "doubling": lambda start, rounds: start << rounds,
    "end_of_event": lambda start, long, pause: start + long + pause,
    "equal_groups": lambda groups, each, broken: groups * each - broken,
    "fence": lambda long, wide, price, gate: (long + wide + long + wide - gate) * price,
    "fewer_than": lambda most, less, extra: most + extra - less,
    "filling_a_box": lambda x, y, z, side: (x // side) * (y // side) * (z // side),
    "filling_a_tank": lambda fill, leak, size: Fraction(size, fill - leak),
    "fraction_used": lambda whole, above, below: whole * (1 - Fraction(above, below)),
    "fuel": lambda per, distance, price: Fraction(distance * price, per),
    "gain_and_give": lambda start, more, given: start + more - given,
    "growing_pattern": lambda first, more, days: range(first, 10**6, more)[days - 1],
    "heads_and_legs": lambda heads, legs: Fraction(legs, 2) - heads,
    "machines": lambda rate, number, made: Fraction(made, rate * number),
    "map_scale": lambda cm, scale, speed: Fraction(cm * scale, speed),
    "minutes_each_day": lambda day, days: day * days,
    "mixed_price": lambda x, low, kilos, high: Fraction(x * low + kilos * high, x + kilos),
    "monthly_or_yearly": lambda month, year: 12 * month - year,
    "overtime": lambda wage, more, hours, extra: wage * (hours + extra) + more * extra,
    "packs_needed": lambda guests, each, pack: math.ceil(Fraction(guests * each, pack)),
    "pages_left": lambda pages, daily, days: pages - daily * days,
    "path_around": lambda long, wide, edge: 2 * edge * (long + wide) + 4 * edge**2,
    "percent_growth": lambda size, percent, more: size * (1 + Fraction(percent, 100)) + more,
    "percent_of_group": lambda size, percent: size * Fraction(100 - percent, 100),
    "plain_average": lambda total, count: Fraction(total, count),
    "price_before": lambda now, percent: now / (1 - Fraction(percent, 100)),
    "price_in_cents": lambda count, cents: Fraction(count * cents, 100),
    "profit": lambda count, cost, price, rent: count * price - count * cost - rent,
    "raise_in_pay": lambda pay, more, months: 12 * pay + (12 - months) * more,
    "ratio_share": lambda x, y, whole: whole * Fraction(y, x + y),
    "recipe": lambda base, used, wanted: Fraction(used * wanted, base),
    "rows_of_seats": lambda rows, seats, taken: rows * seats - taken,
    "saving_weeks": lambda price, have, weekly: Fraction(price - have, weekly),
    "score_needed": lambda total, tests, goal: goal * (tests + 1) - total,
    "share_equally": lambda all, kept, friends: Fraction(all - kept, friends),
    "share_of_colour": lambda one, two, three: Fraction(100 * one, one + two + three),
    "simple_interest": lambda sum, rate, years: sum * (1 + Fraction(rate * years, 100)),
    "solution_strength": lambda weak, strong, x, y: Fraction(x * weak + y * strong, 100),
    "sum_and_difference": lambda both, gap: Fraction(both + gap, 2),
    "temperature": lambda start, fall, hours, rise: start + rise - fall * hours,
    "think_of_a_number": lambda result, times, plus: Fraction(result - plus, times),
    "three_days": lambda base, more, times: base * (2 + times) + more,
    "tickets": lambda adults, children, high, low: adults * high + children * low,
    "tiles_for_floor": lambda side, long, wide: Fraction(long * wide, side**2),
    "time_of_trip": lambda distance, v, rest: Fraction(distance, v) + rest,
    "times_as_many": lambda few, times: few * (1 + times),
    "towards_each_other": lambda v, w, apart: Fraction(apart, v + w),
    "triangle_angles": lambda one, two: 180 - one - two,
    "two_fractions": lambda b, c, whole: whole * (1 - Fraction(1, b)) * (1 - Fraction(1, c)),
    "weight_in_bags": lambda kilograms, bags, grams: kilograms * 1000 - bags * grams,
    "workers_and_days": lambda workers, days, more: Fraction(workers * days, more),
}
# Numbers that a question tells in another form: as a word, a list, a time, an amount of dollars.
UNWRITTEN = {
    "bill_with_tip": {"people"},
    "consecutive_numbers": {"largest"},
    "day_of_the_week": {"today"},
    "end_of_event": {"start"},
    "plain_average": {"count", "total"},
    "price_in_cents": {"cents"},
    "score_needed": {"tests", "total"},
    "times_as_many": {"times"},
}


def value(expression: str) -> Fraction:
    """Compute a written expression exactly."""
    exact = re.sub(r"\d+(\.\d+)?", lambda number: f"F('{number[0]}')", expression.replace("$", ""))
    return eval(exact, {"__builtins__": {}, "F": Fraction})


@pytest.fixture(scope="module")
def drawn():
    """Forty problems of each family."""
    return list(itertools.islice(maths.problems("test"), 40 * len(words.FAMILIES)))


def test_there_are_many_families_each_with_a_formula():
    assert set(FORMULAS) == set(words.FAMILIES)
    assert len(FORMULAS) >= 30


def test_every_written_equation_holds(drawn):
    for problem in drawn:
        found = [pair for step in problem.steps for pair in EQUATION.findall(step)]
        assert len(found) == sum(step.count(" = ") for step in problem.steps), problem.text
        for left, right in found:
            assert value(left) == value(right), problem.text


def test_every_answer_equals_the_formula_of_its_question(drawn):
    for problem in drawn:
        expected = FORMULAS[problem.family](**problem.given)
        assert abs(Fraction(problem.answer) - expected) < Fraction(1, 10**9), problem.text


def test_the_last_line_states_the_answer(drawn):
    for problem in drawn:
        assert problem.text.endswith(f"\nThe answer is {problem.answer_text}.\n")
        stated = problem.answer_text
        if problem.family == "day_of_the_week":
            assert stated == (MONDAY + problem.answer * DAY).strftime("%A")
        elif problem.family == "end_of_event":
            hour, minute = divmod(problem.answer % 1440, 60)
            assert stated == datetime.time(hour, minute).strftime("%I:%M %p").lstrip("0")
        elif problem.family == "minutes_each_day":
            hours, minutes = map(int, re.findall(r"\d+", stated))
            assert 60 * hours + minutes == problem.answer
        else:
            number = Fraction(re.match(r"\$?(-?\d+(\.\d+)?)", stated)[1])
            assert abs(number - Fraction(problem.answer)) < Fraction(1, 10**9)


def test_the_question_states_the_numbers_that_the_formula_uses(drawn):
    for problem in drawn:
        written = set(map(int, re.findall(r"(?<![\d.])-?\d+", problem.question)))
        for name in problem.given.keys() - UNWRITTEN.get(problem.family, set()):
            assert problem.given[name] in written, (name, problem.text)


def test_no_answer_is_negative_but_a_temperature(drawn):
    for problem in drawn:
        assert problem.answer >= 0 or problem.family == "temperature", problem.text


def test_the_text_is_clean_ascii(drawn):
    for problem in drawn:
        assert problem.text.isascii()
        assert not re.search(r"[{}]|\.\.|  |\b1 (hours|days|minutes|metres)\b", problem.text), (
            problem.text
        )
        assert re.fullmatch(
            r"Question: .+[?.]\nAnswer: (.+\.\n)+The answer is .+\.\n", problem.text
        )


def test_the_same_seed_gives_the_same_problems():
    first, again, other = (
        [problem.text for problem in itertools.islice(maths.problems(seed), 100)]
        for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other


def test_families_come_equally_often(drawn):
    assert set(collections.Counter(problem.family for problem in drawn).values()) == {40}


def test_taken_questions_do_not_come_again():
    taken = set()
    first = maths.take_bytes(1, 20_000, taken)
    again = maths.take_bytes(1, 20_000, taken)
    questions = [text.partition("\n")[0] for text in first + again]
    assert len(set(questions)) == len(questions) == len(taken)
    assert 20_000 <= sum(map(len, first)) < 21_000


def test_the_committed_sample_is_what_the_generator_draws():
    path = ROOT / "jax_eplb" / "models" / "samples" / "maths.txt"
    sample = path.read_text(encoding="utf-8").split("\0")[:-1]
    assert sample == maths.take_bytes("heldout 0", len("".join(sample)), set())


@given(st.integers(0, 2879))
def test_clock_agrees_with_the_standard_library(minutes):
    time = datetime.time(minutes % 1440 // 60, minutes % 60)
    assert clocks.clock(minutes) == time.strftime("%I:%M %p").lstrip("0")


@given(st.integers(0, 10**6))
def test_money_reads_back(cents):
    assert Fraction(words.money(cents).lstrip("$")) * 100 == cents


@pytest.mark.parametrize("module", [words, clocks], ids=lambda module: module.__name__)
def test_doctests_hold(module):
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed
