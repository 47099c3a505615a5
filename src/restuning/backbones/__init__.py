"""Backbones by name: the only room that imports model libraries."""

from restuning.backbones.load import SCHEMES as SCHEMES
from restuning.backbones.load import Backbone as Backbone
from restuning.backbones.load import load_backbone as load_backbone
from restuning.backbones.load import load_weights as load_weights
from restuning.backbones.load import with_text_tower as with_text_tower
from restuning.backbones.preprocessing import Preprocessing as Preprocessing
from restuning.backbones.towers import ImageTower as ImageTower
from restuning.backbones.towers import TextTower as TextTower
