"""What the tables say, in plain words; every number in a sentence is computed from rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median

from dualout.analysis.study import Study
from dualout.analysis.tables import Row, Spread, grouped, measured, number, paired, spread
from dualout.evaluation.protocol import ENOUGH
from dualout.parameterizations import Parameterization

CELL = ("sampler", "spacing", "steps")
"""What is equal between methods that are compared."""
EVEN = 0.02
"""Ratios closer to 1 than this are called equal."""


def method(row: Row) -> str:
    """What a row's model is called: its parameterization, and how it was read where that is not as trained."""
    name = str(row.get("method") or Parameterization.shortened(str(row.get("parameterization") or "model")))
    route = row.get("route")
    if "method" not in row and route not in (None, "", "mix"):
        name += f" ({route} route)"
    if row.get("guidance") is not None:
        levels = row.get("guidance_interval")
        guided = f", guidance {row['guidance']:g}" + (f" at {levels}" if levels else "")
        name += "" if guided in name else guided
    calibrated = row.get("calibrated") and not name.endswith(", calibrated")
    return name + (", calibrated" if calibrated else "")


def named(rows: Sequence[Row]) -> list[Row]:
    """The rows, each with its `method`."""
    return [r | {"method": method(r)} for r in rows]


def methods_of(rows: Sequence[Row]) -> list[str]:
    """What the rows' models are called: dual output first, whatever it is called, then as they came."""
    models = _models(rows)
    return sorted(models, key=lambda m: not (m.startswith("dual") or models[m].startswith("dual")))


def _models(rows: Sequence[Row]) -> dict[str, str]:
    """The parameterization of each method."""
    return {(name := method(r)): str(r.get("parameterization") or name) for r in rows}


def cells(rows: Sequence[Row]) -> list[Row]:
    """One row for each sampler, spacing and number of steps.

    It has one column a method, the mean over seeds (`spreads` has their standard deviations), and one column for the
    ratio of the first method to each other, paired by training seed where rows tell theirs.
    """
    methods = methods_of(rows)
    table: list[Row] = []
    keys = grouped(rows, lambda r: tuple(r.get(k) for k in CELL))
    for key in sorted(keys, key=lambda k: (str(k[0]), str(k[1]), k[2] if isinstance(k[2], int) else 0)):
        own = {m: [r for r in keys[key] if method(r) == m] for m in methods}
        found = {m: spread(r.get("fd") for r in of) for m, of in own.items()}
        row: Row = dict(zip(CELL, key, strict=True))
        row |= {m: s.mean for m, s in found.items() if s is not None}
        row["spreads"] = {m: s for m, s in found.items() if s is not None}
        for other in methods[1:]:
            if ratio := paired(own[methods[0]], own[other]):
                row[ratio_name(methods[0], other)] = ratio.mean
        table.append(row)
    return table


def ratio_name(first: str, other: str) -> str:
    """The column of a ratio."""
    return f"{first} / {other}"


def compare(rows: Sequence[Row]) -> list[str]:
    """Which of the methods has the lower score where, honestly."""
    methods, models = methods_of(rows), _models(rows)
    table = cells(rows)
    # the same model read or guided otherwise is what is asked last
    others = sorted(methods[1:], key=lambda m: models[m] == models[methods[0]])
    found = [s for other in others if (s := _against(table, methods[0], other))]
    return [*found, *([solver] if (solver := _solver(table, methods)) else []), *_caution(rows)]


def verdict(rows: Sequence[Row], studies: Sequence[Study]) -> list[str]:
    """The shortest account: which method wins, and whether the ratio was learned."""
    several = len({method(r) for r in rows}) > 1
    return [*(compare(rows)[:1] if several else ()), *(s for study in studies for s in _noisy(study))]


def _against(table: Sequence[Row], first: str, other: str) -> str:
    name = ratio_name(first, other)
    ratios = [row[name] for row in table if name in row]
    if not ratios:
        return ""
    mean = math.exp(fmean(math.log(r) for r in ratios)) if min(ratios) > 0 else fmean(ratios)
    better, worse = sum(r < 1 - EVEN for r in ratios), sum(r > 1 + EVEN for r in ratios)
    verdict = (
        "is better everywhere" if better == len(ratios)
        else "is worse everywhere" if worse == len(ratios)
        else f"is better in {better} of {len(ratios)} settings and worse in {worse}" if better > worse
        else f"does not win: it is better in {better} of {len(ratios)} settings and worse in {worse}"
    )  # fmt: skip
    return (
        f"**{first}** against **{other}**: {first} {verdict}. The ratio of Fréchet distances, {first} over {other}, is "
        f"{mean:.2f} in the (geometric) mean, from {min(ratios):.2f} to {max(ratios):.2f} (below 1 is better)."
    )


