"""torchvision's blocks, heads and layers. Its ResNets are in `adapters.resnet`."""

from resnet_fused.modules.adapters import sequential
from resnet_fused.modules.adapters.torchvision import inverted_residual, networks, regnet
from resnet_fused.modules.block_modules import Adapter

BLOCKS: dict[str, Adapter] = {
    **regnet.BLOCKS,
    **inverted_residual.BLOCKS,
    **networks.BLOCKS,
    "torchvision.ops.misc.Conv2dNormActivation": sequential.layer,
}
LAYERS = ("torchvision.ops.misc.Conv2dNormActivation", *networks.LAYERS)
