"""The manifest of a run: what produced it, where and when, to reproduce a result or explain a difference."""

import os
import platform
import subprocess
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("fedsim", "flwr", "torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy", "hydra-core", "peft", "ray")


def manifest(seed: int, now: datetime) -> dict[str, Any]:
    """Returns versions, commit, seed, hardware, command line and start time as plain values; None for what is unknown."""
    return {
        "started": now.isoformat(timespec="seconds"),
        "command": sys.argv,
        "seed": seed,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "commit": _commit(Path(__file__).parent),
        "hardware": _hardware(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit(folder: Path) -> dict[str, Any] | None:
    """Returns commit id and dirtiness if a checkout tracks this file, else None: an installed copy may lie in another checkout."""
    if _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    head = _git(folder, "rev-parse", "HEAD")
    return {"id": head, "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))} if head else None


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _hardware() -> dict[str, Any]:
    import torch  # a run has loaded it already

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),  # AVX2, AVX512: selects kernels and so the last bits
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(index) for index in range(count)],
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    """Returns the processor's name with family and model, since different processors share a name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))  # the first processor's
    if "model name" not in facts:
        return platform.processor()
    return f"{facts['model name']}, family {facts.get('cpu family', '?')} model {facts.get('model', '?')}"
