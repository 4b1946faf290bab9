"""gin and YAML files become the frozen dataclasses that the other floors read."""

from shardpar.config.bundled import bundled_configs, bundled_models, demo_config
from shardpar.config.load import load
from shardpar.config.model_source import build_options, find_model, load_model_source
from shardpar.config.save import to_gin, to_yaml
from shardpar.config.schema import ModelConfig, RunConfig

__all__ = [
    "ModelConfig",
    "RunConfig",
    "build_options",
    "bundled_configs",
    "bundled_models",
    "demo_config",
    "find_model",
    "load",
    "load_model_source",
    "to_gin",
    "to_yaml",
]
