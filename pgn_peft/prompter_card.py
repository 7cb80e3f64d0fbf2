"""The model card of an `ImagePrompter` on the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pgn_peft.citation import CITATION
from pgn_peft.markdown import list_names

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from pgn_peft.prompter import ImagePrompter


def make_prompter_card(prompter: ImagePrompter, repo_id: str) -> ModelCard:
    """Write the card of a prompter (with `huggingface_hub` installed).

    Args:
        prompter: the prompter.
        repo_id: id of its repository.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        library_name="pgn-peft",
        pipeline_tag="image-classification",
        tags=["pgn-peft", "visual-prompting", "image-classification"],
    )
    return ModelCard(
        f"""\
---
{data.to_yaml()}
---

# {repo_id.rpartition("/")[2]}

The client of a Vision Transformer that can only be called: it lays generated prompts into an image, and the unmodified
model then answers a new task. A [Prompt Generation Network](https://arxiv.org/abs/2210.06466), made with pgn-peft; it
needs torch, safetensors, numpy and Pillow, and nothing of the model.

```python
from pgn_peft.prompter import ImagePrompter

prompter = ImagePrompter.from_pretrained("{repo_id}")
{_use(prompter)}
```

| | |
|---|---|
| images | {_size(prompter.layout.input_size)} pixels, from any image |
| prompted images | {_size(prompter.layout.size)} pixels |
| prompts per image | {prompter.layout.num_virtual_tokens}, in the "{prompter.layout.name}" layout |
| prompts are | {"valid pixels" if prompter.in_range else "pixels that only a float tensor can hold"} |
| answers by | {"the adapter's own head, from features" if prompter.head is not None else "the server's head"} |
| labels | {list_names(prompter.id2label)} |

```bibtex
{CITATION}
```
"""
    )


def _use(prompter: ImagePrompter) -> str:
    if not prompter.in_range:
        return "pixel_values = prompter.pixel_values(image)  # for a model that takes tensors"
    lines = ["prompted = prompter(image)  # a Pillow image, to be sent as PNG"]
    if prompter.probe_scores is not None:
        lines.append("prompter.check_server(server(prompter.probe()))  # raises if the server resizes or re-encodes")
    if prompter.head is None:
        top_k = len(prompter.server_labels or prompter.id2label or {})
        lines.append(f"label = prompter.answer(server(prompted, top_k={top_k}))[0]['label']")
    return "\n".join(lines)


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
