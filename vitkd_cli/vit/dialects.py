"""The parameter names of MMPretrain, transformers and torchvision → timm's."""

import re

import torch
from torch import Tensor

# A key that only they have → what turns their keys into timm's, in this order.
_DIALECTS = {
    # MMClassification's and MMPretrain's ViT, DeiT, DeiT III and BEiT
    r"layers\.\d+\.ln1\.": (
        (r"^layers\.", "blocks."),
        (r"^(blocks\.\d+\.)ln", r"\1norm"),
        (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
        (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
        (r"\.(?:attn|ffn)\.gamma([12])\.weight$", r".ls\1.gamma"),
        (r"^patch_embed\.projection\.", "patch_embed.proj."),
        (r"^ln1\.", "norm."),
        (r"^ln2\.", "fc_norm."),  # where patch tokens are averaged
        (r"^pre_norm\.", "norm_pre."),
        (r"^head\.(?:layers\.head|fc)\.", "head."),
        (r"^head\.layers\.head_dist\.", "head_dist."),
    ),
    # transformers' ViT, DeiT and DINOv2, as their files and as their modules are called
    r"embeddings\.patch_embeddings\.": (
        (r"^(?:encoder\.layer|layers)\.", "blocks."),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.distillation_token$", "dist_token"),
        (r"^embeddings\.", ""),
        (r"\.attention\.(?:attention\.(query|key|value)|(q|k|v)_proj)\.", r".attn.\1\2."),
        (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"\.mlp\.weights_in\.", ".mlp.w12."),
        (r"\.mlp\.(?:weights_out|down_proj)\.", ".mlp.w3."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
        (r"^layernorm\.", "norm."),
        (r"^cls_classifier\.", "head."),
        (r"^distillation_classifier\.", "head_dist."),
    ),
    # torchvision's ViT
    r"conv_proj\.": (
        (r"^conv_proj\.", "patch_embed.proj."),
        (r"^class_token$", "cls_token"),
        (r"^encoder\.pos_embedding$", "pos_embed"),
        (r"^encoder\.layers\.encoder_layer_", "blocks."),
        (r"\.ln_([12])\.", r".norm\1."),
        (r"\.self_attention\.in_proj_", ".attn.qkv."),
        (r"\.self_attention\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.(?:linear_1|0)\.", ".mlp.fc1."),
        (r"\.mlp\.(?:linear_2|3)\.", ".mlp.fc2."),
        (r"^encoder\.ln\.", "norm."),
    ),
}
_FUSED = {
    "attn.qkv": (("attn.query", "attn.key", "attn.value"), ("attn.q", "attn.k", "attn.v")),
    "mlp.w12": (("mlp.gate_proj", "mlp.up_proj"),),
}


def in_timm_s_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The keys of other libraries → timm's; what timm's own converters know is left to them."""
    for sign, names in _DIALECTS.items():
        if any(re.match(sign, key) for key in tensors):
            renamed = {}
            for key, value in tensors.items():
                for pattern, name in names:
                    key = re.sub(pattern, name, key)
                renamed[key] = value
            tensors = _fused(renamed)
    if "mask_token" in tensors:  # DINOv2's training groups its blocks, numbered throughout
        tensors = {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", k): v for k, v in tensors.items()}
    return tensors


def _fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Projections that other libraries keep apart, joined as timm has them."""
    for fused, spellings in _FUSED.items():
        for parts in spellings:
            for key in [key for key in tensors if f".{parts[0]}." in key]:
                keys = [key.replace(parts[0], part) for part in parts]
                found = [tensors[part] for part in keys if part in tensors and tensors[part].ndim]
                if len(found) == len(keys) and len({tensor.shape[1:] for tensor in found}) == 1:
                    tensors[key.replace(parts[0], fused)] = torch.cat([tensors.pop(part) for part in keys])
    return tensors
