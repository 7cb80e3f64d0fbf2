"""Prompt Generation Networks for frozen Vision Transformers, as a PEFT method.

Importing this package makes `peft.get_peft_model` and all of PEFT's loaders know `PGNConfig`.
"""

from importlib.util import find_spec

from pgn_peft.labels import frequency_mapping
from pgn_peft.prompter import ImagePrompter
from pgn_peft.version import __version__

__all__ = [
    "AdapterTrainer",
    "CardFacts",
    "Classifier",
    "ImageCollator",
    "ImagePrompter",
    "PGNConfig",
    "PGNModel",
    "__version__",
    "frequency_mapping",
    "load_classifier",
]

# Parts of the package serve clients that have torch and no PEFT.
if find_spec("peft") is not None:
    from pgn_peft.registration import check_peft, register

    check_peft()  # before anything is imported that an old PEFT may not have

    from pgn_peft.classifier import Classifier, load_classifier
    from pgn_peft.collator import ImageCollator
    from pgn_peft.config import PGNConfig
    from pgn_peft.model import PGNModel
    from pgn_peft.model_card import CardFacts
    from pgn_peft.trainer import AdapterTrainer

    register()
