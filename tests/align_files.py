"""A model that is called as q-future/one-align is, for tests."""

from pathlib import Path

import torch

CONFIGURATION = """
from transformers import PretrainedConfig
class TinyConfig(PretrainedConfig):
    model_type = "tiny_align"
"""
MODELLING = """
import numpy, torch
from transformers import PreTrainedModel
from .configuration_tiny import TinyConfig
class TinyAlign(PreTrainedModel):
    config_class = TinyConfig
    def __init__(self, config):
        super().__init__(config)
        self.slope = torch.nn.Parameter(torch.zeros(1))
        self.post_init()
    def _init_weights(self, module):
        pass
    def score(self, images, task_="quality", input_="image"):
        print("scoring", task_, input_)
        assert input_ == "image"
        light = torch.tensor([numpy.asarray(image).mean() / 255 for image in images])
        return 1 + self.slope * (light if task_ == "quality" else 1 - light)
"""


def write_align(folder: Path) -> Path:
    """A folder with a model to which bright is good and dark is beautiful."""
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text(
        '{"model_type": "tiny_align", "architectures": ["TinyAlign"], "auto_map": {"AutoConfig": "configuration_tiny.TinyConfig", '
        '"AutoModelForCausalLM": "modeling_tiny.TinyAlign"}}'
    )
    (folder / "configuration_tiny.py").write_text(CONFIGURATION)
    (folder / "modeling_tiny.py").write_text(MODELLING)
    save_file({"slope": torch.tensor([4.0])}, folder / "model.safetensors", {"format": "pt"})
    return folder
