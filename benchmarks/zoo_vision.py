"""The zoo's vision models: torchvision, timm and pytorchcv at their real widths, on two small images.

Each table maps a model's name to the side of its square input; 64 where the architecture allows it (pytorchcv pools
over windows of fixed size, so its classifiers take 224). A name in `BUILT_FOR_SIZE` has sizes in its parameters or its
code and takes the side at construction.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.zoo_model import SHARE, CallInputs, ZooModel


def _names(text: str) -> list[str]:
    return text.split()


TORCHVISION_64 = _names("""
alexnet convnext_base convnext_large convnext_small convnext_tiny densenet121 densenet161 densenet169 densenet201
efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5 efficientnet_b6
efficientnet_b7 efficientnet_v2_l efficientnet_v2_m efficientnet_v2_s googlenet mnasnet0_5 mnasnet0_75 mnasnet1_0
mnasnet1_3 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_16gf regnet_x_1_6gf regnet_x_32gf regnet_x_3_2gf
regnet_x_400mf regnet_x_800mf regnet_x_8gf regnet_y_128gf regnet_y_16gf regnet_y_1_6gf regnet_y_32gf regnet_y_3_2gf
regnet_y_400mf regnet_y_800mf regnet_y_8gf resnet101 resnet152 resnet18 resnet34 resnet50 resnext101_32x8d
resnext101_64x4d resnext50_32x4d shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0
squeezenet1_0 squeezenet1_1 swin_b swin_s swin_t swin_v2_b swin_v2_s swin_v2_t vgg11 vgg11_bn vgg13 vgg13_bn vgg16
vgg16_bn vgg19 vgg19_bn vit_b_16 vit_b_32 vit_h_14 vit_l_16 vit_l_32 wide_resnet101_2 wide_resnet50_2
""")
TORCHVISION: dict[str, int] = dict.fromkeys(TORCHVISION_64, 64) | {
    "inception_v3": 96,
    "maxvit_t": 224,
    "vit_h_14": 56,
}
SEGMENTATION = _names("""
deeplabv3_mobilenet_v3_large deeplabv3_resnet101 deeplabv3_resnet50 fcn_resnet101 fcn_resnet50
lraspp_mobilenet_v3_large
""")
# A detector's boxes depend on its inputs' values; its backbone with the feature pyramid is what a peer can prune.
DETECTION: dict[str, int] = dict.fromkeys(
    _names("""
fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_mobilenet_v3_large_fpn fasterrcnn_resnet50_fpn
fasterrcnn_resnet50_fpn_v2 fcos_resnet50_fpn keypointrcnn_resnet50_fpn maskrcnn_resnet50_fpn maskrcnn_resnet50_fpn_v2
retinanet_resnet50_fpn retinanet_resnet50_fpn_v2 ssd300_vgg16 ssdlite320_mobilenet_v3_large
"""),
    64,
) | {"ssd300_vgg16": 300}

TIMM_64 = _names("""
resnet26d resnext50_32x4d seresnext26d_32x4d skresnet18 resnest14d res2net50_26w_4s ecaresnet26t densenet121
inception_next_atto mobilenetv1_100 mobilenetv2_050 mobilenetv3_small_100 mobilenetv4_conv_small
mobilenetv4_hybrid_medium efficientnet_lite0 tf_efficientnet_b0 efficientnetv2_rw_t mixnet_s ghostnet_100 fbnetc_100
rexnet_100 lcnet_050 regnetx_002 regnety_002 regnetz_b16 convnext_atto convnextv2_atto ese_vovnet19b_dw dla34
dpn68 hrnet_w18_small selecsls42 xception41 cspresnet50 repvgg_a0 repvit_m1 fastvit_t8 edgenext_xx_small mobilevit_xxs
mobilevitv2_050 mambaout_femto starnet_s1 rdnet_tiny efficientvit_b0 poolformer_s12 caformer_s18 pvt_v2_b0
resnetv2_50x1_bit vgg11 hgnet_tiny fasternet_t0
""")
TIMM: dict[str, int] = dict.fromkeys(TIMM_64, 64) | {
    "inception_v4": 96,
    "inception_resnet_v2": 96,
    "vit_tiny_patch16_224": 64,
    "vit_small_patch16_dinov3": 64,
    "vit_relpos_small_patch16_224": 64,
    "deit_tiny_patch16_224": 64,
    "deit_tiny_distilled_patch16_224": 64,
    "deit3_small_patch16_224": 64,
    "beit_base_patch16_224": 64,
    "cait_xxs24_224": 64,
    "eva02_tiny_patch14_224": 56,
    "swin_tiny_patch4_window7_224": 224,
    "swinv2_tiny_window8_256": 256,
    "maxvit_pico_rw_256": 256,
    "coatnet_pico_rw_224": 64,
    "mvitv2_tiny": 64,
    "hiera_tiny_224": 224,
    "pit_ti_224": 224,
    "levit_128s": 224,
    "efficientformer_l1": 224,
    "crossvit_tiny_240": 240,
    "convit_tiny": 64,
    "coat_lite_tiny": 64,
    "xcit_nano_12_p16_224": 64,
    "volo_d1_224": 64,
    "mixer_s32_224": 64,
    "resmlp_12_224": 64,
    "gmlp_ti16_224": 64,
    "sequencer2d_s": 64,
    "twins_svt_small": 64,
    "davit_tiny": 224,
    "focalnet_tiny_srf": 64,
    "tiny_vit_5m_224": 224,
    "convmixer_1024_20_ks9_p14": 56,
}

PYTORCHCV_224 = _names("""
alexnet resnet10 preresnet10 resnext14_16x4d seresnet10 sepreresnet10 ibn_resnet50 cbam_resnet18 bam_resnet18
airnet50_1x64d_r2 scnet50 octresnet10_ad2 diracnet18v2 sparsenet121 peleenet drnc26 darknet_tiny darknet53 bagnet9
espnetv2_wd2 hardnet39ds condensenet74_c4_g4 squeezenet_v1_0 sqnxt23_w1 shufflenet_g1_w1 shufflenet_g3_wd4
shufflenetv2_wd2
menet108_8x1_g3 mobilenet_wd4 fdmobilenet_wd4 mobilenetv2_wd4 mobilenetv3_small_w7d20 igcv3_wd4 ghostnet mnasnet_b1
proxylessnas_cpu fbnet_cb bninception nasnet_4a1056 spnasnet isqrtcovresnet18
""")
PYTORCHCV: dict[str, int] = dict.fromkeys(PYTORCHCV_224, 224) | {
    "densenet40_k12_cifar10": 32,
    "pyramidnet110_a48_cifar10": 32,
    "wrn16_10_cifar10": 32,
    "diaresnet20_cifar10": 32,
    "rir_cifar10": 32,
    "nin_cifar10": 32,
    "inceptionv3": 299,
    "xception": 299,
    "unet_cityscapes": 64,
    "linknet_cityscapes": 64,
    "pspnet_resnetd50b_voc": 64,
    "bisenet_resnet18_celebamaskhq": 64,
    "fastscnn_cityscapes": 64,
    "lednet_cityscapes": 64,
    "erfnet_cityscapes": 64,
    "simplepose_resnet18_coco": 64,
}

BUILT_FOR_SIZE = {
    "torchvision": _names("vit_b_16 vit_b_32 vit_h_14 vit_l_16 vit_l_32 maxvit_t"),
    "timm": _names("""
vit_tiny_patch16_224 vit_small_patch16_dinov3 vit_relpos_small_patch16_224 deit_tiny_patch16_224
deit_tiny_distilled_patch16_224 deit3_small_patch16_224 beit_base_patch16_224 cait_xxs24_224 eva02_tiny_patch14_224
coatnet_pico_rw_224 mvitv2_tiny convit_tiny coat_lite_tiny xcit_nano_12_p16_224 volo_d1_224 mixer_s32_224 resmlp_12_224
gmlp_ti16_224 sequencer2d_s twins_svt_small
"""),
    "pytorchcv": _names("""
