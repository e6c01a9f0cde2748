"""One program on any mesh: axes, the rules that place parameters and batches on them, and a language model on them."""

from jaxrl.parallel.experts import experts_on as experts_on
from jaxrl.parallel.mesh import AXES as AXES
from jaxrl.parallel.mesh import make_mesh as make_mesh
from jaxrl.parallel.mesh import on_host as on_host
from jaxrl.parallel.model import model_on as model_on
from jaxrl.parallel.processes import initialise as initialise
from jaxrl.parallel.relayout import relaid as relaid
from jaxrl.parallel.rows import ANY_RULES as ANY_RULES
from jaxrl.parallel.rows import loss_of_rows as loss_of_rows
from jaxrl.parallel.sharding import LAST_AXIS as LAST_AXIS
from jaxrl.parallel.sharding import RULES as RULES
from jaxrl.parallel.sharding import check_rows as check_rows
from jaxrl.parallel.sharding import partition as partition
from jaxrl.parallel.sharding import place_gradients as place_gradients
from jaxrl.parallel.sharding import report as report
from jaxrl.parallel.sharding import shard_batch as shard_batch
from jaxrl.parallel.sharding import state_shardings as state_shardings
