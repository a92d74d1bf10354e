"""Vision: a small model of every family of torchvision and timm."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

# what is no classifier takes images, or pairs or clips of them, in its own way
DETECTORS = ("rcnn", "fcos", "retinanet", "ssd")
SEGMENTERS = ("deeplab", "fcn", "lraspp")
VIDEO = ("r3d", "mc3", "r2plus1d", "s3d", "swin3d", "mvit")
SIZES = {"vit_": 224, "maxvit": 224, "inception": 128}  # pixels; the others see 64


def torchvision_names() -> list[str]:
    """Return a model of every family of torchvision, the smallest if its sizes do not differ in kind."""
    return TORCHVISION.split() if find_spec("torchvision") is not None else []


def torchvision_model(name: str) -> tuple[nn.Module, Any]:
    """Return a model and its inputs."""
    from torchvision import models

    if any(word in name for word in DETECTORS):
        return models.get_model(name, **_of_detector(name)), ([torch.rand(3, 128, 128).double()],)
    segments = name.startswith(SEGMENTERS)
    model = models.get_model(name, weights=None, **({"weights_backbone": None} if segments else {}))
    if name.startswith("raft"):
        return model, tuple(torch.rand(1, 3, 128, 128).double() for _ in range(2))
    if name.startswith(VIDEO):
        frames, pixels = (16, 224) if name.startswith("mvit") else (16, 64)
        return model, (torch.rand(1, 3, frames, pixels, pixels).double(),)
    size = next((size for start, size in SIZES.items() if name.startswith(start)), 64)
    return model, (torch.rand(1, 3, size, size).double(),)


def _of_detector(name: str) -> dict[str, Any]:
    """Return its arguments, with which one of random weights finds boxes, but few, in a small image."""
    weights = {"weights": None, "weights_backbone": None}
    found = {"box_score_thresh": 0.0, "box_detections_per_img": 8} if "rcnn" in name else {"score_thresh": 0.0}
    sizes = {} if name.startswith("ssd") else {"min_size": 128, "max_size": 128}  # without: 320 to 800 pixels
    return {**weights, **found, **sizes}


def timm_names() -> list[str]:
    """Return the smallest model of every family of timm below 60 million parameters."""
    return TIMM.split() if find_spec("timm") is not None else []


def timm_model(name: str) -> tuple[nn.Module, Any]:
    """Return a model and its inputs: of 64 pixels, or the least that it takes, where it takes any number."""
    import timm

    model: nn.Module = timm.create_model(name)
    known: Any = model.pretrained_cfg
    pixels = 128 if name.startswith("inception_") else 64
    size = known["input_size"] if known.get("fixed_input_size") else (3, pixels, pixels)
    return model, (torch.rand(1, *size).double(),)


# in the order of their tasks: classes, segments, detections, classes of videos, optical flow
TORCHVISION = """
alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5
mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d
shufflenet_v2_x0_5 squeezenet1_1 swin_t swin_v2_t vgg11 vgg11_bn vit_b_32 wide_resnet50_2 fcn_resnet50
deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large fasterrcnn_mobilenet_v3_large_320_fpn fcos_resnet50_fpn
keypointrcnn_resnet50_fpn maskrcnn_resnet50_fpn retinanet_resnet50_fpn ssd300_vgg16
ssdlite320_mobilenet_v3_large mc3_18 mvit_v1_b r2plus1d_18 r3d_18 s3d swin3d_t raft_small
"""
TIMM = """
cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 convnext_atto_rms cpubone_nano crossvit_tiny_240
cs3darknet_focus_s csatv2 cspnext_tiny davit_tiny deit_tiny_patch16_224 densenet121 dla46x_c dpn48b
edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvim_m1 efficientvit_b0 efficientvit_m0
ese_vovnet19b_slim_dw fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny ghostnet_050 gmlp_ti16_224
halonet_h1 hardcorenas_b hgnetv2_b0 hiera_tiny_224 hrnet_w18_small iformer_t inception_next_atto
inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small legacy_seresnet18 legacy_xception levit_128s
lowformer_b0 maxvit_pico_rw_256 mnasnet_small mobilenetv3_small_050 mobileone_s1 mobilevit_xxs mvitv2_tiny
nest_tiny nextvit_small nf_regnet_b0 pit_ti_224 poolformerv2_s12 pvt_v2_b0 rdnet_tiny regnetx_002
repghostnet_050 repvit_m1 res2next50 resnest14d resnet10t resnetv2_18 rexnet_100 sam2_hiera_tiny selecsls42
sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224
swinv2_tiny_window8_256 test_mambaout test_vit_relpos tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m
twins_svt_small visformer_tiny vit_tiny_patch16_224 vit_tiny_patch16_dinov3_qkvb vit_tiny_r_s16_p8_224
vitamin_small_224 volo_d1_224 xception41p xcit_nano_12_p8_224
"""
