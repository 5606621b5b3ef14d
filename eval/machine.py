"""What a measurement was made on: device, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import jax


def device() -> str:
    """The device that computes, in words."""
    d = jax.devices()[0]
    if d.platform != "cpu":
        return d.device_kind
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
             ] if info.exists() else [platform.processor()]
    return f"{len(names)} cores of {names[0]}"


def versions() -> dict[str, str]:
    """Versions of what was measured."""
    out = {"python": platform.python_version()}
    for name in ("cacheclip-jax", "jax", "tensorstore", "transformers", "torch"):
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = "not installed"
    return out


def commit() -> str:
    """The commit that was measured: from CACHECLIP_COMMIT, else from git, else "unknown"."""
    if found := os.environ.get("CACHECLIP_COMMIT"):
        return found
    try:
        asked = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True,
                               cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return asked.stdout.strip()


def command(module: str) -> str:
    """The command that measures, of a module of this project; of absolute paths, which are one machine's, the names."""
    return " ".join([f"python -m {module}", *(re.sub(r"(^|=)/\S*/", r"\1", arg) for arg in sys.argv[1:])])
