"""Vision transformers built on the operators, and their weights."""

from vitkernels.models.efficientvit import (
    EfficientViT,
    efficientvit_m0,
    efficientvit_m1,
    efficientvit_m2,
    efficientvit_m3,
    efficientvit_m4,
    efficientvit_m5,
)
from vitkernels.models.registry import create_model, list_models
from vitkernels.models.weights import to_official_state_dict, to_timm_state_dict

__all__ = [
    "EfficientViT",
    "create_model",
    "efficientvit_m0",
    "efficientvit_m1",
    "efficientvit_m2",
    "efficientvit_m3",
    "efficientvit_m4",
    "efficientvit_m5",
    "list_models",
    "to_official_state_dict",
    "to_timm_state_dict",
]
