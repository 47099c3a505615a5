"""Training: one loop that survives being killed, and evaluation."""

from restuning.train.curves import draw_curves as draw_curves
from restuning.train.evaluate import evaluate as evaluate
from restuning.train.fit import fit as fit
from restuning.train.memory import PeakMemory as PeakMemory
from restuning.train.optimiser import build_optimiser as build_optimiser
from restuning.train.optimiser import learning_rate as learning_rate
from restuning.train.optimiser import parameter_groups as parameter_groups
from restuning.train.result import FitResult as FitResult
from restuning.train.settings import FitSettings as FitSettings
