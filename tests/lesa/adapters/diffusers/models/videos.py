"""Tiny video models. A new model is one more row, as small as its constructor allows."""

import importlib
from functools import partial

import torch

from tests.lesa.adapters.diffusers.models.row import Inputs, Row, noise, thousand, unit

WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
COG_VIDEO = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 8,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 8,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 5,
}
HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 4, 4),
    "image_condition_type": None,
}
LTX = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "num_layers": 2,
    "caption_channels": 16,
}
LTX2 = LTX | {
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
    "rope_double_precision": False,
}
KANDINSKY = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 16,
    "in_text_dim2": 8,
    "time_dim": 16,
    "model_dim": 24,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (4, 4, 4),
}
COSMOS = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "mlp_ratio": 2,
    "text_embed_dim": 16,
    "adaln_lora_dim": 4,
    "max_size": (4, 16, 16),
    "patch_size": (1, 2, 2),
    "extra_pos_embed_type": "learnable",
    "concat_padding_mask": False,  # would need torchvision
}


def wan(t: float, channels: int = 4, text: int = 16, **more: object) -> Inputs:
    return {
        "hidden_states": noise(2, channels, 3, 8, 8),
        "encoder_hidden_states": noise(2, 5, text),
        "timestep": thousand(t, 2),
        **more,
    }


def cog_video(t: float, frames: int = 1) -> Inputs:
    return {
        "hidden_states": noise(2, frames, 4, 8, 8),
        "encoder_hidden_states": noise(2, 5, 8),
        "timestep": thousand(t, 2),
    }


def hunyuan(t: float, **more: object) -> Inputs:
    return {
        "hidden_states": noise(1, 4, 3, 8, 8),
        "timestep": thousand(t),
        "encoder_hidden_states": noise(1, 6, 16),
        "pooled_projections": noise(1, 8),
        "encoder_attention_mask": torch.ones(1, 6),
        "guidance": torch.tensor([6000.0]),
        **more,
    }


def ltx(t: float, **more: object) -> Inputs:
    return {
        "hidden_states": noise(2, 32, 4),
        "encoder_hidden_states": noise(2, 5, 16),
        "timestep": thousand(t, 2),
        "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool),
        "num_frames": 2,
        "height": 4,
        "width": 4,
        **more,
    }


def ltx2(t: float) -> Inputs:
    return ltx(
        t,
        audio_hidden_states=noise(2, 6, 4),
        audio_encoder_hidden_states=noise(2, 5, 16),
        audio_num_frames=6,
        fps=25.0,
    )


def half_clean(t: float, tokens: int, clean: int) -> torch.Tensor:
    """Times of each token [2, tokens]: the first ``clean`` tokens are at time 0, as in image to video."""
    times = thousand(t, 2, tokens)
    times[:, :clean] = 0
    return times


def helios(t: float) -> Inputs:
    frames = {"short": 1, "mid": 1, "long": 4}
    history = {f"latents_history_{k}": noise(1, 4, n, 16, 16) for k, n in frames.items()}
    indices = {f"indices_latents_history_{k}": torch.ones(1, n) for k, n in frames.items()}
    return {
        "hidden_states": noise(1, 4, 2, 16, 16),
        "timestep": thousand(t),
        "encoder_hidden_states": noise(1, 5, 16),
        "indices_hidden_states": torch.ones(1, 2),
        **history,
        **indices,
    }


def framepack(t: float) -> Inputs:
    return hunyuan(
        t,
        hidden_states=noise(1, 4, 3, 4, 4),
        image_embeds=noise(1, 6, 16),
        indices_latents=torch.arange(3),
        latents_clean=noise(1, 4, 2, 4, 4),
        indices_latents_clean=torch.ones(2),
        latents_history_2x=noise(1, 4, 2, 4, 4),
        indices_latents_history_2x=torch.ones(2),
        latents_history_4x=noise(1, 4, 8, 4, 4),
        indices_latents_history_4x=torch.ones(8),
    )


