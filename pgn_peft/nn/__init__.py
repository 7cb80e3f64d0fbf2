"""The networks in plain torch: generator, libraries, prompt layouts, preprocessing, the inverse of a patch projection.

Nothing here knows PEFT, Transformers, or another part of this package.
"""
