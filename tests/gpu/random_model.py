"""Make a random model of a given shape, with a tokenizer, texts and a run configuration.

    python -m tests.gpu.random_model CONFIG_JSON FOLDER [--layers N]

FOLDER gets `model/` (bfloat16, made on the accelerator where there is one) and `run.yaml`: W4 in
groups of 128, 20 grid points, 32 calibration texts of 512 tokens, no load check. Nothing is
downloaded.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from qsun.checkpoint_files import read_config_file
from qsun.skeleton import transformers_config
from tests.builders import problem, tiny_tokenizer, write_config, write_definition, write_jsonl

SPREAD = 0.02  # of the weights, as trained models have it
OUTLIERS = 0.01  # share of channels that the norms make LOUDNESS times louder: what AWQ is for
LOUDNESS = 8.0
TOKENS = 512
PROBLEMS = 60  # in one text: more than TOKENS tokens
SAMPLES = {"calibration": 32, "heldout": 16}


def write_model(config_file: Path, folder: Path, layers: int | None) -> None:
    """Write the model, and a byte-level tokenizer that uses the first few of its tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 2 * TOKENS
    tokens = {
        f"{which}_token_id": getattr(tokenizer, f"{which}_token_id") for which in ("bos", "eos")
    }
    changes = tokens if layers is None else tokens | {"num_hidden_layers": layers}
    config = transformers_config(read_config_file(config_file), **changes)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                loud = torch.rand_like(weight) < OUTLIERS
                weight.data.uniform_(0.5, 1.5).masked_fill_(loud, LOUDNESS)
            else:
                weight.data.normal_(std=SPREAD)
    model.save_pretrained(folder, max_shard_size="5GB")
    tokenizer.save_pretrained(folder)


def write_run(folder: Path, model: Path) -> Path:
    """Write both sets of texts and the configuration; returns the configuration's path."""
    rng = random.Random(0)
    for name, samples in SAMPLES.items():
        rows = [
            {"text": " ".join(" ".join(problem(rng).values()) for _ in range(PROBLEMS))}
            for _ in range(samples)
        ]
        lines = write_jsonl(folder / f"{name}.jsonl", rows)
        source = {"name": "sums", "kind": "jsonl", "path": lines.name, "prompt": "text"}
        write_definition(
            folder / f"{name}.yaml", source, samples=samples, min_tokens=TOKENS, max_tokens=TOKENS
        )
    changes = {"quantize__bits": 4, "quantize__group_size": 128, "quantize__grid_points": 20}
    return write_config(folder, model, name="random-8b-shape", **changes)


def main() -> None:
    """Make everything and say where the configuration is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="fewer decoder blocks than CONFIG_JSON says")
    arguments = parser.parse_args()
    model = arguments.folder.absolute() / "model"
    model.mkdir(parents=True)
    write_model(arguments.config, model, arguments.layers)
    print(json.dumps({"config": str(write_run(arguments.folder, model))}))


if __name__ == "__main__":
    main()
