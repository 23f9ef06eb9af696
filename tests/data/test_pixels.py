import numpy as np
import pytest
import torch

from dualout.data.pixels import floats, quantized, to_model, to_uint8

GREYS = torch.arange(256, dtype=torch.uint8)


def test_every_grey_level_survives_the_way_there_and_back():
    model = to_model(GREYS)
    assert model.dtype == torch.float32
    assert model[0] == -1
    assert model[255] == 1
    assert torch.equal(to_uint8(model), GREYS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_also_by_way_of_other_precisions(dtype):
    assert torch.equal(to_uint8(to_model(GREYS).to(dtype)), GREYS)


def test_rounds_half_to_even_and_clips():
    # 0.5, 1.5, 2.5 grey levels are exact in float64, and so in float32 here
    halves = torch.tensor([0.5, 1.5, 2.5, 254.5]) / 127.5 - 1
    exact = ((halves + 1) * 127.5).round()
    assert to_uint8(halves).tolist() == exact.tolist()
    assert to_uint8(torch.tensor([-3.0, 3.0, torch.inf, -torch.inf, torch.nan])).tolist() == [0, 255, 255, 0, 0]
    assert to_uint8(torch.tensor([0.0])).tolist() == [128]  # 127.5, half to even


def test_leaves_its_argument_alone():
    values = torch.tensor([0.25, -0.25])
    to_uint8(values)
    assert values.tolist() == [0.25, -0.25]


def test_latents_pass():
    latents = torch.randn(2, 4, 8, 8)
    assert to_model(latents) is latents


def test_arrays_get_the_same_numbers():
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8), dtype=np.uint8)
    assert np.array_equal(floats(images), to_model(torch.from_numpy(images)).numpy())


@pytest.mark.parametrize(("black", "white"), [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (1.0, 0.0)])
def test_floating_images_become_grey_levels(black, white):
    greys = np.arange(256)
    for dtype in (np.float32, np.float64):
        values = (black + (white - black) * greys / 255).astype(dtype)
        assert np.array_equal(quantized(values, black, white), greys)
