"""Sites: where a network computes `stream + OP(stream)`, found by structure, proved by a forward."""

from restuning.sites.find import Finder as Finder
from restuning.sites.find import first_tensor as first_tensor
from restuning.sites.maps import LentMaps as LentMaps
from restuning.sites.maps import Maps as Maps
from restuning.sites.readout import Readout as Readout
from restuning.sites.readout import vector_of as vector_of
from restuning.sites.site import Op as Op
from restuning.sites.site import Site as Site
from restuning.sites.site import Sites as Sites
from restuning.sites.stages import StageFinder as StageFinder
from restuning.sites.stages import telling as telling
