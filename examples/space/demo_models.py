"""The demo's models, made on the first start: a tiny ViT for flowers by day, and two adapters for them at night."""

from __future__ import annotations

import tempfile
import threading
from functools import cached_property
from pathlib import Path

from flowers import NAMES, SIDE, Flowers, image_processor, make_base, train
from peft import get_peft_model
from transformers import ViTForImageClassification, set_seed

from pgn_peft import Classifier, PGNConfig
from pgn_peft.training import parameter_groups

BASE = "tiny-vit-flowers"
TOKENS, PIXELS = "demo: prompts as tokens", "demo: prompts as pixels"
EPOCHS = 6


class DemoModels:
    """The demo's base and adapters, in folders of their own.

    Args:
        folder: where they are saved; None: a temporary folder.
        epochs: epochs for each adapter; the base has twice as many.
    """

    def __init__(self, folder: Path | None = None, epochs: int = EPOCHS) -> None:
        self.epochs = epochs
        self._temporary = tempfile.TemporaryDirectory(prefix="pgn-demo-") if folder is None else None
        self.folder = Path(self._temporary.name) if self._temporary is not None else folder
        self._lock = threading.Lock()

    @cached_property
    def flowers(self) -> Flowers:
        """The demo's images. Drawing them takes seconds: the page need not wait."""
        return Flowers()

    @property
    def base(self) -> Path:
        """The folder of the tiny ViT."""
        return self.folder / BASE

    def adapter(self, name: str) -> Path:
        """Return the folder of an adapter."""
        return self.folder / {TOKENS: "tokens", PIXELS: "pixels"}[name]

    def make(self) -> None:
        """Train the models that do not exist yet. Takes half a minute on two cores; concurrent calls wait."""
        with self._lock:
            if not self.base.joinpath("preprocessor_config.json").is_file():
                print("making the demo's models, once: half a minute")
                make_base(self.flowers, self.base, 2 * self.epochs)
            for name in (TOKENS, PIXELS):
                if not self.adapter(name).joinpath("adapter_config.json").is_file():
                    self._make_adapter(name)

    def _make_adapter(self, name: str) -> None:
        set_seed(0)
        fields = {"id2label": dict(enumerate(NAMES)), "library_size": 32, "generator_image_size": SIDE // 2}
        if name == TOKENS:
            fields |= {"num_virtual_tokens": 8, "initializer_range": 0.5, "generator_width": 8}
            rates = {"learning_rate": 4e-3}
        else:
            fields |= {"prompt_space": "pixel", "image_size": SIDE, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
            fields |= {"head": "frozen", "label_mapping": list(range(len(NAMES))), "generator_width": 4}
            rates = {"learning_rate": 5e-3, "library_learning_rate": 0.1}
        base = ViTForImageClassification.from_pretrained(self.base)
        model = get_peft_model(base, PGNConfig(**fields))
        groups = parameter_groups(model, **rates)
        train(model, groups, self.flowers.night["train"], rates["learning_rate"], self.epochs, name)
        Classifier(model, image_processor()).save_pretrained(self.adapter(name))

    @staticmethod
    def is_base(name: str | None) -> bool:
        """Whether an adapter's base is the demo's model, of this or another machine."""
        return Path(name or "").name == BASE