def _solver(table: Sequence[Row], methods: Sequence[str]) -> str:
    """How much the choice of sampler and spacing is worth at the fewest steps, beside that of the method."""
    if not table:
        return ""
    fewest = min(row["steps"] for row in table)
    gains = []
    for m in methods:
        known = [(row[m], row) for row in table if row["steps"] == fewest and row.get(m)]
        if len(known) > 1:
            (low, best), (high, worst) = min(known, key=lambda k: k[0]), max(known, key=lambda k: k[0])
            gains.append((high / low, m, _setting(best), _setting(worst)))
    if not gains:
        return ""
    factor, m, best, worst = max(gains)
    return (
        f"At {fewest} steps the sampler and its spacing change {m} by a factor of {factor:.1f} ({worst} against "
        f"{best}): compare methods at equal settings only."
    )


def _setting(row: Row) -> str:
    return f"{row['sampler']}, {row['spacing']}"


def _caution(rows: Sequence[Row]) -> list[str]:
    counts = sorted({r["images"] for r in rows if r.get("images")})
    found = []
    if counts and counts[0] < ENOUGH:
        many = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        found.append(
            f"Scores are of {many} images, below {ENOUGH:,}: they hold beside each other, not beside published ones."
        )
    if any(len({r.get("run") for r in own}) == 1 for own in grouped(rows, method).values()):
        found.append("One training each: differences of a few percent may be chance.")
    return found


def ratio(study: Study) -> list[str]:
    """Whether the learned ratio is what it should be."""
    if not study.dual:
        return []
    found = []
    if crossing := study.crossings:
        clean = min(study.routes, key=lambda r: r["t"])
        sides = (
            ": below it subtracting the noise is the better way to the image, above it asking for the image"
            if len(crossing) == 1 and clean["subtractive_x0_error"] < clean["direct_x0_error"]
            else ""
        )
        found.append(f"The two routes are equally wrong at t = {', '.join(f'{c:.0f}' for c in crossing)}{sides}.")
    found += _noisy(study)
    if known := [r for r in study.routes if r.get("blend_over_best")]:
        worst = max(known, key=lambda r: r["blend_over_best"])
        middle = median(r["blend_over_best"] for r in known)
        found.append(
            f"The blend's error of x0, over that of the best constant r at the same t, is {number(middle, 3)} "
            f"in the median over t, {number(worst['blend_over_best'], 3)} at worst (t = {worst['t']})."
        )
    return found


def _noisy(study: Study) -> list[str]:
    if not study.dual:
        return []
    last = max(r["t"] for r in study.routes)
    # a ratio of 0 says nothing that a slope could be of
    noisy = [r for r in study.routes if r["t"] >= 0.5 * last and measured(r.get("slope"))]
    if not noisy:
        return []
    said, best = fmean(r["ratio_mean"] for r in noisy), fmean(r["ratio_best"] for r in noisy)
    slopes = [r["slope"] for r in noisy]
    if all(0.95 <= s <= 1.05 for s in slopes):
        text = "its slope of calibration lies within 0.95 and 1.05: the ratio has been learned"
    else:
        text = f"its slope of calibration is {min(slopes):.2f} to {max(slopes):.2f}, where 1 is right"
    return [
        f"In the noisier half (t ≥ {0.5 * last:.0f}) r is {said:.2f} on average where {best:.2f} would be best; {text}."
    ]


def paths(studies: Mapping[str, Study]) -> list[str]:
    """What the sampler costs, and what the network."""
    found = []
    for name, study in studies.items():
        if not study.trajectory:
            continue
        end = study.trajectory[-1]
        if end.get("sd") is None or end.get("sd_data") is None:
            continue
        exact = f", and an exact denoiser's by {end['sd_exact']:.3f}" if end.get("sd_exact") is not None else ""
        shares = [r["clipped"] for r in study.trajectory if "clipped" in r]
        clipped = f"; {100 * max(shares):.0f}% of the pixels are clipped at the worst step" if shares else ""
        found.append(
            f"**{name}**, {len(study.trajectory)} steps: the images' {'pixels' if shares else 'latents'} spread by "
            f"{end['sd']:.3f}, the data's by {end['sd_data']:.3f}{exact}{clipped}."
        )
    return found


def spread_text(value: Spread) -> str:
    """Mean ± standard deviation."""
    return number(value.mean, zeros=True) + (f" ± {number(value.sd, 2)}" if value.n > 1 else "")
