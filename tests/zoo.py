"""A small model of every structure of timm's vision transformers, and of some more names.

test_every_structure.py proves that each has the very blocks of the model whose name it bears.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models.mvitv2 import MultiScaleVitCfg, model_cfgs
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
LOW: dict[str, Any] = {
    "width_list": (8, 16, 32, 48, 64),
    "depth_list": (0, 1, 1, 1, 1),
    "head_widths": (64, 64),
}
LEVIT: dict[str, Any] = {
    "img_size": 128,
    "embed_dim": (32, 48, 64),
    "depth": (1, 1, 1),
    "num_heads": (2, 3, 4),
}
DAVIT: dict[str, Any] = {"depths": (1, 1), "embed_dims": (24, 48), "num_heads": (2, 4)}
COAT: dict[str, Any] = {"img_size": 64, "serial_depths": (1, 1, 1, 1), "embed_dims": (32, 32, 64, 64)}
VIM: dict[str, Any] = {"embed_dim": (32, 64, 96), "depths": (1, 1, 1)}
TNT: dict[str, Any] = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads_outer": 3}
# MViTv2 takes its sizes from a table alone.
model_cfgs["small"] = MultiScaleVitCfg(depths=(1, 2, 2, 2), embed_dim=24)
model_cfgs["small_large"] = MultiScaleVitCfg(depths=(2, 2, 2, 2), embed_dim=24, expand_attn=False)

SMALL: dict[str, dict[str, Any]] = {
    "beit3_base_patch16_224": SLIM,
    "beit_base_patch16_224": SLIM,
    "caformer_s18": {},
    "cait_xxs24_224": {**SLIM, "depth_token_only": 1},
    "coat_lite_tiny": COAT,
    "coat_tiny": {**COAT, "embed_dims": (32, 32, 32, 32), "parallel_depth": 1},
    "convit_tiny": {**SLIM, "num_heads": 4, "local_up_to_layer": 1},
    "crossvit_tiny_240": {"img_size": 120, "depth": ((1, 1, 0),), "embed_dim": (24, 48), "num_heads": (3, 3)},
    "csatv2": {"dims": (16, 32, 48, 64)},
    "davit_base_fl": DAVIT,
    "davit_tiny": DAVIT,
    "deepseek_vit_412m": SLIM,
    "deepseek_vit_412m_enc": {**SLIM, "img_size": 48, "out_features": 48},
    "deit_tiny_distilled_patch16_224": SLIM,
    "deit_tiny_patch16_224": SLIM,
    "deit3_small_patch16_224": SLIM,
    "edgenext_xx_small": {"depths": (1, 2, 2, 2), "dims": (24, 32, 48, 64)},
    "efficientformer_l1": {"depths": (1, 1, 1, 2), "embed_dims": (16, 24, 32, 64)},
    "efficientformerv2_s0": {"img_size": 128, "depths": (1, 1, 2, 2), "embed_dims": (16, 24, 32, 48)},
    "efficientvim_m1": VIM,
    "efficientvim_m1_dist": VIM,
    "efficientvit_b0": {"widths": (8, 16, 32, 64, 64), "depths": (1,) * 5, "head_widths": (64, 64)},
    "efficientvit_l1": {"widths": (16, 32, 64, 64, 96), "depths": (1,) * 5, "head_widths": (64, 64)},
    "efficientvit_m0": {"img_size": 128, "embed_dim": (32, 64, 96), "depth": (1, 1, 1)},
    "eva02_base_patch14_224": SLIM,
    "eva02_base_patch16_clip_224": SLIM,
    "eva02_enormous_patch14_clip_224": SLIM,
    "eva02_tiny_patch14_224": {**SLIM, "img_size": 28, "patch_size": 7},
    "fastvit_mci0": {"layers": (1, 1, 1, 1)},
    "gcvit_xxtiny": {"img_size": 64},
    "gemma4_vit_167m": SLIM,
    "gemma4_vit_167m_enc": {**SLIM, "img_size": 48},
    "hiera_small_abswin_256": {"img_size": 64, "embed_dim": 24, "stages": (1, 1, 2, 1)},
    "hiera_tiny_224": {"img_size": 64, "embed_dim": 24},
    "levit_128s": LEVIT,
    "levit_256d": {**LEVIT, "key_dim": 16},
    "lowformer_b0": LOW,
    "maxvit_tiny_pm_256": {"img_size": 64, "depths": (1, 1), "embed_dim": (32, 64)},
    "mobilevit_xxs": {},
    "mvitv2_large": {"img_size": 64, "cfg_variant": "small_large"},
    "mvitv2_tiny": {"img_size": 64, "cfg_variant": "small"},
    "naflexvit_base_patch16_parfac_gap": SLIM,
    "nest_tiny": {"img_size": 128},
    "nextvit_small": {"stem_chs": (16, 16, 16), "depths": (1, 1, 5, 1)},
    "pit_ti_224": {"img_size": 64, "depth": (2, 1, 1), "base_dims": (24, 24, 24)},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},
    "pvt_v2_b2_li": {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)},
    "qwen3_vit_88m": SLIM,
    "qwen3_vit_88m_enc": SLIM,
    "sam2_hiera_tiny": {"embed_dim": 24},
    "samvit_base_patch16_224": {**SLIM, "img_size": 128, "window_size": 5, "global_attn_indexes": (1,)},
    "shvit_s1": {"embed_dim": (32, 64, 96), "partial_dim": (8, 16, 24), "depth": (1, 1, 1)},
    "swin_tiny_patch4_window7_224": STAGES,
    "swinv2_cr_tiny_224": STAGES,
    "swinv2_tiny_window8_256": STAGES,
    "test_coatnet": {"img_size": 64},
    "test_maxvit": {"img_size": 64},
    "test_vit": SLIM,
    "test_vit_relpos": SLIM,
    "tiny_vit_5m_224": {"embed_dims": (16, 32, 64, 96), "num_heads": (1, 2, 4, 6), "depths": (1, 1, 1, 1)},
    "tnt_s_legacy_patch16_224": TNT,
    "tnt_s_patch16_224": TNT,
    "twins_pcpvt_small": {"img_size": 64, "embed_dims": (16, 32, 80, 128), "depths": (1, 1, 1, 1)},
    "twins_svt_small": {"img_size": 64, "embed_dims": (16, 32, 64, 96), "depths": (2, 2, 2, 2)},
    "visformer_tiny": {"img_size": 64, "depth": (1, 1, 1), "embed_dim": 48, "num_heads": 3},
    "vit_base_patch16_rpn_224": SLIM,
    "vit_base_patch16_sapiens2": {**SLIM, "img_size": 64, "patch_size": 16, "num_kv_heads": 1},
    "vit_base_patch16_siglip_224": SLIM,
    "vit_base_patch16_xp_224": SLIM,
    "vit_dpwee_patch16_reg1_gap_256": SLIM,
    "vit_dwee_patch16_reg1_gap_256": SLIM,
    "vit_pe_spatial_tiny_patch16_512": SLIM,
    "vit_pwee_patch16_reg1_gap_256": SLIM,
    "vit_relpos_small_patch16_rpn_224": SLIM,
    "vit_small_patch14_reg4_dinov2": SLIM,
    "vit_small_patch16_18x2_224": SLIM,
    "vit_srelpos_small_patch16_224": SLIM,
    "vit_tiny_patch16_224": SLIM,
    "vit_tiny_patch16_dinov3_qkvb": SLIM,
    "volo_d1_224": {"img_size": 64},
    "xcit_nano_12_p8_224": {**SLIM, "cls_attn_layers": 1},
}  # fmt: skip
# These take smaller images as they are.
SIZES = dict.fromkeys(
    [
        "caformer_s18", "davit_base_fl", "davit_tiny", "edgenext_xx_small", "lowformer_b0", "nextvit_small",
        "pvt_v2_b0", "pvt_v2_b2_li", "tiny_vit_5m_224",
    ],
    (64, 64),
) | dict.fromkeys(
    [
        "csatv2", "efficientvim_m1", "efficientvim_m1_dist", "efficientvit_b0", "efficientvit_l1",
        "fastvit_mci0", "mobilevit_xxs", "sam2_hiera_tiny", "shvit_s1",
    ],
    (128, 128),
)  # fmt: skip


def small(name: str, noise: float = 0.02, dtype: torch.dtype = torch.float32, **changes: Any) -> Model:
    """A random model with its weights away from where they start.

    Layer scales and heads that start at zero would hide a mistake, and all but uniform maps too.
    """
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL[name], **changes}).eval().to(dtype)
    for parameter in model.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return Model(model, describe(model, name=name, img_size=SIZES.get(name)), weights="random")


def noise(model: Model, count: int = 2) -> Tensor:
    """Images as the model takes them, before its normalisation."""
    generator = torch.Generator().manual_seed(1)
    shape = (count, len(model.spec.mean), *model.spec.input_size)
    return torch.randn(shape, generator=generator, dtype=next(model.net.parameters()).dtype)
