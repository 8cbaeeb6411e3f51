import pytest
import torch
from timm.optim import param_groups_layer_decay
from timm.optim._param_groups import group_parameters  # noqa: F401
