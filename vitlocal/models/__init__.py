"""The model families. Importing this package registers them: ``timm.create_model("vitlocal_small_patch16_224")``."""

from timm import create_model as create_model

from vitlocal.models import deit as deit
from vitlocal.models import dit as dit
from vitlocal.models import lffn as lffn
from vitlocal.models import localvit as localvit
