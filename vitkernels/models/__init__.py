"""Vision transformers built on the operators, and their weights."""

from vitkernels.models.deit import DeiT, deit_base_bsr, deit_small_bsr
from vitkernels.models.dinat import (
    NAT,
    dilations_for,
    dinat_base,
    dinat_large,
    dinat_mini,
    dinat_small,
    dinat_tiny,
    nat_base,
    nat_mini,
    nat_small,
    nat_tiny,
)
from vitkernels.models.efficientvit import (
    EfficientViT,
    efficientvit_m0,
    efficientvit_m1,
    efficientvit_m2,
    efficientvit_m3,
    efficientvit_m4,
    efficientvit_m5,
)
from vitkernels.models.ltm import LTMViT, ltm_vit_base, ltm_vit_small
from vitkernels.models.ltm_swin import LTMSwin, ltm_swin_tiny
from vitkernels.models.medvit import MedViT, medvit_base, medvit_large, medvit_small, medvit_tiny
from vitkernels.models.ppma import PPMA, ppma_b, ppma_s, ppma_t
from vitkernels.models.registry import create_model, list_models
from vitkernels.models.s2aformer import (
    S2AFormer,
    s2aformer_m,
    s2aformer_mini,
    s2aformer_s,
    s2aformer_t,
    s2aformer_xs,
)
from vitkernels.models.weights import to_official_state_dict, to_timm_state_dict

__all__ = [
    "NAT",
    "PPMA",
    "DeiT",
    "EfficientViT",
    "LTMSwin",
    "LTMViT",
    "MedViT",
    "S2AFormer",
    "create_model",
    "deit_base_bsr",
    "deit_small_bsr",
    "dilations_for",
    "dinat_base",
    "dinat_large",
    "dinat_mini",
    "dinat_small",
    "dinat_tiny",
    "efficientvit_m0",
    "efficientvit_m1",
    "efficientvit_m2",
    "efficientvit_m3",
    "efficientvit_m4",
    "efficientvit_m5",
    "list_models",
    "ltm_swin_tiny",
    "ltm_vit_base",
    "ltm_vit_small",
    "medvit_base",
    "medvit_large",
    "medvit_small",
    "medvit_tiny",
    "nat_base",
    "nat_mini",
    "nat_small",
    "nat_tiny",
    "ppma_b",
    "ppma_s",
    "ppma_t",
    "s2aformer_m",
    "s2aformer_mini",
    "s2aformer_s",
    "s2aformer_t",
    "s2aformer_xs",
    "to_official_state_dict",
    "to_timm_state_dict",
]
