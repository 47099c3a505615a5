"""Data sets by name or path, transformed as the backbone wants them."""

from restuning.backbones.audio import Sound as Sound
from restuning.backbones.audio import read_audio as read_audio
from restuning.backbones.images import read_image as read_image
from restuning.data.data import LONGEST_TEXT as LONGEST_TEXT
from restuning.data.data import Data as Data
from restuning.data.data import DataOptions as DataOptions
from restuning.data.data import ImageFiles as ImageFiles
from restuning.data.folders import read_list as read_list
from restuning.data.identity import Contents as Contents
from restuning.data.identity import identify as identify
from restuning.data.listing import CORRUPT as CORRUPT
from restuning.data.listing import find_images as find_images
from restuning.data.listing import find_sounds as find_sounds
from restuning.data.listing import merge_left_out as merge_left_out
from restuning.data.listing import say_left_out as say_left_out
from restuning.data.load import load_data as load_data
from restuning.data.load import may_be_data as may_be_data
from restuning.data.sounds import AudioBatch as AudioBatch
from restuning.data.tables import load_columns as load_columns
from restuning.data.text_files import read_csv as read_csv
from restuning.data.tokens import TagBatch as TagBatch
from restuning.data.tokens import TextBatch as TextBatch
from restuning.data.tokens import make_text_batch as make_text_batch
from restuning.data.validation import with_validation as with_validation
