"""GGUF: a model in one file, turned into a Hugging Face folder.

transformers reads the tensors and the tokenizer; what it leaves out (which tokens are special,
which one ends a turn) is taken from the file's own metadata.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from qsun.errors import ModelError

CONTROL_TOKEN = 3  # tokenizer.ggml.token_type: never produced by merging text


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Let a file be parsed once: for config, tokenizer and tensors each it takes seconds again."""
    import gguf

    opened, once = gguf.GGUFReader, cache(gguf.GGUFReader)
    gguf.GGUFReader = lambda path: once(str(path))
    try:
        yield
    finally:
        gguf.GGUFReader = opened


def _metadata(path: Path) -> Any:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        last = reader.tensors[-1]
        if last.data_offset + last.n_bytes > path.stat().st_size:
            raise ValueError("it ends in the middle of its last tensor")
    except (OSError, ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not a readable GGUF file: {error}") from error
    return reader


@_parsed_once()
def gguf_config(path: Path) -> dict[str, Any]:
    """The Hugging Face config that the file's metadata amounts to.

    Raises:
        ModelError: damaged, truncated, or of an architecture transformers cannot read.
    """
    from transformers import AutoConfig

    _metadata(path)
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(f"transformers cannot read {path}: {error}") from error
    settings = dict(config.to_dict())
    settings.pop("quantization_config", None)
    settings["dtype"] = "bfloat16"
    if not settings.get("architectures"):
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        settings["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    return settings


@_parsed_once()
def convert_gguf(path: Path, folder: Path, dtype: str) -> None:
    """Write the model and tokenizer of a GGUF file to `folder` as a Hugging Face checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reader = _metadata(path)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=getattr(torch, dtype)
    )
    # The tensors are dense now; transformers would refuse to save a model marked as GGUF.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model, "quantization_method"):
        del model.quantization_method
    model.config._name_or_path = ""
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    for role in ("bos", "eos", "padding"):
        field = reader.fields.get(f"tokenizer.ggml.{role}_token_id")
        if field is not None:
            name = "pad_token" if role == "padding" else f"{role}_token"
            setattr(tokenizer, name, tokens[field.contents()])
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