def minimax_h3(t: float, text: int = 4, audio: int = 6, video: int = 8) -> Inputs:
    tokens = text + audio + video
    is_audio = (torch.arange(tokens) >= text) & (torch.arange(tokens) < text + audio)
    return {
        "hidden_states": noise(2, video, 16),
        "audio_hidden_states": noise(2, audio, 6),
        "encoder_hidden_states": noise(2, text, 8),
        "timestep": torch.tensor([t, 0.9 * t]),
        "timestep_indices": is_audio.long(),
        "token_tags": torch.tensor([1] * text + [2] * audio + [0] * video),
        "position_ids": torch.arange(float(tokens)).unsqueeze(1).expand(tokens, 3),
        "text_indices": torch.arange(text),
        "audio_indices": torch.arange(text, text + audio),
        "video_indices": torch.arange(text + audio, tokens),
    }


def cosmos3(t: float, sound: bool = False, text: int = 2, video: int = 4) -> Inputs:
    tokens = text + video + (3 if sound else 0)
    places = torch.arange(text, text + video)
    inputs = {
        "input_ids": torch.arange(1, text + 1),
        "text_indexes": torch.arange(text),
        "position_ids": torch.arange(tokens).expand(3, tokens),
        "und_len": text,
        "sequence_length": tokens,
        "vision_tokens": [noise(1, 2, 1, 2, 2)],
        "vision_token_shapes": [(1, 2, 2)],
        "vision_sequence_indexes": places,
        "vision_mse_loss_indexes": places,
        "vision_timesteps": thousand(t, video),
        "vision_noisy_frame_indexes": [torch.tensor([0])],
    }
    if sound:
        places = torch.arange(text + video, tokens)
        inputs |= {
            "sound_tokens": [noise(5, 3)],
            "sound_token_shapes": [(3, 1, 1)],
            "sound_sequence_indexes": places,
            "sound_mse_loss_indexes": places,
            "sound_timesteps": thousand(t, 3),
            "sound_noisy_frame_indexes": [torch.arange(3)],
        }
    return inputs


COSMOS3 = {
    "head_dim": 6,
    "hidden_act": "relu2",
    "hidden_size": 12,
    "intermediate_size": 24,
    "latent_channel": 2,
    "latent_patch_size": 1,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "patch_latent_dim": 2,
    "qk_norm_for_text": False,
    "rope_axes_dim": [1, 1, 1],
    "vocab_size": 32,
}


def anyflow_far(t: float) -> Inputs:
    return {
        "hidden_states": noise(1, 4, 4, 8, 8),
        "timestep": thousand(t, 1, 4),
        "r_timestep": thousand(0.5 * t, 1, 4),
        "encoder_hidden_states": noise(1, 5, 16),
        "chunk_partition": [2, 2],
        "attention_mask": _far_mask(),
    }


def _far_mask() -> object:
    """The causal mask over chunks, as in the pipeline."""
    module = importlib.import_module("diffusers.models.transformers.transformer_anyflow_far")
    return module._build_anyflow_far_causal_block_mask(
        chunk_partition=[2, 2],
        height=8,
        width=8,
        patch_size=(1, 2, 2),
        compressed_patch_size=(1, 4, 4),
        full_chunk_limit=3,
        mode="train",
        has_clean_context=False,
        device="cpu",
    )


def wan_animate2(t: float) -> Inputs:
    """A denoising step with random keys and values, which an earlier call would have stored."""
    module = importlib.import_module("diffusers.models.transformers.transformer_wan_animate_2")
    cache = module.WanAnimate2KVCache(2)
    for layer in cache.layer_caches:
        layer.store(noise(1, 8, 2, 16), noise(1, 8, 2, 16))
    return {
        "hidden_states": [noise(4, 3, 4, 4)],
        "timestep": thousand(t),
        "encoder_hidden_states": [noise(5, 16)],
        "condition_latents": [noise(4, 3, 4, 4)],
        "encoder_hidden_states_image": noise(1, 4, 1280),
        "kv_cache": cache,
        "kv_cache_mode": "cached",
        "seq_len": 12,
        "reference_grid_sizes": torch.tensor([[2, 2, 2]]),
        "origin_len": 5,
        "origin_area": [32, 32],
    }


