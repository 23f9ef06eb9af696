"""What a model card says of its use, carried out."""

import re
from pathlib import Path

import pytest
import torch

from dualout import Denoiser, Dual, networks
from dualout.export import DualOutputPipeline, write_onnx
from dualout.schedules import FromBetas, Linear


def used(card: Path) -> dict:
    """The names that a card's block of Python leaves behind."""
    code = re.search(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    names: dict = {}
    exec(code[1].replace('"PATH"', repr(str(card.parent))), names)
    return names


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("library", ["dualout", "diffusers", "onnx"])
def test_the_cards_use_makes_images(tmp_path: Path, library: str, classes: int | None) -> None:
    torch.manual_seed(0)
    network = networks.build("tiny:width=8", image_channels=1, size=8, out_channels=3, classes=classes)
    denoiser = Denoiser(network, Dual(), Linear()).eval()
    directory = tmp_path / "model"
    if library == "dualout":
        denoiser.save_pretrained(directory, image={"channels": 1, "size": [8, 8]})
    elif library == "diffusers":
        DualOutputPipeline.from_denoiser(denoiser).save_pretrained(directory)
    else:
        pytest.importorskip("onnxscript")
        write_onnx(denoiser, directory, (1, 8, 8))
    assert len(used(directory / "README.md")["images"]) == 16
    card = (directory / "README.md").read_text(encoding="utf-8")
    assert ("3 stands for none" in card) is (classes == 3)
    if library == "onnx":
        assert (", and `class_labels` (B,)" in card) is (classes == 3)


def test_a_card_knows_the_classes_of_a_network_behind_an_adapter(tmp_path: Path) -> None:
    network = networks.build("tiny:width=8", image_channels=1, size=8, out_channels=3, classes=3)
    denoiser = Denoiser(networks.Positional(network, ["class_labels"]), Dual(), Linear()).eval()
    denoiser.save_pretrained(tmp_path, image={"channels": 1, "size": [8, 8]})
    assert "3 stands for none" in (tmp_path / "README.md").read_text()
    assert len(used(tmp_path / "README.md")["images"]) == 16


def test_a_card_has_the_shape_that_the_network_was_built_for(tmp_path: Path) -> None:
    network = networks.build("tiny:width=8", image_channels=1, size=8, out_channels=3)
    Denoiser(network, Dual(), Linear()).save_pretrained(tmp_path)
    assert "| images | 1 × 8 × 8 in [−1, 1] |" in (tmp_path / "README.md").read_text()
    assert used(tmp_path / "README.md")["images"].shape == (16, 1, 8, 8)


def test_a_card_is_a_table_whatever_is_said_in_it(tmp_path: Path) -> None:
    betas = Linear(200).variances()
    network = networks.build("tiny:width=8", image_channels=1, size=8, out_channels=3)
    denoiser = Denoiser(network, Dual(), FromBetas(betas))
    denoiser.card["data"] = {"name": "cats | dogs\nand more"}
    denoiser.save_pretrained(tmp_path, image={"channels": 1, "size": [8, 8]})
    card = (tmp_path / "README.md").read_text()
    assert "| name | cats / dogs and more |" in card.splitlines()
    # the name of such a schedule, and not its table
    assert "| schedule | frombetas |" in card
    assert str(float(betas[5])) not in card
