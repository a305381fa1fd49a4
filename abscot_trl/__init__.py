"""Abstract Chain-of-Thought (arXiv:2604.22709) as a TRL recipe package."""

__version__ = "0.1.0"
