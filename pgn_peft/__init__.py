"""Prompt Generation Networks for frozen Vision Transformers, as a PEFT method.

Importing this package registers `PGNConfig` with PEFT, for `peft.get_peft_model` and all loaders.
"""

from importlib.util import find_spec

from pgn_peft.prompter import ImagePrompter, Views, adapt_black_box, frequency_mapping
from pgn_peft.version import __version__

__all__ = [
    "AdapterTrainer",
    "Classifier",
    "ImageCollator",
    "ImagePrompter",
    "ModelCardInfo",
    "PGNConfig",
    "PGNModel",
    "Views",
    "__version__",
    "adapt_black_box",
    "embed_texts",
    "frequency_mapping",
    "load_classifier",
    "make_prompter",
    "use_texts",
]

# `ImagePrompter` also works where PEFT is not installed.
if find_spec("peft") is not None:
    from pgn_peft.registration import check_peft, register

    check_peft()  # before imports that an old PEFT lacks

    from pgn_peft.hub import Classifier, ModelCardInfo, load_classifier
    from pgn_peft.inversion import make_prompter
    from pgn_peft.texts import embed_texts, use_texts
    from pgn_peft.training import AdapterTrainer, ImageCollator
    from pgn_peft.tuner.config import PGNConfig
    from pgn_peft.tuner.model import PGNModel

    register()
