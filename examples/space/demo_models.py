"""The demo's models, made on the first start: a tiny ViT for digits, and two adapters for digits in a new domain."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from digits import NAMES, Digits, image_processor, make_base, train
from peft import get_peft_model
from transformers import ViTForImageClassification, set_seed

from pgn_peft import Classifier, PGNConfig
from pgn_peft.training import parameter_groups

BASE = "tiny-vit-digits"
TOKENS, PIXELS = "demo: prompts as tokens", "demo: prompts as pixels"
EPOCHS = 12


class DemoModels:
    """The demo's base and adapters, in folders of their own.

    Args:
        folder: where they are saved; None: a temporary folder.
        epochs: epochs of each training.
    """

    def __init__(self, folder: Path | None = None, epochs: int = EPOCHS) -> None:
        self.epochs = epochs
        self._temporary = tempfile.TemporaryDirectory(prefix="pgn-demo-") if folder is None else None
        self.folder = Path(self._temporary.name) if self._temporary is not None else folder
        self._lock = threading.Lock()
        self.digits = Digits()

    @property
    def base(self) -> Path:
        """The folder of the tiny ViT."""
        return self.folder / BASE

    def adapter(self, name: str) -> Path:
        """Return the folder of an adapter."""
        return self.folder / {TOKENS: "tokens", PIXELS: "pixels"}[name]

    def make(self, say: Callable[[str], None] = print) -> None:
        """Train the models that do not exist yet. Takes half a minute on two cores; concurrent calls wait."""
        with self._lock:
            if not self.base.joinpath("preprocessor_config.json").is_file():
                say("making the demo's models, once: a tiny Vision Transformer")
                make_base(self.digits, self.base, self.epochs)
            for name in (TOKENS, PIXELS):
                if not self.adapter(name).joinpath("adapter_config.json").is_file():
                    say(f"making the demo's models, once: {name.removeprefix('demo: ')}")
                    self._make_adapter(name)

    def _make_adapter(self, name: str) -> None:
        set_seed(0)
        fields = {"id2label": dict(enumerate(NAMES)), "library_size": 32, "generator_width": 8}
        rates = {"learning_rate": 1e-2}
        if name == TOKENS:
            fields |= {"num_virtual_tokens": 8, "initializer_range": 0.5}
        else:
            fields |= {"prompt_space": "pixel", "image_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
            fields |= {"head": "frozen", "label_mapping": list(range(len(NAMES)))}
            rates = {"learning_rate": 3e-3, "library_learning_rate": 0.1}
        base = ViTForImageClassification.from_pretrained(self.base)
        model = get_peft_model(base, PGNConfig(**fields, generator_image_size=None))
        groups = parameter_groups(model, **rates)
        train(model, groups, self.digits.turned["train"], rates["learning_rate"], self.epochs)
        Classifier(model, image_processor()).save_pretrained(self.adapter(name))

    @staticmethod
    def is_base(name: str | None) -> bool:
        """Whether an adapter's base is the demo's model, of this or another machine."""
        return Path(name or "").name == BASE
