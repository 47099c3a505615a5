"""Sites: where a network computes `stream + OP(stream)`, found by structure, proved by a forward."""

from restuning.sites.find import Finder as Finder
from restuning.sites.find import first_tensor as first_tensor
from restuning.sites.given import Given as Given
from restuning.sites.given import given as given
from restuning.sites.given import has_past as has_past
from restuning.sites.given import returned_bias as returned_bias
from restuning.sites.given import returns_bias as returns_bias
from restuning.sites.linear import is_plain as is_plain
from restuning.sites.linear import keep_backward as keep_backward
from restuning.sites.maps import LentMaps as LentMaps
from restuning.sites.maps import Maps as Maps
from restuning.sites.pooling import vector_of as vector_of
from restuning.sites.readout import POOLS as POOLS
from restuning.sites.readout import Readout as Readout
from restuning.sites.readout import mean_of as mean_of
from restuning.sites.readout import one_token as one_token
from restuning.sites.site import Op as Op
from restuning.sites.site import Site as Site
from restuning.sites.site import Sites as Sites
from restuning.sites.stages import StageFinder as StageFinder
from restuning.sites.stages import telling as telling
from restuning.sites.sums import stream_in as stream_in
