"""Training with `Trainer`: collator, learning rates for each part, several processes, linear probe."""

from pgn_peft.training.collator import ImageCollator
from pgn_peft.training.ladder import Ladder, RungResult
from pgn_peft.training.linear_probe import LinearProbe, linear_probe, refit_head
from pgn_peft.training.parameter_groups import parameter_groups
from pgn_peft.training.trainer import AdapterTrainer, SyncBatchNormCallback, last_complete_checkpoint

__all__ = [
    "AdapterTrainer",
    "ImageCollator",
    "Ladder",
    "LinearProbe",
    "RungResult",
    "SyncBatchNormCallback",
    "last_complete_checkpoint",
    "linear_probe",
    "parameter_groups",
    "refit_head",
]
