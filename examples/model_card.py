"""The model card that `train_image_classifier.py` writes beside an adapter."""

from __future__ import annotations

from pathlib import Path

from adapter_arguments import AdapterArguments
from image_data import DataArguments


def write_card(folder: Path, adapter: AdapterArguments, data: DataArguments, results: dict, labels: list[str]) -> None:
    """Write a model card with what a stranger needs: how to load it, what it knows, how good it is."""
    call = ", interpolate_pos_encoding=True" if data.image_size is not None else ""
    shown = ", ".join(labels[:20]) + (", ..." if len(labels) > 20 else "")
    folder.joinpath("README.md").write_text(
        f"""---
library_name: peft
base_model: {adapter.model_name_or_path}
pipeline_tag: image-classification
tags: [pgn-peft, image-classification]
---

# {folder.name}

A Prompt Generation Network ([arXiv:2210.06466](https://arxiv.org/abs/2210.06466)) for the frozen
`{adapter.model_name_or_path}`, trained on `{data.dataset}` with `train_image_classifier.py` of pgn-peft.

```python
import pgn_peft  # makes PEFT know this adapter
from peft import AutoPeftModel
from transformers import AutoImageProcessor

model = AutoPeftModel.from_pretrained("{folder.name}")
processor = AutoImageProcessor.from_pretrained("{folder.name}")
logits = model(**processor(images=image, return_tensors="pt"){call}).logits
label = model.config.id2label[logits.argmax(-1).item()]
```

| | |
|---|---|
| classes | {len(labels)}: {shown} |
| trainable parameters | {results["trainable_parameters"]:,} |
| training images | {results["train_images"]:,} |
| accuracy on validation | {results["validation_accuracy"]:.4f} (the best epoch was chosen by it) |
| accuracy on test | {"-" if results["test_accuracy"] is None else f"{results['test_accuracy']:.4f}"} |
"""
    )
