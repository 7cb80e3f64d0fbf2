"""Training with `Trainer`: collator, learning rates of each part, several processes, the accuracy of a head alone."""

from pgn_peft.training.collator import ImageCollator
from pgn_peft.training.head_alone import HeadAlone, head_alone
from pgn_peft.training.parameter_groups import parameter_groups
from pgn_peft.training.trainer import AdapterTrainer, EqualStatistics, last_complete_checkpoint

__all__ = [
    "AdapterTrainer",
    "EqualStatistics",
    "HeadAlone",
    "ImageCollator",
    "head_alone",
    "last_complete_checkpoint",
    "parameter_groups",
]
