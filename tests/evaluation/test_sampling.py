import pytest
import torch

import dualout
from dualout.card import class_count
from dualout.errors import InputError
from dualout.evaluation.model import Model, image_shape
from dualout.evaluation.sampling import Sampling, build_sampler, parse_route


def test_samplers_from_words():
    schedule = dualout.schedules.Linear(steps=50)
    assert build_sampler("ddim", 7, "linspace", schedule) == dualout.samplers.DDIM(steps=7, spacing="linspace")
    assert build_sampler("ddim:eta=0.5", 7, clip=False) == dualout.samplers.DDIM(steps=7, eta=0.5, clip=None)
    for wrong, message in (
        (("ddimm", 5), "did you mean 'ddim'"),
        (("ddim", 0), "1 or more; got 0"),
        (("ddim", 51, "trailing", schedule), "from 1 to 50.*got 51"),
        (("ddim", 5, "trailling"), "did you mean 'trailing'"),
        (("ddim:steps=4", 5), "says steps itself"),
        (("ddim:spacing=leading", 5, "linspace"), "says spacing itself"),
    ):
        with pytest.raises(InputError, match=message):
            build_sampler(*wrong)


def test_routes_from_words():
    assert [parse_route(text) for text in ("mix", "eps", "0.25", "1")] == ["mix", "eps", 0.25, 1.0]


def test_routes_read_the_network_in_their_way(make_model):
    model, sampler = make_model(), build_sampler("ddim", 3)
    mix, eps, x0 = (Sampling(model, sampler, route).images(range(4)) for route in ("mix", "eps", 1.0))
    assert not torch.equal(mix, eps)
    assert not torch.equal(eps, x0)
    assert torch.equal(x0, Sampling(model, sampler, "x0").images(range(4)))
    with pytest.raises(InputError, match="unknown route 'epps'; did you mean 'eps'"):
        Sampling(model, sampler, "epps")


@pytest.mark.parametrize("spec", ["ddim", "ddpm", "ddim:eta=0.7", "dpmsolver", "unipc"])
def test_images_do_not_depend_on_their_batch(make_model, spec):
    sampling = Sampling(make_model((3, 8, 8)), build_sampler(spec, 4))
    together = sampling.images(range(6))
    assert torch.equal(together, torch.cat([sampling.images([i]) for i in range(6)]))
    assert torch.equal(together, torch.cat(list(sampling.batches(6, 4))))
    assert together.dtype == torch.uint8


def test_classes_come_in_turn(make_model):
    model, sampler = make_model(classes=3), build_sampler("ddim", 2)
    turn = Sampling(model, sampler)
    assert turn.protocol()["class_labels"] == [0, 1, 2]
    twos = Sampling(model, sampler, labels=[2])
    assert torch.equal(turn.images([2, 5]), twos.images([2, 5]))
    assert not torch.equal(turn.images([3]), twos.images([3]))
    with pytest.raises(InputError, match=r"are 0 to 2, and 3 for none; got \[4\]"):
        Sampling(model, sampler, labels=[1, 4])
    for wrong in ({"labels": [0]}, {"guidance": 2.0}):
        with pytest.raises(InputError, match="trained without classes"):
            Sampling(make_model(), sampler, **wrong)


def test_guidance(make_model):
    model, sampler = make_model(classes=3), build_sampler("ddim", 4)
    plain, one, two = (Sampling(model, sampler, labels=[0], guidance=scale) for scale in (None, 1.0, 4.0))
    assert (plain.evaluations, one.evaluations, two.evaluations) == (4, 4, 8)
    assert torch.equal(plain.images(range(3)), one.images(range(3)))
    assert not torch.equal(plain.images(range(3)), two.images(range(3)))
    # away from "no class", which is the number 3
    none = Sampling(model, sampler, labels=[0], guidance=0.0).images(range(3))
    assert int((none.int() - Sampling(model, sampler, labels=[3]).images(range(3)).int()).abs().max()) <= 1


