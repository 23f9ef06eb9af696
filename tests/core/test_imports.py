"""What starts quickly stays so: heavy libraries are imported where they are used."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

HEAVY = ("diffusers", "matplotlib", "torchmetrics", "sklearn", "accelerate", "rich", "gradio", "transformers")


def modules_after(code: str) -> set[str]:
    """The top-level modules of a fresh interpreter that has run some code."""
    code += "\nimport sys; print('MODULES', *sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("MODULES ")[2].split())


def test_help_does_not_wait_for_torch() -> None:
    loaded = modules_after("from dualout.cli.main import main; assert main(['--help']) == 0")
    assert "dualout" in loaded
    assert not loaded & {"torch", "numpy", "jsonargparse", *HEAVY}


def test_a_commands_help_and_a_flag_that_cannot_be_read_do_not_wait_for_torch() -> None:
    code = (
        "import contextlib\n"
        "from dualout.cli.main import commands, main\n"
        "for name in commands():\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main([name, '--help'])\n"
        "    assert main([name, '--unheard_of', '1']) == 2, name\n"
    )
    loaded = modules_after(code)
    assert "jsonargparse" in loaded
    assert not loaded & ({"torch", "numpy", "sympy"} | set(HEAVY) - {"rich"})


def test_the_package_alone_does_not_either() -> None:
    assert "torch" not in modules_after("import dualout; dualout.__version__; dir(dualout)")


def test_sampling_needs_torch_and_no_other() -> None:
    loaded = modules_after(
        "import dualout, torch\n"
        "d = dualout.Denoiser(lambda x, t: x.repeat(1, 3, 1, 1), dualout.Dual(), dualout.schedules.Linear())\n"
        "dualout.samplers.DDIM(steps=2).sample(d, dualout.noise([0], (1, 4, 4)))\n"
        "[getattr(dualout, name) for name in dualout.__all__]\n"
        "dualout.networks.Backbone.parse('small')"
    )
    assert "torch" in loaded
    # sympy comes with torch's compiler, and takes as long as torch itself
    assert not loaded & {"sympy", *HEAVY}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    imported, texts = set(), []
    for path in Path(importlib.import_module("dualout").__file__ or "").parent.rglob("*.py"):
        texts.append(path.read_text(encoding="utf-8"))
        for node in ast.walk(ast.parse(texts[-1])):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                imported.add(node.module.partition(".")[0])
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {k: v for k, v in project["optional-dependencies"].items() if k not in ("dev", "docs")}
    by_module = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}

    def modules(declared: list[str]) -> set[str]:
        names = [re.split(r"[\[<>=]", one)[0] for one in declared]
        return {by_module.get(name, name.replace("-", "_")) for name in names}

    needed, optional = modules(project["dependencies"]), modules([one for part in extras.values() for one in part])
    # what comes with one of them: protobuf and the graph's classes with onnx, the server with gradio
    brought = {"docstring_parser", "google", "onnx_ir", "starlette"}
    assert imported - set(sys.stdlib_module_names) - {"dualout"} <= needed | optional | brought
    assert needed <= imported
    # an optional one may be imported by its name in a text
    assert {name for name in optional if not any(name in text for text in texts)} == set()
