"""One command turns a pool of GPU nodes into a serving cluster for large language models."""

__version__ = "0.1.0"
