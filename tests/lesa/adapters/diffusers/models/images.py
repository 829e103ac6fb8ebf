"""Tiny image models. A new model is one more row, as small as its constructor allows."""

import torch

from tests.lesa.adapters.diffusers.models.row import Inputs, Row, growing, noise, prompt_lengths, thousand, unit


def flux_like(t: float, text: int = 5, axes: int = 3, **more: object) -> Inputs:
    """Inputs of FLUX and of models with the same arguments: 4 x 4 image tokens of 4 channels, text tokens of 16."""
    return {
        "hidden_states": noise(2, 16, 4),
        "encoder_hidden_states": noise(2, text, 16),
        "timestep": unit(t, 2),
        "img_ids": noise(16, axes),
        "txt_ids": torch.zeros(text, axes),
        **more,
    }


FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 4, 8),
}
COGVIEW = {
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 4,
    "num_attention_heads": 4,
    "out_channels": 4,
    "text_embed_dim": 8,
    "time_embed_dim": 8,
    "condition_dim": 4,
}
QWEN = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 16,
    "axes_dims_rope": (8, 4, 4),
}
JOY = {
    "patch_size": [1, 2, 2],
    "in_channels": 16,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": 16,
    "num_layers": 2,
    "rope_dim_list": [4, 6, 6],
    "theta": 256,
}


def sizes() -> Inputs:
    """The size conditions of CogView."""
    return {name: torch.tensor([[64, 64]] * 2) for name in ("original_size", "target_size", "crop_coords")}


def qwen(t: float) -> Inputs:
    return {
        "hidden_states": noise(2, 16, 16),
        "encoder_hidden_states": noise(2, 5, 16),
        "encoder_hidden_states_mask": torch.ones(2, 5, dtype=torch.long),
        "timestep": unit(t, 2),
        "img_shapes": [(1, 4, 4)] * 2,
        **prompt_lengths(2, 5),
    }


def ideogram(t: float, text: int = 4, image: int = 4) -> Inputs:
    tokens = text + image
    hidden, words, places = torch.zeros(1, tokens, 16), torch.zeros(1, tokens, 24), torch.zeros(1, tokens, 3)
    hidden[:, text:], words[:, :text] = noise(1, image, 16), noise(1, text, 24)
    places[:, :text] = torch.arange(text).unsqueeze(1)
    places[:, text:, 1:] = 65536 + torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    return {
        "hidden_states": hidden,
        "encoder_hidden_states": words,
        "timestep": growing(t),
        "position_ids": places.long(),
        "segment_ids": torch.ones(1, tokens, dtype=torch.long),
        "indicator": torch.tensor([[3] * text + [2] * image]),
    }


def qwen21(t: float) -> Inputs:
    return {
        "hidden_states": noise(1, 16, 4),
        "encoder_hidden_states": noise(1, 5, 16),
        "timestep": unit(t),
        "img_shapes": [[(1, 4, 4)]],
        "img_mask": torch.tensor([[False] * 5 + [True] * 4]),
        "encoder_hidden_states_mask": torch.ones(1, 5, dtype=torch.long),
    }


