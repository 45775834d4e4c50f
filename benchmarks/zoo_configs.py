"""The configurations of the zoo's transformers models: small ones, from blocks that families share.

Two layers of width 128, eight heads of 16, four key-value heads where queries are grouped, feed-forward layers of 512,
and a vocabulary of 128, so that embeddings do not drown the rest.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

TOKENS: Config = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTHS: Config = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 512}
LENGTH: Config = {"max_position_embeddings": 64}
BERT = TOKENS | WIDTHS | LENGTH
LLAMA = BERT | {"num_key_value_heads": 4}
GEMMA = LLAMA | {"head_dim": 16}
GPT2: Config = TOKENS | {"n_embd": 128, "n_layer": 2, "n_head": 8, "n_positions": 64}
BART: Config = TOKENS | LENGTH | {"d_model": 128, "decoder_start_token_id": 2, "forced_eos_token_id": None}
BART |= {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 8))}
BART |= {"encoder_ffn_dim": 512, "decoder_ffn_dim": 512}
T5: Config = TOKENS | {"d_model": 128, "d_kv": 16, "d_ff": 512, "num_layers": 2, "num_heads": 8}
VIT = WIDTHS | {"image_size": 32, "patch_size": 8}
SWIN: Config = {"image_size": 64, "patch_size": 4, "embed_dim": 64, "depths": [2, 2], "num_heads": [4, 8]}
SWIN |= {"window_size": 4}
STAGES: Config = {"hidden_sizes": [32, 64, 128, 256], "depths": [2, 2, 2, 2]}
PYRAMID: Config = {"hidden_sizes": [32, 64, 128, 256], "depths": [2, 2, 2, 2], "num_attention_heads": [1, 2, 4, 8]}
SPEECH: Config = WIDTHS | {"vocab_size": 32, "conv_dim": [64] * 3, "conv_kernel": [10, 3, 3], "conv_stride": [5, 2, 2]}
SPEECH |= {"num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
SPEECH |= {"apply_spec_augment": False}
MOE = GEMMA | {"num_experts_per_tok": 2}
RESNET: Config = {"embedding_size": 32, "hidden_sizes": [64, 128, 256], "depths": [1, 1, 1]}

# Those that do not fit on a line of the table of models.
LONG: dict[str, Config] = {
    "distilbert": TOKENS | LENGTH | {"dim": 128, "n_layers": 2, "n_heads": 8, "hidden_dim": 512},
    "deberta_v2": BERT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "mobilebert": BERT | {"embedding_size": 64, "intra_bottleneck_size": 64, "true_hidden_size": 64},
    "funnel": TOKENS | {"block_sizes": [1, 1], "d_model": 128, "n_head": 8, "d_head": 16, "d_inner": 512},
    "gpt_neo": TOKENS
    | LENGTH
    | {
        "hidden_size": 128,
        "num_layers": 2,
        "num_heads": 8,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "opt": TOKENS
    | LENGTH
    | {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "ffn_dim": 512,
        "word_embed_proj_dim": 128,
    },
    "qwen2_moe": MOE | {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256, "num_experts": 4},
    "mixtral": LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 256},
    "falcon": TOKENS
    | {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_kv_heads": 4,
        "new_decoder_architecture": True,
    },
    "falcon_multi_query": TOKENS
    | {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8, "multi_query": True},
    "gpt_oss": GEMMA
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 256, "sliding_window": 8},
    "deepseek_v3": BERT
    | {
        "num_key_value_heads": 8,
        "q_lora_rank": 64,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
    },
    "mamba": TOKENS | {"hidden_size": 128, "num_hidden_layers": 2, "state_size": 8},
    "mamba2": TOKENS
    | {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "state_size": 16,
        "num_heads": 8,
        "head_dim": 32,
        "n_groups": 4,
        "chunk_size": 8,
    },
    "flan_t5": T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "whisper": BART | {"num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 64},
    "wav2vec2_stable": SPEECH | {"do_stable_layer_norm": True, "feat_extract_norm": "layer"},
    "audio_spectrogram": WIDTHS
    | {"num_mel_bins": 16, "max_length": 32, "patch_size": 8, "frequency_stride": 8, "time_stride": 8},
    "cvt": {"embed_dim": [32, 64, 128], "num_heads": [2, 4, 8], "depth": [1, 2, 3], "cls_token": [False, False, True]},
    "detr": BART
    | {
        "num_queries": 8,
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone_config": RESNET | {"model_type": "resnet", "out_features": ["stage3"]},
    },
    "dpt": VIT
    | {
        "is_hybrid": False,
        "num_hidden_layers": 4,
        "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [32, 64, 128, 128],
        "fusion_hidden_size": 64,
    },
    "siglip": {"text_config": BERT | {"projection_size": 128, "max_position_embeddings": 16}, "vision_config": VIT},
    "patchtst": {
        "num_input_channels": 3,
        "context_length": 32,
        "patch_length": 8,
        "patch_stride": 8,
        "d_model": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "ffn_dim": 512,
        "prediction_length": 8,
    },
}
