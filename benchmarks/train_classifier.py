"""Trains a small classifier, in whose features a Fréchet distance is measured: of the digits, or of other data.

    python benchmarks/train_classifier.py                          writes the file that ships with the package
    python benchmarks/train_classifier.py --data idx:FOLDER --width 16 --out fashion.safetensors
                                                                  one for other data: --features classifier:path=FILE

The classifier sees the training split, shifted by up to a pixel; its accuracy on the test split is written into the
file. A run is determined by its arguments, to the rounding of its device: data order, shifts and weights come from
--seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dualout.data import load
from dualout.data.pixels import to_model
from dualout.evaluation.features.classifier import Digits, SmallClassifier
from dualout.networks.device import device
from dualout.version import __version__


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """(B, C, H, W), each image moved by −1, 0 or 1 pixel down and across, with the background coming in."""
    b, _, h, w = images.shape
    down, across = torch.randint(0, 3, (2, b), generator=generator)
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    rows, columns = down[:, None] + torch.arange(h), across[:, None] + torch.arange(w)
    batch = torch.arange(b)
    return padded.transpose(0, 1)[:, batch[:, None, None], rows[:, :, None], columns[:, None, :]].transpose(0, 1)


def accuracy(network: SmallClassifier, images: Tensor, labels: Tensor) -> float:
    """The share of images that are put into the right class."""
    with torch.no_grad():
        found = torch.cat([network.logits(batch).argmax(1) for batch in images.split(1000)])
    return float((found == labels).float().mean())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", default="digits")
    options.add_argument("--test", help="images to test on, where they are not the test split of --data")
    options.add_argument("--steps", type=int, default=4000)
    options.add_argument("--batch_size", type=int, default=128)
    options.add_argument("--width", type=int, default=18)
    options.add_argument("--features", type=int, default=64)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--device", default="auto", help="cpu, cuda, …; by default the accelerator, if there is one")
    options.add_argument("--out", type=Path, default=Digits.shipped)
    chosen = options.parse_args()

    train = load(chosen.data, split="train")
    test = load(chosen.test) if chosen.test else load(chosen.data, split="test")
    if train.labels is None or test.labels is None:
        options.error("a classifier needs labels, and these images have none")
    place = device(chosen.device)
    images, held_out = (to_model(d.batch(range(len(d)))).to(place) for d in (train, test))
    labels, held_out_labels = train.labels.to(place), test.labels.to(place)
    classes = int(labels.max()) + 1
    # halved until 2 or 3 pixels are left
    stages = max(1, min(train.size).bit_length() - 2)

    torch.manual_seed(chosen.seed)
    generator = torch.Generator().manual_seed(chosen.seed)
    network = SmallClassifier(train.channels, train.size, classes, chosen.width, chosen.features, stages).to(place)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, chosen.steps)
    for step in range(1, chosen.steps + 1):
        rows = torch.randint(0, len(images), (chosen.batch_size,), generator=generator)
        logits = network.logits(shifted(images[rows], generator))
        loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        if step % 500 == 0:
            right = accuracy(network, held_out, held_out_labels)
            print(f"step {step:5d}  loss {loss:.4f}  test accuracy {right:.4f}", flush=True)

    trained = {
        "data": train.name,
        "fingerprint": train.fingerprint,
        "images": len(train),
        "test_accuracy": round(accuracy(network, held_out, held_out_labels), 4),
        "test_images": len(test),
        "steps": chosen.steps,
        "batch_size": chosen.batch_size,
        "seed": chosen.seed,
        "dualout": __version__,
        "torch": torch.__version__.partition("+")[0],
    }
    network.save(chosen.out, trained)
    count = sum(p.numel() for p in network.parameters())
    print(f"wrote {chosen.out}: {count} parameters, {chosen.out.stat().st_size / 1000:.0f} KB, {trained}")


if __name__ == "__main__":
    main()
