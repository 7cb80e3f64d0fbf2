"""The client of a hosted model. Imports neither PEFT nor Transformers."""

from pgn_peft.prompter.embeddings_client import EmbeddingsClient
from pgn_peft.prompter.image_prompter import ImagePrompter
from pgn_peft.prompter.label_mapping import frequency_mapping
from pgn_peft.prompter.score_fitting import fit_to_answers

__all__ = ["EmbeddingsClient", "ImagePrompter", "fit_to_answers", "frequency_mapping"]
