"""pretrained: folders of models of transformers, also of those whose widths no config of theirs can say."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fxprune.errors import FileError, InputError
from fxprune.graph.program import owner
from fxprune.own_class.deci import ARCHITECTURE, check_format, deci_config, left_out, to_deci

from .own_modules import apply, differences, malformed
from .writing import written

# Beside config.json, where that does not say all.
OWN = "fxprune.json"
_VERSION = 1
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str], *, format: str | None = None) -> Path:
    """Writes a model of transformers, such as `write_back` made, to a folder; returns its path.

    The folder is what the model's own `save_pretrained` writes, and plain `from_pretrained` loads it where the config
    says all widths. Where layers differ, `fxprune.json` beside it says how, and `fxprune.from_pretrained` loads it.
    `format="deci"` writes a decoder of the shape of Llama, Mistral or Qwen2 as `DeciLMForCausalLM`, which serving
    engines read: feed-forward widths and key/value heads by layer, and layers without attention or feed-forward, filled
    up with zeros to the next widths that the format can say. An engine that reads it by the format's own config class
    (vLLM with --trust-remote-code) wants that file of a public model of the format beside it: the folder holds no code.
    What was in the folder before stays until all is written.

    Raises InputError for a model that is none of transformers and a format that does not exist, FxPruneError for a
    model that the format has no word for, and FileError for a place that cannot be written to.
    """
    check_format(format)
    if not _is_of_transformers(type(model)):
        raise InputError(
            f"cannot write a {type(model).__name__} as a folder",
            why="only models of transformers have configs to write",
            do="Save its state_dict, and the selection that made it: fxprune.save(selection, path), which write_back "
            "takes with a fresh copy of the model.",
        )
    target = Path(folder)
    own: Any = to_deci(model) if format == "deci" else model
    with _made(target), written(target / "config.json") as config, torch.no_grad():
        with _bars_in_terminals():
            own.save_pretrained(config.parent)
        said = json.loads(config.read_text(encoding="utf-8"))
        document = {"version": _VERSION, "modules": differences(own, _build(type(own), config.parent, "meta"))}
        if format == "deci":
            document |= {"config": said, "left out": sorted(left_out(own))}
            _leave_out(config.parent, left_out(own))
            config.write_text(json.dumps(deci_config(own), indent=2) + "\n", encoding="utf-8")
        if format is not None or document["modules"]:
            (config.parent / OWN).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        new = {file.name for file in config.parent.iterdir()}
    _remove_stale(target, new)
    return target


def from_pretrained(folder: str | os.PathLike[str], *, device: Any = "cpu") -> Any:
    """The model of transformers that `save_pretrained`, this one's or the model's own, wrote to a folder; in eval mode.

    No code is taken from the folder: the class is the one of that name in the transformers that is installed, whatever
    else the config names. Raises FileError for a folder that is none, is damaged or does not fit the class.
    """
    path = Path(folder)
    said = _read(path / "config.json")
    own = _read(path / OWN) if (path / OWN).exists() else None
    if own is None:
        if said.get("architectures") == [ARCHITECTURE]:
            raise _unreadable(path, f"it is a {ARCHITECTURE} that fxprune did not write, and has no {OWN}")
        with _bars_in_terminals():
            return _class(path, said).from_pretrained(path, trust_remote_code=False).to(device).eval()
    if own.get("version") != _VERSION:
        raise _unreadable(path, f"{OWN} is of version {own.get('version')!r}, and this fxprune reads {_VERSION}")
    modules = own.get("modules", {})
    if why := malformed(modules):
        raise _unreadable(path, f"{OWN}: {why}")
    config, absent = own.get("config", said), own.get("left out", [])
    if not isinstance(config, dict) or not isinstance(absent, list):
        raise _unreadable(path, f"{OWN} has a config that is no table, or names of tensors that are no list")
    model = _build(_class(path, config), config, device)
    apply(model, modules)
    _put_tensors(path, model, absent, device)
    return model.eval()


def _is_of_transformers(kind: type) -> bool:
    return kind.__module__.startswith("transformers.") and hasattr(kind, "save_pretrained")


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        do = "pip install transformers"
        raise InputError("cannot load a folder", why="transformers is not installed", do=do) from error


@contextlib.contextmanager
def _bars_in_terminals() -> Iterator[None]:
    """The progress bars of transformers, which it writes to files as well, only where there is a terminal."""
    bars: Any = importlib.import_module("transformers.utils.logging")
    silent = bars.is_progress_bar_enabled() and not sys.stderr.isatty()
    if silent:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if silent:
            bars.enable_progress_bar()


def _class(path: Path, config: Mapping[str, Any]) -> Any:
    """The class of transformers that a config names, and nothing else of that name."""
    library = _transformers()
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    kind = getattr(library, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not isinstance(kind, type) or not issubclass(kind, library.PreTrainedModel):
        raise _unreadable(path, f"config.json names the class {name!r}, which transformers does not have")
    return kind


def _build(kind: Any, config: Any, device: Any) -> nn.Module:
    """A model of this class by a config, or by the one in a folder; its parameters are whatever the class makes."""
    make = kind.config_class
    try:
        read = make.from_dict(dict(config)) if isinstance(config, Mapping) else make.from_pretrained(config)
        dtype = getattr(read, "dtype", None)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else before)
        try:
            with torch.random.fork_rng(devices=[]), torch.device(device):
                return kind(read)
        finally:
            torch.set_default_dtype(before)
    except Exception as error:
        # Configs check themselves, and classes their configs, in whatever words.
        raise FileError(
            f"cannot make a {kind.__name__} of its config",
            why=f"{type(error).__name__}: {error}",
            do="Load it with the versions of transformers and fxprune that wrote it.",
        ) from error


def _put_tensors(path: Path, model: nn.Module, absent: list[Any], device: Any) -> None:
    """Puts the tensors of the files in place of the model's, in whatever shape they have."""
    found = _tensors(path, device)
    known = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for name, tensor in found.items():
        if name not in known:
            raise _unreadable(path, f'its class has no tensor "{name}"')
        holder, leaf = owner(model, name)
        old = known[name]
        if old.dim() != tensor.dim() or old.is_floating_point() != tensor.is_floating_point():
            raise _unreadable(path, f'"{name}" is {list(tensor.shape)} {tensor.dtype}, which its class cannot use')
        if leaf in holder._parameters:
            holder._parameters[leaf] = nn.Parameter(tensor, requires_grad=old.requires_grad)
        else:
            holder._buffers[leaf] = tensor
    tie: Any = model
    tie.tie_weights()
    # A tied parameter is there under one of its names.
    named = list(model.named_parameters(remove_duplicate=False))
    there = {id(parameter) for name, parameter in named if name in found or name in absent}
    if missing := [name for name, parameter in named if id(parameter) not in there]:
        raise _unreadable(path, f'it has no tensor "{missing[0]}"')


