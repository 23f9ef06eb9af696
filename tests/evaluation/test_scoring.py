import csv
import gc
import json
import time
import weakref

import numpy as np
import pytest
import torch

from dualout import data
from dualout.analysis.reading import method
from dualout.data.dataset import Dataset
from dualout.errors import InputError
from dualout.evaluation import scoring as module
from dualout.evaluation.features import Digits, Features
from dualout.evaluation.metrics import Alone, scores
from dualout.evaluation.protocol import differences, listed, warning
from dualout.evaluation.reference import Reference, cache_file
from dualout.evaluation.sampling import Sampling, build_sampler
from dualout.evaluation.scoring import Results, Scoring, first_seed
from dualout.evaluation.statistics import Statistics


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DUALOUT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def digits():
    return data.load("digits", split="test")


def test_reference_statistics_are_kept_by_content(digits, cache, monkeypatch):
    looked = []
    extract = Digits.extract
    monkeypatch.setattr(Digits, "extract", lambda self, images: looked.append(len(images)) or extract(self, images))
    told = []
    first = Reference.of(digits, Digits(), split="test", batch_size=100, progress=lambda *a: told.append(a))
    assert sum(looked) == len(digits) == first.statistics.count
    assert told[-1] == ("reference", len(digits), len(digits))
    again = Reference.of(digits, Digits(), split="test")
    assert sum(looked) == len(digits)
    assert torch.equal(first.statistics.moments[1], again.statistics.moments[1])
    assert first.protocol() == again.protocol()
    # the same images under another name are found, other images and other features are not
    assert cache_file(digits.select(np.arange(len(digits))), Digits()) == cache_file(digits, Digits())
    assert cache_file(digits.select(np.arange(9)), Digits()) != cache_file(digits, Digits())
    assert cache_file(digits, Features.parse("pixels")) != cache_file(digits, Digits())
    # what is damaged is made again
    path = cache_file(digits, Digits())
    path.write_bytes(path.read_bytes()[:100])
    Reference.of(digits, Digits(), split="test")
    assert sum(looked) == 2 * len(digits)
    Reference.of(digits, Digits(), split="test")
    assert sum(looked) == 2 * len(digits)


def test_a_cache_that_cannot_be_written_is_no_obstacle(digits, cache):
    cache.write_text("a file where the directory should be")
    with pytest.warns(UserWarning, match="not kept"):
        assert Reference.of(digits, Digits()).statistics.count == len(digits)


def test_what_the_real_images_say_alone_is_found_out_once(digits, cache, monkeypatch):
    real, fake = digits.select(np.arange(200)), Statistics()
    fake.add(Digits()(digits.batch(np.arange(100, 290))))
    looked = []
    of = Alone.of
    monkeypatch.setattr(Alone, "of", lambda *a: looked.append(1) or of(*a))
    first = Reference.of(real, Digits())
    expected = scores(fake, first.statistics, of(first.statistics.features))
    assert first.scores(fake) == first.scores(fake) == expected
    assert 0 < expected["recall"] < 1
    # another evaluation of other models reads what was kept
    assert Reference.of(real, Digits()).scores(fake) == expected
    assert len(looked) == 1
    # other images have their own
    Reference.of(digits.select(np.arange(100)), Digits()).scores(fake)
    assert len(looked) == 2
    for file in (cache / "reference").glob("*.alone*"):
        file.write_bytes(b"damaged")
    assert Reference.of(real, Digits()).scores(fake) == expected
    assert len(looked) == 3


def test_references_that_cannot_be():
    colour = Dataset("colour", np.zeros((9, 8, 8, 3), np.uint8), "nhwc")
    with pytest.raises(InputError, match="these are colour 8×8"):
        Reference.of(colour, Digits())
    with pytest.raises(InputError, match="more than 3 images"):
        Reference.of(Dataset("few", np.zeros((3, 8, 8), np.uint8), "nhw"), Digits())
    latents = Dataset("latents", np.zeros((9, 4, 8, 8), np.float32))
    with pytest.raises(InputError, match="latents"):
        Reference.of(latents, Features.parse("random"))


