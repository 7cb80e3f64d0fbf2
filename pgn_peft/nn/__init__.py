"""The networks in plain torch: generator, libraries, prompt layouts, preprocessing, the inverse of a patch projection.

Imports neither PEFT nor Transformers nor any other part of this package.
"""
