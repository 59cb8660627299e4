"""Models of ``timm``, ``diffusers`` and ``segmentation_models_pytorch`` with random weights; nothing is downloaded."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.unseen.case import Case, Sizes

__all__ = ["CASES"]


def _images(batch: int, length: int) -> torch.Tensor:
    return torch.randn(batch, 3, length, length)


def _build(library: str, name: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        module: nn.Module = getattr(importlib.import_module(library), name)(**options)
        return module

    return build


_RESIZED, _FIXED = Sizes((2, 64), (3, 96)), Sizes((2, 64), (3, 64))
_TEST_SIZES = Sizes((2, 160), (3, 160))


def _timm(name: str, sizes: Sizes = _RESIZED, **options: Any) -> tuple[str, Case]:
    make = _build("timm", "create_model", {"model_name": name, "num_classes": 5} | options)
    return f"timm {name}", Case("timm", make, _images, sizes)


def _timm_class(module: str, name: str, sizes: Sizes = _RESIZED, **options: Any) -> tuple[str, Case]:
    make = _build(f"timm.models.{module}", name, {"num_classes": 5} | options)
    return f"timm {name}", Case("timm", make, _images, sizes)


_STAGES: dict[str, Any] = {"depths": (1, 1, 1, 1)}

_TIMM = [
    _timm("test_vit", _TEST_SIZES),
    _timm("test_vit3", _TEST_SIZES),
    _timm("test_convnext2"),
    _timm("test_efficientnet"),
    _timm("test_efficientnet_evos"),
    _timm("test_nfnet"),
    _timm("test_byobnet"),
    _timm("test_maxvit", _TEST_SIZES),
    _timm("test_mambaout"),
    _timm_class("mlp_mixer", "MlpMixer", _FIXED, img_size=64, num_blocks=2, embed_dim=32),
    _timm_class("vision_transformer_relpos", "VisionTransformerRelPos", _FIXED, img_size=64, embed_dim=32, depth=2, num_heads=4),
    _timm_class("convmixer", "ConvMixer", dim=24, depth=2, patch_size=8),
    _timm("cait_xxs24_224", _FIXED, img_size=64, embed_dim=32, depth=2, num_heads=4, depth_token_only=1),
    _timm("xcit_nano_12_p16_224", _FIXED, img_size=64, embed_dim=32, depth=2, num_heads=4),
    _timm("swinv2_cr_tiny_224", _FIXED, img_size=64, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4)),
    _timm("davit_tiny", embed_dims=(16, 16, 32, 32), num_heads=(2, 2, 4, 4), window_size=4, **_STAGES),
    _timm_class("focalnet", "FocalNet", embed_dim=16, **_STAGES),
    _timm("pvt_v2_b0", _RESIZED, embed_dims=(8, 16, 16, 32), num_heads=(1, 2, 2, 4), **_STAGES),
    _timm("ghostnet_050"),
    _timm("mobilenetv4_conv_small_050"),
    _timm("mobileone_s0"),
    _timm("repvgg_a0"),
    _timm("fastvit_t8", embed_dims=(8, 16, 16, 32), layers=(1, 1, 1, 1)),
    _timm("levit_128s", Sizes((2, 224), (3, 224)), embed_dim=(16, 32, 32), key_dim=8, num_heads=(2, 4, 4), depth=(1, 1, 1)),
    _timm("hrnet_w18_small"),
]  # fmt: skip


def _smp(name: str, encoder: str, sizes: Sizes = _RESIZED, **options: Any) -> tuple[str, Case]:
    make = _build(
        "segmentation_models_pytorch", name, {"encoder_name": encoder, "encoder_weights": None, "classes": 3} | options
    )
    return f"segmentation {name}", Case("segmentation_models_pytorch", make, _images, sizes)


_SEGMENTATION = [
    _smp("Unet", "mobilenet_v2", decoder_channels=(32, 24, 16, 8, 8)),
    _smp("UnetPlusPlus", "timm-mobilenetv3_small_minimal_100", decoder_channels=(32, 24, 16, 8, 8)),
    _smp("FPN", "efficientnet-b0", decoder_pyramid_channels=32, decoder_segmentation_channels=32),
    _smp("Linknet", "resnet18"),
    _smp("MAnet", "timm-mobilenetv3_small_minimal_100", decoder_channels=(32, 24, 16, 8, 8), decoder_pab_channels=8),
    _smp("PSPNet", "mobilenet_v2", psp_out_channels=32),
    _smp("DeepLabV3Plus", "mobilenet_v2", decoder_channels=16),
    _smp("PAN", "mobilenet_v2", Sizes((2, 128), (3, 160)), decoder_channels=16),
    _smp("UPerNet", "mobilenet_v2", decoder_channels=16),
]  # fmt: skip


def _diffusers(
    name: str, inputs: Callable[[int, int], Any], sizes: Sizes, title: str = "", **options: Any
) -> tuple[str, Case]:
    make = _build("diffusers", name, options)
    return f"diffusers {title or name}", Case("diffusers", make, inputs, sizes)


def _noisy(channels: int) -> Callable[[int, int], dict[str, Any]]:
    def inputs(batch: int, length: int) -> dict[str, Any]:
        sample = torch.randn(batch, channels, length, length)
        return {"sample": sample, "timestep": torch.arange(batch) * 7 + 3}

    return inputs


def _prompted(batch: int, length: int) -> dict[str, Any]:
    return _noisy(4)(batch, length) | {"encoder_hidden_states": torch.randn(batch, 5, 16)}


def _labelled(batch: int, length: int) -> dict[str, Any]:
    hidden = torch.randn(batch, 4, length, length)
    return {"hidden_states": hidden, "timestep": torch.arange(batch) * 7 + 3, "class_labels": torch.arange(batch) % 5}


def _joint(batch: int, length: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, length, length),
        "encoder_hidden_states": torch.randn(batch, 6, 16),
        "pooled_projections": torch.randn(batch, 12),
        "timestep": torch.arange(batch) * 7 + 3,
    }


_BLOCKS: dict[str, Any] = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4}
_CODER: dict[str, Any] = _BLOCKS | {
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
    "latent_channels": 4,
}

_DIFFUSERS = [
    _diffusers(
        "UNet2DModel",
        _noisy(3),
        Sizes((2, 16), (3, 24)),
        sample_size=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        **_BLOCKS,
    ),
    _diffusers(
        "UNet2DConditionModel",
        _prompted,
        Sizes((2, 16), (3, 24)),
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        **_BLOCKS,
    ),
    _diffusers("AutoencoderKL", _images, Sizes((2, 16), (3, 24)), **_CODER),
    _diffusers("VQModel", _images, Sizes((2, 16), (3, 24)), num_vq_embeddings=16, **_CODER),
    _diffusers(
        "DiTTransformer2DModel",
        _labelled,
        Sizes((2, 8), (3, 8)),
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=5,
        norm_num_groups=4,
    ),
    _diffusers(
        "SD3Transformer2DModel",
        _joint,
        Sizes((2, 8), (3, 12)),
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=12,
        out_channels=4,
        pos_embed_max_size=16,
    ),
]  # fmt: skip

CASES: dict[str, Case] = dict([*_TIMM, *_SEGMENTATION, *_DIFFUSERS])
