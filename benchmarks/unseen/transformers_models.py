"""Sixty architectures of ``transformers``, built from small configurations with random weights; nothing is downloaded."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.unseen.case import Case, Sizes

__all__ = ["CASES"]

_TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_KEYS: dict[str, Any] = _TEXT | {"num_key_value_heads": 2, "head_dim": 8}
_EXPERTS: dict[str, Any] = _KEYS | {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
_GPT: dict[str, Any] = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} | {
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TWO_SIDES: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_T5: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4} | {
    "decoder_start_token_id": 0
}
_IMAGE: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_SPEECH: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (16, 16),
    "conv_stride": (4, 2),
    "conv_kernel": (8, 4),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
}


def _tokens(batch: int, length: int) -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 64, (batch, length))}


def _padded(batch: int, length: int) -> dict[str, Any]:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[1:, -2:] = 0
    return _tokens(batch, length) | {"attention_mask": mask}


def _two_sequences(batch: int, length: int) -> dict[str, Any]:
    return _tokens(batch, length) | {"decoder_input_ids": torch.randint(3, 64, (batch, length - 2))}


def _pixels(batch: int, length: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(batch, 3, length, length)}


def _waves(batch: int, length: int) -> dict[str, Any]:
    return {"input_values": torch.randn(batch, length)}


def _pairs(batch: int, length: int) -> dict[str, Any]:
    return _tokens(batch, length) | {"pixel_values": torch.randn(batch, 3, 32, 32)}


def _spectra(batch: int, length: int) -> dict[str, Any]:
    return {"input_features": torch.randn(batch, 8, 64), "decoder_input_ids": torch.randint(3, 64, (batch, length))}


def _past_values(batch: int, length: int) -> dict[str, Any]:
    return {"past_values": torch.randn(batch, length, 3)}


def _trajectories(batch: int, length: int) -> dict[str, Any]:
    return {
        "states": torch.randn(batch, length, 5),
        "actions": torch.randn(batch, length, 3),
        "rewards": torch.randn(batch, length, 1),
        "returns_to_go": torch.randn(batch, length, 1),
        "timesteps": torch.arange(length).expand(batch, length).clone(),
        "attention_mask": torch.ones(batch, length),
    }


def _build(config: str, model: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = importlib.import_module("transformers")
        module: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
        return module

    return build


_TEXT_SIZES = Sizes((2, 8), (3, 13))
_Inputs = Callable[[int, int], dict[str, Any]]


def _case(
    name: str, head: str, options: dict[str, Any], inputs: _Inputs = _tokens, sizes: Sizes = _TEXT_SIZES
) -> tuple[str, Case]:
    return f"transformers {name}", Case("transformers", _build(f"{name}Config", name + head, options), inputs, sizes)


_FIXED = Sizes((2, 32), (3, 32))
_RESIZED = Sizes((2, 32), (3, 64))

CASES: dict[str, Case] = dict(
    [
        # Decoders
        _case("Llama", "ForCausalLM", _KEYS),
        _case("Mistral", "ForCausalLM", _KEYS | {"sliding_window": 4}),
        _case("Qwen2", "ForCausalLM", _KEYS),
        _case("Qwen3", "ForCausalLM", _KEYS),
        _case("Gemma", "ForCausalLM", _KEYS),
        _case("Gemma2", "ForCausalLM", _KEYS | {"query_pre_attn_scalar": 8}),
        _case("Phi", "ForCausalLM", _TEXT),
        _case("Phi3", "ForCausalLM", _TEXT | {"num_key_value_heads": 2}),
        _case("Olmo2", "ForCausalLM", _KEYS),
        _case("StableLm", "ForCausalLM", _TEXT | {"num_key_value_heads": 2}),
        _case("Cohere", "ForCausalLM", _TEXT | {"num_key_value_heads": 2}),
        _case("Granite", "ForCausalLM", _TEXT | {"num_key_value_heads": 2}),
        _case("Nemotron", "ForCausalLM", _KEYS),
        _case("GPTNeoX", "ForCausalLM", _TEXT),
        _case("Falcon", "ForCausalLM", _TEXT | {"alibi": True}),
        _case("Bloom", "ForCausalLM", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
        _case("OPT", "ForCausalLM", _TEXT | {"ffn_dim": 48, "word_embed_proj_dim": 16}),
        _case("GPT2", "LMHeadModel", _GPT),
        _case("GPTJ", "ForCausalLM", _GPT | {"rotary_dim": 4}),
        _case("CTRL", "LMHeadModel", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48}),
        # Mixtures of experts
        _case("Mixtral", "ForCausalLM", _KEYS | {"num_local_experts": 4}),
        _case("Qwen2Moe", "ForCausalLM", _EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 24}),
        _case("Olmoe", "ForCausalLM", _EXPERTS | {"num_experts": 4}),
        # Recurrences and state spaces
        _case("Mamba", "ForCausalLM", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
        _case(
            "Mamba2",
            "ForCausalLM",
            {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "n_groups": 1}
            | {"num_heads": 8, "head_dim": 8, "chunk_size": 4},
        ),
        _case("RecurrentGemma", "ForCausalLM", _KEYS | {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8}),
        _case("Rwkv", "ForCausalLM", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}),
        # Encoders
        _case("Bert", "ForMaskedLM", _TEXT, _padded),
        _case("Roberta", "ForSequenceClassification", _TEXT | {"type_vocab_size": 1}, _padded),
        _case("Albert", "ForMaskedLM", _TEXT | {"embedding_size": 16}),
        _case(
            "DistilBert", "ForMaskedLM", {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
        ),
        _case("Electra", "ForPreTraining", _TEXT | {"embedding_size": 16}, _padded),
        _case("DebertaV2", "Model", _TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
        _case("MPNet", "Model", _TEXT),
        _case("FNet", "Model", _TEXT | {"type_vocab_size": 2}),
        _case("ConvBert", "Model", _TEXT | {"embedding_size": 16, "head_ratio": 2, "conv_kernel_size": 3}),
        _case("SqueezeBert", "Model", _TEXT | {"embedding_size": 32}),
        _case("RoFormer", "Model", _TEXT | {"embedding_size": 16}),
        _case("ModernBert", "Model", _TEXT | {"global_attn_every_n_layers": 2, "local_attention": 4}),
        _case(
            "XLNet", "LMHeadModel", {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
        ),
        _case("Canine", "Model", _TEXT | {"num_hash_buckets": 32, "downsampling_rate": 2, "local_transformer_stride": 8},
              _tokens, Sizes((2, 16), (3, 24))),
        # Encoders with decoders
        _case("T5", "ForConditionalGeneration", _T5, _two_sequences),
        _case("Bart", "ForConditionalGeneration", _TWO_SIDES, _two_sequences),
        _case("Pegasus", "ForConditionalGeneration", _TWO_SIDES, _two_sequences),
        _case(
            "Whisper",
            "ForConditionalGeneration",
            _TWO_SIDES | {"num_mel_bins": 8, "max_source_positions": 32, "max_target_positions": 64},
            _spectra,
        ),
        # Vision
        _case("ViT", "ForImageClassification", _IMAGE, _pixels, _FIXED),
        _case("Beit", "ForImageClassification", _IMAGE | {"use_relative_position_bias": True}, _pixels, _FIXED),
        _case(
            "Swinv2",
            "ForImageClassification",
            {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4]}
            | {"window_size": 4},
            _pixels,
            _FIXED,
        ),
        _case(
            "ConvNextV2",
            "ForImageClassification",
            {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 12, 16, 20]},
            _pixels,
            _RESIZED,
        ),
        _case(
            "Segformer",
            "ForSemanticSegmentation",
            {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 32], "decoder_hidden_size": 16}
            | {"num_attention_heads": [1, 2, 2, 4]},
            _pixels,
            Sizes((2, 64), (3, 96)),
        ),
        _case("Dinov2", "Model", _IMAGE | {"mlp_ratio": 2, "use_swiglu_ffn": True}, _pixels, _RESIZED),
        _case(
            "PoolFormer",
            "ForImageClassification",
            {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 12, 16, 20]},
            _pixels,
            Sizes((2, 64), (3, 96)),
        ),
        _case("Hiera", "Model", {"image_size": [32, 32], "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}
              | {"query_stride": [2, 2], "num_query_pool": 1, "masked_unit_size": [4, 4]}, _pixels, _FIXED),
        # Speech
        _case("Wav2Vec2", "ForCTC", _SPEECH | {"feat_extract_norm": "group"}, _waves, Sizes((2, 256), (3, 400))),
        _case("WavLM", "Model", _SPEECH | {"num_buckets": 8, "max_bucket_distance": 16}, _waves,
              Sizes((2, 256), (3, 400))),
        # Several kinds of inputs, time series, decisions
        _case(
            "CLIP",
            "Model",
            {
                "text_config": {key: _TEXT[key] for key in _TEXT if key != "bos_token_id"},
                "vision_config": _IMAGE,
                "projection_dim": 16,
            },
            _pairs,
        ),
        _case("Vilt", "Model", _TEXT | _IMAGE, _pairs),
        _case(
            "PatchTST",
            "ForPrediction",
            {"num_input_channels": 3, "context_length": 16, "patch_length": 4, "patch_stride": 4, "d_model": 32}
            | {"num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "prediction_length": 4},
            _past_values,
            Sizes((2, 16), (3, 16)),
        ),
        _case(
            "DecisionTransformer",
            "Model",
            {"state_dim": 5, "act_dim": 3, "hidden_size": 32, "n_layer": 2, "n_head": 4, "max_ep_len": 32},
            _trajectories,
            Sizes((2, 6), (3, 9)),
        ),
        _case("Esm", "ForMaskedLM", _TEXT | {"position_embedding_type": "rotary", "mask_token_id": 3}, _padded),
    ]
)  # fmt: skip
