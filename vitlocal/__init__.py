"""vitlocal: Vision Transformers trained from scratch on a small budget.

Importing the package registers its models with timm, and does nothing else.
"""

from vitlocal import models as models

__version__ = "0.1.0"
