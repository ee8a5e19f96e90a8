"""What the scripts beside this one share."""

from __future__ import annotations

import logging
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path


def quiet() -> None:
    """Let libraries say nothing but errors, and fetch nothing. To be called before they are imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["TQDM_DISABLE"] = "1"
    import transformers

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def say(text: str) -> None:
    """Progress, which goes to stderr."""
    print(text, file=sys.stderr, flush=True)


def environment(*packages: str, dtype: str | None = None) -> str:
    """Versions of torch, transformers and `packages`, device, threads, and `dtype` or else the device's, in a line."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    dtype = dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", *packages))
    return f"python {platform.python_version()}, {versions}; {device}, {dtype}"


def peak_rss() -> int:
    """Bytes. Linux hands `getrusage`'s peak on from a parent to what it starts, but not this one."""
    import resource

    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])