def test_a_row_says_all_about_its_scores(make_model, digits):
    references = [Reference.of(digits, Features.parse(spec), split="test") for spec in ("digits", "random")]
    sampling = Sampling(make_model(), build_sampler("ddim", 3, "linspace"), "eps", first_seed(2, 20))
    scoring = Scoring(sampling, 20, references, seed=2)
    assert scoring.title == "dual (eps) ddim linspace 3 steps"
    began = time.perf_counter()
    assert list(scoring.run(batch_size=8)) == [8, 16, 20]
    elapsed = time.perf_counter() - began
    rows = scoring.rows()
    assert [row["features"] for row in rows] == ["digits", "random"]
    row = rows[0]
    told = {k: row[k] for k in ("parameterization", "route", "sampler", "spacing", "steps", "seed", "images", "nfe")}
    assert list(told.values()) == ["dual", "eps", "ddim", "linspace", 3, 2, 20, 3]
    assert 0 < row["seconds"] < elapsed + 0.001
    protocol = row["protocol"]
    assert protocol["seed"] == 40
    assert protocol["reference"] | {"variance": 0} == {
        "data": digits.name, "split": "test", "count": len(digits), "fingerprint": digits.fingerprint, "variance": 0,
    }  # fmt: skip
    assert protocol["features"]["sha256"] == Digits().protocol()["sha256"]
    assert "20 generated images and 296 reference images are fewer than 10000" in protocol["warning"]
    assert protocol["software"]["torch"] == torch.__version__
    assert json.loads(json.dumps(rows)) == rows
    assert "trained on" not in protocol["warning"]
    sampling.model.details["trained_on"] = {"fingerprint": digits.fingerprint}
    assert "are those the model was trained on" in scoring.pending()[0]["protocol"]["warning"]
    # the scores are those of the images, computed by hand
    generated = Statistics()
    generated.add(Digits()(sampling.images(range(20))))
    for name, value in scores(generated, references[0].statistics).items():
        assert row[name] == pytest.approx(value, rel=1e-5)


def test_real_images_score_better_than_the_fake_model(make_model, digits):
    reference = Reference.of(digits, Digits())
    real = Statistics()
    train = data.load("digits", split="train")
    real.add(Digits()(train.batch(range(len(train)))))
    good = reference.scores(real)
    scoring = Scoring(Sampling(make_model(), build_sampler("ddim", 3)), 300, [reference])
    list(scoring.run())
    bad = scoring.rows()[0]
    assert good["fd"] < bad["fd"] / 5
    assert good["kid"] < bad["kid"] / 5
    assert good["precision"] > 0.8 > 0.3 > bad["precision"]
    assert good["recall"] > 0.8


def test_of_a_scoring_that_has_ended_the_scores_stay_and_not_the_features(make_model, digits, monkeypatch):
    gathered = []

    class Noticed(Statistics):
        def __init__(self):
            super().__init__()
            gathered.append(weakref.ref(self))

    monkeypatch.setattr(module, "Statistics", Noticed)
    scoring = Scoring(Sampling(make_model(), build_sampler("ddim", 2)), 10, [Reference.of(digits, Digits())])
    assert list(scoring.run(5)) == [5, 10]
    gc.collect()
    assert [ref() for ref in gathered] == [None]
    assert scoring.rows() == scoring.rows()


def test_too_few_images_and_wrong_shapes_are_refused_before_sampling(make_model, digits):
    reference = Reference.of(digits, Digits())
    sampler = build_sampler("ddim", 3)
    with pytest.raises(InputError, match="more than 3 images"):
        Scoring(Sampling(make_model(), sampler), 3, [reference])
    with pytest.raises(InputError, match="these are colour 8×8"):
        Scoring(Sampling(make_model((3, 8, 8)), sampler), 30, [reference])


def test_results_are_kept_as_they_come(make_model, digits, tmp_path):
    reference = Reference.of(digits, Digits())

    def scored(steps, sha="0"):
        model = make_model()
        model.details["sha256"] = sha
        scoring = Scoring(Sampling(model, build_sampler("ddim", steps)), 10, [reference])
        list(scoring.run())
        return scoring

    out = tmp_path / "out"
    results = Results(out)
    assert json.loads((out / "results.json").read_text()) == []
    two, three = scored(2), scored(3)
    results.add(two.rows())
    results.add(three.rows())
    again = Results(out)
    assert len(again.rows) == 2
    assert again.find(two.pending()[0])["fd"] == two.rows()[0]["fd"]
    assert again.find(scored(4).pending()[0]) is None
    # other weights under the same name: the old row is no answer, and is replaced
    retrained = scored(2, sha="1")
    assert again.find(retrained.pending()[0]) is None
    again.add(retrained.rows())
    assert [row["steps"] for row in Results(out).rows] == [3, 2]
    lines = (out / "results.csv").read_text().splitlines()
    assert lines[0].startswith("run,parameterization,route,sampler,spacing,steps,seed,features,")
    assert len(lines) == 3


