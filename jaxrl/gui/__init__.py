"""Agents that operate a screen by looking at it, after UI-TARS (Qin et al. 2025, arXiv 2501.12326).

`actions`: what can be done, and the one way to write it. `coordinates`: units of places. `screens`: pictures as text;
`sight`: as pixels. `history`: what an agent is shown of its past, and records for SFT and DPO. `episodes`: rolling out,
and learning from the good ones; `online`: GRPO. `window`: a small world to try it in.
"""

from jaxrl.gui.actions import BOX as BOX
from jaxrl.gui.actions import PLAIN as PLAIN
from jaxrl.gui.actions import POINT as POINT
from jaxrl.gui.actions import Point as Point
from jaxrl.gui.actions import Step as Step
from jaxrl.gui.actions import format as format
from jaxrl.gui.actions import parse as parse
from jaxrl.gui.coordinates import rescale as rescale
from jaxrl.gui.coordinates import smart_resize as smart_resize
from jaxrl.gui.coordinates import to_pixels as to_pixels
from jaxrl.gui.coordinates import to_thousandths as to_thousandths
from jaxrl.gui.episodes import RULES as RULES
from jaxrl.gui.episodes import World as World
from jaxrl.gui.episodes import bootstrap as bootstrap
from jaxrl.gui.episodes import make_respond as make_respond
from jaxrl.gui.episodes import play as play
from jaxrl.gui.history import Reflection as Reflection
from jaxrl.gui.history import Trace as Trace
from jaxrl.gui.history import Turn as Turn
from jaxrl.gui.history import correct as correct
from jaxrl.gui.history import kept as kept
from jaxrl.gui.history import messages as messages
from jaxrl.gui.history import pair_batch as pair_batch
from jaxrl.gui.history import prompt as prompt
from jaxrl.gui.history import records as records
from jaxrl.gui.history import sft_batch as sft_batch
from jaxrl.gui.sight import Seen as Seen
from jaxrl.gui.sight import Sight as Sight
