"""A small model of every family with maps."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor

from vitkd_cli.vit.model import Model
from vitkd_cli.vit.spec import describe

SLIM: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3}
STAGES: dict[str, Any] = {
    "img_size": 64,
    "depths": (2, 2),
    "embed_dim": 24,
    "num_heads": (2, 4),
    "window_size": 4,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": SLIM,
    "caformer_s18": {},
    "cait_xxs24_224": {**SLIM, "depth_token_only": 1},
    "convit_tiny": {**SLIM, "num_heads": 4},
    "crossvit_tiny_240": {"depth": ((1, 1, 0),)},
    "csatv2": {},
    "davit_tiny": {"depths": (1, 1), "embed_dims": (24, 48), "num_heads": (2, 4)},
    "deit_tiny_distilled_patch16_224": SLIM,
    "edgenext_xx_small": {},
    "efficientformer_l1": {"depths": (1, 1, 1, 2), "embed_dims": (16, 24, 32, 64)},
    "efficientformerv2_s0": {"img_size": 128, "depths": (1, 1, 2, 2)},
    "efficientvit_m0": {"img_size": 128},
    "eva02_tiny_patch14_224": {**SLIM, "img_size": 28, "patch_size": 7},
    "fastvit_mci0": {},
    "gcvit_xxtiny": {"img_size": 128},
    "hiera_tiny_224": {"img_size": 64, "embed_dim": 24},
    "levit_128s": {"img_size": 128},
    "lowformer_b0": {},
    "maxvit_tiny_pm_256": {"img_size": 128, "depths": (1, 1), "embed_dim": (32, 64)},
    "mobilevit_xxs": {},
    "mvitv2_tiny": {"img_size": 64},
    "naflexvit_base_patch16_gap": SLIM,
    "nest_tiny": {"img_size": 64},
    "nextvit_small": {},
    "pit_ti_224": {"img_size": 64},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},
    "sam2_hiera_tiny": {"embed_dim": 24},
    "samvit_base_patch16_224": {
        **SLIM, "img_size": 128, "window_size": 5, "global_attn_indexes": (1,),
    },
    "shvit_s1": {},
    "swin_tiny_patch4_window7_224": STAGES,
    "swinv2_tiny_window8_256": STAGES,
    "swinv2_cr_tiny_224": STAGES,
    "test_coatnet": {},
    "test_maxvit": {},
    "tiny_vit_5m_224": {"embed_dims": (16, 32, 64, 96), "num_heads": (1, 2, 4, 6), "depths": (1, 1, 1, 1)},
    "tnt_s_patch16_224": {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads_outer": 3},
    "twins_svt_small": {"img_size": 64, "embed_dims": (16, 32, 64, 96), "depths": (2, 2, 2, 2)},
    "visformer_tiny": {"img_size": 64, "depth": (1, 1, 1), "embed_dim": 48, "num_heads": 3},
    "vit_base_patch16_siglip_224": SLIM,
    "vit_dwee_patch16_reg1_gap_256": SLIM,
    "vit_relpos_small_patch16_224": SLIM,
    "vit_small_patch16_18x2_224": SLIM,
    "vit_small_patch16_dinov3_qkvb": SLIM,
    "vit_tiny_patch16_224": SLIM,
    "volo_d1_224": {"img_size": 64},
    "xcit_nano_12_p8_224": {"img_size": 32, "depth": 2, "cls_attn_layers": 1},
}  # fmt: skip
# These take smaller images as they are.
SIZES = {
    "sam2_hiera_tiny": (128, 128),
    "csatv2": (128, 128),
    "mobilevit_xxs": (128, 128),
    "shvit_s1": (128, 128),
}
SIZES |= dict.fromkeys(
    [
        "caformer_s18",
        "edgenext_xx_small",
        "fastvit_mci0",
        "lowformer_b0",
        "nextvit_small",
        "pvt_v2_b0",
    ],
    (64, 64),
)


def small(name: str, arguments: dict[str, Any] | None = None) -> Model:
    """A model with its weights away from where they start, which would make all but uniform maps.

    In double precision, or the last layers of deep ones would differ by more than the tolerance.
    """
    torch.manual_seed(0)
    model = timm.create_model(name, **(FAMILIES[name] if arguments is None else arguments)).eval().double()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return Model(model, describe(model, name=name, img_size=SIZES.get(name)), weights="random")


def noise(built: Model, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    size = (count, len(built.spec.mean), *built.spec.input_size)
    return torch.randn(size, generator=generator, dtype=torch.double)