unet_cityscapes linknet_cityscapes pspnet_resnetd50b_voc bisenet_resnet18_celebamaskhq fastscnn_cityscapes
lednet_cityscapes erfnet_cityscapes simplepose_resnet18_coco
"""),
}

_LIBRARY: list[torch.library.Library] = []

# (share, reason) where the architecture gives less than SHARE.
LESS: dict[str, tuple[float, str]] = {
    "pytorchcv/isqrtcovresnet18": (
        0.05,
        "74% of the weights are one layer over the upper triangle of a covariance matrix, whose entries are pairs of "
        "channels",
    ),
    "pytorchcv/shufflenet_g3_wd4": (
        0.01,
        "79% of the weights read the residual width, which joins 24 and 36 channels and is cut in 3 groups of 20; the "
        "shuffle of 3 groups of 5 is cut in 3 groups as well",
    ),
    "pytorchcv/menet108_8x1_g3": (
        0.05,
        "66% of the weights read the residual width, which joins parts of unequal size and is cut in 3 groups",
    ),
}


def torchvision_models() -> list[ZooModel]:
    """All of torchvision's image classifiers and segmentation models, and the backbones of its detectors."""
    rows = [(name, size, _build_torchvision) for name, size in sorted(TORCHVISION.items())]
    rows += [(name, 64, _build_segmentation) for name in SEGMENTATION]
    rows += [(name, size, _build_backbone) for name, size in DETECTION.items()]
    return [_model("torchvision", name, size, build) for name, size, build in rows]


def timm_models() -> list[ZooModel]:
    """The models from timm."""
    return [_model("timm", name, size, _build_timm) for name, size in TIMM.items()]


def pytorchcv_models() -> list[ZooModel]:
    """The models from pytorchcv."""
    return [_model("pytorchcv", name, size, _build_pytorchcv) for name, size in PYTORCHCV.items()]


def _model(source: str, name: str, size: int, build: Any) -> ZooModel:
    share, why = LESS.get(f"{source}/{name}", (SHARE, ""))
    return ZooModel(
        name, source, functools.partial(build, name, size), functools.partial(images, size), share=share, why=why
    )


def images(size: int) -> CallInputs:
    """A call with two images of this side."""
    return (torch.randn(2, 3, size, size),), {}


def define_operators() -> None:
    """Makes torchvision importable beside a torch that it was not built for, such as one without CUDA.

    Its C++ part cannot be loaded then, and its Python part registers fakes for two operators that nobody has defined.
    transformers imports torchvision wherever it is installed.
    """
    if _LIBRARY or importlib.util.find_spec("torchvision") is None:
        return
    (folder,) = importlib.util.find_spec("torchvision").submodule_search_locations  # pyright: ignore
    try:
        for file in Path(folder).glob("_C*"):
            torch.ops.load_library(str(file))
    except OSError:
        # The definitions live as long as the Library does.
        _LIBRARY.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            _LIBRARY[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _torchvision_models() -> Any:
    define_operators()
    return importlib.import_module("torchvision.models")


def _sized(source: str, name: str, **size: Any) -> Mapping[str, Any]:
    return size if name in BUILT_FOR_SIZE[source] else {}


def _build_torchvision(name: str, size: int) -> nn.Module:
    models = _torchvision_models()
    side = {"input_size": (size, size)} if name == "maxvit_t" else {"image_size": size}
    keywords: dict[str, Any] = dict(_sized("torchvision", name, **side))
    if name in ("googlenet", "inception_v3"):
        # The auxiliary classifiers only serve training.
        keywords |= {"aux_logits": False, "init_weights": False}
    return models.get_model(name, weights=None, **keywords).eval()


def _build_segmentation(name: str, size: int) -> nn.Module:
    return _torchvision_models().get_model(name, weights=None, weights_backbone=None).eval()


def _build_backbone(name: str, size: int) -> nn.Module:
    return _torchvision_models().get_model(name, weights=None, weights_backbone=None).backbone.eval()


def _build_timm(name: str, size: int) -> nn.Module:
    define_operators()
    timm = importlib.import_module("timm")
    return timm.create_model(name, pretrained=False, **_sized("timm", name, img_size=size)).eval()


def _build_pytorchcv(name: str, size: int) -> nn.Module:
    define_operators()
    provider = importlib.import_module("pytorchcv.model_provider")
    model = provider.get_model(name, pretrained=False, **_sized("pytorchcv", name, in_size=(size, size))).eval()
    for path, buffer in model.named_buffers():
        if path.endswith(".index"):
            # CondenseNet learns which channel goes where; until then each of these says 0.
            buffer.copy_(torch.randperm(len(buffer)))
    return model
