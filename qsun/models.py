"""Models: where a checkpoint lies, what its config says, and how it is opened safely.

Where the weights are a GGUF file they are converted first; see `gguf_file`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qsun.checkpoint_files import Tensors, check_checkpoint, read_config_file, weight_files
from qsun.errors import ModelError, bullet_list
from qsun.files import sha256_files
from qsun.skeleton import Skeleton, check_tensors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE_PREFIX = "package:"
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.*"]


@dataclass(frozen=True)
class ModelSource:
    """One place a model can come from; exactly one of the three is set."""

    folder: Path | None = None
    gguf: Path | None = None
    hub_id: str | None = None
    revision: str | None = None


def locate(model: str, revision: str | None, relative_to: Path) -> ModelSource:
    """Find what a config's `base.model` means, without reading it.

    Raises:
        ModelError: a package or path that does not exist.
    """
    if model.startswith(PACKAGE_PREFIX):
        return ModelSource(gguf=_file_in_package(model.removeprefix(PACKAGE_PREFIX)))
    if model.startswith((".", "/", "~")):
        path = (relative_to / Path(model).expanduser()).resolve()
        if path.is_dir():
            return ModelSource(folder=path)
        if path.is_file() and path.suffix == ".gguf":
            return ModelSource(gguf=path)
        raise ModelError(f"base.model: there is no model folder or .gguf file at {path}")
    return ModelSource(hub_id=model, revision=revision)


def _file_in_package(reference: str) -> Path:
    package, _, name = reference.partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"base.model: package {package!r} is not installed in this environment.\n"
            "`make setup` installs the packages that the shipped configs name."
        )
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    path = root / name
    if not path.is_file() or ".." in path.parts:
        raise ModelError(f"base.model: package {package!r} has no file {name!r}")
    return path


def read_config(source: ModelSource) -> dict[str, Any]:
    """The model's `config.json` as a mapping, weights untouched.

    Raises:
        ModelError: missing, unreadable, not a model config, or asking for remote code.
    """
    if source.gguf is not None:
        from qsun.gguf_file import gguf_config

        return gguf_config(source.gguf)
    if source.folder is not None:
        return read_config_file(source.folder / "config.json")
    return read_config_file(_hub_config(source))


def _hub_config(source: ModelSource) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    assert source.hub_id is not None
    try:
        return Path(hf_hub_download(source.hub_id, "config.json", revision=source.revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(_hub_message(source.hub_id, error)) from error


def _hub_message(hub_id: str, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"cannot get {hub_id!r} from the Hugging Face hub: {reason}\n"
        "Check the id, the network and HF_TOKEN; write a local folder as ./folder; or plan "
        "without weights by --dry-run and base.config."
    )


def checkpoint_folder(source: ModelSource, shape: Skeleton, scratch: Path, dtype: str) -> Path:
    """The base model as a Hugging Face folder: as it lies, from the hub, or converted from GGUF.

    A conversion goes to `scratch`, as `dtype`. The folder has passed `check_checkpoint` and
    `check_tensors` against `shape`.
    """
    if source.gguf is not None:
        from qsun.gguf_file import convert_gguf

        convert_gguf(source.gguf, scratch, dtype)
        folder = scratch
    elif source.folder is not None:
        folder = source.folder
    else:
        folder = _hub_snapshot(source)
    check_checkpoint(folder)
    check_tensors(folder, shape)
    return folder


def _hub_snapshot(source: ModelSource) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    assert source.hub_id is not None
    try:
        return Path(
            snapshot_download(source.hub_id, revision=source.revision, allow_patterns=HUB_FILES)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(_hub_message(source.hub_id, error)) from error


def serving_dtype(config: Mapping[str, Any]) -> str:
    """The dtype a module is kept and served in: its own, but bfloat16 for float32 (as vLLM)."""
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    return "bfloat16" if dtype == "float32" else str(dtype)


def load_model(folder: Path, dtype: str) -> PreTrainedModel:
    """The causal language model of a checked folder, in evaluation mode and frozen.

    Raises:
        ModelError: names every tensor with infinite values or NaN.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), local_files_only=True
    )
    _refuse_broken(folder, model.named_parameters())
    return cast("PreTrainedModel", model.eval().requires_grad_(False))


def check_values(folder: Path, dtype: str) -> None:
    """Read a checked folder's tensors, one in memory at a time, for what `load_model` refuses.

    Raises:
        ModelError: names every tensor with infinite values or NaN.
    """
    import torch

    with Tensors(folder) as tensors:
        names = tensors.names()
        _refuse_broken(folder, ((name, tensors[name].to(getattr(torch, dtype))) for name in names))


def _refuse_broken(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    broken = [name for name, tensor in tensors if not tensor.isfinite().all()]
    if broken:
        raise ModelError(f"{folder} holds values that are no numbers:\n{bullet_list(broken)}")


@contextmanager
def on_accelerator(
    model: PreTrainedModel, last_use: bool = False, models: int = 1
) -> Iterator[None]:
    """Hold the model on the accelerator, where there is one with room; back to memory after.

    `last_use` spares the way back for a model that is dropped next; `models` of its size must have
    room.
    """
    import torch

    wanted = 1.5 * models * _model_bytes(model)
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < wanted:
        yield
        return
    model.to("cuda")
    try:
        yield
    finally:
        if not last_use:
            model.to("cpu")
        torch.cuda.empty_cache()


def _model_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checked folder.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return cast(
            "PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(folder, local_files_only=True)
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"cannot read the tokenizer of {folder}: {reason}") from error


def fingerprint(source: ModelSource, folder: Path) -> dict[str, str]:
    """SHA-256 of the files that hold the weights, by name."""
    files = [source.gguf] if source.gguf is not None else weight_files(folder)
    names = (path.name for path in files)
    return dict(zip(names, sha256_files(files), strict=True))
