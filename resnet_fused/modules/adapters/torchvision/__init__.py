"""torchvision's RegNets, inverted residuals, heads and layers. Its ResNets are in `adapters.resnet`."""

from resnet_fused.modules.adapters import sequential
from resnet_fused.modules.adapters.torchvision import inverted_residual, regnet
from resnet_fused.modules.block_modules import Adapter

BLOCKS: dict[str, Adapter] = {
    **regnet.BLOCKS,
    **inverted_residual.BLOCKS,
    "torchvision.models.segmentation.fcn.FCNHead": sequential.chain,
    "torchvision.models.segmentation.deeplabv3.ASPPConv": sequential.chain,
    "torchvision.models.segmentation.deeplabv3.DeepLabHead": sequential.chain,
    "torchvision.ops.misc.Conv2dNormActivation": sequential.layer,
}
LAYERS = ("torchvision.ops.misc.Conv2dNormActivation",)
SEQUENTIALS: dict[str, tuple[str, ...]] = {
    "torchvision.models.segmentation.deeplabv3.ASPP": ("convs.0", "project"),
}
