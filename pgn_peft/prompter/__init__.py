"""The client of a hosted model: prompts images and reads the answers. Imports neither PEFT nor Transformers."""

from pgn_peft.prompter.black_box import NOTHING, adapt_black_box, make_candidates
from pgn_peft.prompter.calls import Calls
from pgn_peft.prompter.image_prompter import ImagePrompter
from pgn_peft.prompter.score_head import fit_to_answers, frequency_mapping
from pgn_peft.prompter.views import Views

__all__ = [
    "NOTHING",
    "Calls",
    "ImagePrompter",
    "Views",
    "adapt_black_box",
    "fit_to_answers",
    "frequency_mapping",
    "make_candidates",
]
