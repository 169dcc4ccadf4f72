"""Transformers without matrix multiplications, trained, compared and deployed in JAX. Start at
`layers.weightless` or README.md.
"""

__version__ = "0.1.0"
