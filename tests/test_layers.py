"""Imports point down: entry > world > training > core > base."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ["base", "core", "training", "world", "entry"]
BASE = {"fedsim"} | {
    f"fedsim.{name}" for name in ["config", "choices", "config_check", "plain", "docstrings", "types", "seeding", "errors", "files"]
}
ENTRY = (
    "fedsim.__main__",
    "fedsim.api",
    "fedsim.cli",
    "fedsim.experiment",
    "fedsim.deploy",
    "clients",
)  # fedsim.experiment joins the server with the client app of this process
NOT_IN_CORE = {"flwr", "hydra", "omegaconf", "transformers", "datasets", "ray", "rich", "matplotlib", "peft"}
DISK_AND_CLOCK = {"os", "pathlib", "io", "shutil", "tempfile", "time", "datetime"}


def modules():
    """All modules of the project by name."""
    files = [*ROOT.glob("fedsim/**/*.py"), *ROOT.glob("clients/**/*.py")]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def layer_of(module):
    """Returns the layer of a module: world, unless a constant above says otherwise."""
    if module in BASE:
        return "base"
    for prefix, layer in [("fedsim.core", "core"), ("fedsim.training", "training"), *((prefix, "entry") for prefix in ENTRY)]:
        if f"{module}.".startswith(f"{prefix}."):
            return layer
    return "world"


def imports_of(module, known):
    """All modules that a module imports, lazily or not, as full names."""
    found = set()
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: write imports in full"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & known) | ({node.module} if inner - known else set())
    return found


KNOWN = set(modules())


@pytest.mark.parametrize("package", ["fedsim", "fedsim.core", "fedsim.flower", "fedsim.privacy", "fedsim.training"])
def test_the_list_of_layers_names_every_module(package):
    layers = (ROOT / "ARCHITECTURE.md").read_text().split("\n## Layers\n")[1].split("\n## ")[0]
    mine = {name.rpartition(".")[2] for name in KNOWN if name.rpartition(".")[0] == package} - {"__main__"}
    assert mine - set(re.findall(r"\w+", layers)) == set()


@pytest.mark.parametrize("module", sorted(KNOWN))
def test_imports_point_down(module):
    mine = LAYERS.index(layer_of(module))
    upward = {name for name in imports_of(module, KNOWN) & KNOWN if LAYERS.index(layer_of(name)) > mine}
    assert not upward, f"{module} ({layer_of(module)}) imports {upward}"


@pytest.mark.parametrize("module", sorted(name for name in KNOWN if layer_of(name) == "core"))
def test_the_core_imports_no_framework_disk_or_clock(module):
    roots = {name.partition(".")[0] for name in imports_of(module, KNOWN)}
    assert not roots & (NOT_IN_CORE | DISK_AND_CLOCK)


@pytest.mark.parametrize("module", sorted(name for name in KNOWN if layer_of(name) != "entry"))
def test_only_entry_modules_import_hydra(module):
    roots = {name.partition(".")[0] for name in imports_of(module, KNOWN)}
    assert not roots & {"hydra", "omegaconf"}
