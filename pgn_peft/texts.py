"""Texts as classes: computing their embeddings, and setting them in an adapter's head."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pgn_peft.nn.functional import evaluating
from pgn_peft.nn.heads import TextHead
from pgn_peft.tuner.adapters import find_layer, unwrap
from pgn_peft.tuner.backbones import SUPPORTED, architecture_of
from pgn_peft.tuner.head import find_head

BATCH = 256  # texts at a time


def embed_texts(
    model: nn.Module,
    tokenizer: Any,
    classes: Sequence[str] | Mapping[str, Sequence[str]],
    templates: Sequence[str] = ("a photo of a {}.",),
) -> Tensor:
    """Embed the names or descriptions of classes with a model's text tower.

    Args:
        model: a model with a text tower, adapted or not: `CLIPModel`, `CLIPTextModelWithProjection`, `SiglipModel`.
        tokenizer: the model's tokenizer, or the processor that holds it.
        classes: names, which are inserted into the templates; or lists of descriptions by name, used as they are.
        templates: sentences with "{}" for the name.

    Returns:
        (M, D) embeddings of unit norm, on the CPU. Those of several sentences are averaged and normalised again.

    Raises:
        TypeError: `classes` does not hold lists of texts.
        ValueError: a template has no "{}", or a class has no description.

    Source: arXiv:2103.00020 (templates and their mean).
    """
    lists = list(classes.values()) if isinstance(classes, Mapping) else [classes]
    if any(isinstance(texts, str) or not all(isinstance(text, str) for text in texts) for texts in lists):
        raise TypeError(
            f"`classes` is {classes!r}, not a list of names, nor a list of descriptions for each name. For an "
            "`id2label`, pass list(id2label.values())."
        )
    if isinstance(classes, Mapping):
        sentences = [list(descriptions) for descriptions in classes.values()]
    else:
        sentences = [[template.replace("{}", name) for template in templates if "{}" in template] for name in classes]
    if not sentences or not all(sentences) or not all("{}" in template for template in templates):
        raise ValueError(
            f"A class has no text, or a template has no '{{}}' for its name: {classes!r}, {list(templates)!r}."
        )
    texts = [sentence for one_class in sentences for sentence in one_class]
    embedded = torch.cat([_embed(model, tokenizer, texts[at : at + BATCH]) for at in range(0, len(texts), BATCH)])
    parts = F.normalize(embedded, dim=-1).split([len(one_class) for one_class in sentences])
    return F.normalize(torch.stack([part.mean(dim=0) for part in parts]), dim=-1)


def _embed(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    text_config = getattr(model.config, "text_config", model.config)
    # SigLIP was trained on texts padded to full length, without a mask. CLIP's attention is causal, so padding after
    # the end has no effect.
    length = getattr(text_config, "max_position_embeddings", None)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    input_ids = tokens["input_ids"].to(next(model.parameters()).device)
    with evaluating(model), torch.no_grad():
        if hasattr(model, "text_projection") and not hasattr(model, "get_text_features"):  # a text tower alone
            output = model(input_ids=input_ids).text_embeds
        else:
            output = model.get_text_features(input_ids=input_ids)
            output = getattr(output, "pooler_output", output)
    return output.float().cpu()


def use_texts(
    model: nn.Module,
    text_embeds: Tensor,
    *,
    logit_scale: float | None = None,
    logit_bias: float | None = None,
    adapter_name: str = "default",
) -> None:
    """Set the texts of the classes of an adapter with head="text". They are saved with the adapter.

    Args:
        model: the adapted model.
        text_embeds: (M, D), one for each class in the order of `id2label`, of any norm; see `embed_texts`.
        logit_scale: factor of the cosines; None: the model's own, or that of OpenAI's CLIP, 100.
        logit_bias: added to the scaled cosines; None: the model's own (SigLIP), or 0.
        adapter_name: the adapter.

    Raises:
        ValueError: the adapter has another head; the embeddings have another shape or are not finite; or the model is
            SigLIP's image tower, and scale and bias are not given.
    """
    layer, heads = find_layer(model, adapter_name), find_head(model)
    head = None if heads is None else heads.head(adapter_name)
    if not isinstance(head, TextHead):
        raise ValueError(
            f"The adapter {adapter_name!r} has head={layer.configs[adapter_name].head!r}, which takes no texts. Make "
            "one with PGNConfig(head='text', id2label=...)."
        )
    text_embeds = torch.as_tensor(text_embeds)
    if text_embeds.shape != head.text_embeds.shape:
        raise ValueError(
            f"`text_embeds` has the shape {tuple(text_embeds.shape)}, not {tuple(head.text_embeds.shape)}. Embed one "
            "text for each class of `id2label`, with the same model's text tower."
        )
    base = unwrap(model)
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    if hasattr(base, "logit_scale"):
        usual_scale = base.logit_scale.exp().item()
    else:
        usual_scale = SUPPORTED[architecture_of(base) or ""].text_scale
    usual_bias = base.logit_bias.item() if hasattr(base, "logit_bias") else 0.0
    if usual_scale is None and None in (logit_scale, logit_bias):
        raise ValueError(
            f"A {type(base).__name__} lacks `logit_scale` and `logit_bias`: pass both. The model with both towers has "
            "them, as logit_scale.exp() and logit_bias."
        )
    scale = usual_scale if logit_scale is None else logit_scale
    bias = usual_bias if logit_bias is None else logit_bias
    lengths = text_embeds.float().norm(dim=-1)
    if not (lengths.isfinite() & (lengths > 0)).all() or not 0 < scale < math.inf or not math.isfinite(bias):
        raise ValueError(
            "`text_embeds` or `logit_bias` is not finite, a text's embedding is zero, or `logit_scale` is not above 0."
        )
    head.set_texts(text_embeds, scale, bias)
