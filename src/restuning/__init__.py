"""Res-Tuning: small tuners that run beside a frozen backbone, and a bypass that detaches them."""

from restuning import methods as methods
from restuning._errors import RestuningError as RestuningError
from restuning._version import __version__ as __version__
from restuning.bypass import Bypass as Bypass
from restuning.bypass import Needs as Needs
from restuning.files import describe as describe
from restuning.files import load as load
from restuning.files import push_to_hub as push_to_hub
from restuning.files import save as save
from restuning.host import Host as Host
from restuning.host import find_sites as find_sites
from restuning.sites import Readout as Readout
from restuning.sites import Site as Site
from restuning.sites import Sites as Sites
from restuning.task import Task as Task
from restuning.tuned import Tuned as Tuned
from restuning.tuners import DropPath as DropPath
from restuning.tuners import ResAdapter as ResAdapter
from restuning.tuners import ResPrefix as ResPrefix
from restuning.tuners import ResPrompt as ResPrompt
from restuning.tuners import Scaled as Scaled
from restuning.tuners import StemPrompt as StemPrompt
from restuning.tuners import Sum as Sum
from restuning.tuners import Tuner as Tuner
from restuning.tuners import View as View
from restuning.tuners import tuner as tuner
