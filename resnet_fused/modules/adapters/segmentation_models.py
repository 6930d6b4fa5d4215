"""segmentation_models_pytorch: its copies of the first SE-ResNets, and the layers of its decoders.

Its other encoders hold torchvision's and timm's blocks.
"""

from __future__ import annotations

from resnet_fused.modules.adapters import sequential
from resnet_fused.modules.adapters.timm import senet
from resnet_fused.modules.block_modules import Adapter

SENET = "segmentation_models_pytorch.encoders._senet."
LAYERS: tuple[str, ...] = (
    "segmentation_models_pytorch.base.modules.Conv2dReLU",
    "segmentation_models_pytorch.decoders.deeplabv3.decoder.ASPPConv",
)

BLOCKS: dict[str, Adapter] = {
    SENET + "SEBottleneck": senet.bottleneck,
    SENET + "SEResNetBottleneck": senet.bottleneck,
    SENET + "SEResNeXtBottleneck": senet.bottleneck,
    **dict.fromkeys(LAYERS, sequential.layer),
}
