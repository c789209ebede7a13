"""A driver with GPUs, for this process or as a module for others, on machines that have neither."""

from pathlib import Path

import pynvml

MODULE = '''
"""The real module, but for the functions that answer as a machine with GPUs does."""
import importlib.machinery, importlib.util, sys
from pathlib import Path

_rest = [folder for folder in sys.path if Path(folder or ".").resolve() != Path(__file__).parent]
_finder = importlib.machinery.PathFinder.find_spec("pynvml", _rest)
_real = importlib.util.module_from_spec(_finder)
_finder.loader.exec_module(_real)
globals().update({k: v for k, v in vars(_real).items() if not k.startswith("__")})
nvmlInit = nvmlShutdown = lambda: None
nvmlDeviceGetCount = lambda: COUNT
nvmlSystemGetCudaDriverVersion_v2 = lambda: 11040
nvmlSystemGetDriverVersion = lambda: "470.57.02"
'''


def install(monkeypatch, count: int, cuda: int = 11040) -> None:
    """Let NVML report `count` GPUs under an old driver, in this process."""
    for name, function in {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: count,
        "nvmlSystemGetCudaDriverVersion_v2": lambda: cuda,
        "nvmlSystemGetDriverVersion": lambda: "470.57.02",
    }.items():
        monkeypatch.setattr(pynvml, name, function)


def write_module(folder: Path, count: int) -> str:
    """Write a module that replaces NVML's in processes with this folder on PYTHONPATH."""
    (folder / "pynvml.py").write_text(MODULE.replace("COUNT", str(count)))
    return str(folder)
