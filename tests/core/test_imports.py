"""What starts quickly stays so: heavy libraries are imported where they are used."""

from __future__ import annotations

import subprocess
import sys

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
    # but for compare: its grid is read by what it compares
    code = (
        "import contextlib\n"
        "from dualout.cli.main import commands, main\n"
        "for name in commands():\n"
        "    if name != 'compare':\n"
        "        with contextlib.suppress(SystemExit):\n"
        "            main([name, '--help'])\n"
        "        assert main([name, '--unheard_of', '1']) == 2, name\n"
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
