"""Whatever is written down reads back as what it was."""

from __future__ import annotations

import dataclasses
import json
from abc import abstractmethod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dualout.errors import InputError
from dualout.parameterizations import Dual, Epsilon, Karras, Parameterization
from dualout.registry import Registered
from dualout.samplers import DDIM, DDPM, DPMSolver, FromDiffusers, Sampler
from dualout.schedules import EDM, Cosine, FromBetas, Linear, RectifiedFlow, Schedule
from variants import parameterizations, samplers, schedules

FAMILIES = (Schedule, Parameterization, Sampler)
SAMPLERS = [*samplers(), *samplers(7, clip=None), *samplers(3, spacing="logsnr")]
EVERYTHING = [*schedules(50), *parameterizations(), *SAMPLERS]


def same(thing: Any) -> None:
    family = next(f for f in FAMILIES if isinstance(thing, f))
    assert family.parse(thing.spec) == thing
    assert family.from_config(json.loads(json.dumps(thing.config()))) == thing
    assert type(family.parse(thing.spec)) is type(thing)


@pytest.mark.parametrize("thing", EVERYTHING)
def test_specs_and_configurations_read_back(thing: Any) -> None:
    same(thing)


POSITIVE = st.floats(1e-12, 1e12, allow_nan=False)


@given(
    st.one_of(
        st.builds(Linear, st.integers(1, 5000), st.floats(1e-12, 0.1), st.floats(0.1, 0.99)),
        st.builds(Cosine, st.integers(1, 5000), st.floats(0, 1), st.floats(1e-3, 0.9999)),
        st.builds(RectifiedFlow, st.integers(1, 5000), POSITIVE),
        st.builds(EDM, st.integers(1, 100), st.floats(1e-9, 1), st.floats(2, 1e6), POSITIVE),
        st.builds(FromBetas, st.lists(st.floats(1e-20, 0.999), min_size=1, max_size=5)),
        st.builds(Karras, POSITIVE),
        st.builds(
            Dual,
            st.sampled_from(["pixel", "channel", "image", "step", "velocity", "flow"]) | st.floats(0, 1),
            st.sampled_from(["posterior", "balanced"]),
            st.booleans(),
            st.none() | POSITIVE,
        ),
        st.builds(
            DDIM,
            st.integers(1, 1000),
            spacing=st.sampled_from(["leading", "trailing"]) | st.lists(st.integers(0, 999), min_size=1, max_size=4),
            clip=st.none() | st.tuples(st.floats(-1e30, -1e-30), st.floats(1e-30, 1e30)),
            eta=st.floats(0, 1),
        ),
    )
)
def test_any_numbers_read_back(thing: Any) -> None:
    same(thing)


def test_numbers_of_numpy_and_torch_are_written_down_as_pythons() -> None:
    half, one = np.float32(0.5), torch.tensor(1.5)
    for thing, plain in (
        (Linear(np.int64(50), beta_end=half), Linear(50, beta_end=0.5)),  # type: ignore[arg-type]
        (Cosine(np.int32(7), offset=one), Cosine(7, offset=1.5)),  # type: ignore[arg-type]
        (Dual(ratio=half, detach=np.True_), Dual(ratio=0.5)),  # type: ignore[arg-type]
        (Karras(sigma_data=half), Karras(sigma_data=0.5)),  # type: ignore[arg-type]
    ):
        assert thing == plain
        assert json.dumps(thing.config()) == json.dumps(plain.config())
        assert thing.spec == plain.spec


def test_specs_are_short() -> None:
    assert DDIM().spec == "ddim"
    assert DDIM(steps=10, eta=0.5, clip=None).spec == "ddim:steps=10:clip=null:eta=0.5"
    assert Dual(ratio="channel", gate="balanced").spec == "dual:ratio=channel:gate=balanced"
    assert Dual(detach=False).spec == "dual:detach=false"
    assert Linear(beta_start=1e-5).spec == "linear:beta_start=1e-05"
    assert DDIM(steps=3, spacing=(9, 4, 0)).spec == "ddim:steps=3:spacing=[9+4+0]"


def test_defaults_fill_what_a_spec_leaves_open() -> None:
    assert Sampler.parse("ddim:eta=0.5", steps=10, spacing="linspace") == DDIM(10, spacing="linspace", eta=0.5)
    assert Sampler.parse(" ddim: steps = 4 ", steps=10) == DDIM(4)
    assert Sampler.parse("dpmsolver:order=3:published=true") == DPMSolver(order=3, published=True)


@pytest.mark.parametrize(
    ("family", "spec", "says"),
    [
        (Sampler, "dimm", "unknown sampler 'dimm'; did you mean 'ddim'?"),
        (Sampler, "", "unknown sampler ''"),
        (Sampler, "ddim:etta=1", "did you mean 'eta'?"),
        (Sampler, "ddim:eta", "options are written key=value"),
        (Sampler, "ddim:eta=", "options are written key=value"),
        (Sampler, "ddim:eta=abc", "eta of sampler 'ddim' is a number; got 'abc'"),
        (Sampler, "ddim:eta=2", "eta is from 0"),
        (Sampler, "ddim:eta=true", "is a number; got True"),
        (Sampler, "ddim:steps=2.5", "is a whole number; got 2.5"),
        (Sampler, "ddim:clip=5", "clip of sampler 'ddim' is a list of numbers or null; got 5"),
        (Sampler, "ddim:clip=[1+0]", "low < high"),
        (Sampler, "ddim:spacing=linear", "did you mean 'linspace'?"),
        (Sampler, "heun:order=3", "unknown field of sampler 'heun'"),
        (Sampler, "ddpm:variance=huge", "unknown variance 'huge'"),
        (Parameterization, "dual:ratio=null", "ratio of parameterization 'dual' is a name or a number; got None"),
        (Parameterization, "dual:detach=3", "is true or false; got 3"),
        (Parameterization, "dual:gate_weight=[1]", "is a number or null; got (1,)"),
        (Parameterization, "dual:ratio={", "unknown ratio '{'"),
        (Parameterization, "velocty", "did you mean 'velocity'?"),
        (Parameterization, "karras:sigma_data=0", "above 0; got 0"),
        (Schedule, "frombetas", "needs a value for 'betas'"),
        (Schedule, "frombetas:betas=abc", "is a list of numbers; got 'abc'"),
        (Schedule, "linear:steps=true", "is a whole number; got True"),
    ],
)
def test_what_cannot_be_read_is_explained(family: type[Registered], spec: str, says: str) -> None:
    with pytest.raises(InputError) as error:
        family.parse(spec)
    assert says in str(error.value)


