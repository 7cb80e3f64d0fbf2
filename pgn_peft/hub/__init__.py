"""Adapters on disk and on the Hub: loading them with base model and image processor, publishing, model cards."""

from pgn_peft.hub.classifier import Classifier, load_classifier
from pgn_peft.hub.image_processors import plain_processor
from pgn_peft.hub.publishing import ModelCardInfo

__all__ = ["Classifier", "ModelCardInfo", "load_classifier", "plain_processor"]
