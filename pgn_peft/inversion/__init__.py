"""Prompt inversion, from a library of tokens to pixels; and the client of a trained adapter."""

from pgn_peft.inversion.from_adapter import make_prompter
from pgn_peft.inversion.library import invert_library, invert_static_prompts
from pgn_peft.nn.pixel_prompts import InversionReport, PixelPrompts

__all__ = ["InversionReport", "PixelPrompts", "invert_library", "invert_static_prompts", "make_prompter"]
