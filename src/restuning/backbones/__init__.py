"""Backbones by name: the only room that imports model libraries."""

from restuning.backbones.audio import measure_audio as measure_audio
from restuning.backbones.audio_preprocessing import AudioPreprocessing as AudioPreprocessing
from restuning.backbones.backbone import Backbone as Backbone
from restuning.backbones.backbone import refuse_for_loaded as refuse_for_loaded
from restuning.backbones.device import choose_device as choose_device
from restuning.backbones.engines.export import Exported as Exported
from restuning.backbones.engines.export import export_engine as export_engine
from restuning.backbones.engines.open import open_engine as open_engine
from restuning.backbones.engines.open import refuse_other_engine as refuse_other_engine
from restuning.backbones.images import read_format as read_format
from restuning.backbones.inputs import AnyPreprocessing as AnyPreprocessing
from restuning.backbones.inputs import preprocessing_from_dict as preprocessing_from_dict
from restuning.backbones.load import SCHEMES as SCHEMES
from restuning.backbones.load import load_backbone as load_backbone
from restuning.backbones.load import take_backbone as take_backbone
from restuning.backbones.load import with_text_tower as with_text_tower
from restuning.backbones.preprocessing import Preprocessing as Preprocessing
from restuning.backbones.towers import ImageTower as ImageTower
from restuning.backbones.towers import TextTower as TextTower
from restuning.backbones.variants import QUANTIZED as QUANTIZED
from restuning.backbones.variants import add_image_size as add_image_size
from restuning.backbones.variants import add_quantization as add_quantization
from restuning.backbones.weights import load_weights as load_weights