def _tensors(path: Path, device: Any) -> dict[str, Tensor]:
    files = [_WEIGHTS]
    if (path / _INDEX).exists():
        table = _read(path / _INDEX).get("weight_map")
        files = sorted({str(name) for name in table.values()}) if isinstance(table, dict) else []
    found: dict[str, Tensor] = {}
    for name in files:
        if Path(name).name != name:
            raise _unreadable(path, f'{_INDEX} names a file elsewhere, "{name}"')
        try:
            with safe_open(path / name, framework="pt", device=str(device)) as file:
                found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, f"{name}: {error}") from error
    return found


def _leave_out(folder: Path, names: set[str]) -> None:
    """Takes tensors out of the files of a folder."""
    for file in sorted(folder.glob("*.safetensors")) if names else []:
        tensors = load_file(file)
        save_file({name: t for name, t in tensors.items() if name not in names}, file, metadata={"format": "pt"})
    index = folder / _INDEX
    if index.exists():
        table = json.loads(index.read_text(encoding="utf-8"))
        table["weight_map"] = {name: file for name, file in table["weight_map"].items() if name not in names}
        index.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """A folder to write to, made if need be, and gone again where the body raises."""
    if folder.exists() and not folder.is_dir():
        raise FileError(f'cannot write to "{folder}"', why="it is a file", do="Name a folder.")
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = error.strerror or str(error)
        raise FileError(f'cannot write to "{folder}"', why=why, do="Name a place that can be written to.") from error
    try:
        yield
    except BaseException:
        if new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _remove_stale(folder: Path, new: set[str]) -> None:
    """Takes away what an earlier model left of itself, so that none of it is taken for the new one's."""
    for file in folder.iterdir():
        if file.name not in new and (file.name in (OWN, _INDEX, _WEIGHTS) or _SHARD.fullmatch(file.name)):
            file.unlink()


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(file.parent, f"{file.name}: {error}") from error
    if not isinstance(found, dict):
        raise _unreadable(file.parent, f"{file.name} is no table")
    return found


def _unreadable(path: Path, why: str) -> FileError:
    return FileError(
        f'cannot load "{path}"',
        why=why,
        do="Give a folder that fxprune.save_pretrained, or save_pretrained of a model, wrote.",
    )
