"""Tiny seeded models with a tower for images and one for texts, and their tokenizer."""

import torch
import transformers
from conftest import SIZES
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import CLIPConfig, PreTrainedTokenizerFast, SiglipConfig

NAMES = ["cat", "dog", "owl"]
WORDS = ["[PAD]", "a", "photo", "of", *NAMES, "end", "[UNK]", ".", "sketch"]
END = WORDS.index("end")
TEXT = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 12,
    "eos_token_id": END,
    "bos_token_id": 1,
    "pad_token_id": 0,
}


def tokenizer():
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = TemplateProcessing(single="$A end", special_tokens=[("end", END)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="end")


def two_towers(kind="CLIPModel", seed=0):
    torch.manual_seed(seed)
    if kind == "CLIPModel":
        config = CLIPConfig(vision_config=SIZES, text_config=TEXT, projection_dim=16)
    else:
        config = SiglipConfig(vision_config=SIZES, text_config=TEXT)
    model = getattr(transformers, kind)(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model
