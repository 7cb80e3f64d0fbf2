"""Networks in plain torch: generator, libraries, heads, prompt layouts, preprocessing, inverse of a patch projection.

Imports neither PEFT nor Transformers nor any other part of this package.
"""
