"""`jax-eplb report` of a log: balancedness over time, as vLLM or SGLang wrote it."""

import json

import numpy as np

from jax_eplb.formats.balancedness_log import Balancedness

_PARTS = 10  # rows of the table


def print_log(series: list[Balancedness], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"models": [_figures(each) for each in series]}))
        return
    print("\n\n".join(_text(each) for each in series))


def _figures(series: Balancedness) -> dict:
    values = series.balancedness
    weighted = series.by_tokens
    return {
        "model": series.model,
        "lines": len(values),
        "balancedness": float(values.mean()),
        "balancedness_by_tokens": None if np.isnan(weighted) else weighted,
        "lowest": float(values.min()),
        "rearrangements": len(series.seconds),
        "rearrangement_seconds": float(sum(series.seconds)),
        "rearranged_after_lines": list(series.rearranged),
        "steps": series.steps.tolist(),
        "over_time": values.tolist(),
    }


def _text(series: Balancedness) -> str:
    figures = _figures(series)
    lines = [f"{series.model or 'balancedness'}: mean load of the ranks / load of the fullest"]
    lines.append("lines            mean  lowest")
    values = series.balancedness
    ends = np.unique(np.linspace(0, len(values), _PARTS + 1).astype(int))
    for first, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        part = values[first:end]
        lines.append(f"{f'{first} - {end - 1}':<13}  {part.mean():.4f}  {part.min():.4f}")
    lines.append(f"{'all':<13}  {values.mean():.4f}  {values.min():.4f}")
    if figures["balancedness_by_tokens"] is not None:
        weighted = figures["balancedness_by_tokens"]
        lines.append(
            f"weighted by tokens {weighted:.4f}: the ranks wait {100 * (1 - weighted):.1f}% of the "
            "time of the experts for the fullest one"
        )
    if series.seconds:
        after = ", ".join(map(str, series.rearranged[:8]))
        more = ", ..." if len(series.rearranged) > 8 else ""
        lines.append(
            f"{len(series.seconds)} rearrangements, {sum(series.seconds):.2f} s, after lines "
            f"{after}{more}"
        )
    if series.model:
        lines.append(
            "(vLLM before August 2026 takes mean and maximum over layers, not ranks; there these "
            "figures say nothing of the ranks: see docs/formats.md)"
        )
    return "\n".join(lines)
