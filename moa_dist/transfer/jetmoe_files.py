"""Reads and writes JetMoE folders, as `JetMoeForCausalLM` of transformers does.

A folder has `config.json`, safetensors files, and optionally `tokenizer.json`; transformers is not
needed. Only one tensor is in memory at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moa_dist.checkpoint.check import require_valid
from moa_dist.checkpoint.convert import make_partial
from moa_dist.checkpoint.format import MASTER, FileName, Reader, parse, tokenizer_of
from moa_dist.checkpoint.tensor_file import TensorSpec, Written, write_file, write_tensors
from moa_dist.checkpoint.write import move_into_place
from moa_dist.config.load import config_of
from moa_dist.config.model import ModelConfig
from moa_dist.config.run import Config
from moa_dist.data.manifest import read_regular_file
from moa_dist.data.tokenizer import TOKENIZER_FILE, load_tokenizer
from moa_dist.errors import ConfigError, DataError
from moa_dist.evaluate.export import MODEL_FILE
from moa_dist.evaluate.trained import require_fit
from moa_dist.models.language_model import LanguageModel
from moa_dist.transfer.jetmoe import (
    Entry,
    JetMoeSettings,
    entries,
    model_config_of,
    problems_of_model,
    problems_of_settings,
    settings_of,
)
from moa_dist.transfer.new_run import write_new_run

_SETTINGS_FILE = "config.json"
_SHARDS_FILE = "model.safetensors.index.json"


class _Kind(BaseModel):
    model_type: Literal["jetmoe"]


class _Shards(BaseModel):
    """Holds the content of `model.safetensors.index.json`."""

    weight_map: dict[str, FileName]


class Imported(NamedTuple):
    """Describes a run that was imported from a JetMoE folder."""

    config: Config
    num_bytes: int
    """Size of the weights in bytes."""
    without_tokenizer: str | None
    """Reason why the run has no tokenizer; None if it has one."""


def export_jetmoe(checkpoint: Path, target: Path, dtype: torch.dtype = torch.float32) -> Written:
    """Write the model of a checkpoint as a folder that `JetMoeForCausalLM.from_pretrained` reads.

    Raises ConfigError if JetMoE cannot express the model, and DataError if the checkpoint is
    damaged, it has no tokenizer, or `target` exists.
    """
    require_valid(checkpoint)
    reader = Reader(checkpoint)
    model = reader.index.config.model
    problems = list(problems_of_model(model))
    if reader.index.config.data.document_attention:
        problems.append("`data.document_attention` is true, but tokens see documents before theirs")
    if problems:
        raise ConfigError(problems, f"{checkpoint} cannot be exported as JetMoE")
    tokenizer = tokenizer_of(checkpoint)
    used = load_tokenizer(tokenizer)
    settings = settings_of(
        model,
        max_length=reader.index.config.data.sequence_length,
        end_of_document=used.end_of_document,
    )
    settings["dtype"] = str(dtype).removeprefix("torch.")
    for_tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": used.end_token,
        "eos_token": used.end_token,
        "pad_token": used.end_token,
        "padding_side": "left",  # to generate from several prompts
        "split_special_tokens": True,  # text that spells one stays text, as in training
    }
    shapes = _our_shapes(model)
    specs = [TensorSpec(e.theirs, dtype, _their_shape(e, shapes, model)) for e in entries(model)]
    values = (_their_values(e, reader, shapes, model).to(dtype) for e in entries(model))
    partial = make_partial(target)
    written = write_tensors(partial / MODEL_FILE, specs, values, {"format": "pt"})
    for file, content in (
        (_SETTINGS_FILE, settings),
        ("tokenizer_config.json", for_tokenizer),
    ):
        write_file(partial / file, [json.dumps(content, indent=2).encode()])
    shutil.copyfile(tokenizer, partial / TOKENIZER_FILE)
    move_into_place(partial, target)
    return written


def import_jetmoe(
    folder: Path,
    target: Path,
    overrides: Sequence[str] = (),
    end_of_document: str | None = None,
) -> Imported:
    """Create a run at step 0 from a folder that `JetMoeForCausalLM` saved.

    Args:
        folder: the JetMoE folder.
        target: folder of the run to create.
        overrides: `key.path=value` for the run's configuration, except for `model`.
        end_of_document: token that ends documents, if the folder does not name it; see
            `load_tokenizer`.

    Raises:
        ConfigError: our model cannot express this JetMoE, or an override is invalid.
        DataError: a file is missing or damaged, `target` exists, or the tokenizer does not fit
            `end_of_document`.
    """
    settings = _read_settings(folder)
    config = config_of(
        {
            "name": target.name,
            "output": str(target.parent),
            "model": model_config_of(settings),
            "data": {"train": "data/train", "sequence_length": settings.max_position_embeddings},
            "train": {"steps": 1000, "global_batch": 32, "micro_batch": 1},
        },
        overrides,
        str(folder / _SETTINGS_FILE),
    )
    if config.model != ModelConfig.model_validate(model_config_of(settings)):
        raise ConfigError(
            ["`model` is determined by the folder; remove the overrides of `model`"], str(folder)
        )
    shapes = _our_shapes(config.model)
    source = _Source(folder)
    table = list(entries(config.model))
    source.check({e.theirs: _their_shape(e, shapes, config.model) for e in table})
    specs = [TensorSpec(name, torch.float32, shapes[name]) for e in table for name in e.ours]
    values = (part.contiguous() for e in table for part in e.to_ours(source.read(e.theirs).float()))
    tokenizer, problem = None, None
    try:
        # As `prepare` writes it, so that data prepared with either file fits the run.
        used = load_tokenizer(folder / TOKENIZER_FILE, end_of_document)
        require_fit(used, config.model, folder / TOKENIZER_FILE)
        tokenizer = used.to_json().encode()
    except DataError as error:
        if end_of_document is not None:
            raise
        problem = str(error)
    num_bytes = write_new_run(target, config, specs, values, tokenizer)
    return Imported(config, num_bytes, problem)


def _read_settings(folder: Path) -> JetMoeSettings:
    path = folder / _SETTINGS_FILE
    content = _read(path)
    parse(_Kind, content, path)
    settings = parse(JetMoeSettings, content, path)
    if problems := list(problems_of_settings(settings)):
        raise ConfigError(problems, str(path))
    return settings


def _read(path: Path) -> bytes:
    try:
        return read_regular_file(path)
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}; give a folder that save_pretrained wrote", path=path
        ) from error


class _Source:
    """Reads the tensors of a folder from one or several safetensors files."""

    def __init__(self, folder: Path) -> None:
        shards = folder / _SHARDS_FILE
        self._folder = folder
        self._files: dict[Path, Any] = {}
        self._file_of: dict[str, Path] = {}
        if shards.exists():
            names = parse(_Shards, _read(shards), shards).weight_map
            self._file_of = {name: folder / file for name, file in names.items()}
        else:
            path = folder / MODEL_FILE
            self._file_of = dict.fromkeys(self._open(path).keys(), path)

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise DataError unless the folder has these tensors, and no others that matter."""
        # A tied head may be stored twice; rotary frequencies follow from the settings.
        extra = {n for n in self._file_of.keys() - shapes if not n.endswith("rotary_emb.inv_freq")}
        if extra == {"lm_head.weight"}:
            extra = set()
        if different := sorted(extra | (shapes.keys() - self._file_of.keys())):
            raise DataError(
                f"{self._folder}: {len(different)} tensors are missing, or do not belong to a "
                f"JetMoE with this {_SETTINGS_FILE}, such as {different[0]}; copy the folder again",
                path=self._folder,
                key=different[0],
            )
        for name, shape in shapes.items():
            found = self._slice(name).get_shape()
            if tuple(found) != shape:
                raise DataError(
                    f"{self._file_of[name]}: {name} has shape {tuple(found)}, but {_SETTINGS_FILE} "
                    f"needs {shape}; copy the folder again",
                    path=self._file_of[name],
                    key=name,
                )

    def read(self, name: str) -> Tensor:
        """Read the tensor `name` in its stored type."""
        values: Tensor = self._slice(name)[:]
        return values

    def _slice(self, name: str) -> Any:
        path = self._file_of[name]
        try:
            return self._open(path).get_slice(name)
        except SafetensorError as error:
            raise DataError(
                f"{path}: missing or damaged: {error}; copy the folder again", path=path, key=name
            ) from error

    def _open(self, path: Path) -> Any:
        try:
            if path not in self._files:
                self._files[path] = safe_open(path, "pt")
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{path}: missing or damaged: {error}; only safetensors files can be read",
                path=path,
            ) from error
        return self._files[path]


def _our_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = LanguageModel(model).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _their_shape(
    entry: Entry, shapes: dict[str, tuple[int, ...]], model: ModelConfig
) -> tuple[int, ...]:
    if not entry.ours:
        return (model.d_model,)
    ours = [torch.empty(shapes[name], device="meta") for name in entry.ours]
    return tuple(entry.to_theirs(ours).shape)


def _their_values(
    entry: Entry, reader: Reader, shapes: dict[str, tuple[int, ...]], model: ModelConfig
) -> Tensor:
    if not entry.ours:
        return torch.zeros(model.d_model)
    ours = [torch.empty(shapes[name]) for name in entry.ours]
    for name, values in zip(entry.ours, ours, strict=True):
        reader.read_into(f"{name}/{MASTER}", 0, values.view(-1))
    return entry.to_theirs(ours).contiguous()