def test_guidance_is_told_apart_in_the_table(make_model, digits, tmp_path):
    reference, results = Reference.of(digits, Features.parse("random")), Results(tmp_path)
    for scale, interval in ((0.0, None), (2.0, None), (2.0, (0.2, 500.0))):
        sampling = Sampling(make_model(classes=3), build_sampler("ddim", 2), guidance=scale, guidance_interval=interval)
        scoring = Scoring(sampling, 10, [reference])
        assert scoring.title == f"dual ddim trailing 2 steps guidance {scale:g}"
        list(scoring.run())
        results.add(scoring.rows())
    rows = list(csv.DictReader((tmp_path / "results.csv").open(newline="")))
    assert [(row["guidance"], row["guidance_interval"]) for row in rows] == [
        ("0.0", ""),
        ("2.0", ""),
        ("2.0", "0.2,500"),
    ]
    assert [method(row) for row in results.rows][1:] == ["dual, guidance 2", "dual, guidance 2 at 0.2,500"]


def test_images_of_classes_in_turn_are_told_of_where_the_real_ones_are_uneven(make_model, digits):
    pixels = digits.batch(np.arange(40)).numpy()
    for counts in ([30, 8, 2], [14, 13, 13]):
        labels = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
        reference = Reference.of(
            Dataset("some", pixels, labels=labels, classes=("a", "b", "c")), Features.parse("pixels")
        )
        sampler = build_sampler("ddim", 2)
        uneven = "3 classes in turn, 2 to 30 reference images"
        for asked, told in ((None, counts[0] == 30), ((0,), False)):
            [row] = Scoring(Sampling(make_model(classes=3), sampler, labels=asked), 10, [reference]).pending()
            assert (uneven in row["protocol"]["warning"]) is told
        for other in (make_model(), make_model(classes=4)):
            [row] = Scoring(Sampling(other, sampler), 10, [reference]).pending()
            assert "in turn" not in row["protocol"]["warning"]


def test_other_files_are_not_taken_for_results(tmp_path):
    (tmp_path / "results.json").write_text('{"mine": 1}')
    with pytest.raises(InputError, match="something else than rows"):
        Results(tmp_path)
    (tmp_path / "results.json").write_text("[{]")
    with pytest.raises(InputError, match="cannot be read"):
        Results(tmp_path)


def test_protocols_are_compared_but_for_versions_and_devices():
    a = {"steps": 5, "model": {"sha256": "a", "ema": None}, "device": "cpu", "software": {"torch": "1"}}
    b = {"steps": 5, "model": {"sha256": "b", "ema": None}, "device": "cuda", "warning": "few"}
    found = differences(a, b)
    assert found == {"model.sha256": ("a", "b"), "warning": (None, "few")}
    assert listed(found) == "model.sha256 was a, now b; warning was None, now few"
    assert listed({str(i): (0, 1) for i in range(9)}, most=2).endswith("and 7 more")


def test_images_that_have_moved_are_the_same_in_protocols():
    here = {"reference": {"data": "folder:/here", "split": "test", "fingerprint": "a"}, "model": {"name": "one"}}
    there = {"reference": here["reference"] | {"data": "folder:/there"}, "model": {"name": "one"}}
    assert differences(here, there) == {}
    there["reference"]["fingerprint"] = "b"
    assert differences(here, there).keys() == {"reference.data", "reference.fingerprint"}
    unknown = {"reference": {"data": "folder:/there"}, "model": {"name": "two"}}
    assert differences(here, unknown).keys() >= {"reference.data", "model.name"}


def test_the_warning_is_for_few_images():
    assert warning(10_000, 10_000) is None
    assert "296 reference images are" in warning(50_000, 296)
    assert "9999 generated" in warning(9999, 50_000)
    assert warning(50_000, 50_000, trained_on=True).startswith("The reference images are those")
    assert warning(50_000, 50_000, classes=[10_000, 20_000, 20_000]) is None
    assert "the 2 classes in turn, 9000 to 41000 reference images" in warning(50_000, 50_000, classes=[9000, 41_000])


def test_sets_of_images_have_no_seed_in_common():
    sets = [set(range(first_seed(s, 50), first_seed(s, 50) + 50)) for s in range(4)]
    assert len(set.union(*sets)) == 200


def test_two_commands_that_score_at_a_time_keep_each_others_rows(make_model, digits, tmp_path):
    reference = Reference.of(digits, Digits())
    scorings = [Scoring(Sampling(make_model(), build_sampler("ddim", k)), 10, [reference]) for k in (2, 3)]
    commands = [Results(tmp_path) for _ in scorings]
    for results, scoring in zip(commands, scorings, strict=True):
        list(scoring.run())
        results.add(scoring.rows())
    assert [row["steps"] for row in Results(tmp_path).rows] == [2, 3]
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 3
