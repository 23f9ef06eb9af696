"""What a model card says of its use, carried out."""

import re
from pathlib import Path

import pytest
import torch

from dualout import Denoiser, Dual, networks
from dualout.export import DualOutputPipeline, write_onnx
from dualout.schedules import Linear


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
    assert ("3 stands for none" in (directory / "README.md").read_text()) is (classes == 3)
