"""One program on any mesh: axes, and the rules that place parameters and batches on them."""

from jaxrl.parallel.mesh import AXES as AXES
from jaxrl.parallel.mesh import make_mesh as make_mesh
from jaxrl.parallel.sharding import RULES as RULES
from jaxrl.parallel.sharding import partition as partition
from jaxrl.parallel.sharding import shard_batch as shard_batch
from jaxrl.parallel.sharding import state_shardings as state_shardings
