"""The page is valid, whole, and fetches nothing."""

import functools
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from dualout.analysis import canvas, figures, page, reading
from dualout.analysis.report import Material, Run, comparison, report
from dualout.analysis.study import Study
from dualout.analysis.trajectories import Frame

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Checker(HTMLParser):
    """Tags that open and close, ids that are unique, and nothing that is fetched."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.tags, self.sources, self.links = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        self.sources += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "data") and v]
        assert not any(k.startswith("on") for k in attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag


def check(text):
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    for source in checker.sources:
        assert source.startswith(("data:image/png;base64,", "#")), source
        if source.startswith("#"):
            assert source[1:] in checker.ids
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert "url(//" not in text
    assert not {"script", "link", "iframe", "object"} & set(checker.tags)
    return checker


def rows(dual=True):
    found = []
    for t in (0, 100, 500, 999):
        row = {"t": t, "x0_error": 0.01 + t / 1000, "eps_error": 1.0 / (t + 1), "v_error": 0.3}
        if dual:
            row |= {
                "subtractive_x0_error": 1e-3 + t / 500,
                "direct_x0_error": 0.1 + t / 2000,
                "velocity_x0_error": 0.2 + t,
            }
            row |= {"best_x0_error": 0.01 + t / 1100, "blend_over_best": 1.01, "ratio_mean": 0.3, "ratio_sd": 0.1}
            row |= {
                f"ratio_q{q}": 0.3 + q_ for q, q_ in (("05", -0.2), ("25", -0.1), ("50", 0), ("75", 0.1), ("95", 0.2))
            }
            row |= {
                "ratio_best": t / 999,
                "ratio_best_se": 0.01,
                "ratio_velocity": t / 999,
                "slope": 3 * t / 999,
                "slope_se": 0.01,
            }
        found.append(row)
    return found


def study(dual=True):
    way = [
        {
            "k": k,
            "t": 900 - k,
            "t_next": -1,
            "mean": 0.1,
            "drift": 0.01,
            "sd": 1.0 / (k + 1),
            "sd_exact": 0.9 / (k + 1),
            "sd_data": 1.1 / (k + 1),
            "clipped": 0.1,
        }
        for k in range(3)
    ]
    x = torch.rand(2, 1, 8, 8) * 2 - 1
    frames = [Frame(k, 900 - k, x, x, x, *((x, x, x / 2 + 0.5) if dual else (None, None, None))) for k in range(3)]
    reliability = (
        [{"t": 500, "bin": 3, "share": 1.0, "ratio_mean": 0.3, "ratio_best": 0.9, "weight": 1.0}] if dual else []
    )
    maps = {t: torch.rand(1, 8, 8) for t in (0, 500, 999)} if dual else {}
    return Study({"model": {"name": "m"}, "sampler": "ddim:steps=3"}, rows(dual), reliability, way, maps, frames)


def test_a_gate_that_is_shut_has_no_slope():
    own = study()
    for row in own.routes:
        row |= {"ratio_mean": 0.0, "slope": np.nan, "slope_se": np.nan}
    assert "slope" not in [drawing.name for drawing in own.drawings()]
    assert "nan" not in " ".join(reading.ratio(own))


def test_which_route_is_better_on_which_side_is_said_where_there_are_two_sides():
    once, twice = study(), study()
    assert "below it subtracting the noise is the better way" in reading.ratio(once)[0]
    twice.routes[-1]["direct_x0_error"] = 2 * twice.routes[-1]["subtractive_x0_error"]
    assert len(twice.crossings) == 2
    assert reading.ratio(twice)[0].endswith(f"{twice.crossings[1]:.0f}.")


def scores(factor, dual="dual"):
    same = {"route": "mix", "seed": 0, "kid": 0.1, "images": 500, "features": "digits", "protocol": {"data": "digits"}}
    return [
        same | {"parameterization": name, "run": f"runs/{name}", "sampler": sampler, "spacing": spacing}
        | {"steps": k, "fd": f * 10 / k}
        for name, f in ((dual, factor), ("eps", 1.0))
        for sampler in ("ddim", "dpmsolver")
        for spacing in ("trailing", "linspace")
        for k in (5, 10)
    ]  # fmt: skip


@functools.cache
def whole(factor=0.5):
    png = canvas.png_of(np.zeros((8, 8, 1), np.uint8))
    metrics = [
        {"step": s, "loss": 1 / s, "loss/eps": 0.5 / s, "loss/x0": 0.5 / s, "loss/mu": 0.1 / s} for s in range(1, 60)
    ]
    runs = [
        Run("dual", {"parameterization": {"name": "dual"}}, metrics, {"step-1.png": png}, study()),
        Run("eps", {"parameterization": {"name": "eps"}}, metrics[:2], {}, study(dual=False)),
    ]
    samples = {
        name: np.random.default_rng(0).integers(0, 255, (8, 8, 8, c), np.uint8) for name, c in (("dual", 1), ("eps", 3))
    }
    commands = {"scores": "dualout evaluate <run>", "analysis": "dualout analyze", "samples": "x", "report": "y"}
    return report(Material(runs, scores(factor), samples, "eight", commands), "Title & <more>", "Lead")


def test_the_whole_report_is_valid_and_self_contained():
    text = whole()
    checker = check(text)
    assert text.startswith("<!doctype html>")
    assert checker.tags.count("svg") == 4 + 6 + 2 + 4 + 2
    assert checker.tags.count("img") >= 3
    for heading in ("Scores", "Samples", "Inside dual", "From noise to image", "On the way", "Training", "Protocols"):
        assert f"<h2>{heading}</h2>" in text
    assert "Title &amp; &lt;more&gt;" in text
    assert "prefers-color-scheme: dark" in text
    assert "var(--blue" in text
    assert "dualout evaluate &lt;run&gt;" in text


def test_a_figure_is_the_same_svg_again():
    assert canvas.svg(figures.ratio(rows()), "n") == canvas.svg(figures.ratio(rows()), "n")


def test_it_says_who_wins_and_also_when_dual_does_not():
    assert "dual is better everywhere" in whole(0.5)
    text = report(Material([], scores(1.6)), "Title")
    assert "dual is worse everywhere" in text
    assert "1.60" in text
    assert 'class="bad"' in text
    assert 'class="good"' not in text


def test_a_report_of_little():
    check(report(Material([Run("lonely")]), "Nothing"))
    check(report(Material([], scores(0.7)[:3]), "Some scores"))
    check(report(Material([Run("eps", {}, [], {}, study(dual=False))]), "One"))


def test_what_others_wrote_is_only_text():
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>\"' `code` **b**"
    found = [r | {"parameterization": evil, "sampler": evil, "protocol": {evil: evil}} for r in scores(0.5)[:4]]
    run = Run(
        evil,
        {"card": {evil: [evil]}},
        [{"step": 1, "loss": 1.0, f"loss/{evil}": 1.0}, {"step": 2, "loss": 1.0}],
        {evil: b""},
    )
    text = report(Material([run], found, commands={"report": evil}), evil, evil)
    check(text)
    assert "<script" not in text


def test_svg_names_colours_and_carries_the_title():
    figure = figures.slope(rows(), "T")
    text = canvas.svg(figure, "name", 'A "title" <b>')
    assert "#0069aa)" in text
    assert text.count("#0069aa") == text.count("var(--blue,#0069aa)")
    assert '<title>A "title" b</title>' in text
    assert 'id="name-' in text
    assert text.count(' id="') == len(set(re.findall(r' id="([^"]*)"', text)))
    assert "xmlns" not in text


def test_figures_leave_matplotlib_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    canvas.png(figures.models({"dual": rows(), "eps": rows(dual=False)}))
    assert dict(matplotlib.rcParams) == before


def test_a_ratio_that_is_called_equal_has_no_colour():
    table = comparison(
        [dict(row, method=m) for m, fd in (("dual", 10.1), ("eps", 10.0)) for row in [EVEN | {"fd": fd}]], "digits"
    )
    assert 'class="best">10.00' in table
    assert ">1.01<" in table
    assert "bad" not in table


EVEN = {"sampler": "ddim", "spacing": "trailing", "steps": 5}


def test_a_logarithmic_axis_has_ordinary_numbers():
    figure = canvas.plot(lambda axes: (axes.plot([1, 2], [0.001, 20_000]), canvas.plain_log(axes)))
    text = canvas.svg(figure, "wide")
    assert ">10,000<" in text
    assert ">0.01<" in text


def test_tables_align_words_and_numbers():
    html = page.table(
        [{"a": "x", "b": 1.5}, {"a": "y", "b": None}], {"a": "A", "b": "B"}, lambda r, c: "best" if c == "b" else ""
    )
    assert '<td class="text">x</td><td class="best">1.5</td>' in html
    assert "<th class=text>A</th><th>B</th>" in html


@pytest.mark.parametrize("n", [1, 3, 4])
def test_tiles_hold_the_images(n):
    images = np.arange(n * 4, dtype=np.uint8).reshape(n, 2, 2, 1)
    sheet = canvas.tiles(images, 2)
    assert sheet.shape == (2 + 3 * ((n - 1) // 2), 5, 1)
    np.testing.assert_array_equal(sheet[:2, :2], images[0])
    if n > 2:
        np.testing.assert_array_equal(sheet[3:, :2], images[2])


@pytest.mark.parametrize(
    ("count", "turn", "columns"), [(24, 1, 5), (24, 3, 6), (64, 10, 10), (64, 1000, 8), (2, 3, 2), (1, 1, 1)]
)
def test_classes_that_take_turns_have_their_own_columns(count, turn, columns):
    image = Image.open(io.BytesIO(canvas.sheet(np.zeros((count, 64, 64, 1), np.uint8), turn)))
    assert image.width == columns * 65 - 1


@pytest.mark.parametrize("labels", [["dual", "eps", "v"], [f"dual, guidance {g}" for g in (1, 2, 3)], ["m" * 24] * 2])
def test_a_legend_is_within_its_figure(labels):
    def draw(axes):
        for label in labels:
            axes.plot([1, 2], [1, 2], label=label)
        canvas.legend_below(axes, 3)

    figure = canvas.plot(draw)
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert figure.legends[0]._ncols == (3 if labels[0] == "dual" else 2 if "guidance" in labels[0] else 1)
