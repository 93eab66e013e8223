"""What `serve_systems` serves: a random model, a random prefill module a task, a bundle a decoder.

Speed does not depend on what weights are, so nothing is trained and nothing searched for: the
quantized decode module is the base model rounded to nearest. The bundles pass `qsun verify` at its
static level but for the modules' tuning records, which do not exist; that and the numeric level are
left out, by names that `qsun serve` must be told to allow.
"""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from peft import LoraConfig
from safetensors.torch import save_file

from qsun.bench.serving import PROGRAM
from qsun.checkpoint_files import Tensors, read_config_file
from qsun.config import QuantizeConfig, VerifyConfig
from qsun.decode_checkpoint import QuantizedLayer
from qsun.files import write_json
from qsun.jobs.verify import bundle_request, run_verify, write_verdict
from qsun.models import load_tokenizer
from qsun.packed_checkpoint import write_packed
from qsun.prefill_module import ADAPTER_WEIGHTS
from qsun.quantize.plan import make_plan
from qsun.skeleton import skeleton
from qsun.verdict import VERDICT, Check, Outcome, Verdict, require
from tests.builders import problems, write_jsonl
from tests.gpu.job_runner import ROOT
from tests.gpu.random_model import write_model

TASKS = ("math", "code", "tools", "chat")
BUNDLES = {"sun": "model", "qsun": "decode"}  # and the folder of what decodes
NUMERIC = "numeric.random-weights"
OF_TUNING = tuple(
    f"static.{check}.{task}" for check in ("record", "base", "system") for task in TASKS
)
LEFT_OUT = (*OF_TUNING, NUMERIC)
RANK, SPREAD = 16, 0.01
MAX_TOKENS, GROUP = 2048, 128
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make(state: Path, shape: str, layers: int | None) -> None:
    """Make what is not made yet in `state`, and say how long each step took.

    `shape` is one of `configs/models`, or a file like them.
    """
    named = ROOT / "configs" / "models" / shape / "config.json"
    config_file = Path(shape) if Path(shape).is_file() else named
    model, device = state / "model", "cuda" if torch.cuda.is_available() else "cpu"
    write_json(_folder(state) / "shape.json", {"shape": config_file.parent.name, "layers": layers})
    _step(model, lambda folder: write_model(config_file, folder, layers))
    _step(state / "modules", lambda folder: write_modules(model, folder))
    _step(state / "tasks", write_tasks)
    _step(state / "decode", lambda folder: write_rounded(model, folder, device))
    gc.collect()
    torch.cuda.empty_cache()
    with _timed("exports, both at once"):
        export(state)
    for name in BUNDLES:
        if not (state / "bundles" / name / VERDICT).exists():
            with _timed(f"static verification of {name}"):
                verify(state / "bundles" / name)


def write_modules(model: Path, folder: Path) -> None:
    """A random LoRA adapter of every layer for each task."""
    linears = skeleton(read_config_file(model / "config.json")).linears
    adapted = [one for one in linears if one.name.endswith(LAYERS)]
    for seed, task in enumerate(TASKS):
        dice = torch.Generator().manual_seed(seed)

        def drawn(*shape: int, dice: torch.Generator = dice) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.bfloat16).normal_(std=SPREAD, generator=dice)

        factors: dict[str, torch.Tensor] = {}
        for one in adapted:
            name = f"base_model.model.{one.name}"
            factors[f"{name}.lora_A.weight"] = drawn(RANK, one.in_features)
            factors[f"{name}.lora_B.weight"] = drawn(one.out_features, RANK)
        module = _folder(folder / task)
        save_file(factors, module / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        lora = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=list(LAYERS), task_type="CAUSAL_LM"
        )
        lora.save_pretrained(str(module))


