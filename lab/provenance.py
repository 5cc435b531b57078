"""What a result needs to be believed: the machine, the versions, the commit, the memory it took."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]  # of the project
LIBRARIES = ("torch", "accelerate", "tokenizers", "safetensors")


def provenance(*, seed: int, device: str) -> dict[str, Any]:
    """Say where a result comes from, as JSON values: command, commit, seed, machine, versions; no host name, no path.

    Args:
        seed: the result's.
        device: "cpu", "cuda" or "mps"; the GPU is named only if it was used.
    """
    status = _git("status", "--porcelain", "--untracked-files=no", "--", "*.py")  # not the results that it is about
    return {
        "command": command(folders=False),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "seed": seed,
        "processes": int(os.environ.get("WORLD_SIZE", 1)),  # as torchrun says
        "machine": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gib": _memory_gib(),
            "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
            "device": device,
        },
        "versions": {"python": platform.python_version()} | {name: installed_version(name) for name in LIBRARIES},
    }


def installed_version(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def command(*, folders: bool) -> str:
    """Return the command that runs, as a shell takes it.

    Args:
        folders: whether paths are named in full, as it takes to repeat it; results to be published name no folder.
    """
    processes = os.environ.get("WORLD_SIZE", "1")  # as torchrun says
    launcher = ["python"] if processes == "1" else ["torchrun", f"--nproc-per-node={processes}"]
    words = sys.argv[1:] if folders else map(_without_folder, sys.argv[1:])
    return f"{' '.join(launcher)} {script()} {shlex.join(words)}".rstrip()


def script() -> str:
    """Name what runs: `-m MODULE`, or a script, from the project's folder if it lies there."""
    module = getattr(sys.modules["__main__"], "__spec__", None)  # None for a script
    if module is not None:
        return f"-m {module.name.removesuffix('.__main__')}"
    path = Path(sys.argv[0]).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def _git(*arguments: str) -> str | None:
    """Return what git says about the project's folder; None without git or outside a repository."""
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _without_folder(word: str) -> str:
    """Return a word of the command line, of a path only its last part: results are published, folders are private."""
    flag, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + (Path(value).name if os.sep in value else value)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    memory = memory_bytes(torch.device("cpu"))
    return None if memory is None else round(memory / 2**30, 1)


def memory_bytes(device: torch.device) -> int | None:
    """Return the memory of a GPU, else of the machine; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def keep_freed_memory() -> None:
    """Keep large blocks when they are freed, to be used again, as PyTorch does on a GPU; on Linux with glibc.

    Else each goes back to the system, and every page of the next one is handed out anew, at every training step.
    """
    trim_threshold, mmap_max = -1, -4  # names of glibc's malloc.h
    if libc := _glibc():
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring `peak_memory` anew, where the system can: on CUDA and on Linux."""
    gc.collect()
    if libc := _glibc():
        libc.malloc_trim(0)  # give back what was kept
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # 5 sets the high-water mark back to what is resident now


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" and platform.libc_ver()[0] == "glibc" else None


def peak_memory(device: torch.device) -> int:
    """Return the most memory that was in use, in bytes.

    On CUDA it is what was allocated, elsewhere what the whole process held, libraries and data included. On CUDA and
    on Linux it counts from `reset_peak_memory` on, elsewhere from the start.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    import resource  # there is none on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
