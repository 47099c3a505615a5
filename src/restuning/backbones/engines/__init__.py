"""Engines: exported from a backbone by one command, opened from their files by name."""

from restuning.backbones.engines.description import PRECISIONS as PRECISIONS
from restuning.backbones.engines.description import Description as Description
from restuning.backbones.engines.export import Exported as Exported
from restuning.backbones.engines.export import export_engine as export_engine
from restuning.backbones.engines.open import OPENERS as OPENERS
from restuning.backbones.engines.open import open_engine as open_engine
from restuning.backbones.engines.program import RUNTIMES as RUNTIMES
