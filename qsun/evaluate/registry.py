"""qsun's models by the names that lm-eval finds them by, nothing imported before one is asked for.

lm-eval 0.4.13 looks for models in its own package alone. Its command imports the functions that a
task's YAML file names before it looks for the model, so `calib/lm_eval/*.yaml` bring these along;
`qsun-lm-eval` is the same command for other tasks.
"""

from __future__ import annotations

from lm_eval.api.registry import model_registry

MODELS = {
    "qsun": "qsun.evaluate.lm:BundleModules",
    "qsun-served": "qsun.evaluate.routed:RoutedModules",
}


def register_models() -> None:
    """Tell lm-eval of both; twice is once."""
    for name, target in MODELS.items():
        if name not in model_registry:
            model_registry.register(name, target=target)
