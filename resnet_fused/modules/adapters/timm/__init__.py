"""timm's blocks. Attention and stochastic depth are a gate; what has no fused form is called between fused parts."""

from resnet_fused.modules.adapters import sequential
from resnet_fused.modules.adapters.timm import (
    byobnet,
    cspnet,
    efficientnet,
    layers,
    networks,
    regnet,
    res2net,
    resnest,
    resnet,
    resnetv2,
    senet,
    sknet,
)
from resnet_fused.modules.block_modules import Adapter

BLOCKS: dict[str, Adapter] = {
    **resnet.BLOCKS,
    **resnetv2.BLOCKS,
    **regnet.BLOCKS,
    **senet.BLOCKS,
    **byobnet.BLOCKS,
    **cspnet.BLOCKS,
    **sknet.BLOCKS,
    **res2net.BLOCKS,
    **resnest.BLOCKS,
    **networks.BLOCKS,
    **efficientnet.BLOCKS,
    **layers.BLOCKS,
}
LAYERS = (sequential.CONV_NORM_ACT,)
