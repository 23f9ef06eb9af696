"""Ways to damage bytes, text and JSON values, drawn from a seeded generator."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

WORDS = (
    "", " ", "null", "true", "nan", "inf", "-inf", "-1", "0", "1.5", "1e400", "1e-400", "99999999999999999999", "[]",
    "{}", "[1,2]", "{a: 1}", "a=b", ":", "::", "=", "dual:", "dual:ratio", "dual:ratio=", "dual:ratio=0.5:ratio=1",
    "ddim:eta=nan", "ddim:eta=-1", "tiny:width=0", "tiny:width=1e3", "../../..", "/", "~", "~nobody/x", ".", "\n", "\t",
    "ü", "٣", "😀", "\udcff", "a" * 5000, "((((", "learned:base=(learned:base=dual)", "x" + "/x" * 400, "%s", "$HOME",
    "!!python/object/apply:os.system ['touch canary']", "__import__('os').system('touch canary')", "-", "--", "*", "0x10",
    "1_000", "01", "None", "False", "cpu:1", "cuda:99", "hub:../../x", "folder:", "folder:/dev", "arrays:/dev/zero",
    "arrays:/dev/null", "idx:/", "digits:size=0", "digits:size=1", "digits:size=99999", "digits:split=none",
)  # fmt: skip
"""What may be typed where something else was meant."""

FOREIGN = (
    "os.system", "subprocess.Popen", "builtins.eval", "torch.nn.Linear", "torch.load", "diffusers.DDPMPipeline", "diffusers",
    "diffusers.UNet2DModel.from_pretrained", "diffusers.models.UNet2DModel", "dualout.networks.build", "dualout.networks.",
    "dualout.networks.build.checkpoint.os.system", "dualout.networks.wide.nn.Linear", "dualout.cli.main", "", ".", "..",
    "../../etc/passwd", "/etc/passwd", "dualout.networks.backbones.unet.UNet", "diffusers.ModelMixin",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 1.5, -0.5, 10**6, 10**9, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf"), "", "x",
    "10", [], [0], [1, 2, 3], [None], [[1]], {}, {"class": "os.system", "arguments": {"command": "touch canary"}},
    {"name": "dual"}, {"name": "learned", "base": {"name": "learned", "base": "dual"}}, "a" * 3000, [10**5] * 40,
    ["DownBlock2D"] * 30, {"class": "diffusers.UNet2DModel", "arguments": {}},
)  # fmt: skip


def text(draw: random.Random, given: str) -> str:
    """A text with characters lost, doubled, exchanged or put in, or cut off."""
    letters = list(given)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        at = draw.randrange(len(letters) + 1)
        what = draw.randrange(6)
        if what == 0 and letters:
            del letters[at : at + draw.choice((1, 3, 30))]
        elif what == 1:
            letters[at:at] = draw.choice(WORDS)
        elif what == 2:
            letters[at:at] = draw.choice("\0\x1b\t{}[]:,\"'-#&*!|>%@`\n\r\u2028\ufeff")
        elif what == 3:
            letters[at:at] = letters[at : at + 20]
        elif what == 4 and letters:
            letters[at % len(letters)] = chr(draw.randrange(1, 0xD800))
        elif draw.random() < 0.2:
            del letters[at:]
    return "".join(letters)


def raw(draw: random.Random, given: bytes) -> bytes:
    """Bytes with bits flipped, stretches lost, zeroed, doubled or made up, or cut off."""
    changed = bytearray(given)
    what = draw.randrange(7)
    at = draw.randrange(max(1, len(changed)))
    if what == 0:
        for _ in range(draw.choice((1, 3, 50))):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    elif what == 1:
        del changed[at:]
    elif what == 2:
        del changed[at : at + draw.choice((1, 4, 100, 5000))]
    elif what == 3:
        changed[at : at + 64] = draw.randbytes(64)
    elif what == 4:
        changed[at : at + 4096] = bytes(4096)
    elif what == 5:
        # where headers are
        for _ in range(draw.choice((1, 3))):
            changed[draw.randrange(min(len(changed), 200))] = draw.randrange(256)
    else:
        changed[at:at] = draw.choice((b"\0" * 8, b"\xff" * 64, changed[:200], draw.randbytes(10)))
    return bytes(changed)


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value in a JSON value is."""
    found = [at] if at else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += paths(inner, (*at, key))
    return found


def tree(draw: random.Random, given: Any) -> Any:
    """A JSON value in which one or more values are exchanged, taken away, renamed or moved."""
    changed = copy.deepcopy(given)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        *above, last = draw.choice(paths(changed) or [("x",)])
        place = changed
        for key in above:
            place = place[key]
        what = draw.randrange(6)
        if what <= 2:
            place[last] = copy.deepcopy(draw.choice(VALUES))
        elif what == 3:
            del place[last]
        elif what == 4 and isinstance(place, dict):
            place[draw.choice((*WORDS[:20], last + "x"))] = place.pop(last)
        elif isinstance(place[last], int | float) and not isinstance(place[last], bool):
            place[last] = place[last] * draw.choice((-1, 2, 0, 1000, 0.5))
        else:
            place[last] = [place[last]]
    return changed


def dumped(value: Any) -> str:
    """JSON, with the NaN that Python's reader takes."""
    return json.dumps(value, ensure_ascii=True)
