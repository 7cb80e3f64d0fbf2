"""Training with `Trainer`: collator, parameter groups, checkpoints, several processes."""

from pgn_peft.training.checkpoints import last_complete_checkpoint
from pgn_peft.training.collator import ImageCollator
from pgn_peft.training.distributed import EqualStatistics, SameSteps, broadcast_statistics
from pgn_peft.training.head_alone import HeadAlone, head_alone
from pgn_peft.training.initialization import start_library_from_images
from pgn_peft.training.parameter_groups import parameter_groups
from pgn_peft.training.trainer import AdapterTrainer

__all__ = [
    "AdapterTrainer",
    "EqualStatistics",
    "HeadAlone",
    "ImageCollator",
    "SameSteps",
    "broadcast_statistics",
    "head_alone",
    "last_complete_checkpoint",
    "parameter_groups",
    "start_library_from_images",
]
