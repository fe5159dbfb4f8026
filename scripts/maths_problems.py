"""Write grade-school maths word problems with worked solutions, from a seed.

    python scripts/maths_problems.py --count 3 --seed 1

Every number in a solution is computed, never copied, so each written equation holds; all text is
this project's own. A family is a function that draws one kind of problem: `maths_counting`,
`maths_money`, `maths_measures`, `maths_ratios` and `maths_time` hold them.
"""

import argparse
import random
from collections.abc import Iterator

# Imported for their registrations: each module adds its families to FAMILIES.
import maths_counting
import maths_measures
import maths_money
import maths_ratios
import maths_time
from maths_words import FAMILIES, Draw, Problem

MODULES = (maths_counting, maths_measures, maths_money, maths_ratios, maths_time)


def problems(seed: int | str) -> Iterator[Problem]:
    """Yield problems without end; the same seed gives the same problems on every machine.

    The families come in shuffled rounds, so any long run holds them all equally often.
    """
    # Seeding by text goes through SHA-512, which no platform changes.
    rng = random.Random(f"maths {seed}")
    draw = Draw(rng)
    names = sorted(FAMILIES)
    while True:
        for name in rng.sample(names, len(names)):
            yield FAMILIES[name](draw)


def take_bytes(seed: int | str, size: int, taken: set[str]) -> list[str]:
    """Take new problems until their text reaches `size` bytes.

    `taken` holds the questions seen so far, and grows.
    """
    texts, total = [], 0
    for problem in problems(seed):
        if total >= size:
            break
        if problem.question not in taken:
            taken.add(problem.question)
            texts.append(problem.text)
            total += len(problem.text.encode())
    return texts


def main() -> None:
    """Print some problems."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=5, help="how many problems")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    stream = problems(options.seed)
    print("\n".join(next(stream).text for _ in range(options.count)), end="")


if __name__ == "__main__":
    main()