def write_tasks(folder: Path) -> None:
    """A definition with a few rows for each task."""
    for seed, task in enumerate(TASKS):
        rows = write_jsonl(folder / f"{task}.jsonl", problems(16, seed))
        source = {"name": "sums", "kind": "jsonl", "path": rows.name}
        definition = {
            "name": task,
            "description": "small sums",
            "train": [source | {"prompt": "prompt", "response": "response"}],
            "validation_samples": 4,
        }
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(definition), encoding="utf-8")


def write_rounded(model: Path, folder: Path, device: str) -> None:
    """The model as W4A16 in asymmetric groups of 128, rounded to nearest on `device`."""
    config = read_config_file(model / "config.json")
    plan = make_plan(config, skeleton(config).linears, QuantizeConfig("", "", group_size=GROUP))
    args = QuantizationArgs(**plan.scheme.arguments(plan.scheme.stored_sizes[0]))
    names = [layer.name for layer in plan.layers]
    weights = {f"{name}.weight" for name in names}
    with Tensors(model) as tensors:
        others = ((name, tensors[name]) for name in tensors.names() if name not in weights)
        layers = (rounded(name, tensors[f"{name}.weight"].to(device), args) for name in names)
        write_packed(others, layers, config, plan.scheme, plan.full_precision_layers, folder)
    load_tokenizer(model).save_pretrained(folder)


def rounded(name: str, weight: torch.Tensor, args: QuantizationArgs) -> QuantizedLayer:
    """A linear layer's weight `[out, in]` as the nearest codes of its groups' ranges."""
    groups = weight.reshape(weight.shape[0], -1, args.group_size)
    scales, zeros = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    codes = quantize(x=weight, scale=scales, zero_point=zeros, args=args, dtype=torch.int8)
    return QuantizedLayer(name, codes, zeros.to(torch.int8), scales)


def export(state: Path) -> None:
    """Both bundles by `qsun export`, at the same time; their files are links."""
    running = {}
    for name, decode in BUNDLES.items():
        out = state / "bundles" / name
        if out.exists():
            continue
        config = state / f"{name}.yaml"
        config.write_text(yaml.safe_dump(_export_config(state, name, decode)), encoding="utf-8")
        command = [sys.executable, "-c", PROGRAM, "export", str(config), "--out", str(out)]
        running[name] = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    codes = {name: process.wait() for name, process in running.items()}
    if any(codes.values()):
        raise SystemExit(f"qsun export ended with {codes}: see above")


def _export_config(state: Path, name: str, decode: str) -> Mapping[str, Any]:
    modules = [{"task": task, "module": str(state / "modules" / task)} for task in TASKS]
    return {
        "name": f"random-{name}",
        "base": {"model": str(state / "model")},
        "tasks": [str(state / "tasks" / f"{task}.yaml") for task in TASKS],
        "export": {
            "decode": str(state / decode),
            "prefill": modules,
            "references": 2,
            "max_tokens": MAX_TOKENS,
            "link": True,
        },
    }


def verify(bundle: Path) -> None:
    """The static level's verdict, and that of the numeric level nothing is claimed."""
    found = run_verify(bundle_request(bundle, ("static",), OF_TUNING, None), VerifyConfig())
    require(found, str(bundle))
    message = "the weights are random: what they compute is nobody's to judge"
    check = Check(NUMERIC, Outcome.SKIPPED, "the numeric level", message)
    verdict = Verdict(found.bundle, (*found.checks, check), found.seconds)
    write_verdict(verdict, VerifyConfig(), bundle)


def made_shape(state: Path) -> dict[str, Any]:
    """The shape that `make` was asked for."""
    found: dict[str, Any] = json.loads((state / "shape.json").read_text(encoding="utf-8"))
    return found


def _step(target: Path, write: Callable[[Path], None]) -> None:
    """A folder that is there whole or not at all."""
    if target.exists():
        return
    scratch = target.with_name(f".{target.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    with _timed(target.name):
        write(_folder(scratch))
        scratch.rename(target)


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def _timed(what: str) -> Iterator[None]:
    begun = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - begun:.1f} s", flush=True)
