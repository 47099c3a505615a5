"""Data sets by name or path, transformed as the backbone wants them."""

from restuning.data.data import Data as Data
from restuning.data.data import ImageFiles as ImageFiles
from restuning.data.data import decode as decode
from restuning.data.folders import read_list as read_list
from restuning.data.load import load_data as load_data
from restuning.data.texts import csv_rows as csv_rows
from restuning.data.tokens import LONGEST_TEXT as LONGEST_TEXT
from restuning.data.tokens import TagBatch as TagBatch
from restuning.data.tokens import TextBatch as TextBatch
from restuning.data.tokens import text_batch as text_batch
from restuning.data.validation import with_validation as with_validation
