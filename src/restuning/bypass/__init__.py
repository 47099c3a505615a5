"""Side networks on detached taps: taps in, a feature out, no gradient towards the taps."""

from restuning.bypass.bypass import STARTING_LAMBDA as STARTING_LAMBDA
from restuning.bypass.bypass import Bypass as Bypass
from restuning.bypass.bypass import Plan as Plan
from restuning.bypass.ensemble import Ensemble as Ensemble
from restuning.bypass.finer import Finer as Finer
from restuning.bypass.grid_ridge import GridRidge as GridRidge
from restuning.bypass.mixing import MixingBypass as MixingBypass
from restuning.bypass.nearest import Nearest as Nearest
from restuning.bypass.pooling import Pooling as Pooling
from restuning.bypass.ridge import Ridge as Ridge
from restuning.bypass.side_network import SideNetwork as SideNetwork
from restuning.bypass.side_network import from_spec as from_spec
from restuning.bypass.side_network import kinds as kinds
from restuning.bypass.side_network import side_network as side_network
from restuning.bypass.unet import UNetBypass as UNetBypass