def test_an_interval_of_guidance_counts_what_it_looks_at(make_model):
    model, heun = make_model(classes=3), build_sampler("heun", 3)
    schedule = model.denoiser.schedule
    times = heun.timesteps(schedule)
    levels = [float(s / a) for a, s in map(schedule.scalars, times)]
    # the second of three levels: Heun looks at 0, 1, 1, 2, 2
    within = (levels[2], levels[1])
    sampling = Sampling(model, heun, labels=[0], guidance=3.0, guidance_interval=within)
    assert sampling.evaluations == 5 + 2
    assert sampling.protocol()["guidance_interval"] == list(within)
    images = [
        Sampling(model, heun, labels=[0], guidance=g, guidance_interval=i).images(range(3))
        for g, i in ((3.0, within), (3.0, None), (None, None), (3.0, (0.0, 1e9)))
    ]
    assert torch.equal(images[1], images[3])
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])
    with pytest.raises(InputError, match=r"holds none of the noise levels .* of heun"):
        Sampling(model, heun, guidance=3.0, guidance_interval=(levels[0], levels[0] + 1))
    with pytest.raises(InputError, match="say --guidance too"):
        Sampling(model, heun, guidance_interval=within)


def test_images_that_are_not_finite_are_named(make_model):
    model = make_model()
    network = model.denoiser.network
    model.denoiser.network = lambda x, t, **c: network(x, t, **c) * float("nan")
    with pytest.raises(InputError, match=r"3 of 3 images are not finite \(image 5 is one\).*ddim:steps=2"):
        Sampling(model, build_sampler("ddim", 2)).images([5, 6, 7])


def test_precision_is_chosen_and_written_down(make_model):
    sampling = Sampling(make_model(), build_sampler("ddim", 2), precision="bf16")
    assert sampling.protocol()["precision"] == "bf16"
    with pytest.raises(InputError, match="unknown precision"):
        Sampling(make_model(), build_sampler("ddim", 2), precision="fp8")


def test_the_protocol_is_all_that_images_depend_on(make_model):
    sampling = Sampling(make_model(), build_sampler("heun", 5, "linspace"), 0.5, 7)
    found = sampling.protocol()
    assert found["nfe"] == 9
    assert found["times"] == [999, 749, 500, 250, 0]
    assert (found["route"], found["seed"], found["spacing"], found["steps"]) == (0.5, 7, "linspace", 5)
    assert found["sampler"]["clip"] == [-1.0, 1.0]
    assert found["model"]["sha256"] == "0"


def test_shape_and_classes_of_a_checkpoint(tmp_path):
    network = {"class": "…", "arguments": {"in_channels": 3, "sample_size": 32, "num_class_embeds": 11}}
    assert image_shape({"network": network}, tmp_path) == (3, 32, 32)
    told = {"network": network, "image": {"channels": 1, "size": [8, 12]}}
    assert image_shape(told, tmp_path) == (1, 8, 12)
    wrapped = {"class": "…", "arguments": {"network": network}}
    assert image_shape({"network": wrapped}, tmp_path) == (3, 32, 32)
    assert class_count(wrapped) == 10
    assert class_count({"class": "…"}) is None
    with pytest.raises(InputError, match="does not say what shape"):
        image_shape({"network": {"class": "…"}}, tmp_path)


def test_what_training_wrote_is_read(tmp_path):
    from dualout.networks.build import build

    network = build("tiny", 1, 8, 3, classes=2)
    denoiser = dualout.Denoiser(network, dualout.Dual(), dualout.schedules.Linear())
    written = {
        "image": {"channels": 1, "size": [8, 8], "latents": False},
        "training": {"step": 7, "ema": 0.99},
        "data": {"name": "digits", "fingerprint": "f", "images": 1501},
        "conditions": {"class_labels": {"classes": ["odd", "even"], "null": 2}},
    }
    denoiser.save_pretrained(tmp_path, **written)
    model = Model.load(tmp_path)
    assert (model.shape, model.classes, model.class_names) == ((1, 8, 8), 2, ("odd", "even"))
    assert model.details["ema"] == 0.99
    assert model.protocol()["trained_on"] == written["data"]
    assert Sampling(model, build_sampler("ddim", 2)).images(range(3)).shape == (3, 1, 8, 8)
    denoiser.save_pretrained(tmp_path, **written | {"image": {"channels": 1, "size": [8, 8], "latents": True}})
    with pytest.raises(InputError, match=r"makes latents.*--decode"):
        Model.load(tmp_path)


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no checkpoint directory"):
        Model.load(tmp_path / "none")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"config.json is missing \(it holds model.safetensors\)"):
        Model.load(tmp_path)
