"""vitlocal: Vision Transformers trained from scratch on a small budget.

``import vitlocal.models`` registers its models with timm. This package itself imports nothing, so that commands
which need no PyTorch start at once.
"""

__version__ = "0.1.0"
