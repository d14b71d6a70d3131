"""Files that a wheel contains besides the packages: options and presets, and nothing that needs this repository."""

import tomllib
from pathlib import Path

import fedsim

ROOT = Path(__file__).resolve().parents[1]


def test_the_wheel_contains_every_preset_and_nothing_else_of_the_experiments():
    included = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    presets = {f"experiments/{path.name}": f"fedsim/_experiments/{path.name}" for path in ROOT.glob("experiments/*.yaml")}
    assert included == {"conf": "fedsim/_conf", **presets}


def test_the_package_is_marked_as_typed():
    assert (Path(fedsim.__file__).parent / "py.typed").exists()