IMAGES: dict[str, Row] = {
    "AuraFlowTransformer2DModel": Row(
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_projection_dim": 32,
            "joint_attention_dim": 16,
            "out_channels": 4,
            "pos_embed_max_size": 16,
        },
        lambda t: {
            "hidden_states": noise(2, 4, 8, 8),
            "encoder_hidden_states": noise(2, 5, 16),
            "timestep": unit(t, 2),
        },
    ),
    "BriaTransformer2DModel": Row(
        FLUX | {"attention_head_dim": 8, "pooled_projection_dim": None, "axes_dims_rope": [0, 4, 4]},
        lambda t: flux_like(t, timestep=thousand(t, 2)),
    ),
    "BriaFiboTransformer2DModel": Row(
        FLUX
        | {
            "attention_head_dim": 8,
            "text_encoder_dim": 8,
            "pooled_projection_dim": None,
            "axes_dims_rope": [0, 4, 4],
        },
        lambda t: flux_like(t, timestep=thousand(t, 2), text_encoder_layers=[noise(2, 5, 8), noise(2, 5, 8)]),
    ),
    "BriaFibo2Transformer2DModel": Row(
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": 8,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 4,
            "gist_min_text_len": 4,
            "gist_max_text_len": 16,
            "axes_dims": (4, 6, 6),
            "axes_lens": (64, 32, 32),
        },
        lambda t: {
            "hidden_states": noise(2, 4, 8, 8),
            "timestep": unit(t, 2),
            "encoder_hidden_states": noise(2, 2, 5, 8),
        },
    ),
    "ChromaTransformer2DModel": Row(
        FLUX | {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}, flux_like
    ),
    "CogView3PlusTransformer2DModel": Row(
        COGVIEW | {"pos_embed_max_size": 8, "sample_size": 8},
        lambda t: {
            "hidden_states": noise(2, 4, 8, 8),
            "encoder_hidden_states": noise(2, 5, 8),
            "timestep": thousand(t, 2),
            **sizes(),
        },
    ),
    "CogView4Transformer2DModel": Row(
        COGVIEW,
        lambda t: {
            "hidden_states": noise(2, 4, 8, 8),
            "encoder_hidden_states": noise(2, 5, 8),
            "timestep": thousand(t, 2),
            **sizes(),
        },
    ),
    "DiTTransformer2DModel": Row(
        {
            "in_channels": 4,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "num_embeds_ada_norm": 8,
            "patch_size": 2,
            "sample_size": 8,
            "norm_type": "ada_norm_zero",
        },
        lambda t: {
            "hidden_states": noise(2, 4, 8, 8),
            "timestep": thousand(t, 2),
            "class_labels": torch.tensor([3, 5]),
        },
        embedders=("transformer_blocks.0.norm1.emb",),
    ),
    "ErnieImageTransformer2DModel": Row(
        {
            "hidden_size": 16,
            "num_attention_heads": 1,
            "num_layers": 2,
            "ffn_hidden_size": 16,
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 1,
            "text_in_dim": 16,
            "rope_theta": 256,
            "rope_axes_dim": (8, 4, 4),
        },
        lambda t: {
            "hidden_states": noise(2, 16, 4, 4),
            "timestep": thousand(t, 2),
            "text_bth": noise(2, 5, 16),
            "text_lens": torch.tensor([5, 5]),
        },
    ),
    "FluxTransformer2DModel": Row(
        FLUX | {"pooled_projection_dim": 8}, lambda t: flux_like(t, pooled_projections=noise(2, 8))
    ),
    "Flux2Transformer2DModel": Row(
        FLUX | {"timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 4, 4)},
        lambda t: flux_like(t, axes=4, guidance=torch.ones(2)),
    ),
    "Flux3Transformer2DModel": Row(
        {
            "in_channels": 4,
            "cond_in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "timestep_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        lambda t: flux_like(t, axes=4),
    ),
    "GlmImageTransformer2DModel": Row(
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "text_embed_dim": 16,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": 64,
        },
        lambda t: {
            "hidden_states": noise(1, 4, 8, 8),
            "encoder_hidden_states": noise(1, 5, 16),
            "prior_token_id": torch.randint(0, 64, (1,)),
            "prior_token_drop": torch.zeros(1, dtype=torch.bool),
            "timestep": thousand(t),
            "target_size": torch.tensor([[8.0, 8.0]]),
            "crop_coords": torch.zeros(1, 2),
        },
    ),
    "HiDreamImageTransformer2DModel": Row(
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_channels": [8, 4],
            "text_emb_dim": 8,
            "num_routed_experts": 2,
            "num_activated_experts": 2,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (8, 8),
            "llama_layers": (0, 1),
            "force_inference_output": True,
        },
        lambda t: {
            "hidden_states": noise(2, 4, 8, 8),
            "encoder_hidden_states_t5": noise(2, 5, 8),
            "encoder_hidden_states_llama3": noise(2, 2, 5, 4),
            "pooled_embeds": noise(2, 8),
            "timesteps": thousand(t, 2),
        },
        embedders=("caption_projection",),
    ),
    "HunyuanDiT2DModel": Row(
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "cross_attention_dim": 8,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4,
            "hidden_size": 16,
            "text_len": 4,
            "text_len_t5": 4,
        },
        lambda t: {
            "hidden_states": noise(2, 4, 8, 8),
            "encoder_hidden_states": noise(2, 4, 8),
            "text_embedding_mask": torch.ones(2, 4),
            "encoder_hidden_states_t5": noise(2, 4, 8),
            "text_embedding_mask_t5": torch.ones(2, 4),
            "timestep": thousand(t, 2),
            "image_meta_size": torch.tensor([[64.0, 64, 64, 64, 0, 0]] * 2),
            "style": torch.zeros(2, dtype=torch.long),
            "image_rotary_emb": [torch.ones(1, 8), torch.zeros(1, 8)],
        },
    ),
    "HunyuanImageTransformer2DModel": Row(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 16,
            "rope_axes_dim": (4, 4),
        },
        lambda t: {
            "hidden_states": noise(2, 4, 4, 4),
            "timestep": thousand(t, 2),
            "encoder_hidden_states": noise(2, 5, 16),
            "encoder_attention_mask": torch.ones(2, 5),
        },
    ),
    "Ideogram4Transformer2DModel": Row(
        {
            "in_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "intermediate_size": 32,
            "adaln_dim": 16,
            "llm_features_dim": 24,
            "rope_theta": 10000,
            "mrope_section": (2, 1, 1),
        },
        ideogram,
    ),
    "JoyImageEditTransformer3DModel": Row(
        JOY,
        lambda t: {
            "hidden_states": noise(2, 16, 1, 4, 4),
            "encoder_hidden_states": noise(2, 5, 16),
            "timestep": thousand(t, 2),
        },
    ),
    "JoyImageEditPlusTransformer3DModel": Row(
        JOY,
        lambda t: {
            "hidden_states": noise(1, 2, 16, 1, 2, 2),
            "encoder_hidden_states": noise(1, 5, 16),
            "timestep": thousand(t),
            "shape_list": [[(1, 1, 1), (1, 1, 1)]],
        },
    ),
    "Krea2Transformer2DModel": Row(
        {
            "in_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 16,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 2, 2),
        },
        lambda t: {
            "hidden_states": noise(1, 4, 16),
            "encoder_hidden_states": noise(1, 5, 3, 16),
            "timestep": unit(t),
            "position_ids": torch.arange(9.0).unsqueeze(1).expand(9, 3),
            "encoder_attention_mask": torch.tensor([[True] * 4 + [False]]),
        },
    ),
    "LongCatImageTransformer2DModel": Row(
        FLUX | {"pooled_projection_dim": 16}, lambda t: flux_like(t, guidance=torch.full((2,), 3.5))
    ),
    "LuminaNextDiT2DModel": Row(
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "learn_sigma": False,
            "qk_norm": True,
            "cross_attention_dim": 32,
        },
        lambda t: {
            "hidden_states": noise(2, 4, 8, 8),
            "encoder_hidden_states": noise(2, 5, 32),
            "timestep": growing(t, 2),
            "encoder_mask": torch.ones(2, 5),
            "image_rotary_emb": noise(384, 384, 4),
            "cross_attention_kwargs": {},
        },
    ),
    "Lumina2Transformer2DModel": Row(
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "scaling_factor": 1.0,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (64, 64, 64),
            "cap_feat_dim": 32,
        },
        lambda t: {
            "hidden_states": noise(2, 4, 8, 8),
            "encoder_hidden_states": noise(2, 5, 32),
            "timestep": growing(t, 2),
            "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool),
        },
    ),
    "NucleusMoEImageTransformer2DModel": Row(
        QWEN | {"num_attention_heads": 4, "moe_enabled": False, "capacity_factors": [8.0, 8.0]}, qwen
    ),
    "OmniGenTransformer2DModel": Row(
        {
            "hidden_size": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 32,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 100,
            "in_channels": 4,
            "time_step_dim": 4,
            "rope_scaling": {"long_factor": [1, 2], "short_factor": [1, 2]},
        },
        lambda t: {
            "hidden_states": noise(2, 4, 8, 8),
            "timestep": growing(t, 2),
            "input_ids": torch.randint(0, 10, (2, 24)),
            "input_img_latents": [noise(1, 4, 8, 8)],
            "input_image_sizes": {0: [[0, 16]]},
            "attention_mask": torch.ones(2, 41, 41),
            "position_ids": torch.arange(41).expand(2, 41),
        },
    ),
    "OvisImageTransformer2DModel": Row(FLUX | {"out_channels": 4}, flux_like),
    "PixArtTransformer2DModel": Row(
        {
            "sample_size": 8,
            "num_layers": 2,
            "patch_size": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "in_channels": 4,
            "cross_attention_dim": 16,
            "out_channels": 8,
            "caption_channels": 8,
            "use_additional_conditions": False,
        },
        lambda t: {
            "hidden_states": noise(2, 4, 8, 8),
            "encoder_hidden_states": noise(2, 5, 8),
            "timestep": thousand(t, 2),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "PRXTransformer2DModel": Row(
        {
            "in_channels": 4,
            "patch_size": 2,
            "context_in_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [8, 8],
        },
        lambda t: {
            "hidden_states": noise(2, 4, 8, 8),
            "encoder_hidden_states": noise(2, 5, 16),
            "timestep": unit(t, 2),
        },
    ),
    "QwenImageTransformer2DModel": Row(QWEN, qwen),
    "QwenImage21Transformer2DModel": Row(
        {
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "context_in_dim": 16,
            "axes_dims_rope": (4, 6, 6),
        },
        qwen21,
    ),
    "SanaTransformer2DModel": Row(
        {
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 4,
            "cross_attention_dim": 8,
            "caption_channels": 8,
            "sample_size": 8,
        },
        lambda t: {
            "hidden_states": noise(2, 4, 8, 8),
            "encoder_hidden_states": noise(2, 5, 8),
            "timestep": thousand(t, 2),
        },
    ),
    "SD3Transformer2DModel": Row(
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_projection_dim": 32,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 12,
            "out_channels": 4,
            "pos_embed_max_size": 12,
        },
        lambda t: {
            "hidden_states": noise(2, 4, 8, 12),
            "encoder_hidden_states": noise(2, 5, 16),
            "pooled_projections": noise(2, 12),
            "timestep": thousand(t, 2),
        },
    ),
    "ZImageTransformer2DModel": Row(
        {
            "all_patch_size": (2,),
            "all_f_patch_size": (1,),
            "in_channels": 16,
            "dim": 16,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 1,
            "n_kv_heads": 2,
            "qk_norm": True,
            "cap_feat_dim": 16,
            "axes_dims": [8, 4, 4],
            "axes_lens": [256, 32, 32],
        },
        lambda t: {"x": [noise(16, 1, 8, 8)], "cap_feats": [noise(5, 16)], "t": growing(t)},
    ),
}
