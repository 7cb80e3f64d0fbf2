"""The client of a hosted model: prompts images and reads the answers. Imports neither PEFT nor Transformers."""

from pgn_peft.prompter.black_box import adapt_black_box
from pgn_peft.prompter.calls import Calls
from pgn_peft.prompter.image_prompter import ImagePrompter
from pgn_peft.prompter.score_head import fit_to_answers, frequency_mapping
from pgn_peft.prompter.views import Views

__all__ = ["Calls", "ImagePrompter", "Views", "adapt_black_box", "fit_to_answers", "frequency_mapping"]
