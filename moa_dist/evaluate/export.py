"""Exports a trained model as `model.safetensors`, `config.yaml` and `tokenizer.json`.

Tensors are named as in `LanguageModel.state_dict()`; training state is not included. A fourth
file, `SHA256SUMS`, detects altered tensors. The others are for transformers, see
`transformers_files`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moa_dist.checkpoint.check import altered, read_sums, require_valid
from moa_dist.checkpoint.convert import make_partial
from moa_dist.checkpoint.format import MASTER, Reader, tokenizer_of
from moa_dist.checkpoint.tensor_file import TensorSpec, Written, write_file, write_tensors
from moa_dist.checkpoint.write import move_into_place, write_sums
from moa_dist.config import load_config, to_yaml
from moa_dist.config.run import Config
from moa_dist.data.tokenizer import TOKENIZER_FILE, load_tokenizer
from moa_dist.errors import DataError
from moa_dist.evaluate.transformers_files import unsupported, write_transformers_files
from moa_dist.models.language_model import LanguageModel, build_model

MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.yaml"


def is_export(folder: Path) -> bool:
    """Return whether `export` wrote this folder."""
    return (folder / MODEL_FILE).is_file()


def export(checkpoint: Path, target: Path, dtype: torch.dtype = torch.float32) -> Written:
    """Write the model of a checkpoint into `target`, a folder that must not exist yet.

    In fp32 the logits equal the checkpoint's; in bf16 the file has half the size. Only one tensor
    is in memory at a time. Raises DataError if the checkpoint is damaged, it has no tokenizer, or
    `target` exists.
    """
    require_valid(checkpoint)
    tokenizer = tokenizer_of(checkpoint)
    loaded = load_tokenizer(tokenizer)  # raises if it is damaged
    reader = Reader(checkpoint)
    index = reader.index
    with torch.device("meta"):
        tensors = LanguageModel(index.config.model).state_dict()
    specs = [TensorSpec(name, dtype, tuple(t.shape)) for name, t in tensors.items()]
    metadata = {"format": "pt", "step": str(index.step), "samples": str(index.samples)}
    partial = make_partial(target)
    written = write_tensors(partial / MODEL_FILE, specs, _values(reader, specs), metadata)
    write_file(partial / CONFIG_FILE, [to_yaml(index.config).encode()])
    if unsupported(index.config) is None:
        write_transformers_files(partial, index.config, loaded, dtype)
    shutil.copyfile(tokenizer, partial / TOKENIZER_FILE)
    write_sums(partial, {MODEL_FILE: written.sha256})
    move_into_place(partial, target)
    return written


def _values(reader: Reader, specs: list[TensorSpec]) -> Iterator[Tensor]:
    for name, dtype, shape in specs:
        values = torch.empty(shape)
        reader.read_into(f"{name}/{MASTER}", 0, values.view(-1))
        yield values.to(dtype)


class ExportedWeights:
    """Reads ranges of an export's tensors; one tensor at a time is in memory."""

    def __init__(self, folder: Path) -> None:
        """Read names and shapes; raises DataError if the file is damaged."""
        self._path = folder / MODEL_FILE
        try:
            self._file = safe_open(self._path, "pt")
        except (OSError, SafetensorError) as error:
            raise DataError(f"{self._path}: damaged: {error}", path=self._path) from error
        names = list(self._file.keys())
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tuple(self._file.get_slice(name).get_shape()) for name in names
        }
        """Shape of every parameter and buffer, by name."""

    def read_into(self, name: str, start: int, view: Tensor) -> None:
        """Fill the 1-D `view` with elements of a parameter from `start` on."""
        view.copy_(self._file.get_tensor(name).view(-1)[start : start + view.numel()])


def load_export(folder: Path) -> tuple[LanguageModel, Config, int]:
    """Load the model in fp32 and evaluation mode, the run's configuration, and its step.

    Raises DataError if the tensors do not match the configuration, and ConfigError.
    """
    if not (folder / CONFIG_FILE).exists():
        raise DataError(
            f"{folder}: no {CONFIG_FILE}, so this is not an export of moa-dist; to use a JetMoE, "
            "run `moa-dist import jetmoe`",
            path=folder / CONFIG_FILE,
        )
    try:
        problems = list(altered(folder, read_sums(folder)))
    except DataError as error:
        problems = [error]
    if problems:
        raise DataError(
            f"{problems[0]}; export it again, or use a copy", path=folder, causes=problems
        )
    config = load_config(folder / CONFIG_FILE)
    model = build_model(config.model)
    expected, path = model.state_dict(), folder / MODEL_FILE
    try:
        with safe_open(path, "pt") as file:
            step = int((file.metadata() or {}).get("step", 0))
            if different := sorted(expected.keys() ^ set(file.keys())):
                raise DataError(
                    f"{path}: {len(different)} tensors do not match {CONFIG_FILE}, such as "
                    f"{different[0]}; export it again",
                    path=path,
                    key=different[0],
                )
            for name, tensor in expected.items():
                values = file.get_tensor(name)
                if values.shape != tensor.shape:
                    raise DataError(
                        f"{path}: {name} has shape {tuple(values.shape)}, but {CONFIG_FILE} "
                        f"needs {tuple(tensor.shape)}; export it again",
                        path=path,
                        key=name,
                    )
                tensor.copy_(values)
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(
            f"{path}: missing or damaged: {error}; export it again", path=path
        ) from error
    return model.eval(), config, step