VIDEOS: dict[str, Row] = {
    "AllegroTransformer3DModel": Row(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "cross_attention_dim": 16,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 8,
            "caption_channels": 8,
        },
        lambda t: {
            "hidden_states": noise(2, 4, 2, 8, 8),
            "encoder_hidden_states": noise(2, 5, 8),
            "timestep": thousand(t, 2),
        },
    ),
    "AnyFlowTransformer3DModel": Row(
        WAN | {"gate_value": 0.25, "deltatime_type": "r"},
        lambda t: {
            "hidden_states": noise(1, 2, 4, 8, 8),
            "timestep": thousand(t, 1, 2),
            "r_timestep": thousand(0.5 * t, 1, 2),
            "encoder_hidden_states": noise(1, 5, 16),
        },
    ),
    "AnyFlowFARTransformer3DModel": Row(
        WAN | {"compressed_patch_size": (1, 4, 4), "full_chunk_limit": 3, "gate_value": 0.25, "deltatime_type": "r"},
        anyflow_far,
    ),
    "ChronoEditTransformer3DModel": Row(WAN | {"rope_temporal_skip_len": 8}, wan),
    "CogVideoXTransformer3DModel": Row(COG_VIDEO, cog_video),
    "CogVideoXTransformer3DModel: 1.5": Row(
        COG_VIDEO | {"patch_size_t": 2, "use_rotary_positional_embeddings": True}, partial(cog_video, frames=2)
    ),
    "ConsisIDTransformer3DModel": Row(
        COG_VIDEO
        | {
            "cross_attn_interval": 1,
            "is_train_face": True,
            "cross_attn_dim_head": 1,
            "cross_attn_num_heads": 1,
            "LFE_id_dim": 2,
            "LFE_vit_dim": 2,
            "LFE_depth": 5,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 1,
            "LFE_num_querie": 1,
            "LFE_output_dim": 10,
            "LFE_ff_mult": 1,
            "LFE_num_scale": 1,
        },
        lambda t: cog_video(t) | {"id_vit_hidden": [noise(2, 2, 2)], "id_cond": noise(2, 2)},
    ),
    "CosmosTransformer3DModel": Row(
        COSMOS,
        lambda t: {
            "hidden_states": noise(1, 4, 2, 8, 8),
            "timestep": unit(t),
            "encoder_hidden_states": noise(1, 5, 16),
            "fps": 30,
        },
    ),
    "CosmosTransformer3DModel: time of each frame": Row(
        COSMOS | {"in_channels": 5},
        lambda t: {
            "hidden_states": noise(1, 4, 2, 8, 8),
            "timestep": torch.tensor([1e-4, t]).reshape(1, 1, 2, 1, 1),
            "encoder_hidden_states": noise(1, 5, 16),
            "fps": 30,
            "condition_mask": torch.ones(1, 1, 2, 8, 8),
        },
    ),
    "Cosmos3OmniTransformer": Row(COSMOS3, cosmos3),
    "Cosmos3OmniTransformer: with sound": Row(
        COSMOS3 | {"sound_gen": True, "sound_dim": 5}, partial(cosmos3, sound=True)
    ),
    "EasyAnimateTransformer3DModel": Row(
        {
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "in_channels": 4,
            "mmdit_layers": 1,
            "num_layers": 2,
            "out_channels": 4,
            "patch_size": 2,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
        },
        lambda t: {
            "hidden_states": noise(2, 4, 2, 8, 8),
            "timestep": thousand(t, 2),
            "encoder_hidden_states": noise(2, 5, 16),
        },
    ),
    "HeliosTransformer3DModel": Row(
        {k: v for k, v in WAN.items() if k != "rope_max_seq_len"}
        | {
            "rope_dim": (4, 4, 4),
            "has_multi_term_memory_patch": True,
            "guidance_cross_attn": True,
            "zero_history_timestep": True,
            "is_amplify_history": False,
        },
        helios,
    ),
    "HunyuanVideoTransformer3DModel": Row(HUNYUAN, hunyuan),
    "HunyuanVideoTransformer3DModel: first frame given": Row(
        HUNYUAN | {"image_condition_type": "token_replace"}, hunyuan
    ),
    "HunyuanVideo15Transformer3DModel": Row(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "mlp_ratio": 2.0,
            "patch_size": 1,
            "patch_size_t": 1,
            "text_embed_dim": 16,
            "text_embed_2_dim": 8,
            "image_embed_dim": 12,
            "rope_axes_dim": (2, 2, 4),
            "target_size": 16,
            "task_type": "t2v",
        },
        lambda t: {
            "hidden_states": noise(1, 4, 1, 8, 8),
            "timestep": thousand(t),
            "encoder_hidden_states": noise(1, 6, 16),
            "encoder_hidden_states_2": noise(1, 4, 8),
            "encoder_attention_mask": torch.ones(1, 6),
            "encoder_attention_mask_2": torch.ones(1, 4),
            "image_embeds": torch.zeros(1, 3, 12),
        },
    ),
    "HunyuanVideoFramepackTransformer3DModel": Row(
        HUNYUAN | {"has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True}, framepack
    ),
    "Kandinsky5Transformer3DModel": Row(
        KANDINSKY,
        lambda t: {
            "hidden_states": noise(1, 2, 8, 8, 4),
            "encoder_hidden_states": noise(1, 5, 16),
            "timestep": thousand(t),
            "pooled_projections": noise(1, 8),
            "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
            "text_rope_pos": torch.arange(5),
        },
    ),
    "Kandinsky6Transformer3DModel": Row(
        KANDINSKY | {"in_audio_dim": 5, "out_audio_dim": 5},
        lambda t: {
            "hidden_states": noise(1, 2, 8, 8, 9),
            "encoder_hidden_states": noise(1, 5, 16),
            "pooled_projections": noise(1, 8),
            "timestep": thousand(t),
            "audio_hidden_states": noise(1, 6, 5),
        },
    ),
    "Kandinsky6SRTransformer3DModel": Row(
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "time_dim": 16,
            "model_dim": 24,
            "ff_dim": 32,
            "num_visual_blocks": 2,
            "axes_dims": (4, 4, 4),
        },
        lambda t: {"hidden_states": noise(1, 1, 16, 16, 9), "timestep": thousand(t)},
    ),
    "LatteTransformer3DModel": Row(
        {
            "sample_size": 8,
            "num_layers": 2,
            "patch_size": 2,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "caption_channels": 8,
            "in_channels": 4,
            "cross_attention_dim": 8,
            "out_channels": 8,
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "video_length": 3,
        },
        lambda t: {
            "hidden_states": noise(2, 4, 3, 8, 8),
            "encoder_hidden_states": noise(2, 5, 8),
            "timestep": thousand(t, 2),
        },
    ),
    "LTXVideoTransformer3DModel": Row(LTX, ltx),
    "LTXVideoTransformer3DModel: time of each token": Row(LTX, lambda t: ltx(t, timestep=half_clean(t, 32, 16))),
    "LTX2VideoTransformer3DModel": Row(LTX2, ltx2),
    "MiniMaxH3Transformer3DModel": Row(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 2,
            "ffn_dim": 32,
            "in_channels": 4,
            "audio_in_channels": 6,
            "text_dim": 8,
            "freq_dim": 8,
            "time_embed_hidden_dim": 24,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        minimax_h3,
    ),
    "MochiTransformer3DModel": Row(
        {
            "patch_size": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 4,
            "max_sequence_length": 5,
        },
        lambda t: {
            "hidden_states": noise(2, 4, 2, 8, 8),
            "encoder_hidden_states": noise(2, 5, 16),
            "timestep": thousand(1 - t, 2),
            "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool),
        },
    ),
    "MotifVideoTransformer3DModel": Row(
        {
            "in_channels": 9,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "num_single_layers": 2,
            "num_decoder_layers": 1,
            "patch_size": 1,
            "patch_size_t": 1,
            "text_embed_dim": 16,
            "image_embed_dim": 4,
            "rope_axes_dim": (4, 4, 4),
        },
        lambda t: {
            "hidden_states": noise(1, 9, 3, 4, 4),
            "encoder_hidden_states": noise(1, 5, 16),
            "timestep": thousand(t),
        },
    ),
    "SanaVideoTransformer3DModel": Row(
        {
            "in_channels": 16,
            "out_channels": 16,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 16,
            "sample_size": 8,
            "rope_max_seq_len": 32,
        },
        lambda t: {
            "hidden_states": noise(1, 16, 2, 8, 8),
            "encoder_hidden_states": noise(1, 5, 16),
            "timestep": thousand(t),
        },
    ),
    "SanaWMTransformer3DModel": Row(
        {
            "in_channels": 4,
            "num_layers": 2,
            "hidden_size": 24,
            "num_attention_heads": 2,
            "linear_head_dim": 12,
            "caption_channels": 16,
            "softmax_every_n": 2,
        },
        lambda t: {
            "hidden_states": noise(1, 4, 2, 4, 4),
            "timestep": thousand(t, 1, 1, 2),
            "encoder_hidden_states": noise(1, 1, 5, 16),
            "encoder_attention_mask": torch.ones(1, 5),
        },
        module="diffusers.models.transformers.transformer_sana_wm",
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Row(
        LTX2,
        lambda t: {
            "hidden_states": noise(1, 8, 4),
            "encoder_hidden_states": noise(1, 5, 16),
            "timestep": thousand(t),
            "video_rotary_emb": (noise(1, 8, 16), noise(1, 8, 16)),
        },
        module="diffusers.models.transformers.transformer_sana_wm_refiner",
    ),
    "SkyReelsV2Transformer3DModel": Row(WAN, wan),
    "SkyReelsV2Transformer3DModel: time of each frame": Row(
        WAN, lambda t: wan(t, timestep=half_clean(t, 3, 1), enable_diffusion_forcing=True)
    ),
    "WanTransformer3DModel": Row(WAN, wan),
    "WanTransformer3DModel: time of each token": Row(WAN, lambda t: wan(t, timestep=half_clean(t, 48, 16))),
    "WanAnimateTransformer3DModel": Row(
        WAN
        | {
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 16,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        lambda t: wan(
            t,
            hidden_states=noise(1, 12, 3, 8, 8),
            timestep=thousand(t),
            encoder_hidden_states=noise(1, 5, 16),
            encoder_hidden_states_image=noise(1, 5, 16),
            pose_hidden_states=noise(1, 4, 2, 8, 8),
            face_pixel_values=noise(1, 3, 5, 16, 16),
        ),
    ),
    "WanAnimate2Transformer3DModel": Row(
        {
            "text_len": 5,
            "in_dim": 8,
            "dim": 32,
            "ffn_dim": 32,
            "freq_dim": 16,
            "text_dim": 16,
            "out_dim": 4,
            "num_heads": 2,
            "num_layers": 2,
        },
        wan_animate2,
    ),
    "WanVACETransformer3DModel": Row(
        WAN | {"vace_layers": [0], "vace_in_channels": 6}, lambda t: wan(t, control_hidden_states=noise(2, 6, 3, 8, 8))
    ),
}
