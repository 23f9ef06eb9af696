"""Uploading to the Hub, with its interface replaced: what is sent, where to, and what is said when it cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from dualout import Denoiser, Dual, InputError
from dualout.calibrated import Calibration
from dualout.card import DECODER, public
from dualout.export import DualOutputPipeline
from dualout.samplers import DDIM
from dualout.schedules import Linear


class Hub:
    """What is asked of HfApi, in order; files are read while they are there."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.files: dict[str, bytes] = {}
        self.fails: Exception | None = None

    def __call__(self, **account: Any) -> Hub:
        self.calls.append(("login", account))
        return self

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        if self.fails is not None:
            raise self.fails
        return SimpleNamespace(repo_id=repo_id)

    def create_branch(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create_branch", {"repo_id": repo_id, **options}))

    def upload_folder(self, *, folder_path: str, **options: Any) -> Any:
        self.calls.append(("upload_folder", options))
        here = Path(folder_path)
        self.files = {str(p.relative_to(here)): p.read_bytes() for p in here.rglob("*") if p.is_file()}
        return SimpleNamespace(commit_url=f"https://hub/{options['repo_id']}/commit/1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    replaced = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", replaced)
    return replaced


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=3, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    denoiser = Denoiser(network, Dual(), Linear()).eval()
    denoiser.card = {"training": {"images": 1797}}
    return denoiser


def test_a_checkpoint_is_uploaded_in_one_commit(hub: Hub, denoiser: Denoiser, tmp_path: Path) -> None:
    where = denoiser.push_to_hub("ann/digits", private=True, token="secret", image={"channels": 1, "size": [8, 8]})
    assert where == "https://hub/ann/digits/commit/1"
    names = [name for name, _ in hub.calls]
    assert names == ["login", "create_repo", "upload_folder"]
    assert hub.calls[0][1]["token"] == "secret"
    assert hub.calls[1][1] == {"repo_id": "ann/digits", "private": True, "exist_ok": True}
    assert hub.calls[2][1]["repo_id"] == "ann/digits"
    assert hub.files.keys() == {"config.json", "model.safetensors", "README.md"}
    assert 'from_pretrained("ann/digits")' in hub.files["README.md"].decode()
    assert "path" not in denoiser.card
    # what was sent is a checkpoint
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    again = Denoiser.from_pretrained(tmp_path)
    assert again.card["training"] == {"images": 1797}
    assert json.loads(hub.files["config.json"])["image"] == {"channels": 1, "size": [8, 8]}


def test_nobody_is_told_where_things_lie_on_this_machine(hub: Hub, denoiser: Denoiser, tmp_path: Path) -> None:
    told = {
        "title": "A dual diffusion model of folder:/disk/ann/my pictures/cats:size=64",
        "training": {"data": "folder:/disk/ann/my pictures/cats:size=64", "started from": "/disk/ann/runs/first"},
        "data": {"name": "folder:path=/disk/ann/my pictures/cats:size=64"},
        DECODER: "/disk/ann/vae",
        "metrics": [{"reference": "64 of folder:/disk/ann/my pictures/cats (train)", "fd": 1.5}],
    }
    known = Denoiser(denoiser.network, denoiser.parameterization, denoiser.schedule).eval()
    known.card = told
    protocol = {"data": {"name": "folder:/disk/ann/my pictures/cats"}}
    calibration = Calibration(DDIM(2).config(), [999, 499], {"x0_scale": [1.0, 1.1]}, protocol)
    known.push_to_hub("ann/cats")
    sent = dict(hub.files)
    DualOutputPipeline.from_denoiser(known, calibration=calibration).push_to_hub("ann/cats")
    sent |= {f"pipeline/{name}": content for name, content in hub.files.items()}
    words = {name: content for name, content in sent.items() if not name.endswith(".safetensors")}
    assert not [name for name, content in words.items() if b"home" in content]
    assert "| data | folder:cats:size=64 |" in sent["README.md"].decode()
    assert json.loads(sent["config.json"])["card"]["metrics"] == [{"reference": "64 of folder:cats (train)", "fd": 1.5}]
    # what is written here knows it, but for the page that people read
    known.save_pretrained(tmp_path)
    assert Denoiser.from_pretrained(tmp_path).card == told
    assert "home" not in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/disk/ann/pictures", "pictures"),
        ("/disk/ann/pictures/", "pictures/"),
        ("folder:/disk/ann/my (old) pictures:size=48x64", "folder:my (old) pictures:size=48x64"),
        ("arrays:path=~/x/latents.npz:latents=true", "arrays:path=latents.npz:latents=true"),
        (r"folder:C:\Users\ann\pictures:grey=true", "folder:pictures:grey=true"),
        (r"\\server\share\pictures", "pictures"),
        # nobody's directory
        ("google/ddpm-cifar10-32", "google/ddpm-cifar10-32"),
        ("hub:ylecun/mnist", "hub:ylecun/mnist"),
        ("https://huggingface.co/ann/cats", "https://huggingface.co/ann/cats"),
        ("12 images / s", "12 images / s"),
    ],
)
def test_of_a_path_the_last_name_is_told(path: str, name: str) -> None:
    assert public(path) == name


