"""Attention: one door, a mask algebra, and implementations that agree."""

from jaxrl.kernels.attention.alibi import alibi_slopes as alibi_slopes
from jaxrl.kernels.attention.api import attention as attention
from jaxrl.kernels.attention.decode import decode_attention as decode_attention
from jaxrl.kernels.attention.masks import BlockDiffusion as BlockDiffusion
from jaxrl.kernels.attention.masks import Causal as Causal
from jaxrl.kernels.attention.masks import Chunked as Chunked
from jaxrl.kernels.attention.masks import Dense as Dense
from jaxrl.kernels.attention.masks import Full as Full
from jaxrl.kernels.attention.masks import Mask as Mask
from jaxrl.kernels.attention.masks import Prefix as Prefix
from jaxrl.kernels.attention.masks import Segments as Segments
from jaxrl.kernels.attention.masks import Span as Span
from jaxrl.kernels.attention.masks import Tree as Tree
from jaxrl.kernels.attention.masks import Window as Window
from jaxrl.kernels.attention.masks import dense as dense
from jaxrl.kernels.attention.patterns import BigBird as BigBird
from jaxrl.kernels.attention.patterns import Fixed as Fixed
from jaxrl.kernels.attention.patterns import Longformer as Longformer
from jaxrl.kernels.attention.patterns import Pattern as Pattern
from jaxrl.kernels.attention.patterns import Strided as Strided
from jaxrl.kernels.attention.ring import ring_attention as ring_attention
from jaxrl.kernels.attention.ring import unzigzag as unzigzag
from jaxrl.kernels.attention.ring import zigzag as zigzag
