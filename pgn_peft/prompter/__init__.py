"""The client of a hosted model: prompts images and reads the answers. Imports neither PEFT nor Transformers."""

from pgn_peft.prompter.image_prompter import ImagePrompter
from pgn_peft.prompter.score_head import fit_to_answers, frequency_mapping

__all__ = ["ImagePrompter", "fit_to_answers", "frequency_mapping"]