def test_a_branch_is_made_first(hub: Hub, denoiser: Denoiser) -> None:
    denoiser.push_to_hub("ann/digits", revision="v2", commit_message="second")
    assert [name for name, _ in hub.calls] == ["login", "create_repo", "create_branch", "upload_folder"]
    assert hub.calls[2][1] == {"repo_id": "ann/digits", "branch": "v2", "exist_ok": True}
    sent = hub.calls[3][1]
    assert (sent["revision"], sent["commit_message"]) == ("v2", "second")


def test_a_pipeline_is_uploaded_in_diffusers_layout(hub: Hub, denoiser: Denoiser, tmp_path: Path) -> None:
    calibration = Calibration(DDIM(2).config(), [999, 499], {"x0_scale": [1.0, 1.1]})
    pipeline = DualOutputPipeline.from_denoiser(denoiser, calibration=calibration)
    assert pipeline.push_to_hub("ann/digits-pipeline", private=False).endswith("/commit/1")
    assert hub.files.keys() == {
        "model_index.json", "README.md", "pipeline.py", "unet/config.json", "scheduler/scheduler_config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    card = hub.files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert 'from_pretrained("ann/digits-pipeline")' in card
    assert "| calibrated for | ddim:steps=2 |" in card
    assert "1797" in card
    for name, content in hub.files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert DualOutputPipeline.from_pretrained(tmp_path).calibration == pipeline.calibration


@pytest.mark.parametrize("name", ["ann/two/three", "ann/sp ace", "", "ann/-x-"])
def test_names_are_checked_before_any_work(hub: Hub, denoiser: Denoiser, name: str) -> None:
    with pytest.raises(InputError, match="is named NAME/REPOSITORY, got"):
        denoiser.push_to_hub(name)
    assert not hub.calls


def refused(status: int) -> HfHubHTTPError:
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError(f"{status} Client Error", response=response)  # type: ignore[arg-type]


class ConnectError(Exception):
    """As the HTTP libraries of huggingface_hub's several versions have it, which derive it from nothing common."""

    __module__ = "httpx._exceptions"


@pytest.mark.parametrize(
    ("fails", "says"),
    [
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set, so the Hub is not reached"),
        (ConnectError("[Errno 111] refused"), r"not reached \(\[Errno 111\] refused\); check the connection"),
        (ConnectionError("no route"), r"not reached \(no route\); check the connection"),
        (LocalTokenNotFoundError("Token is required"), "Token is required; log in .* hf auth login"),
        (refused(401), "401 Client Error; log in with an account that may write there"),
        (refused(403), "hf auth login, or set HF_TOKEN"),
        (refused(429), "cannot upload to ann/digits: 429 Client Error"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, Exception) else "",
)
def test_what_keeps_it_from_being_uploaded_is_said(hub: Hub, denoiser: Denoiser, fails: Exception, says: str) -> None:
    hub.fails = fails
    with pytest.raises(InputError, match=says):
        denoiser.push_to_hub("ann/digits")


def test_a_mistake_of_the_packages_own_is_not_hidden(hub: Hub, denoiser: Denoiser) -> None:
    hub.fails = AttributeError("no such thing")
    with pytest.raises(AttributeError):
        denoiser.push_to_hub("ann/digits")
