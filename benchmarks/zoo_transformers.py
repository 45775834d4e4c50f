"""The zoo's transformers models: every family small, from a configuration, with random weights.

Attention is the library's default (SDPA) unless a name ends in `_eager`: those run the hand-written attention.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import nn

from benchmarks.zoo_configs import (
    BART,
    BERT,
    GEMMA,
    GPT2,
    LLAMA,
    LONG,
    MOE,
    PYRAMID,
    RESNET,
    SPEECH,
    STAGES,
    SWIN,
    T5,
    TOKENS,
    VIT,
    Config,
)
from benchmarks.zoo_model import SHARE, CallInputs, ZooModel
from benchmarks.zoo_vision import define_operators

# name, class, inputs, configuration; `model_type` in a nested configuration names its class.
TABLE: list[tuple[str, str, str, Config]] = [
    ("bert", "BertModel", "masked", BERT),
    ("bert_eager", "BertForSequenceClassification", "masked", BERT),
    ("roberta", "RobertaForMaskedLM", "masked", BERT),
    ("xlm_roberta", "XLMRobertaModel", "masked", BERT),
    ("distilbert", "DistilBertModel", "masked", LONG["distilbert"]),
    ("electra", "ElectraModel", "masked", BERT | {"embedding_size": 64}),
    ("albert", "AlbertModel", "masked", BERT | {"embedding_size": 64}),
    ("deberta", "DebertaModel", "masked", BERT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    ("deberta_v2", "DebertaV2Model", "masked", LONG["deberta_v2"]),
    ("mpnet", "MPNetModel", "masked", BERT),
    ("convbert", "ConvBertModel", "masked", BERT | {"embedding_size": 64}),
    ("mobilebert", "MobileBertModel", "masked", LONG["mobilebert"]),
    ("squeezebert", "SqueezeBertModel", "masked", BERT | {"embedding_size": 128}),
    ("funnel", "FunnelBaseModel", "masked", LONG["funnel"]),
    ("xlnet", "XLNetModel", "masked", TOKENS | {"d_model": 128, "n_layer": 2, "n_head": 8, "d_inner": 512}),
    ("fnet", "FNetModel", "ids", BERT),
    ("roformer", "RoFormerModel", "masked", BERT),
    ("modernbert", "ModernBertModel", "masked", BERT | {"cls_token_id": 1, "sep_token_id": 2}),
    ("rembert", "RemBertModel", "masked", BERT | {"input_embedding_size": 64, "output_embedding_size": 64}),
    ("layoutlm", "LayoutLMModel", "masked", BERT | {"max_2d_position_embeddings": 64}),
    ("gpt2", "GPT2LMHeadModel", "ids", GPT2),
    ("gpt2_eager", "GPT2LMHeadModel", "ids", GPT2),
    ("gpt_neo", "GPTNeoForCausalLM", "ids", LONG["gpt_neo"]),
    ("gpt_neox", "GPTNeoXForCausalLM", "ids", BERT),
    ("gptj", "GPTJForCausalLM", "ids", GPT2 | {"rotary_dim": 8}),
    ("codegen", "CodeGenForCausalLM", "ids", GPT2 | {"rotary_dim": 8}),
    ("gpt_bigcode", "GPTBigCodeForCausalLM", "ids", GPT2),
    ("opt", "OPTForCausalLM", "ids", LONG["opt"]),
    ("llama", "LlamaForCausalLM", "ids", LLAMA),
    ("llama_eager", "LlamaForCausalLM", "ids", LLAMA),
    ("llama_tied", "LlamaForCausalLM", "ids", LLAMA | {"tie_word_embeddings": True}),
    ("mistral", "MistralForCausalLM", "ids", LLAMA | {"sliding_window": 8}),
    ("qwen2", "Qwen2ForCausalLM", "ids", LLAMA),
    ("qwen3", "Qwen3ForCausalLM", "ids", GEMMA),
    ("qwen3_eager", "Qwen3ForCausalLM", "ids", GEMMA),
    ("qwen2_moe", "Qwen2MoeForCausalLM", "ids", LONG["qwen2_moe"]),
    ("qwen3_moe", "Qwen3MoeForCausalLM", "ids", MOE | {"moe_intermediate_size": 256, "num_experts": 4}),
    ("gemma", "GemmaForCausalLM", "ids", GEMMA),
    ("gemma2", "Gemma2ForCausalLM", "ids", GEMMA | {"sliding_window": 8, "query_pre_attn_scalar": 16}),
    ("gemma3", "Gemma3ForCausalLM", "ids", GEMMA | {"sliding_window": 8, "query_pre_attn_scalar": 16}),
    ("phi", "PhiForCausalLM", "ids", BERT),
    ("phi3", "Phi3ForCausalLM", "ids", LLAMA),
    ("mixtral", "MixtralForCausalLM", "ids", LONG["mixtral"]),
    ("falcon", "FalconForCausalLM", "ids", LONG["falcon"]),
    ("falcon_multi_query", "FalconForCausalLM", "ids", LONG["falcon_multi_query"]),
    ("bloom", "BloomForCausalLM", "ids", TOKENS | {"hidden_size": 128, "n_layer": 2, "n_head": 8}),
    ("mpt", "MptForCausalLM", "ids", TOKENS | {"d_model": 128, "n_layers": 2, "n_heads": 8, "max_seq_len": 64}),
    ("stablelm", "StableLmForCausalLM", "ids", LLAMA),
    ("starcoder2", "Starcoder2ForCausalLM", "ids", LLAMA),
    ("olmo2", "Olmo2ForCausalLM", "ids", LLAMA),
    ("cohere", "CohereForCausalLM", "ids", LLAMA),
    ("granite", "GraniteForCausalLM", "ids", LLAMA),
    ("gpt_oss", "GptOssForCausalLM", "ids", LONG["gpt_oss"]),
    ("deepseek_v3", "DeepseekV3ForCausalLM", "ids", LONG["deepseek_v3"]),
    ("mamba", "MambaForCausalLM", "ids", LONG["mamba"]),
    ("mamba2", "Mamba2ForCausalLM", "ids", LONG["mamba2"]),
    ("t5", "T5ForConditionalGeneration", "seq2seq", T5),
    ("flan_t5", "T5ForConditionalGeneration", "seq2seq", LONG["flan_t5"]),
    ("bart", "BartForConditionalGeneration", "seq2seq", BART),
    ("bart_eager", "BartModel", "seq2seq", BART),
    ("mbart", "MBartForConditionalGeneration", "seq2seq", BART),
    ("pegasus", "PegasusModel", "seq2seq", BART),
    ("marian", "MarianMTModel", "seq2seq", BART),
    ("whisper", "WhisperForConditionalGeneration", "mel", LONG["whisper"]),
    ("wav2vec2", "Wav2Vec2ForCTC", "wave", SPEECH),
    ("wav2vec2_stable", "Wav2Vec2Model", "wave", LONG["wav2vec2_stable"]),
    ("hubert", "HubertModel", "wave", SPEECH),
    ("wavlm", "WavLMModel", "wave", SPEECH),
    ("audio_spectrogram", "ASTModel", "spectrogram", LONG["audio_spectrogram"]),
    ("vit", "ViTForImageClassification", "image32", VIT),
    ("vit_eager", "ViTModel", "image32", VIT),
    ("deit", "DeiTModel", "image32", VIT),
    ("beit", "BeitModel", "image32", VIT | {"use_relative_position_bias": True}),
    ("dinov2", "Dinov2Model", "image32", VIT | {"mlp_ratio": 4}),
    ("swin", "SwinModel", "image64", SWIN),
    ("swinv2", "Swinv2Model", "image64", SWIN),
    ("convnext", "ConvNextModel", "image64", STAGES),
    ("convnextv2", "ConvNextV2Model", "image64", STAGES),
    ("resnet", "ResNetForImageClassification", "image64", RESNET),
    ("segformer", "SegformerForSemanticSegmentation", "image64", PYRAMID | {"decoder_hidden_size": 128}),
    ("pvt_v2", "PvtV2ForImageClassification", "image64", PYRAMID | {"image_size": 64}),
    ("mobilevit", "MobileViTModel", "image64", {"image_size": 64, "hidden_sizes": [64, 80, 96]}),
    ("cvt", "CvtModel", "image64", LONG["cvt"]),
    ("poolformer", "PoolFormerModel", "image64", STAGES),
    ("yolos", "YolosForObjectDetection", "image32", VIT | {"image_size": [32, 32], "num_detection_tokens": 8}),
    ("detr", "DetrForObjectDetection", "image64", LONG["detr"]),
    ("dpt", "DPTForDepthEstimation", "image32", LONG["dpt"]),
    ("clip", "CLIPModel", "clip", {"text_config": BERT, "vision_config": VIT, "projection_dim": 64}),
    ("siglip", "SiglipModel", "clip", LONG["siglip"]),
    ("blip_vision", "BlipVisionModel", "image32", VIT),
    ("vilt", "ViltModel", "vilt", BERT | {"image_size": 32, "patch_size": 8}),
    ("timesformer", "TimesformerModel", "video", VIT | {"num_frames": 2}),
    ("videomae", "VideoMAEModel", "video", VIT | {"num_frames": 2}),
    ("patchtst", "PatchTSTForPrediction", "series", LONG["patchtst"]),
]

# (share, reason) where the architecture gives less than SHARE.
LESS: dict[str, tuple[float, str]] = {}


def transformers_models() -> list[ZooModel]:
    """The models from transformers."""
    models = []
    for name, class_name, kind, config in TABLE:
        share, why = LESS.get(name, (SHARE, ""))
        build = functools.partial(_build, class_name, config, "eager" if name.endswith("_eager") else None)
        models.append(ZooModel(name, "transformers", build, functools.partial(_inputs, kind), share=share, why=why))
    return models


def _build(class_name: str, config: Config, attention: str | None) -> nn.Module:
    define_operators()
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    model_class = getattr(transformers, class_name)
    fields = dict(config)
    backbone = fields.get("backbone_config")
    if backbone is not None:
        fields["backbone_config"] = transformers.AutoConfig.for_model(**backbone)
    built = model_class.config_class(**fields)
    built.use_cache = False
    if attention is not None:
        built._attn_implementation = attention
    return model_class(built).eval()


def _inputs(kind: str) -> CallInputs:
    """One call, by keywords: two sequences of 16 tokens, or two images, clips, waves or series."""
    ids = torch.randint(3, 128, (2, 16))
    mask = torch.ones_like(ids)
    ways: dict[str, Any] = {
        "ids": lambda: {"input_ids": ids},
        "masked": lambda: {"input_ids": ids, "attention_mask": mask},
        "seq2seq": lambda: {"input_ids": ids, "decoder_input_ids": ids.flip(1)[:, :12]},
        "mel": lambda: {"input_features": torch.randn(2, 16, 64), "decoder_input_ids": ids},
        "wave": lambda: {"input_values": torch.randn(2, 800)},
        "spectrogram": lambda: {"input_values": torch.randn(2, 32, 16)},
        "image32": lambda: {"pixel_values": torch.randn(2, 3, 32, 32)},
        "image64": lambda: {"pixel_values": torch.randn(2, 3, 64, 64)},
        "video": lambda: {"pixel_values": torch.randn(2, 2, 3, 32, 32)},
        "series": lambda: {"past_values": torch.randn(2, 32, 3)},
        "clip": lambda: {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32)},
        "vilt": lambda: {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 32, 32)},
    }
    return (), ways[kind]()
