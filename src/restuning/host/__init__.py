"""The backbone with its hooks: the only room that registers one."""

from restuning.host.answers import compare_answers as compare_answers
from restuning.host.engine import Engine as Engine
from restuning.host.engine import cannot_tune_inside as cannot_tune_inside
from restuning.host.extractor import Extractor as Extractor
from restuning.host.extractor import is_image as is_image
from restuning.host.find_sites import find_sites as find_sites
from restuning.host.fingerprint import ADAPTERS as ADAPTERS
from restuning.host.fingerprint import find_device as find_device
from restuning.host.fingerprint import fingerprint as fingerprint
from restuning.host.fingerprint import weights_digest as weights_digest
from restuning.host.host import Host as Host
from restuning.host.side_by_side import SideBySide as SideBySide
from restuning.host.weights import is_offloaded as is_offloaded
from restuning.host.weights import is_shared_out as is_shared_out
