"""Data sets by name or path, transformed as the backbone wants them."""

from restuning.data.data import Data as Data
from restuning.data.data import ImageFiles as ImageFiles
from restuning.data.data import decode as decode
from restuning.data.folders import read_list as read_list
from restuning.data.load import load_data as load_data
