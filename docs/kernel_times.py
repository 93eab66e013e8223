"""Write `qsun/kernel_times.json`, the kernels' times that qsun chooses by, from the record of them.

Run `python docs/kernel_times.py` after `tests.gpu.decode_tpot`; a test fails while they disagree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qsun.checkpoint_files import read_config_file
from qsun.files import write_json
from qsun.kernel_advice import TIMES
from qsun.kv_layout import kv_layout
from qsun.records import read_record

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "docs" / "records" / "decode-tpot.json"


def kernel_times() -> dict[str, Any]:
    """What is chosen by: at the least context that was measured, where attention takes least."""
    record = read_record(RECORD, "decode-tpot")
    sweeps = record.result["sweeps"]
    context = min(row["context_tokens"] for sweep in sweeps for row in sweep["tpot"])
    return {
        "record": RECORD.relative_to(ROOT).as_posix(),
        "created": record.created,
        "accelerator": sweeps[0]["accelerator"],
        "vllm": sweeps[0]["vllm"],
        "weights": record.result["weights"],
        "context_tokens": context,
        "shapes": [
            {
                "shape": shape,
                "cache_values_a_token": _cache_values(shape),
                "times": [_times(one, context) for one in sweeps if one["shape"] == shape],
            }
            for shape in dict.fromkeys(one["shape"] for one in sweeps)
        ],
    }


def _cache_values(shape: str) -> int:
    layout = kv_layout(read_config_file(ROOT / "configs" / "models" / shape / "config.json"))
    return layout.layers * layout.kv_heads * layout.head_dim


def _times(sweep: dict[str, Any], context: int) -> dict[str, Any]:
    return {
        "format": sweep["name"],
        "backend": sweep["backend"],
        "kernels": sweep["kernels"],
        "tpot_s": {
            str(row["batch"]): row["tpot_s"]
            for row in sweep["tpot"]
            if row["context_tokens"] == context
        },
    }


if __name__ == "__main__":
    write_json(TIMES, kernel_times())
