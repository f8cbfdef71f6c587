"""Joint training: many adapters over one frozen base in one process.

``can_join`` tells which recipes fit together, ``members_that_fit`` how many of them the memory
holds, and ``train_joint`` trains them. Each member is a run of its own (``members``) on a view of
the base (``base``); ``trunk`` is the model that computes the steps of all of them (``passes``).
"""

from lorakit.training.joint.joinable import can_join
from lorakit.training.joint.memory import members_that_fit
from lorakit.training.joint.run import train_joint

__all__ = ["can_join", "members_that_fit", "train_joint"]
