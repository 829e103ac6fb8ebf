"""Tiny models of audio, and of data that is neither image, video nor audio."""

import torch

from tests.lesa.adapters.diffusers.models.row import Row, growing, noise, thousand, unit

AUDIO: dict[str, Row] = {
    "AceStepTransformer1DModel": Row(
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "in_channels": 24,
            "audio_acoustic_hidden_dim": 8,
            "sliding_window": 16,
        },
        lambda t: {
            "hidden_states": noise(2, 8, 8),
            "timestep": unit(t, 2),
            "timestep_r": unit(t, 2),
            "encoder_hidden_states": noise(2, 5, 32),
            "context_latents": noise(2, 8, 16),
        },
    ),
    "LongCatAudioDiTTransformer": Row(
        {"dit_dim": 64, "dit_depth": 2, "dit_heads": 4, "dit_text_dim": 32, "latent_dim": 8, "text_conv": False},
        lambda t: {
            "hidden_states": noise(1, 16, 8),
            "encoder_hidden_states": noise(1, 10, 32),
            "encoder_attention_mask": torch.ones(1, 10, dtype=torch.bool),
            "attention_mask": torch.ones(1, 16, dtype=torch.bool),
            "timestep": unit(t),
        },
    ),
    "MiniMaxMusic3Transformer1DModel": Row(
        {
            "in_channels": 8,
            "condition_dim": 16,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "ff_inner_dim": 32,
            "rotary_dim": 4,
            "fourier_embedding_dim": 8,
        },
        lambda t: {
            "hidden_states": noise(1, 8, 24),
            "encoder_hidden_states": noise(1, 24, 16),
            "timestep": growing(t),
        },
    ),
    "PriorTransformer": Row(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "num_layers": 2,
            "embedding_dim": 8,
            "num_embeddings": 7,
            "additional_embeddings": 4,
        },
        lambda t: {
            "hidden_states": noise(2, 8),
            "timestep": thousand(t, 2),
            "proj_embedding": noise(2, 8),
            "encoder_hidden_states": noise(2, 7, 8),
        },
    ),
    "StableAudioDiTModel": Row(
        {
            "sample_size": 16,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 2,
            "out_channels": 4,
            "cross_attention_dim": 16,
            "time_proj_dim": 8,
            "global_states_input_dim": 8,
            "cross_attention_input_dim": 16,
        },
        lambda t: {
            "hidden_states": noise(2, 4, 12),
            "timestep": unit(t, 2),
            "encoder_hidden_states": noise(2, 5, 16),
            "global_hidden_states": noise(2, 1, 8),
            "rotary_embedding": (noise(13, 4), noise(13, 4)),
        },
    ),
    "StableAudio3DiTModel": Row(
        {
            "io_channels": 8,
            "patch_size": 1,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 4,
            "cond_token_dim": 16,
            "global_cond_dim": 12,
            "local_add_cond_dim": 5,
            "timestep_features_dim": 16,
            "ff_mult": 2,
            "num_memory_tokens": 3,
        },
        lambda t: {
            "hidden_states": noise(2, 8, 16),
            "timestep": unit(t, 2),
            "encoder_hidden_states": noise(2, 4, 16),
            "global_hidden_states": noise(2, 12),
        },
    ),
    "T5FilmDecoder": Row(
        {
            "input_dims": 4,
            "targets_length": 12,
            "d_model": 16,
            "num_layers": 2,
            "num_heads": 2,
            "d_kv": 8,
            "d_ff": 16,
        },
        lambda t: {
            "encodings_and_masks": [(noise(2, 5, 16), torch.ones(2, 5))],
            "decoder_input_tokens": noise(2, 12, 4),
            "decoder_noise_time": unit(t, 2),
        },
    ),
}
