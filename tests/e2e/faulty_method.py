"""A user's method that has a fault in one of several processes, as the environment says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: FAULT is RANK:STEP:KIND; the fault is in the first pass of a step, counted from 1. A process kills
#: itself only if the file FAULT_ONCE is not there yet.
METHOD = """
import math, os, signal
from pathlib import Path
import torch
from torch import nn
from lorakit.layers import AdapterLayer
from lorakit.methods.base import Method, RunHooks
from lorakit.recipe.sections import AdapterSection

rank, step, kind = os.environ.get("FAULT", "-1:0:none").split(":")
is_due = False

def set_due(steps_taken):
    global is_due
    is_due = os.environ.get("RANK", "0") == rank and steps_taken + 1 == int(step)

def faulty(update):
    global is_due
    if not (is_due and torch.is_grad_enabled()):
        return update
    is_due = False
    if kind == "error":
        raise ArithmeticError("the method cannot go on")
    if kind == "loss":
        return update * math.nan
    if kind == "gradient":
        update.register_hook(lambda gradient: gradient * math.nan)
    if kind == "kill" and not (once := Path(os.environ["FAULT_ONCE"])).exists():
        once.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return update

class Config(AdapterSection):
    pass

class Layer(AdapterLayer):
    def __init__(self, base_layer, config, name):
        super().__init__(base_layer)
        self.scales = self.new_parameter(self.out_features)
        nn.init.zeros_(self.scales)

    def delta_weight(self):
        return faulty(self.scales[:, None] * self.dense_weight())

class Hooks(RunHooks):
    def after_step(self, step, scaled=False):
        set_due(step)

class Faulty(Method):
    Config = Config
    Layer = Layer

    def hooks(self, layers, config, total_steps):
        set_due(0)
        return Hooks()
"""


def adapter(folder: Path) -> dict[str, Any]:
    """The section ``adapter`` of a recipe in ``folder``, to which the file is written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "faulty.py").write_text(METHOD)
    return {"method": f"{folder / 'faulty.py'}:Faulty", "target_modules": ["q", "v"]}