NO_CONFIGURATIONS = [None, 3, "ddim", [], {}, {"eta": 1.0}, {"name": 3}, {"name": "no"}, {"name": "ddim", "x": 1}]


@pytest.mark.parametrize("config", NO_CONFIGURATIONS)
def test_what_is_no_configuration_is_refused(config: Any) -> None:
    with pytest.raises(InputError):
        Sampler.from_config(config)


def test_configurations_are_plain_json() -> None:
    assert DDPM(4).config() == {
        "name": "ddpm",
        "steps": 4,
        "spacing": "trailing",
        "clip": [-1.0, 1.0],
        "variance": "large",
    }
    assert Epsilon().config() == {"name": "eps"}

    def my_spacing(schedule: Schedule, steps: int) -> list[int]:
        return [*range(steps)][::-1]

    assert DDIM(spacing=my_spacing).config()["spacing"] == "my_spacing"
    assert FromDiffusers(steps=3).config()["spacing"] is None
    for thing in EVERYTHING:
        json.dumps(thing.values[0].config(), allow_nan=False)


def test_a_preset_is_its_class_with_fields_set() -> None:
    blend = Parameterization.parse("dual-blend")
    assert blend == Dual(gate="balanced", blend_weight=1.0, eps_weight=0.3)
    assert Parameterization.parse("dual-blend:eps_weight=1.0") == Dual(gate="balanced", blend_weight=1.0)
    assert Parameterization.parse(blend.spec) == blend
    assert Parameterization.from_config(blend.config()) == blend


def test_a_preset_is_read_by_its_name_and_written_down_without() -> None:
    blend = Parameterization.parse("dual-blend:second=velocity:ratio=image")
    assert blend.spec == "dual:ratio=image:gate=balanced:eps_weight=0.3:blend_weight=1.0:second=velocity"
    assert blend.short == Parameterization.shortened(blend.spec) == "dual-blend:ratio=image:second=velocity"
    assert Parameterization.parse(blend.short) == blend
    # without one of the preset's fields it is none
    assert Dual(gate="balanced", blend_weight=1.0).short == "dual:gate=balanced:blend_weight=1.0"
    assert Parameterization.parse("learned:base=dual-blend").short == "learned:base=dual-blend"
    assert Parameterization.shortened("another's") == "another's"


def test_a_new_class_is_known_by_being_written() -> None:
    class Animal(Registered):
        kind = "animal"

        @abstractmethod
        def says(self) -> str: ...

    @dataclasses.dataclass(frozen=True)
    class Cat(Animal):
        lives: int = 9

        def says(self) -> str:
            return "miau"

    @dataclasses.dataclass(frozen=True)
    class Lion(Cat):
        name = "king"

    assert Animal.kinds() == {"cat": Cat, "king": Lion}
    assert Animal.parse("king:lives=1") == Lion(1)
    with pytest.raises(InputError, match=r"unknown animal 'dog'\. Known: cat, king"):
        Animal.parse("dog")


@pytest.mark.parametrize("name", ["ddim", "2m"])
def test_nobody_takes_the_name_of_a_class_that_is_there(name: str) -> None:
    """By a checkpoint's `linear`, or `--sampler ddim`, another's class would be meant from then on."""

    class Known(Registered):
        kind = "sampler"
        __module__ = "dualout.somewhere"

    @dataclasses.dataclass(frozen=True)
    class DDIM(Known):
        __module__ = "dualout.somewhere"
        aliases = ("2m",)

    with pytest.raises(InputError, match=f"sampler '{name}' is dualout's own DDIM: give .*Mine another name"):
        type("Mine", (Known,), {"__module__": "mine", "name": name})
    type("Mine", (Known,), {"__module__": "mine"})
    assert Known.parse("2m") == DDIM()


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_what_a_spec_can_hold(family: type[Registered]) -> None:
    assert len(family.kinds()) >= 6
    for name, cls in family.kinds().items():
        assert name == cls.name
        assert name == name.lower().strip()
        assert not set(name) & set(":=,+[] ")
        assert cls.__doc__
        for other in (cls.__name__, cls.__name__.lower(), *cls.aliases):
            assert type(family.named(other, **required(cls))) is cls
    words = [w for cls in family.kinds().values() for w in {cls.name, cls.__name__.lower(), *cls.aliases}]
    assert len(words) == len(set(words))


def required(cls: type[Registered]) -> dict[str, Any]:
    return {"betas": (0.1,)} if "betas" in {f.name for f in dataclasses.fields(cls)} else {}  # type: ignore[arg-type]


def test_what_a_file_names_may_be_of_a_module_that_is_not_imported():
    with pytest.raises(InputError, match=r"unknown parameterization 'score'.*once its module is imported"):
        Parameterization.from_config({"name": "score"})
    with pytest.raises(InputError, match=r"^unknown parameterization 'score'\. Known: [^;]*$"):
        Parameterization.parse("score")
